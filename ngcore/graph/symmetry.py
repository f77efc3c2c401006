"""The permutations of hidden neurons that leave a network's function unchanged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ngcore.graph.neural_graph import NeuralGraph
from ngcore.graph.wiring import Wiring


def random_permutations(wiring: Wiring, generator: torch.Generator | None = None) -> dict[int, Tensor]:
    """A uniformly drawn permutation of every hidden group, by group index."""
    return {g: torch.randperm(wiring.groups[g].size, generator=generator) for g in wiring.with_role("hidden")}


def permute(graph: NeuralGraph, permutations: Mapping[int, Tensor]) -> NeuralGraph:
    """Reorder neurons: position i of group g receives neuron `permutations[g][i]`, with all of its edges."""
    nodes, edges = list(graph.nodes), list(graph.edges)
    for g, order in permutations.items():
        size = graph.wiring.groups[g].size
        if sorted(order.tolist()) != list(range(size)):
            raise ValueError(f"group {g} needs a permutation of {size} neurons, got {order.tolist()}")
        nodes[g] = nodes[g].index_select(-2, order.to(nodes[g].device))
        for b, block in enumerate(graph.wiring.blocks):
            if block.target == g:
                edges[b] = edges[b].index_select(-3, order.to(edges[b].device))
            if block.source == g:
                edges[b] = edges[b].index_select(-2, order.to(edges[b].device))
    return NeuralGraph(graph.wiring, tuple(nodes), tuple(edges))
