"""The input network's own computation, done on its neural graph."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ngcore.graph.neural_graph import NeuralGraph

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sine": lambda x: torch.sin(30.0 * x),  # a SIREN's unit (Sitzmann et al. 2020), ω₀ = 30
}


def activations(graph: NeuralGraph, points: Float[Tensor, "points inputs"]) -> list[Float[Tensor, ...]]:
    """Every neuron's activation at the given inputs, by one batched forward pass (paper, equation 2).

    The networks of the batch must be feed-forward with one input group and blocks in the order of computation.

    Shapes:
        result[g]: (*batch, size of group g, points); the input group shows the points themselves.
    """
    groups, first = graph.wiring.groups, graph.edges[0]
    batch = first.shape[:-3]
    sums: list[Tensor | None] = [None] * len(groups)
    values = [points.T.expand(*batch, *points.T.shape)] + [first.new_empty(0)] * (len(groups) - 1)
    for b, (block, edges) in enumerate(zip(graph.wiring.blocks, graph.edges, strict=True)):
        product = edges.squeeze(-1) @ values[block.source]
        before = sums[block.target]
        sums[block.target] = product if before is None else before + product
        if all(later.target != block.target for later in graph.wiring.blocks[b + 1 :]):
            activation = ACTIVATIONS[groups[block.target].activation]
            values[block.target] = activation(sums[block.target] + graph.nodes[block.target])
    return values
