"""Where the scalars of a network's parameters stand: in one row, and on its neural graph. Read once per network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ngcore.graph import Block, NeuralGraph, Wiring, trace
from ngcore.graph.batch import Stack
from ngcore.graph.pyg import ROLES, kernel_places
from ngcore.models.baselines.weight_space import WeightSpace

WINDOW = (3, 3)  # kernels are centred in it; weights without a kernel lie at its centre
POSITIONS = math.prod(WINDOW)


class Layout:
    """A network's parameters as one row of scalars, and the place of each on the network's graph.

    Args:
        shapes: of the parameters, by name; their scalars stand one after the other in this order.
        wiring: of the network; None where only the row is needed.
        device: of the indices.

    Attributes:
        sizes: numbers of scalars, by parameter.
        count: of all scalars.

    Raises:
        ValueError: parameters that are not on the graph, or kernels that do not fit into the window.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        wiring: Wiring | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.count = sum(self.sizes)
        self.device = torch.device(device)
        self._wiring = wiring
        if wiring is not None:
            left = [name for name in self.shapes if name not in wiring.shapes]
            if left:
                raise ValueError(f"no operator reads the parameters {', '.join(left)}: they are not on the graph")
            self._parts = self._read_parts()

    @classmethod
    def of(cls, network: nn.Module, *example_inputs: Any) -> Layout:
        """Of a network; with example inputs its graph is read too.

        Raises:
            TraceError: it has operators that the graph cannot hold.
            ValueError: as of the class.
        """
        parameters = dict(network.named_parameters())
        if not parameters:
            raise ValueError(f"{type(network).__name__} has no parameters to optimize")
        wiring = trace(network, *example_inputs) if example_inputs else None
        device = next(iter(parameters.values())).device
        return cls({name: tuple(parameter.shape) for name, parameter in parameters.items()}, wiring, device)

    @property
    def wiring(self) -> Wiring:
        """
        Raises:
            ValueError: the network was bound without example inputs.
        """
        if self._wiring is None:
            raise ValueError(
                "this optimizer reads the network's graph: give example inputs too, "
                "optimizer.bind(network, example_input)"
            )
        return self._wiring

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """Tensors (*batch, *shape), one per parameter, as rows (*batch, scalars)."""
        return torch.cat(
            [
                x.reshape(*x.shape[: x.dim() - len(shape)], -1)
                for x, shape in zip(tensors, self.shapes.values(), strict=True)
            ],
            dim=-1,
        )

    def split(self, rows: Tensor) -> list[Tensor]:
        """The inverse of `flatten`."""
        parts = rows.split(self.sizes, dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    @cached_property
    def ids(self) -> NeuralGraph:
        """The graph with the number of each scalar in its place, and `count` where a node or edge has none."""
        row = torch.arange(self.count)
        graph = self.wiring.graph(dict(zip(self.shapes, self.split(row), strict=True)))
        none = torch.full_like
        nodes = tuple(
            ids if group.bias is not None else none(ids, self.count)
            for group, ids in zip(self.wiring.groups, graph.nodes, strict=True)
        )
        edges = tuple(
            ids if block.weight is not None else none(ids, self.count)
            for block, ids in zip(self.wiring.blocks, graph.edges, strict=True)
        )
        return NeuralGraph(self.wiring, nodes, edges).map(lambda ids: ids.to(self.device))

    @cached_property
    def order(self) -> Int[Tensor, " scalars"]:
        """The place of every scalar among the numbers of all nodes and, behind them, of all edges."""
        return torch.cat([ids.flatten() for ids in (*self.ids.nodes, *self.ids.edges)]).argsort()[: self.count]

    @cached_property
    def weight_space(self) -> WeightSpace:
        """Of the group NP; a ValueError where the network is no chain of layers."""
        return WeightSpace(self.wiring, "NP")

    def _read_parts(self) -> list[tuple[tuple[int, int], Tensor, Tensor, Tensor]]:
        """Shape (targets, sources), target and source nodes and scalars of the parts of all blocks, sorted by shape."""
        found = []
        for block, ids in zip(self.wiring.blocks, self.ids.edges, strict=True):
            source, target = (
                self.wiring.edge_index(block).to(self.device).unflatten(1, (block.groups, -1, ids.shape[1]))
            )
            windows = self._in_window(block, ids).unflatten(0, (block.groups, -1))
            for part in range(block.groups):
                found.append((tuple(target[part].shape), target[part, :, 0], source[part, 0], windows[part]))
        return sorted(found, key=lambda part: part[0])

    def _in_window(self, block: Block, ids: Int[Tensor, "t s positions"]) -> Int[Tensor, "t s window"]:
        if ids.shape[-1] != math.prod(block.kernel):
            raise ValueError(
                f"parameter {block.weight} has {ids.shape[-1]} numbers an edge, but its kernel is {block.kernel}"
            )
        try:
            places = kernel_places(block.kernel, WINDOW)
        except ValueError as error:
            raise ValueError(f"parameter {block.weight}: {error}") from error
        found = ids.new_full((*ids.shape[:2], POSITIONS), self.count)
        found[..., places.to(ids.device)] = ids
        return found

    @cached_property
    def edge_scalars(self) -> Int[Tensor, "edges window"]:
        """The scalars of every edge, in the order of the stacks."""
        return torch.cat([windows.flatten(0, 1) for *_, windows in self._parts])

    @cached_property
    def node_scalars(self) -> Int[Tensor, " nodes"]:
        return torch.cat([ids.squeeze(-1) for ids in self.ids.nodes])

    @cached_property
    def roles(self) -> Int[Tensor, " nodes"]:
        """Index into `ngcore.graph.pyg.ROLES`."""
        index = torch.tensor([ROLES.index(group.role) for group in self.wiring.groups], device=self.device)
        return index.repeat_interleave(torch.tensor([group.size for group in self.wiring.groups], device=self.device))

    @cached_property
    def place(self) -> Int[Tensor, " scalars"]:
        """The first place of every scalar among all of the edges' windows and, behind them, the nodes."""
        places = torch.cat([self.edge_scalars.flatten(), self.node_scalars]).cpu()
        first = torch.full((self.count + 1,), len(places))
        first.scatter_reduce_(0, places, torch.arange(len(places)), "amin")
        return first[: self.count].to(self.device)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks of each shape."""
        stacks, edge = [], 0
        for (t, s), parts in groupby(self._parts, key=lambda part: part[0]):
            _, targets, sources, _ = zip(*parts, strict=True)
            near = torch.zeros(len(targets), dtype=torch.long, device=self.device)  # all states are read
            size = len(targets) * t * s
            stacks.append(Stack(torch.stack(targets), torch.stack(sources), near, near, slice(edge, edge + size)))
            edge += size
        return tuple(stacks)

    @cached_property
    def pairs(self) -> tuple[Int[Tensor, " edges"], Int[Tensor, " edges"]]:
        """Target and source of every edge, in the order of the stacks."""
        targets = [stack.targets.unsqueeze(2).expand(stack.shape).flatten() for stack in self.stacks]
        sources = [stack.sources.unsqueeze(1).expand(stack.shape).flatten() for stack in self.stacks]
        return torch.cat(targets), torch.cat(sources)

    @cached_property
    def degrees(self) -> Float[Tensor, " nodes"]:
        """Number of edges at every node, in both directions."""
        return torch.cat(self.pairs).bincount(minlength=self.wiring.num_nodes).float()

    def nodes_and_edges(self, rows: Float[Tensor, "batch scalars f"]) -> tuple[Tensor, Tensor]:
        """Features of scalars where they stand, zeros where no scalar does.

        Shapes: (batch, nodes, f) and (batch, edges, window * f), the features of a position side by side.
        """
        padded = torch.cat([rows, rows.new_zeros(len(rows), 1, rows.shape[2])], dim=1)
        return padded[:, self.node_scalars], padded[:, self.edge_scalars].flatten(2)

    def row(
        self, nodes: Float[Tensor, "batch nodes f"], edges: Float[Tensor, "batch edges positions"]
    ) -> Float[Tensor, "batch scalars f"]:
        """The inverse of `nodes_and_edges`; scalars with several places are read from the first."""
        by_position = edges.unflatten(2, (POSITIONS, -1)).flatten(1, 2)
        return torch.cat([by_position, nodes], dim=1)[:, self.place]
