"""Example networks small enough to follow by eye, and what is checked of their graphs (paper, sections 2 and C)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric.utils import to_dense_adj

from ngcore.data.images.subsets import load_images
from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.dialects import to_parameter_graph
from ngcore.graph.simulate import simulate
from ngcore.study.runs import cache_directory

UNCHANGED = 1e-9  # float64 outputs that differ by less are the same


class ResidualNet(nn.Module):
    """A convolutional network with one residual block, which normalizes inside: image -> class scores.

    Args:
        skip: False leaves out the residual connection.
    """

    def __init__(self, channels: int = 3, inside: int = 4, classes: int = 2, skip: bool = True) -> None:
        super().__init__()
        self.skip = skip
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.first = nn.Conv2d(channels, inside, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(inside)
        self.second = nn.Conv2d(inside, channels, 3, padding=1)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        y = self.second(self.norm(self.first(x)).relu())
        y = (y + x if self.skip else y).relu()
        return self.head(y.mean((2, 3)))


class LanguageModel(nn.Module):
    """PyTorch's own transformer block between an embedding and a linear head: tokens -> scores at every position."""

    def __init__(self, tokens: int = 5, width: int = 6, heads: int = 2, hidden: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.block = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)))


def digits(count: int) -> Tensor:
    """Handwritten digits of the embedded MNIST subset, (count, 1, 28, 28), from 0 to 1 in float64."""
    return load_images("mnist", "test", count, cache=cache_directory()).pixels[:, None].double() / 255


def randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module in float64 and evaluation mode, with every parameter and running statistic drawn at random.

    Fresh networks have biases of 0 and norms of 1, behind which a wrong permutation could hide.
    """
    module = module.double().eval().requires_grad_(False)
    for name, values in module.state_dict().items():
        if name.endswith("running_var"):
            values.uniform_(0.5, 1.5, generator=generator)
        elif values.is_floating_point():
            values.normal_(generator=generator)
            if values.dim() == 1:  # smaller than the sums, so that few ReLUs are dead
                values /= 2
    return module


def output(module: nn.Module, state: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
    """What the module computes with other parameters."""
    with torch.no_grad():
        return functional_call(module, dict(state), inputs)


def groups_table(graph: NeuralGraph) -> pd.DataFrame:
    """A network's neurons: one row per group."""
    rows = [
        {
            "module": "" if group.role == "input" else group.where,
            "role": group.role,
            "layer": group.layer,
            "neurons": group.size,
            "node feature": group.bias or "",
            "activation": "" if group.activation == "identity" else group.activation,
        }
        for group in graph.wiring.groups
    ]
    return pd.DataFrame(rows).rename_axis("group")


def blocks_table(graph: NeuralGraph) -> pd.DataFrame:
    """A network's edges: one row per block."""
    rows = [
        {
            "from group": block.source,
            "to group": block.target,
            "kind": block.kind,
            "edge feature": block.weight or "1",
            "edges": edges.shape[-3] * edges.shape[-2],
            "features per edge": edges.shape[-1],
        }
        for block, edges in zip(graph.wiring.blocks, graph.edges, strict=True)
    ]
    return pd.DataFrame(rows).rename_axis("block")


def symmetry_table(wiring: Wiring) -> pd.DataFrame:
    """The symmetric groups of which a network's symmetry is made, and the parameters that each one moves."""
    rows = [
        {
            "factor": f"{factor.size}!" + "".join(f", in each of {n}" for n in factor.copies),
            "moves": ", ".join(factor.parameters),
        }
        for factor in wiring.symmetry.factors
    ]
    return pd.DataFrame(rows)


def symmetry_check(
    module: nn.Module, wiring: Wiring, inputs: Sequence[Tensor], generator: torch.Generator
) -> pd.DataFrame:
    """Draw a permutation from a network's symmetry; how far the output moves if parameters are reordered by it.

    One row for all parameters together and, as a control, one for every parameter that moves alone.
    """
    state = module.state_dict()
    moved = wiring.symmetry.permute(state, wiring.symmetry.random(generator))
    expected = output(module, state, *inputs)

    def row(name: str, changed: Mapping[str, Tensor]) -> dict[str, Any]:
        difference = (output(module, changed, *inputs) - expected).abs().max().item()
        return {"reordered": name, "output moves by": difference, "same function": difference < UNCHANGED}

    alone = [name for name in state if not torch.equal(moved[name], state[name])]
    return pd.DataFrame(
        [row("all parameters together", moved), *(row(f"{name} alone", state | {name: moved[name]}) for name in alone)]
    )


def simulation_error(module: nn.Module, wiring: Wiring, inputs: Sequence[Tensor]) -> float:
    """Largest difference between the module's output and the forward pass on its graph."""
    simulated = simulate(wiring.graph(module.state_dict()), *inputs)
    return (simulated - output(module, module.state_dict(), *inputs)).abs().max().item()


def sizes_table(graphs: Mapping[str, NeuralGraph]) -> pd.DataFrame:
    """How large networks are in both dialects: as neural graph and as parameter graph."""
    rows = {}
    for name, graph in graphs.items():
        neural, parameter = graph.to_data(), to_parameter_graph(graph)
        rows[name] = {
            ("", "parameters"): sum(map(math.prod, graph.wiring.shapes.values())),
            ("neural graph", "nodes"): neural.num_nodes,
            ("neural graph", "edges"): neural.num_edges,
            ("neural graph", "features per edge"): neural.num_edge_features,
            ("parameter graph", "nodes"): parameter.num_nodes,
            ("parameter graph", "edges"): parameter.num_edges,
            ("parameter graph", "of them with a parameter"): int(parameter.edge_weighted.sum()),
        }
    return pd.DataFrame(rows).T


def places(wiring: Wiring) -> Tensor:
    """How many places on the graph every single number of every parameter has, (numbers,): one each, unless tied."""
    state, first = {}, 2  # 0 and 1 are on the graph anyway
    for name, shape in wiring.shapes.items():
        count = math.prod(shape)
        state[name] = torch.arange(first, first + count, dtype=torch.float64).view(shape)
        first += count
    graph = wiring.graph(state)
    found = torch.cat([values.flatten() for values in (*graph.nodes, *graph.edges)]).long()
    return torch.bincount(found, minlength=first)[2:]


def draw_matrix(graph: NeuralGraph, ax: Axes) -> AxesImage:
    """The matrix E of equation 1: sources are rows, targets columns; of kernels the norm; white where no edge is.

    Returns:
        the image, for `figure.colorbar`.
    """
    data = graph.to_data()
    values = data.edge_attr if data.edge_attr.shape[1] == 1 else data.edge_attr.norm(dim=1, keepdim=True)
    matrix = to_dense_adj(data.edge_index, edge_attr=values, max_num_nodes=len(data.x))[0, :, :, 0].cpu().numpy()
    limit = max(np.abs(matrix).max(), 1e-12)
    image = ax.imshow(np.where(matrix == 0, np.nan, matrix), cmap="PuOr", vmin=-limit, vmax=limit, interpolation="none")
    offsets = np.array(graph.wiring.offsets)
    for border in offsets[1:-1] - 0.5:
        ax.axhline(border, color="0.85", linewidth=0.6, zorder=0)
        ax.axvline(border, color="0.85", linewidth=0.6, zorder=0)
    centres = (offsets[:-1] + offsets[1:] - 1) / 2
    labels = [str(g) for g in range(len(centres))]
    ax.set_xticks(centres, labels)
    ax.set_yticks(centres, labels)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.set_xlabel("to group")
    ax.set_ylabel("from group")
    return image
