"""A message-passing network, its weights set by hand, that runs an MLP on its own neural graph (paper, appendix B)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch_geometric.data import Data

from ngcore.activations import function_of


class ForwardPass:
    """v'ᵢ = φᵤ(vᵢ, Σⱼ φₘ(vᵢ, eᵢⱼ, vⱼ)), once for every layer of the MLP (paper, equations 10 and 11).

    A node's features are its value, its bias and its layer: the layer's embedding decides which nodes update, so that
    values wait at their nodes until the layer that reads them.

    Example:
        >>> outputs = ForwardPass("relu")(graph.to_data(), points)
    """

    def __init__(self, activation: str = "relu") -> None:
        self.activation = function_of(activation)

    def message(
        self, edge: Float[Tensor, "edges 1"], source: Float[Tensor, "edges points"]
    ) -> Float[Tensor, "edges points"]:
        """φₘ: the weight times the value at the edge's source."""
        return edge * source

    def update(
        self, step: int, data: Data, values: Float[Tensor, "nodes points"], sums: Float[Tensor, "nodes points"]
    ) -> Float[Tensor, "nodes points"]:
        """φᵤ: nodes of the layer whose turn it is take σ(bias + sum), outputs without σ; others keep their value."""
        sums = data.x + sums
        fresh = torch.where((data.role == OUTPUT)[:, None], sums, self.activation(sums))
        return torch.where((data.layer == step)[:, None], fresh, values)

    def __call__(self, data: Data, points: Float[Tensor, "points inputs"]) -> Float[Tensor, "points outputs"]:
        """The MLP's outputs.

        Shapes:
            data: one MLP, as `NeuralGraph.to_data` gives it: nodes with a bias, edges with a weight.
        """
        values = points.new_zeros(data.num_nodes, len(points))
        values[data.role == INPUT] = points.T
        source, target = data.edge_index
        for step in range(1, int(data.layer.max()) + 1):
            messages = self.message(data.edge_attr, values[source])
            values = self.update(step, data, values, torch.zeros_like(values).index_add(0, target, messages))
        return values[data.role == OUTPUT].T


INPUT, OUTPUT = 0, 2
