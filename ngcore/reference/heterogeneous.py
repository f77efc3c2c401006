"""NG-GNN and NG-T for networks of any shape, written the plain way: one `Data` object per network.

NG-GNN passes messages along torch_geometric's edge lists, NG-T reads one network after the other, without padding. They
state the models independently of `ngcore.models.heterogeneous`, which are tested and timed against them. Parameters
carry the same names, so that NG-GNN's either form loads the other's `state_dict()`; NG-T's attention has no module of
its own, as in `plain_ng_t`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from ngcore.graph import NeuralGraph
from ngcore.graph.batch import Frame
from ngcore.graph.pyg import ROLES
from ngcore.reference import ng_gnn as plain_ng_gnn
from ngcore.reference import ng_t as plain_ng_t
from ngcore.reference.ng_gnn import NUM_FREQUENCIES, NUM_LAYERS, WIDTH, encoding

INPUT, HIDDEN, OUTPUT = map(ROLES.index, ("input", "hidden", "output"))
NODE_WIDTH, EDGE_WIDTH, ATTENTION_WIDTH, NUM_HEADS = 16, 8, 32, 1  # of NG-T


def to_data_list(graphs: Sequence[NeuralGraph], frame: Frame) -> list[Data]:
    """One `Data` per network of batches of them, with both directions of every edge.

    Those of `NeuralGraph.to_data`, whose features are [e, 0, e] along edges and [0, e, e] against them, and

    - `present` (edges, 3 * features of the frame): which of these stand for a number of the network;
    - `node_slot` (nodes,) and `edge_slot` (edges,): whose mean and std, 0 for none;
    - `position_row` and `activation_row` (nodes,): which embeddings.
    """
    return [_to_data(graph[i], frame) for graph in graphs for i in range(graph.num_networks)]


def to_batch(graphs: Sequence[NeuralGraph], frame: Frame) -> Batch:
    """Batches of networks as torch_geometric collates them: one large disconnected graph."""
    return Batch.from_data_list(to_data_list(graphs, frame))


def _to_data(network: NeuralGraph, frame: Frame) -> Data:
    wiring = network.wiring
    data, ones = (
        graph.to_data(window=frame.window, linear="convolution", direction="both")
        for graph in (network, network.map(torch.ones_like))
    )
    data.present = ones.edge_attr > 0
    row = torch.where(data.role == OUTPUT, frame.layers + 1, data.layer)
    has_bias = [group.bias is not None for group in wiring.groups for _ in range(group.size)]
    data.node_slot = row * torch.tensor(has_bias)
    has_weight = [block.weight is not None for block in wiring.blocks for _ in range(wiring.edge_index(block).shape[1])]
    _, target = data.edge_index[:, ~data.edge_reversed]
    data.edge_slot = (row[target] * torch.tensor(has_weight)).repeat(2)
    first = torch.where(data.role == OUTPUT, frame.inputs + frame.layers, 0)
    data.position_row = torch.where(data.role == HIDDEN, frame.inputs + data.layer - 1, first + data.position)
    activations = [group.activation for group in wiring.groups for _ in range(group.size)]
    known = [frame.activations.index(name) if name in frame.activations else -1 for name in activations]
    data.activation_row = torch.where(data.role == HIDDEN, torch.tensor(known), len(frame.activations))
    return data


class Standardize(nn.Module):
    """Zero mean and unit deviation per layer, of the numbers of a network alone."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        for kind in ("node", "edge"):
            self.register_buffer(f"{kind}_mean", torch.zeros(frame.layers + 2))
            self.register_buffer(f"{kind}_std", torch.ones(frame.layers + 2))

    def forward(self, data: Data) -> tuple[Float[Tensor, "nodes 1"], Float[Tensor, "edges features"]]:
        mean, std = self.node_mean[data.node_slot], self.node_std[data.node_slot]
        biases = (data.x - mean.unsqueeze(-1)) / std.unsqueeze(-1)
        mean, std = self.edge_mean[data.edge_slot], self.edge_std[data.edge_slot]
        weights = (data.edge_attr - mean.unsqueeze(-1)) / std.unsqueeze(-1)
        return biases, torch.where(data.present, weights, 0.0)


class Encoder(nn.Module):
    """Biases to node states; the Linears that turn encoded weights into edge states.

    Args:
        edge_features: numbers on an edge.
    """

    def __init__(
        self,
        frame: Frame,
        node_width: int,
        edge_width: int,
        *,
        edge_features: int,
        positions: bool,
        activations: bool,
        sigma: float | None,
    ) -> None:
        super().__init__()
        self.standardize = Standardize(frame)
        for kind, features, width in (("node", 1, node_width), ("edge", edge_features, edge_width)):
            frequencies = None if sigma is None else sigma * torch.randn(features, NUM_FREQUENCIES)
            self.register_buffer(f"{kind}_frequencies", frequencies)
            setattr(self, f"{kind}_fourier", nn.Linear(features if sigma is None else 2 * NUM_FREQUENCIES, width))
            setattr(self, f"{kind}_linear", nn.Linear(width, width))
        if positions:
            self.positions = nn.Parameter(torch.randn(frame.inputs + frame.layers + frame.outputs, node_width))
        if activations:
            self.activations = nn.Parameter(torch.randn(len(frame.activations) + 1, node_width))

    def nodes(self, data: Data, biases: Float[Tensor, "nodes 1"]) -> Float[Tensor, "nodes width"]:
        nodes = self.node_linear(self.node_fourier(encoding(biases, self.node_frequencies)))
        if hasattr(self, "positions"):
            nodes = nodes + self.positions[data.position_row]
        if hasattr(self, "activations"):
            nodes = nodes + self.activations[data.activation_row]
        return nodes

    def edges(self, encoded: Float[Tensor, "*edges encoding"]) -> Float[Tensor, "*edges width"]:
        return self.edge_linear(self.edge_fourier(encoded))


class PlainHeterogeneousNGGNN(nn.Module):
    """NG-GNN for a property of networks of any shape (paper, equations 3 and 4).

    369,025 parameters for the frame of the CNN Wild Park, one output and Fourier features.

    Args:
        outputs: numbers to predict.
        positions, activations: give nodes these embeddings.
        sigma: scale of the Fourier frequencies, None for Linears of biases and [e, e^T, e + e^T].
    """

    def __init__(
        self,
        frame: Frame,
        outputs: int = 1,
        *,
        positions: bool = True,
        activations: bool = True,
        dropout: float = 0.0,
        sigma: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            *(frame, WIDTH, WIDTH),
            edge_features=3 * frame.features,
            positions=positions,
            activations=activations,
            sigma=sigma,
        )
        self.register_buffer("mean_log_degree", torch.ones(()))
        self.layers = nn.ModuleList(
            plain_ng_gnn.Layer(1.0, dropout, last=k == NUM_LAYERS - 1) for k in range(NUM_LAYERS)
        )
        self.head = nn.Sequential(
            nn.Linear(frame.outputs * WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, outputs),
        )

    def forward(self, batch: Batch) -> Float[Tensor, "networks outputs"]:
        """Predictions for a batch from `to_batch`."""
        biases, weights = self.encoder.standardize(batch)
        nodes = self.encoder.nodes(batch, biases)
        edges = self.encoder.edges(encoding(weights, self.encoder.edge_frequencies))
        for layer in self.layers:
            layer.propagation.aggr_module.delta = self.mean_log_degree  # a buffer: it comes with the weights
            nodes, edges = layer(nodes, batch.edge_index, edges)
        return self.head(nodes[batch.role == OUTPUT].reshape(batch.num_graphs, -1))


class PlainHeterogeneousNGT(nn.Module):
    """NG-T for a property of networks of any shape (paper, equation 5).

    Args: as of `PlainHeterogeneousNGGNN`.
    """

    def __init__(
        self,
        frame: Frame,
        outputs: int = 1,
        *,
        positions: bool = True,
        activations: bool = True,
        dropout: float = 0.0,
        sigma: float | None = None,
    ) -> None:
        super().__init__()
        self.num_features = frame.features
        self.encoder = Encoder(
            *(frame, NODE_WIDTH, EDGE_WIDTH),
            edge_features=frame.features,
            positions=positions,
            activations=activations,
            sigma=sigma,
        )
        widths = NODE_WIDTH, EDGE_WIDTH, ATTENTION_WIDTH, NUM_HEADS
        self.layers = nn.ModuleList(plain_ng_t.Layer(dropout, k == NUM_LAYERS - 1, *widths) for k in range(NUM_LAYERS))
        self.head = nn.Sequential(
            nn.Linear(frame.outputs * NODE_WIDTH, 2 * NODE_WIDTH),
            nn.ReLU(),
            nn.Linear(2 * NODE_WIDTH, outputs),
        )

    def forward(self, networks: Sequence[Data]) -> Float[Tensor, "networks outputs"]:
        """Predictions for networks from `to_data_list`."""
        return torch.stack([self.predict(data) for data in networks])

    def predict(self, data: Data) -> Float[Tensor, " outputs"]:
        """The prediction for one network."""
        biases, weights = self.encoder.standardize(data)
        ahead = ~data.edge_reversed
        source, target = data.edge_index[:, ahead]
        encoded = encoding(weights[ahead, : self.num_features], self.encoder.edge_frequencies)
        # a weight of zero is still an edge; parallel edges add up
        pairs = encoded.new_zeros(data.num_nodes, data.num_nodes, encoded.shape[1])
        pairs = pairs.index_put((target, source), encoded, accumulate=True)
        nodes, edges = self.encoder.nodes(data, biases).unsqueeze(0), self.encoder.edges(pairs).unsqueeze(0)
        for layer in self.layers:
            nodes, edges = layer(nodes, edges)
        return self.head(nodes[0, data.role == OUTPUT].flatten())
