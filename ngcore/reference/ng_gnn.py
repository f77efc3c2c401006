"""NG-GNN written the plain way: one `Data` object per network, torch_geometric message passing.

It states the models independently of `ngcore.models.NGGNN` and `EquivariantNGGNN`, which are tested and timed
against it. Parameters carry the same names, so that either loads the other's `state_dict()`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.utils import degree

from ngcore.graph import NeuralGraph, Wiring

WIDTH = 64
NUM_LAYERS = 4
NUM_FREQUENCIES = 128
SIGMA = 3.0
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "siren": lambda x: torch.sin(30 * x),
    "tanh": torch.tanh,
}


def to_data_list(graph: NeuralGraph) -> list[Data]:
    """One `Data` per network of a batch, with both directions of every edge.

    Those of `NeuralGraph.to_data`, the raw biases and weights among them, and

    - `direction` (edges, 3): what a weight is multiplied by to give [e, e^T, e + e^T];
    - `block` (edges,) and `position_row` (nodes,): whose mean and std, which positional embedding;
    - `weight_<b>` (1, out, in) and `bias_<g>` (1, size): the parameters once more, for the probe features.
    """
    return [_to_data(graph[i]) for i in range(graph.num_networks)]


def to_batch(graph: NeuralGraph) -> Batch:
    """A batch of networks as torch_geometric collates it: one large disconnected graph."""
    return Batch.from_data_list(to_data_list(graph))


def _to_data(network: NeuralGraph) -> Data:
    wiring, data = network.wiring, network.to_data()
    forward, backward = data.x.new_tensor([1, 0, 1]), data.x.new_tensor([0, 1, 1])
    num_weights = data.edge_index.shape[1]
    block = torch.cat([torch.full((edges[..., 0].numel(),), b) for b, edges in enumerate(network.edges)])

    data.edge_index = torch.cat([data.edge_index, data.edge_index.flip(0)], dim=1)
    data.edge_attr = data.edge_attr.repeat(2, 1)
    data.direction = torch.cat([forward.repeat(num_weights, 1), backward.repeat(num_weights, 1)])
    data.block = block.repeat(2)
    data.position_row = position_rows(wiring)
    for b, edges in enumerate(network.edges):
        data[f"weight_{b}"] = edges.squeeze(-1).unsqueeze(0)
    for g, nodes in enumerate(network.nodes):
        data[f"bias_{g}"] = nodes.squeeze(-1).unsqueeze(0)
    return data


def position_rows(wiring: Wiring) -> Int[Tensor, " nodes"]:
    """Every node's row of the positional embedding: one per input node, hidden layer and output node."""
    rows: list[int] = []
    for group in wiring.groups:
        first = max(rows, default=-1) + 1
        rows += [first] * group.size if group.role == "hidden" else range(first, first + group.size)
    return torch.tensor(rows)


def fourier(
    x: Float[Tensor, "*batch features"], frequencies: Float[Tensor, "features frequencies"]
) -> Float[Tensor, "*batch encoding"]:
    """Gaussian Fourier features [cos(2 pi x B), sin(2 pi x B)]."""
    angle = 2 * math.pi * x @ frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def encoding(
    x: Float[Tensor, "*batch features"], frequencies: Float[Tensor, "features frequencies"] | None
) -> Float[Tensor, "*batch encoding"]:
    """What the encoders' first Linears read: Fourier features, or the features as they are."""
    return x if frequencies is None else fourier(x, frequencies)


class Probe(nn.Module):
    """Probe features: activations of the input network at learned points, projected to the node width."""

    def __init__(self, wiring: Wiring, num_points: int, width: int) -> None:
        super().__init__()
        self.activations = [group.activation for group in wiring.groups]
        self.points = nn.Parameter(2 * torch.rand(num_points, wiring.groups[0].size) - 1)
        self.project = nn.ModuleList(nn.Linear(num_points, width) for _ in wiring.groups)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in wiring.groups)

    def forward(self, weights: list[Tensor], biases: list[Tensor]) -> Float[Tensor, "batch nodes width"]:
        """Shapes: weights (batch, out, in) of all blocks, biases (batch, size) of all but the input group."""
        features = [
            norm(project(values))
            for norm, project, values in zip(self.norm, self.project, self.evaluate(weights, biases), strict=True)
        ]
        return torch.cat(features, dim=1)

    def evaluate(self, weights: list[Tensor], biases: list[Tensor]) -> list[Float[Tensor, "batch size points"]]:
        """Activations of every group of the input networks at the probe points."""
        state = self.points.expand(len(weights[0]), -1, -1)
        kept = [state.mT]
        for activation, weight, bias in zip(self.activations[1:], weights, biases, strict=True):
            state = ACTIVATIONS[activation](state @ weight.mT + bias.unsqueeze(1))
            kept.append(state.mT)
        return kept


class Encoder(nn.Module):
    """Biases to node states, weights to edge states (paper, section 3); without `sigma` by Linears."""

    def __init__(self, wiring: Wiring, probes: int, sigma: float | None, positions: bool) -> None:
        super().__init__()
        self.wiring = wiring
        fourier_features = sigma is not None
        self.register_buffer("node_mean", torch.zeros(len(wiring.groups)))
        self.register_buffer("node_std", torch.ones(len(wiring.groups)))
        self.register_buffer("edge_mean", torch.zeros(len(wiring.blocks)))
        self.register_buffer("edge_std", torch.ones(len(wiring.blocks)))
        self.register_buffer("node_frequencies", sigma * torch.randn(1, NUM_FREQUENCIES) if fourier_features else None)
        self.register_buffer("edge_frequencies", sigma * torch.randn(3, NUM_FREQUENCIES) if fourier_features else None)
        self.node_fourier = nn.Linear(2 * NUM_FREQUENCIES if fourier_features else 1, WIDTH)
        self.edge_fourier = nn.Linear(2 * NUM_FREQUENCIES if fourier_features else 3, WIDTH)
        self.node_linear = nn.Linear(WIDTH, WIDTH)
        self.edge_linear = nn.Linear(WIDTH, WIDTH)
        if positions:
            self.positions = nn.Parameter(torch.randn(int(position_rows(wiring).max()) + 1, WIDTH))
        if probes > 0:
            self.probe = Probe(wiring, probes, WIDTH)

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "nodes width"], Float[Tensor, "edges width"]]:
        """Shapes: nodes and edges of all networks of the batch, one after the other."""
        mean, std = self.node_mean[batch.layer], self.node_std[batch.layer]
        bias = (batch.x - mean.unsqueeze(-1)) / std.unsqueeze(-1)
        bias = torch.where((batch.role == 0).unsqueeze(-1), 0.0, bias)  # input nodes have no bias
        nodes = self.node_fourier(encoding(bias, self.node_frequencies))
        if hasattr(self, "probe"):
            weights = [batch[f"weight_{b}"] for b in range(len(self.wiring.blocks))]
            biases = [batch[f"bias_{g}"] for g in range(1, len(self.wiring.groups))]
            nodes = nodes + self.probe(weights, biases).flatten(0, 1)
        nodes = self.node_linear(nodes)
        if hasattr(self, "positions"):
            nodes = nodes + self.positions[batch.position_row]

        mean, std = self.edge_mean[batch.block], self.edge_std[batch.block]
        weight = (batch.edge_attr - mean.unsqueeze(-1)) / std.unsqueeze(-1)
        edges = self.edge_linear(self.edge_fourier(encoding(weight * batch.direction, self.edge_frequencies)))
        return nodes, edges


class PNAAggregation(Aggregation):
    """Mean, min, max and std of the incoming messages, as they are and amplified by the log degree."""

    def __init__(self, delta: float) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, x, index=None, ptr=None, dim_size=None, dim=-2):
        """Shapes: x (edges, width), index (edges,) the edges' targets; returns (dim_size, 8 * width)."""
        mean = self.reduce(x, index, ptr, dim_size, dim, reduce="mean")
        mean_of_squares = self.reduce(x * x, index, ptr, dim_size, dim, reduce="mean")
        low = self.reduce(x, index, ptr, dim_size, dim, reduce="min")
        high = self.reduce(x, index, ptr, dim_size, dim, reduce="max")
        std = torch.sqrt(torch.relu(mean_of_squares - mean * mean) + 1e-5)
        statistics = torch.cat([mean, low, high, std], dim=-1)
        amplification = torch.log(degree(index, dim_size, x.dtype) + 1) / self.delta
        return torch.cat([statistics, amplification.unsqueeze(-1) * statistics], dim=-1)


class FiLMPropagation(MessagePassing):
    """Messages modulated by their edges (paper, equation 4), aggregated by PNA.

    It owns no parameters: `message` and `update`, the names of two of the layer's Linears, are methods here.
    """

    def __init__(self, delta: float) -> None:
        super().__init__(aggr=PNAAggregation(delta))

    def forward(self, nodes, edge_index, film, linear):
        """Shapes: nodes (nodes, width), film (edges, 2 * width); returns (nodes, 8 * width)."""
        return self.propagate(edge_index, x=nodes, film=film, linear=linear)

    def message(self, x_i, x_j, film, linear):
        """Shapes: x_i, the targets, and x_j, the sources (edges, width)."""
        scale, shift = film.chunk(2, dim=-1)
        return scale * linear(torch.cat([x_i, x_j], dim=-1)) + shift


class Layer(nn.Module):
    """One layer of message passing; all but the last also normalize the nodes and update the edges."""

    def __init__(self, delta: float, dropout: float, last: bool) -> None:
        super().__init__()
        self.last = last
        self.propagation = FiLMPropagation(delta)
        self.film = nn.Linear(WIDTH, 2 * WIDTH)
        self.message = nn.Linear(2 * WIDTH, WIDTH)
        self.update = nn.Linear(9 * WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        if not last:
            self.norm = nn.LayerNorm(WIDTH)
            self.dropout = nn.Dropout(dropout)
            self.edge_state = nn.Linear(WIDTH, WIDTH)
            self.edge_source = nn.Linear(WIDTH, WIDTH)
            self.edge_target = nn.Linear(WIDTH, WIDTH)
            self.edge_output = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        nodes: Float[Tensor, "nodes width"],
        edge_index: Int[Tensor, "2 edges"],
        edges: Float[Tensor, "edges width"],
    ) -> tuple[Float[Tensor, "nodes width"], Float[Tensor, "edges width"]]:
        aggregated = self.propagation(nodes, edge_index, self.film(edges), self.message)
        change = self.output(self.update(torch.cat([nodes, aggregated], dim=-1)))
        if self.last:
            return nodes + change, edges
        nodes = nodes + self.dropout(F.silu(self.norm(change)))
        source, target = edge_index
        mixed = self.edge_state(edges) + self.edge_source(nodes[source]) + self.edge_target(nodes[target])
        return nodes, self.edge_output(F.silu(mixed))


def mean_log_degree(wiring: Wiring) -> float:
    """PNA's delta: the mean over all nodes of log(degree + 1), with reversed edges counted."""
    degrees = [0] * len(wiring.groups)
    for block in wiring.blocks:
        degrees[block.target] += wiring.groups[block.source].size
        degrees[block.source] += wiring.groups[block.target].size
    total = sum(group.size * math.log(d + 1) for group, d in zip(wiring.groups, degrees, strict=True))
    return total / wiring.num_nodes


class PlainNGGNN(nn.Module):
    """NG-GNN classifier of MLPs: PNA with FiLM messages and edge updates (paper, equations 3 and 4).

    331,466 parameters for 2-32-32-1 networks and 10 classes, 348,746 with 64 probe features.
    """

    def __init__(self, wiring: Wiring, num_classes: int, *, probes: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        delta = mean_log_degree(wiring)
        self.encoder = Encoder(wiring, probes, SIGMA, positions=True)
        self.layers = nn.ModuleList(Layer(delta, dropout, last=k == NUM_LAYERS - 1) for k in range(NUM_LAYERS))
        self.head = nn.Sequential(
            nn.Linear(wiring.groups[-1].size * WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, num_classes),
        )

    def forward(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Logits of a batch from `to_batch`."""
        nodes, edges = self.encoder(batch)
        for layer in self.layers:
            nodes, edges = layer(nodes, batch.edge_index, edges)
        output_nodes = nodes[batch.role == 2]
        return self.head(output_nodes.reshape(batch.num_graphs, -1))


class PlainEquivariantNGGNN(nn.Module):
    """NG-GNN with `outputs` numbers for every parameter of an MLP: every layer updates the edges, and none is pooled.

    Args:
        sigma: scale of the Fourier frequencies, None for Linears of the features [b] and [e, e^T, e + e^T].
    """

    def __init__(
        self,
        wiring: Wiring,
        outputs: int = 1,
        *,
        probes: int = 0,
        positions: bool = True,
        dropout: float = 0.2,
        sigma: float | None = None,
    ) -> None:
        super().__init__()
        self.wiring = wiring
        delta = mean_log_degree(wiring)
        self.encoder = Encoder(wiring, probes, sigma, positions)
        self.layers = nn.ModuleList(Layer(delta, dropout, last=False) for _ in range(NUM_LAYERS))
        self.node_head = nn.Linear(WIDTH, outputs)
        self.edge_head = nn.Linear(WIDTH, outputs)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Numbers for the networks of a batch from `to_batch`, by parameter: (batch, *its shape, outputs)."""
        nodes, edges = self.encoder(batch)
        for layer in self.layers:
            nodes, edges = layer(nodes, batch.edge_index, edges)
        of_nodes, of_edges = self.node_head(nodes), self.edge_head(edges)

        numbers = {}
        source, target = batch.edge_index
        forward = batch.direction[:, 0] == 1
        first = batch.ptr[batch.batch]  # of every node, the first node of its network
        for b, block in enumerate(self.wiring.blocks):
            own = forward & (batch.block == b)
            network = batch.batch[source[own]]
            row = target[own] - first[target[own]] - self.wiring.offsets[block.target]
            column = source[own] - first[source[own]] - self.wiring.offsets[block.source]
            weight = of_edges.new_zeros(batch.num_graphs, *self.wiring.shapes[block.weight], of_edges.shape[-1])
            numbers[block.weight] = weight.index_put((network, row, column), of_edges[own])
            biases = of_nodes[batch.layer == block.target]
            numbers[self.wiring.groups[block.target].bias] = biases.unflatten(0, (batch.num_graphs, -1))
        return numbers
