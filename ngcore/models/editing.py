"""Editing networks: a metanetwork's numbers become changes of the input network's own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring

INITIAL_SCALE = 0.01


@runtime_checkable
class Equivariant(Protocol):
    """A metanetwork with numbers for every parameter, which permute with the input network's neurons."""

    wiring: Wiring

    def fit_normalization(self, graph: NeuralGraph) -> None: ...

    def __call__(self, graph: NeuralGraph) -> NeuralGraph: ...


def outputs_first(numbers: NeuralGraph, graph: NeuralGraph) -> NeuralGraph:
    """Numbers for every parameter of a graph, k for each, as k graphs along a new first axis.

    Shapes:
        numbers: (batch, ..., features * k), the k of a feature side by side
        graph: (batch, ..., features)
        result: (k, batch, ..., features)
    """

    def split(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.unflatten(-1, (y.shape[-1], -1)).movedim(-1, 0) for x, y in zip(tensors, like, strict=True))

    return NeuralGraph(numbers.wiring, split(numbers.nodes, graph.nodes), split(numbers.edges, graph.edges))


class Editor(nn.Module):
    """New parameter = old parameter + scale × what the metanetwork says, with a learned scale per layer and kind.

    A metanetwork with k numbers per parameter makes k networks of each. Neurons without a bias get none (their
    group's scale is unused).
    """

    def __init__(self, metanetwork: Equivariant) -> None:
        super().__init__()
        self.metanetwork = metanetwork
        wiring = metanetwork.wiring
        self.node_scale = nn.Parameter(torch.full((len(wiring.groups),), INITIAL_SCALE))
        self.edge_scale = nn.Parameter(torch.full((len(wiring.blocks),), INITIAL_SCALE))

    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Take the training set's statistics, by which every input is standardized."""
        self.metanetwork.fit_normalization(graph)

    def compile_parts(self) -> None:
        """Compile the parts of a metanetwork that has hot ones."""
        if hasattr(self.metanetwork, "compile_parts"):
            self.metanetwork.compile_parts()

    def forward(self, graph: NeuralGraph) -> NeuralGraph:
        """The edited networks, behind a first axis of k: `.state_dict()` holds parameters (k, batch, *own shape)."""
        changes = outputs_first(self.metanetwork(graph), graph)
        nodes = tuple(
            old + (torch.zeros_like(change) if group.bias is None else scale * change)
            for group, old, change, scale in zip(
                graph.wiring.groups, graph.nodes, changes.nodes, self.node_scale, strict=True
            )
        )
        edges = tuple(
            old + scale * change for old, change, scale in zip(graph.edges, changes.edges, self.edge_scale, strict=True)
        )
        return NeuralGraph(graph.wiring, nodes, edges, graph.others)
