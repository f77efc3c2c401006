"""Pictures of small neural graphs: neurons by layer, weights as coloured edges, biases as coloured nodes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import TwoSlopeNorm

from ngcore.graph.neural_graph import NeuralGraph

COLOURS = "PuOr"  # diverging, safe for colour-blind readers; white is zero


def draw(graph: NeuralGraph, ax: Axes) -> ScalarMappable:
    """Draw one network: layers from left to right, neurons from top to bottom; the largest parameter is darkest.

    Returns:
        the colour scale, for `figure.colorbar`.

    Raises:
        ValueError: the graph is of a batch of networks.
    """
    if graph.edges[0].dim() != 3:
        raise ValueError("draw takes one network: index the batch first, as in graph[0]")
    values = torch.cat([tensor.flatten() for tensor in (*graph.edges, *graph.nodes)]).detach().abs()
    limit = max(values.max().item(), 1e-12)
    scale = ScalarMappable(TwoSlopeNorm(0.0, -limit, limit), plt.get_cmap(COLOURS))
    places = [_places(group.layer, group.size) for group in graph.wiring.groups]
    for block, edges in zip(graph.wiring.blocks, graph.edges, strict=True):
        weights = edges.squeeze(-1).detach().cpu().numpy()
        lines = [(start, end) for end in places[block.target] for start in places[block.source]]
        width = 0.8 + 2.2 * np.abs(weights).flatten() / limit
        # a grey line below shows an edge whose weight is (nearly) zero: it is an edge all the same
        ax.add_collection(LineCollection(lines, colors="0.85", linewidths=width + 0.6, zorder=1))
        ax.add_collection(LineCollection(lines, colors=scale.to_rgba(weights.flatten()), linewidths=width, zorder=2))
    for group, nodes, place in zip(graph.wiring.groups, graph.nodes, places, strict=True):
        colours = "white" if group.bias is None else scale.to_rgba(nodes.squeeze(-1).detach().cpu().numpy())
        ax.scatter(*place.T, s=320, c=colours, edgecolors="0.2", linewidths=1.0, zorder=3)
    ax.set_axis_off()
    ax.margins(0.1)
    ax.set_aspect("auto")
    return scale


def _places(layer: int, size: int) -> np.ndarray:
    """(size, 2) coordinates of a layer's neurons."""
    return np.stack([np.full(size, float(layer)), (size - 1) / 2 - np.arange(size)], axis=1)
