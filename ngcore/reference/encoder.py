"""What the plain NG-GNN and NG-T read, one torch_geometric `Data` per network, and the first states of its nodes.

Everything is per network: batches are those of torch_geometric. `ngcore.models` is tested and timed against it.
Parameters have the same names, so that either form loads the other's `state_dict()`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from ngcore.activations import function_of
from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.frame import Frame
from ngcore.graph.pyg import ACTIVATIONS, ROLES, kernel_places
from ngcore.models import PerParameter, Scores

NUM_FREQUENCIES = 128
INPUT, HIDDEN, OUTPUT = map(ROLES.index, ("input", "hidden", "output"))


def to_data_list(graphs: Sequence[NeuralGraph], frame: Frame) -> list[Data]:
    """One `Data` for every network of some batches, with both directions of every edge.

    That of `NeuralGraph.to_data`, whose features are [e, 0, e] along edges and [0, e, e] against them, and

    - `present` (edges, 3 * features of the frame): which of them hold a number of the network;
    - `node_slot` (nodes,) and `edge_slot` (edges,): which mean and deviation are theirs, 0 for none;
    - `layer_row`, `position_row` and `activation_row` (nodes,): which projection of probe features and embeddings.
    """
    return [_to_data(graph[i], frame) for graph in graphs for i in range(graph.num_networks)]


def to_batch(graphs: Sequence[NeuralGraph], frame: Frame) -> Batch:
    """Batches of networks as torch_geometric collates them: one large disconnected graph."""
    return Batch.from_data_list(to_data_list(graphs, frame))


def _to_data(network: NeuralGraph, frame: Frame) -> Data:
    wiring = network.wiring
    data, ones = (
        graph.to_data(window=frame.window, linear=frame.linear, direction="both")
        for graph in (network, network.map(torch.ones_like))
    )
    data.present = ones.edge_attr > 0
    for name, rows in node_rows(wiring, frame).items():
        data[name] = torch.tensor(rows)
    data.edge_slot = torch.tensor(edge_rows(wiring, frame, data.layer_row.tolist())).repeat(2)
    return data


def node_rows(wiring: Wiring, frame: Frame) -> dict[str, list[int]]:
    """The rows of every node in a model's tables: input and output neurons have positional embeddings of their own,
    hidden ones one per layer, flattened ones one per location, other nodes one per kind and layer."""
    names = ("layer_row", "node_slot", "position_row", "activation_row")
    rows: dict[str, list[int]] = {name: [] for name in names}
    neurons: Counter[str] = Counter()
    ends, depth = frame.inputs + frame.layers, frame.layers + 2
    for group in wiring.groups:
        layer = {"input": 0, "output": frame.layers + 1}.get(group.role, group.layer)
        activation = len(frame.activations)
        for i in range(group.size):
            if group.kind != "neuron":
                kind = frame.kinds.index(group.kind)
                position = ends + frame.outputs + frame.locations + kind * depth + group.layer
            elif group.locations is not None:
                position = ends + frame.outputs + group.locations[i]
            elif group.role == "hidden":
                position = frame.inputs + group.layer - 1
            else:
                position = neurons[group.role] + (ends if group.role == "output" else 0)
                neurons[group.role] += 1
            if group.role == "hidden" and group.kind == "neuron":
                known = group.activation in frame.activations
                activation = frame.activations.index(group.activation if known else "other")
            found = layer, layer if group.bias is not None else 0, position, activation
            for name, row in zip(names, found, strict=True):
                rows[name].append(row)
    return rows


def edge_rows(wiring: Wiring, frame: Frame, layer_row: Sequence[int]) -> list[int]:
    """The row of every edge in the tables of means and deviations: the target's layer, for every kind of source."""
    rows = []
    for block in wiring.blocks:
        kind = ("neuron", *frame.kinds).index(wiring.groups[block.source].kind)
        for target in wiring.edge_index(block)[1].tolist():
            rows.append(0 if block.weight is None else layer_row[target] + kind * (frame.layers + 2))
    return rows


def encoding(
    x: Float[Tensor, "*batch features"], frequencies: Float[Tensor, "features frequencies"] | None
) -> Float[Tensor, "*batch encoding"]:
    """What the encoders' first Linears read: Gaussian Fourier features [cos(2 pi x B), sin(2 pi x B)], or x itself."""
    if frequencies is None:
        return x
    angle = 2 * math.pi * x @ frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Standardize(nn.Module):
    """Zero mean and unit deviation per layer, of a network's own numbers alone."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        for kind in ("node", "edge"):
            self.register_buffer(f"{kind}_mean", torch.zeros(frame.slots))
            self.register_buffer(f"{kind}_std", torch.ones(frame.slots))

    def nodes(self, data: Data) -> Float[Tensor, "nodes 1"]:
        mean, std = self.node_mean[data.node_slot], self.node_std[data.node_slot]
        return (data.x - mean.unsqueeze(-1)) / std.unsqueeze(-1)

    def edges(self, data: Data) -> Float[Tensor, "edges features"]:
        mean, std = self.edge_mean[data.edge_slot], self.edge_std[data.edge_slot]
        return torch.where(data.present, (data.edge_attr - mean.unsqueeze(-1)) / std.unsqueeze(-1), 0.0)


class Probe(nn.Module):
    """Probe features of MLPs: every neuron's activation at learned points, projected to the node width by layer."""

    def __init__(self, frame: Frame, num_points: int, width: int) -> None:
        super().__init__()
        self.place = int(kernel_places((), frame.window)[0])  # of a weight among an edge's features
        self.points = nn.Parameter(2 * torch.rand(num_points, frame.inputs) - 1)
        self.project = nn.ModuleList(nn.Linear(num_points, width) for _ in range(frame.slots))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(frame.slots))

    def forward(self, data: Data) -> Float[Tensor, "nodes width"]:
        values = self.activations(data)
        found = values.new_zeros(len(values), self.norm[0].bias.shape[0])
        for row in data.layer_row.unique().tolist():
            own = data.layer_row == row
            found[own] = self.norm[row](self.project[row](values[own]))
        return found

    def activations(self, data: Data) -> Float[Tensor, "nodes points"]:
        """Layer by layer, along the edges."""
        values = data.x.new_zeros(data.num_nodes, len(self.points))
        values[data.layer == 0] = self.points.T[data.position[data.layer == 0]]
        ahead = ~data.edge_reversed
        (source, target), weight = data.edge_index[:, ahead], data.edge_attr[ahead, self.place]
        for layer in range(1, int(data.layer.max()) + 1):
            into = data.layer[target] == layer
            sums = data.x.expand_as(values).index_add(0, target[into], weight[into].unsqueeze(1) * values[source[into]])
            for activation in data.activation.unique().tolist():
                own = (data.layer == layer) & (data.activation == activation)
                values = torch.where(own.unsqueeze(1), function_of(ACTIVATIONS[activation])(sums), values)
        return values


class Encoder(nn.Module):
    """Biases to node states; the encoding of weights, and the Linears that make edge states of it (paper, section 3).

    Args:
        edge_copies: 3 where edges read [e, eᵀ, e + eᵀ], 1 for e.
        probes: number of probe points, 0 for none.
        positions, activations: give nodes these embeddings; activations None: where there are several.
        sigma: deviation of the Fourier frequencies, None for Linears of the numbers.
    """

    def __init__(
        self,
        frame: Frame,
        node_width: int,
        edge_width: int,
        *,
        edge_copies: int,
        probes: int,
        positions: bool,
        activations: bool | None,
        sigma: float | None,
    ) -> None:
        super().__init__()
        self.edge_features = edge_copies * frame.features
        self.standardize = Standardize(frame)
        for kind, features, width in (("node", 1, node_width), ("edge", self.edge_features, edge_width)):
            frequencies = None if sigma is None else sigma * torch.randn(features, NUM_FREQUENCIES)
            self.register_buffer(f"{kind}_frequencies", frequencies)
            setattr(self, f"{kind}_fourier", nn.Linear(features if sigma is None else 2 * NUM_FREQUENCIES, width))
            setattr(self, f"{kind}_linear", nn.Linear(width, width))
        if probes > 0:
            self.probe = Probe(frame, probes, node_width)
        if positions:
            self.positions = nn.Parameter(torch.randn(frame.positions, node_width))
        if len(frame.activations) > 1 if activations is None else activations:
            self.activations = nn.Parameter(torch.randn(len(frame.activations) + 1, node_width))

    def nodes(self, data: Data) -> Float[Tensor, "nodes width"]:
        nodes = self.node_fourier(encoding(self.standardize.nodes(data), self.node_frequencies))
        if hasattr(self, "probe"):
            nodes = nodes + self.probe(data)
        nodes = self.node_linear(nodes)
        if hasattr(self, "positions"):
            nodes = nodes + self.positions[data.position_row]
        if hasattr(self, "activations"):
            nodes = nodes + self.activations[data.activation_row]
        return nodes

    def encoded(self, data: Data, edges: Bool[Tensor, " edges"]) -> Float[Tensor, "some encoding"]:
        """What the Linears read of these edges."""
        return encoding(self.standardize.edges(data)[edges, : self.edge_features], self.edge_frequencies)

    def edges(self, encoded: Float[Tensor, "*edges encoding"]) -> Float[Tensor, "*edges width"]:
        return self.edge_linear(self.edge_fourier(encoded))


def head_of(head: Scores | PerParameter, frame: Frame, widths: Sequence[int], edge_width: int) -> nn.Module:
    """An MLP on the output neurons' states side by side, or a Linear of every node's state and one of every edge's.

    `widths`: of a node's state and of the hidden layers.
    """
    if isinstance(head, PerParameter):
        node, edge = nn.Linear(widths[0], head.count), nn.Linear(edge_width, frame.features * head.count)
        return nn.ModuleDict({"node": node, "edge": edge})
    layers: list[nn.Module] = [nn.Linear(frame.outputs * widths[0], widths[1])]
    for width, following in zip(widths[1:], (*widths[2:], head.count), strict=True):
        layers += [nn.ReLU(), nn.Linear(width, following)]
    return nn.Sequential(*layers)
