"""Where the scalars of a network's parameters stand: in one row, and on its neural graph. Read once per network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring, trace
from ngcore.graph.batch import check_kernel
from ngcore.graph.frame import Frame
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
            _ = self.frame  # whether kernels fit is found now

    @classmethod
    def of(cls, network: nn.Module, *example_inputs: Any) -> Layout:
        """Of a network; with example inputs its graph is read too.

        Raises:
            TraceError: it has operators that the graph cannot hold.
            ValueError: see the class.
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
        row = torch.arange(self.count, dtype=torch.float64)  # exact, and what weights are
        graph = self.wiring.graph(dict(zip(self.shapes, self.split(row), strict=True)))
        named = (
            *zip(graph.nodes, (group.bias for group in self.wiring.groups), strict=True),
            *zip(graph.edges, (block.weight for block in self.wiring.blocks), strict=True),
        )
        found = [ids if name is not None else torch.full_like(ids, self.count) for ids, name in named]
        nodes = len(graph.nodes)
        graph = NeuralGraph(self.wiring, tuple(found[:nodes]), tuple(found[nodes:]))
        return graph.map(lambda ids: ids.long().to(self.device))

    def graph(self, rows: Float[Tensor, "batch scalars f"]) -> NeuralGraph:
        """Features of scalars where they stand on the graph, those of a kernel's places side by side; zeros where no
        scalar stands."""
        padded = torch.cat([rows, rows.new_zeros(len(rows), 1, rows.shape[2])], dim=1)
        return self.ids.map(lambda ids: padded[:, ids].flatten(-2))

    def row(self, graph: NeuralGraph, width: int) -> Float[Tensor, "batch scalars f"]:
        """The inverse of `graph`, of features of this width; scalars with several places are read from the first."""
        values = [x.reshape(x.shape[0], -1, width) for x in (*graph.nodes, *graph.edges)]
        return torch.cat(values, dim=1)[:, self.order]

    @cached_property
    def order(self) -> Int[Tensor, " scalars"]:
        """The first place of every scalar among the numbers of all nodes and, behind them, of all edges."""
        places = torch.cat([ids.flatten() for ids in (*self.ids.nodes, *self.ids.edges)]).cpu()
        first = torch.full((self.count + 1,), len(places))
        first.scatter_reduce_(0, places, torch.arange(len(places)), "amin")
        return first[: self.count].to(self.device)

    @cached_property
    def weight_space(self) -> WeightSpace:
        """Of the group NP; a ValueError where the network is no chain of layers."""
        return WeightSpace(self.wiring, "NP")

    @cached_property
    def frame(self) -> Frame:
        """Of the network, with `WINDOW` for its kernels.

        Raises:
            ValueError: a kernel does not fit; the error names its parameter.
        """
        for block in self.wiring.blocks:
            try:
                check_kernel(block)
                kernel_places(block.kernel, WINDOW)
            except ValueError as error:
                raise ValueError(f"parameter {block.weight}: {error}") from error
        return replace(Frame.of([self.wiring]), window=WINDOW)

    @cached_property
    def roles(self) -> Int[Tensor, " nodes"]:
        """Index into `ngcore.graph.pyg.ROLES`."""
        index = torch.tensor([ROLES.index(group.role) for group in self.wiring.groups], device=self.device)
        return index.repeat_interleave(torch.tensor([group.size for group in self.wiring.groups], device=self.device))
