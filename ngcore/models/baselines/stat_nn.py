"""StatNN (Unterthiner et al., 2020): statistics of every layer's weights and biases, read by an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ngcore.graph import NeuralGraph
from ngcore.graph.frame import Frame
from ngcore.models.encoder import spread

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
STATISTICS = 2 + len(QUANTILES)  # mean, variance, quantiles


def statistics(graphs: Sequence[NeuralGraph], frame: Frame) -> Float[Tensor, "networks features"]:
    """Mean, variance and quantiles of every layer's weights, then of its biases, layer by layer, the output's last.

    Layers that a network does not have are zeros. Skip connections, which have no parameters, are not seen.

    Args:
        graphs: each with a single wiring and one batch axis of networks; the networks are numbered in this order.
        frame: the frame of all wirings; six layers make 84 features.
    """
    return torch.cat([_statistics_of(graph, frame) for graph in graphs])


def _statistics_of(graph: NeuralGraph, frame: Frame) -> Float[Tensor, "networks features"]:
    found = graph.edges[0].new_zeros(graph.num_networks, frame.layers + 1, 2, STATISTICS)
    groups = graph.wiring.groups
    for block, edges in zip(graph.wiring.blocks, graph.edges, strict=True):
        if block.weight is not None:
            found[:, frame.slot(groups[block.target]) - 1, 0] = _summary(edges.flatten(1))
    for group, nodes in zip(groups, graph.nodes, strict=True):
        if group.bias is not None:
            found[:, frame.slot(group) - 1, 1] = _summary(nodes.flatten(1))
    return found.flatten(1)


def _summary(values: Float[Tensor, "networks numbers"]) -> Float[Tensor, "networks 7"]:
    quantiles = torch.quantile(values, values.new_tensor(QUANTILES), dim=1)
    return torch.stack([values.mean(1), values.var(1, correction=0), *quantiles], dim=1)


class StatNN(nn.Module):
    """An MLP on `statistics`, standardized over the training set.

    For six layers, one output and the paper's width it has 1,087,001 parameters (paper, appendix D.2).
    """

    def __init__(self, features: int, outputs: int = 1, *, width: int = 1000) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.mlp = nn.Sequential(
            *(nn.Linear(features, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, outputs),
        )

    def fit_normalization(self, features: Float[Tensor, "all features"], rows: Int[Tensor, " networks"]) -> None:
        """Take the mean and the standard deviation of every statistic over a training set, the networks `rows`."""
        own = features[rows]
        self.mean.copy_(own.mean(0))
        self.std.copy_(torch.stack([spread(column) for column in own.unbind(1)]))

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch outputs"]:
        return self.mlp((features - self.mean) / self.std)
