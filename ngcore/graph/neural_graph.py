"""A neural graph: a wiring with the weights of one network, or of a batch of networks, laid in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch_geometric.data import Data

from ngcore.graph.data import Direction, Flatten, Linear, to_data

if TYPE_CHECKING:
    from ngcore.graph.wiring import View, Wiring


@dataclass(frozen=True)
class NeuralGraph:
    """Biases on nodes and weights on edges (paper, equation 1), kept as one dense tensor per group and block.

    Shapes:
        nodes[g]: (*batch, size of group g, features)
        edges[b]: (*batch, targets of block b, sources of a target, features)
        others: what the wiring does not place on the graph, e.g. running statistics, as it came
    """

    wiring: Wiring
    nodes: tuple[Tensor, ...]
    edges: tuple[Tensor, ...]
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> NeuralGraph:
        """The same wiring with `function` applied to every tensor, e.g. to index, move or cast them."""
        nodes, edges = tuple(map(function, self.nodes)), tuple(map(function, self.edges))
        return NeuralGraph(self.wiring, nodes, edges, self.others)

    def __getitem__(self, index: object) -> NeuralGraph:
        """Index the batch axes of every tensor."""
        others = {name: values[index] for name, values in self.others.items()}
        return replace(self.map(lambda tensor: tensor[index]), others=others)

    @property
    def num_networks(self) -> int:
        """Length of the first batch axis."""
        return self.edges[0].shape[0]

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters, exactly as they were laid in: the inverse of `Wiring.graph`."""
        state: dict[str, Tensor] = {}
        for block, edges in zip(self.wiring.blocks, self.edges, strict=True):
            if block.weight is not None and not block.tied:
                self._give_back(state, block.weight, block.view, edges)
        for group, nodes in zip(self.wiring.groups, self.nodes, strict=True):
            if group.bias is not None and not group.tied:
                self._give_back(state, group.bias, group.view, nodes)
        state = {name: state[name] for name in self.wiring.shapes}
        state.update((alias, state[name]) for alias, name in self.wiring.aliases)
        return {**state, **self.others}

    def _give_back(self, state: dict[str, Tensor], name: str, view: View | None, values: Tensor) -> None:
        """Write features to where they came from; a whole parameter comes back as the view that it is."""
        if view is None:
            state[name] = values.squeeze(-1)
            return
        shape = self.wiring.shapes[name]
        batch = values.shape[: values.dim() - 3] if len(view.size) > 1 else values.shape[: values.dim() - 2]
        if name not in state:
            state[name] = values.new_empty(*batch, *shape)
        view(state[name], len(batch)).copy_(values.reshape(*batch, *view.size))

    def to_data(
        self,
        *,
        window: Sequence[int] | None = None,
        linear: Linear = "linear",
        direction: Direction = "forward",
        flatten: Flatten = "layer",
    ) -> Data:
        """One network as torch_geometric `Data`: see `ngcore.graph.data.to_data` for options and attributes."""
        return to_data(self, window=window, linear=linear, direction=direction, flatten=flatten)
