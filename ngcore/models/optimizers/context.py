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
from ngcore.graph.batch import GraphBatch, batch_of
from ngcore.graph.pyg import ROLES
from ngcore.models.baselines.weight_space import EquivariantLayer, WeightSpace
from ngcore.models.messages import Neighbours, degrees, messages_of
from ngcore.models.ng_gnn import PNALayer, propagate
from ngcore.models.ng_t import NGTLayer, Widths, transform
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
        states = space.features(layout.graph(features))
        for layer in self.layers:
            states = [torch.relu(x) for x in layer(states)]
        return layout.row(space.graph(states, self.width), self.width)


class GraphContext(nn.Module):
    """First states of nodes and edges, and the states of scalars, which NG-GNN and NG-T have in common.

    The graph has the features of all scalars: of biases on nodes, of kernels on edges, 14 for each of the 9 positions
    (paper, section 4.3). Nodes are distinguished by their role alone, not one by one: how a class or a colour is
    numbered says nothing about how to optimize, and the model fits networks with other numbers of them.
    """

    reads_graph = True

    def __init__(self, width: int, node_width: int, edge_width: int) -> None:
        super().__init__()
        self.width = width
        self.node_encoder = nn.Linear(FEATURES, node_width)
        self.roles = nn.Parameter(torch.randn(len(ROLES), node_width))
        self.node_head = nn.Linear(node_width, width)
        self.edge_head = nn.Linear(edge_width, POSITIONS * width)

    def first_nodes(self, batch: GraphBatch, layout: Layout) -> Float[Tensor, "batch nodes w"]:
        return self.node_encoder(batch.biases) + self.roles[layout.roles]

    def scalars(
        self, batch: GraphBatch, nodes: Tensor, edges: Sequence[Tensor], layout: Layout
    ) -> Float[Tensor, "batch scalars w"]:
        """From the last states of nodes and edges."""
        (graph,) = batch.on_graphs(self.node_head(nodes), tuple(map(self.edge_head, edges)))
        return layout.row(graph, self.width)


class NGGNNContext(GraphContext):
    """NG-GNN: the layers of `ngcore.models.ng_gnn`, with messages in both directions."""

    def __init__(self, width: int = 16, hidden: int = 32, layers: int = 3) -> None:
        super().__init__(width, hidden, hidden)
        self.forward_encoder = nn.Linear(POSITIONS * FEATURES, hidden)
        self.reverse_encoder = nn.Linear(POSITIONS * FEATURES, hidden)
        self.layers = nn.ModuleList(PNALayer(True, 0.0, hidden) for _ in range(layers))
        self.register_buffer("mean_log_degree", torch.ones(()))

    def fit_normalization(self, layout: Layout) -> None:
        """Take PNA's δ, the mean of log(degree + 1) over nodes, from the network that is trained on."""
        features = torch.zeros(1, layout.count, FEATURES, device=layout.device)
        count = degrees(batch_of(layout.graph(features), layout.frame), "both")
        self.mean_log_degree.copy_(torch.log(count + 1).mean())

    def forward(self, features: Float[Tensor, "batch scalars 14"], layout: Layout) -> Float[Tensor, "batch scalars w"]:
        batch = batch_of(layout.graph(features), layout.frame)
        weights = [stack.weights.flatten(0, 1) for stack in batch.stacks]
        ahead, back = map(self.forward_encoder, weights), (self.reverse_encoder(x).transpose(1, 2) for x in weights)
        nodes, edges, after = propagate(
            self.layers,
            batch.split(self.first_nodes(batch, layout)),
            (*ahead, *back),
            (None, None),
            messages_of(batch),
            Neighbours.of(batch, "both", self.mean_log_degree),
            everything=True,
        )
        return self.scalars(batch, torch.cat(nodes, dim=1), tuple(map(after, edges)), layout)


class NGTContext(GraphContext):
    """NG-T: the layers of `ngcore.models.ng_t` over all pairs of nodes."""

    def __init__(self, width: int = 16, hidden: int = 32, layers: int = 3) -> None:
        widths = Widths(node=hidden, edge=hidden // 2, attention=2 * hidden, heads=4)
        super().__init__(width, widths.node, widths.edge)
        self.edge_encoder = nn.Linear(POSITIONS * FEATURES, widths.edge)
        self.layers = nn.ModuleList(NGTLayer(True, 0.0, widths) for _ in range(layers))

    def forward(self, features: Float[Tensor, "batch scalars 14"], layout: Layout) -> Float[Tensor, "batch scalars w"]:
        batch = batch_of(layout.graph(features), layout.frame)
        own = [F.linear(stack.weights.flatten(0, 1), self.edge_encoder.weight) for stack in batch.stacks]
        nodes, edges = transform(self.layers, batch, self.first_nodes(batch, layout), self.edge_encoder.bias, own)
        return self.scalars(batch, nodes, edges, layout)
