"""What learned optimizers know of a scalar beside its own features: what its layer, or the network, looks like.

Each is a module of a `width` that reads the features of all scalars of a network, (batch, scalars, FEATURES), and
returns a state for each, (batch, scalars, width). Permuting hidden neurons of the network permutes the states. None
holds anything of a network's size, so one that was trained on one network runs on others. `reads_graph` says whether
the layout has to know the network's graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph.architectures import cnn
from ngcore.graph.pyg import ROLES
from ngcore.models.baselines.weight_space import EquivariantLayer, WeightSpace
from ngcore.models.heterogeneous import Messages, StackedLayer, Way
from ngcore.models.ng_t import EVERY, NGTLayer, Widths
from ngcore.models.optimizers.layout import POSITIONS, Layout

FEATURES = 14  # of a scalar: weight, gradient and five momenta, a logarithm and a sign each


class NoContext(nn.Module):
    """FF: a scalar is on its own (Metz et al., 2019)."""

    width = 0
    reads_graph = False

    def forward(self, features: Float[Tensor, "batch scalars 14"], layout: Layout) -> Float[Tensor, "batch scalars 0"]:
        return features[..., :0]


class LayerLSTM(nn.Module):
    """LSTM: the features' averages over every parameter tensor pass through an LSTM from the first tensor to the last
    (Metz et al., 2020); its state is that of the tensor's scalars."""

    reads_graph = False

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.lstm = nn.LSTM(FEATURES, width, batch_first=True)

    def forward(self, features: Float[Tensor, "batch scalars 14"], layout: Layout) -> Float[Tensor, "batch scalars w"]:
        means = torch.stack([part.mean(1) for part in features.split(layout.sizes, dim=1)], dim=1)
        states, _ = self.lstm(means)
        return states.repeat_interleave(torch.tensor(layout.sizes, device=features.device), dim=1)


class NFNContext(nn.Module):
    """NFN (Zhou et al., 2023a): NF-Layers with ReLU over all scalars, for the group NP.

    NP, without encodings of inputs and outputs, for HNP's coefficients belong to single input and output neurons and so
    to one number of them. What is left of the network in the coefficients are its layers and their kernels.

    Args:
        kernel_size: of the convolutions, which a linear layer follows.
    """

    reads_graph = True

    def __init__(self, width: int = 8, layers: int = 2, kernel_size: Sequence[int] = (3, 3, 3)) -> None:
        super().__init__()
        self.width = width
        depth = len(kernel_size)
        self.kernel_size = tuple(kernel_size)
        stand_in = cnn([1] * (depth + 1), self.kernel_size, ["relu"] * depth, [-1] * depth, 1)
        self.space = WeightSpace(stand_in, "NP")
        widths = [FEATURES] + [width] * layers
        self.layers = nn.ModuleList(EquivariantLayer(self.space, *pair, "mean") for pair in pairwise(widths))

    def forward(self, features: Float[Tensor, "batch scalars 14"], layout: Layout) -> Float[Tensor, "batch scalars w"]:
        space = layout.weight_space
        own, theirs = ((s.supports, s.multiplicity) for s in (self.space, space))
        if own != theirs:
            raise ValueError(
                f"this NFN was built for convolutions with kernels of sizes {list(self.kernel_size)} and a linear "
                "layer, all with biases: its coefficients belong to them, and the network has other layers"
            )
        padded = torch.cat([features, features.new_zeros(len(features), 1, FEATURES)], dim=1)
        graph = layout.ids.map(lambda ids: padded[:, ids].flatten(-2))
        states = space.features(graph)
        for layer in self.layers:
            states = [torch.relu(x) for x in layer(states)]
        graph = space.graph(states, self.width)
        row = [values.reshape(len(features), -1, self.width) for values in (*graph.nodes, *graph.edges)]
        return torch.cat(row, dim=1)[:, layout.order]


class GraphContext(nn.Module):
    """First states of nodes and edges, and the states of scalars, which NG-GNN and NG-T have in common.

    The graph has the features of all scalars: of biases on nodes, of kernels on edges, 14 for each of the 9 positions
    (paper, section 4.3). Nodes are told apart by their role alone, not one by one: how a class or a colour is numbered
    says nothing about how to optimize, and the model fits networks with other numbers of them.
    """

    reads_graph = True

    def __init__(self, width: int, node_width: int, edge_width: int) -> None:
        super().__init__()
        self.width = width
        self.node_encoder = nn.Linear(FEATURES, node_width)
        self.roles = nn.Parameter(torch.randn(len(ROLES), node_width))
        self.node_head = nn.Linear(node_width, width)
        self.edge_head = nn.Linear(edge_width, POSITIONS * width)

    def first_nodes(self, features: Float[Tensor, "batch nodes 14"], layout: Layout) -> Tensor:
        return self.node_encoder(features) + self.roles[layout.roles]

    def scalars(self, nodes: Tensor, edges: Tensor, layout: Layout) -> Float[Tensor, "batch scalars w"]:
        return layout.row(self.node_head(nodes), self.edge_head(edges))


class NGGNNContext(GraphContext):
    """NG-GNN: the layers of `ngcore.models.ng_gnn`, with edges in both directions."""

    def __init__(self, width: int = 16, hidden: int = 32, layers: int = 3) -> None:
        super().__init__(width, hidden, hidden)
        self.forward_encoder = nn.Linear(POSITIONS * FEATURES, hidden)
        self.reverse_encoder = nn.Linear(POSITIONS * FEATURES, hidden)
        self.layers = nn.ModuleList(StackedLayer(True, 0.0, hidden) for _ in range(layers))
        self.register_buffer("mean_log_degree", torch.ones(()))

    def fit_normalization(self, layout: Layout) -> None:
        """Take PNA's δ, the mean of log(degree + 1) over nodes, from the network that is trained on."""
        self.mean_log_degree.copy_(torch.log(layout.degrees + 1).mean())

    def forward(self, features: Float[Tensor, "batch scalars 14"], layout: Layout) -> Float[Tensor, "batch scalars w"]:
        batch = len(features)
        node_features, edge_features = layout.nodes_and_edges(features)
        nodes = self.first_nodes(node_features, layout).flatten(0, 1)
        degree = layout.degrees.to(nodes.dtype)
        scaler = (torch.log(degree + 1) / self.mean_log_degree).repeat(batch)
        degree = degree.clamp(min=1).repeat(batch)  # to divide by
        messages: Messages = []
        for reverse, encoder in ((False, self.forward_encoder), (True, self.reverse_encoder)):
            messages += batched(layout, encoder(edge_features), reverse)
        before = None
        for layer in self.layers:
            weight, bias = layer.edge_affine(before)
            film = dict.fromkeys((False, True), (weight[: 2 * layer.width], bias[: 2 * layer.width]))
            state = dict.fromkeys((False, True), (weight[2 * layer.width :], bias[2 * layer.width :]))
            nodes = layer(nodes, messages, film, degree, scaler)
            if layer is self.layers[-1]:  # of whose edges only those of the network are read
                messages = [(way, edges) for way, edges in messages if not way.reverse]
            messages = layer.new_edges(nodes, messages, state)
            before = layer.edge_output
        edges = before(torch.cat([edges.unflatten(0, (batch, -1)) for _, edges in messages], dim=1))
        return self.scalars(nodes.unflatten(0, (batch, -1)), edges, layout)


def batched(layout: Layout, edges: Float[Tensor, "batch edges f"], reverse: bool) -> Messages:
    """The messages of a batch of networks of one layout, whose nodes stand one network after the other."""
    first = layout.wiring.num_nodes * torch.arange(len(edges), device=edges.device)
    messages = []
    for stack in layout.stacks:
        rows, columns = ((first[:, None, None] + nodes).flatten(0, 1) for nodes in (stack.targets, stack.sources))
        way = Way(rows, columns, stack.target_hops.repeat(len(edges)), reverse)
        messages.append((way, edges[:, stack.edges].flatten(0, 1)))
    return messages


class NGTContext(GraphContext):
    """NG-T: the layers of `ngcore.models.ng_t` over all pairs of nodes."""

    def __init__(self, width: int = 16, hidden: int = 32, layers: int = 3) -> None:
        widths = Widths(node=hidden, edge=hidden // 2, attention=2 * hidden, heads=4)
        super().__init__(width, widths.node, widths.edge)
        self.edge_encoder = nn.Linear(POSITIONS * FEATURES, widths.edge)
        every = ((EVERY, EVERY),)
        self.layers = nn.ModuleList(NGTLayer(EVERY, every, 0.0, widths) for _ in range(layers))

    def forward(self, features: Float[Tensor, "batch scalars 14"], layout: Layout) -> Float[Tensor, "batch scalars w"]:
        node_features, edge_features = layout.nodes_and_edges(features)
        nodes = self.first_nodes(node_features, layout)
        targets, sources = layout.pairs
        own = F.linear(edge_features, self.edge_encoder.weight)
        size = nodes.shape[1]
        pairs = self.edge_encoder.bias.expand(len(nodes), size, size, own.shape[-1])
        index = torch.arange(len(nodes), device=nodes.device).unsqueeze(1), targets, sources
        edges = (pairs.index_put(index, own, accumulate=True),)
        for layer in self.layers:
            nodes, edges = layer(nodes, layer.gather(nodes, *edges), *edges)
        return self.scalars(nodes, edges[0][:, targets, sources], layout)
