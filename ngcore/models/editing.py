"""Editing networks: a metanetwork's numbers become changes of the input network's own parameters."""

from __future__ import annotations

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


class Editor(nn.Module):
    """New parameter = old parameter + scale × what the metanetwork says, with a learned scale per layer and kind.

    A metanetwork with k numbers per parameter makes k networks of one (`edited_parameters` tells them apart).
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
        """The edited networks, the k-th in the k-th feature of nodes and edges; neurons without bias stay so."""
        changes = self.metanetwork(graph)
        nodes = (
            old + (0 if group.bias is None else scale * change)
            for group, old, change, scale in zip(
                graph.wiring.groups, graph.nodes, changes.nodes, self.node_scale, strict=True
            )
        )
        edges = (
            old + scale * change for old, change, scale in zip(graph.edges, changes.edges, self.edge_scale, strict=True)
        )
        return NeuralGraph(graph.wiring, tuple(nodes), tuple(edges))


def edited_parameters(graph: NeuralGraph) -> dict[str, Tensor]:
    """Parameters of the networks in the features of nodes and edges, each (k, batch, *its own shape)."""
    return graph.map(lambda values: values.movedim(-1, 0).unsqueeze(-1)).state_dict()
