"""A neural graph: a wiring with the weights of one network, or of a batch of networks, laid in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch_geometric.data import Data

if TYPE_CHECKING:
    from ngcore.graph.wiring import Wiring


@dataclass(frozen=True)
class NeuralGraph:
    """Biases on nodes and weights on edges (paper, equation 1), kept as one dense tensor per group and block.

    Shapes:
        nodes[g]: (*batch, size of group g, features)
        edges[b]: (*batch, size of block b's target, size of its source, features)
    """

    wiring: Wiring
    nodes: tuple[Tensor, ...]
    edges: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> NeuralGraph:
        """The same wiring with `function` applied to every tensor, e.g. to index, move or cast them."""
        return NeuralGraph(self.wiring, tuple(map(function, self.nodes)), tuple(map(function, self.edges)))

    def __getitem__(self, index: object) -> NeuralGraph:
        """Index the batch axes of every tensor."""
        return self.map(lambda tensor: tensor[index])

    @property
    def num_networks(self) -> int:
        """Length of the first batch axis."""
        return self.edges[0].shape[0]

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters, exactly as they were laid in: the inverse of `Wiring.graph`."""
        state = {}
        for block, edges in zip(self.wiring.blocks, self.edges, strict=True):
            state[block.weight] = edges.squeeze(-1)
            bias = self.wiring.groups[block.target].bias
            if bias is not None:
                state[bias] = self.nodes[block.target].squeeze(-1)
        return state

    def to_data(self) -> Data:
        """One network as torch_geometric `Data`.

        Attributes: x (nodes, features), edge_index (2, edges) from source to target, edge_attr (edges, features),
        `layer` (nodes,) the layer index, `role` (nodes,) 0 input, 1 hidden, 2 output.
        """
        if self.edges[0].dim() != 3:
            raise ValueError("to_data takes one network: index the batch first, as in graph[0].to_data()")
        groups, offsets = self.wiring.groups, self.wiring.offsets
        device = self.edges[0].device
        index, attributes = [], []
        for block, edges in zip(self.wiring.blocks, self.edges, strict=True):
            target = offsets[block.target] + torch.arange(edges.shape[0], device=device)
            source = offsets[block.source] + torch.arange(edges.shape[1], device=device)
            index.append(torch.cartesian_prod(target, source).T.flip(0))
            attributes.append(edges.flatten(0, 1))
        sizes = torch.tensor([group.size for group in groups], device=device)
        layer = torch.tensor([group.layer for group in groups], device=device)
        role = torch.tensor([("input", "hidden", "output").index(group.role) for group in groups], device=device)
        return Data(
            x=torch.cat(self.nodes),
            edge_index=torch.cat(index, dim=1),
            edge_attr=torch.cat(attributes),
            layer=layer.repeat_interleave(sizes),
            role=role.repeat_interleave(sizes),
        )
