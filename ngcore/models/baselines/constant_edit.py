"""The control of editors: one edit for all networks, which reads none of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.encoder import check_finite


class ConstantEdit(nn.Module):
    """Every layer's weights and biases by a learned factor each, and a learned offset of the last layer's biases.

    Of an INR 2-32-32-1 these are seven numbers. What an editor gains beyond them it gains by reading its input.

    Args:
        wiring: layers in a row, each with weights and biases.
    """

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.wiring = wiring
        self.weight_factor = nn.Parameter(torch.ones(len(wiring.blocks)))
        self.bias_factor = nn.Parameter(torch.ones(len(wiring.blocks)))
        self.offset = nn.Parameter(torch.zeros(()))

    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Nothing to store; parameters that are not finite are an error, as with every model."""
        check_finite(graph)

    def forward(self, graph: NeuralGraph) -> NeuralGraph:
        """The edited networks behind a first axis of 1, as `Editor` gives them."""
        inputs, *biases = graph.nodes
        factors: list[Tensor] = list(self.bias_factor)
        biases = [factor * own for factor, own in zip(factors, biases, strict=True)]
        biases[-1] = biases[-1] + self.offset
        weights = [factor * own for factor, own in zip(self.weight_factor, graph.edges, strict=True)]
        edited = NeuralGraph(graph.wiring, (inputs, *biases), tuple(weights), graph.others)
        return edited.map(lambda values: values.unsqueeze(0))
