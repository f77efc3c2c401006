"""NG-T written the plain way: dense n x n edge states, queries, keys and values materialized for all pairs.

It states the models independently of `ngcore.models.NGT` and `EquivariantNGT`, which are tested and timed against
it. Parameters carry the same names, so that either loads the other's `state_dict()`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.reference.ng_gnn import NUM_FREQUENCIES, Probe, encoding, position_rows

NODE_WIDTH = 64
EDGE_WIDTH = 32
ATTENTION_WIDTH = 128
NUM_HEADS = 4
NUM_LAYERS = 4
SIGMA = 1.0


def adjacency(wiring: Wiring) -> Bool[Tensor, "target source"]:
    """True where the wiring has an edge."""
    mask = torch.zeros(wiring.num_nodes, wiring.num_nodes, dtype=torch.bool)
    for block in wiring.blocks:
        mask[_rows(wiring, block.target), _rows(wiring, block.source)] = True
    return mask


def _rows(wiring: Wiring, group: int) -> slice:
    return slice(wiring.offsets[group], wiring.offsets[group + 1])


class Encoder(nn.Module):
    """Biases to node states, weights to the states of all pairs (paper, section 3); without `sigma` by Linears."""

    def __init__(self, wiring: Wiring, probes: int, sigma: float | None, positions: bool) -> None:
        super().__init__()
        self.wiring = wiring
        fourier_features = sigma is not None
        self.register_buffer("adjacency", adjacency(wiring), persistent=False)
        self.register_buffer("position_rows", position_rows(wiring), persistent=False)
        self.register_buffer("node_mean", torch.zeros(len(wiring.groups)))
        self.register_buffer("node_std", torch.ones(len(wiring.groups)))
        self.register_buffer("edge_mean", torch.zeros(len(wiring.blocks)))
        self.register_buffer("edge_std", torch.ones(len(wiring.blocks)))
        self.register_buffer("node_frequencies", sigma * torch.randn(1, NUM_FREQUENCIES) if fourier_features else None)
        self.register_buffer("edge_frequencies", sigma * torch.randn(1, NUM_FREQUENCIES) if fourier_features else None)
        self.node_fourier = nn.Linear(2 * NUM_FREQUENCIES if fourier_features else 1, NODE_WIDTH)
        self.edge_fourier = nn.Linear(2 * NUM_FREQUENCIES if fourier_features else 1, EDGE_WIDTH)
        self.node_linear = nn.Linear(NODE_WIDTH, NODE_WIDTH)
        self.edge_linear = nn.Linear(EDGE_WIDTH, EDGE_WIDTH)
        if positions:
            self.positions = nn.Parameter(torch.randn(int(self.position_rows.max()) + 1, NODE_WIDTH))
        if probes > 0:
            self.probe = Probe(wiring, probes, NODE_WIDTH)

    def forward(
        self, graph: NeuralGraph
    ) -> tuple[Float[Tensor, "batch n node_width"], Float[Tensor, "batch n n edge_width"]]:
        """Shapes: edge states (batch, target, source, edge width)."""
        nodes = self.node_fourier(encoding(self.standardized_biases(graph), self.node_frequencies))
        if hasattr(self, "probe"):
            weights = [edges.squeeze(-1) for edges in graph.edges]
            biases = [group.squeeze(-1) for group in graph.nodes[1:]]
            nodes = nodes + self.probe(weights, biases)
        nodes = self.node_linear(nodes)
        if hasattr(self, "positions"):
            nodes = nodes + self.positions[self.position_rows]

        # a weight of zero is still an edge: what is none is known from the wiring alone
        encoded = encoding(self.standardized_weights(graph), self.edge_frequencies) * self.adjacency.unsqueeze(-1)
        return nodes, self.edge_linear(self.edge_fourier(encoded))

    def standardized_biases(self, graph: NeuralGraph) -> Float[Tensor, "batch n 1"]:
        """Biases of all nodes; 0 at the input nodes, which have none."""
        biases = [torch.zeros_like(graph.nodes[0])]
        for g in range(1, len(graph.nodes)):
            biases.append((graph.nodes[g] - self.node_mean[g]) / self.node_std[g])
        return torch.cat(biases, dim=1)

    def standardized_weights(self, graph: NeuralGraph) -> Float[Tensor, "batch n n 1"]:
        """Weights of all pairs (target, source); 0 where there is no edge."""
        num_nodes = self.wiring.num_nodes
        dense = graph.edges[0].new_zeros(graph.num_networks, num_nodes, num_nodes, 1)
        for b, block in enumerate(self.wiring.blocks):
            target, source = _rows(self.wiring, block.target), _rows(self.wiring, block.source)
            dense[:, target, source] = (graph.edges[b] - self.edge_mean[b]) / self.edge_std[b]
        return dense


class Layer(nn.Module):
    """Relational attention over all pairs (paper, equation 5); all but the last also update the edges."""

    def __init__(
        self,
        dropout: float,
        last: bool,
        node_width: int = NODE_WIDTH,
        edge_width: int = EDGE_WIDTH,
        attention_width: int = ATTENTION_WIDTH,
        num_heads: int = NUM_HEADS,
    ) -> None:
        super().__init__()
        self.last, self.num_heads = last, num_heads
        self.dropout = nn.Dropout(dropout)
        self.node_qkv = nn.Linear(node_width, 3 * attention_width, bias=False)
        self.edge_qkss = nn.Linear(edge_width, 4 * attention_width, bias=False)
        self.attention_output = nn.Linear(attention_width, node_width)
        self.attention_linear = nn.Linear(node_width, node_width)
        self.node_norm1 = nn.LayerNorm(node_width)
        self.node_feed1 = nn.Linear(node_width, 2 * node_width, bias=False)
        self.node_feed2 = nn.Linear(2 * node_width, node_width)
        self.node_norm2 = nn.LayerNorm(node_width)
        if not last:
            self.edge_pair = nn.Linear(2 * edge_width, 2 * edge_width)
            self.edge_source = nn.Linear(node_width, 2 * edge_width)
            self.edge_target = nn.Linear(node_width, 2 * edge_width)
            self.edge_output = nn.Linear(2 * edge_width, edge_width)
            self.edge_norm1 = nn.LayerNorm(edge_width)
            self.edge_feed1 = nn.Linear(edge_width, 2 * edge_width, bias=False)
            self.edge_feed2 = nn.Linear(2 * edge_width, edge_width)
            self.edge_norm2 = nn.LayerNorm(edge_width)

    def forward(
        self, nodes: Float[Tensor, "batch n node_width"], edges: Float[Tensor, "batch n n edge_width"]
    ) -> tuple[Float[Tensor, "batch n node_width"], Float[Tensor, "batch n n edge_width"]]:
        attended = self.attention_linear(self.attention_output(self.attend(nodes, edges)))
        nodes = self.node_norm1(nodes + self.dropout(attended))
        nodes = self.node_norm2(nodes + self.dropout(self.node_feed2(F.gelu(self.node_feed1(nodes)))))
        if not self.last:
            edges = self.update_edges(nodes, edges)
        return nodes, edges

    def attend(
        self, nodes: Float[Tensor, "batch n node_width"], edges: Float[Tensor, "batch n n edge_width"]
    ) -> Float[Tensor, "batch n attention_width"]:
        """Every node's attention over all nodes, heads concatenated."""
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in self.node_qkv(nodes).chunk(3, dim=-1))
        edge_query, edge_key, shift, scale = (
            x.unflatten(-1, (self.num_heads, -1)) for x in self.edge_qkss(edges).chunk(4, dim=-1)
        )
        query = query.unsqueeze(2) + edge_query  # (batch, i, j, heads, head width)
        key = key.unsqueeze(1) + edge_key
        value = scale * value.unsqueeze(1) + shift
        score = (query * key).sum(dim=-1) / math.sqrt(query.shape[-1])
        attention = score.softmax(dim=2)
        return (attention.unsqueeze(-1) * value).sum(dim=2).flatten(-2)

    def update_edges(
        self, nodes: Float[Tensor, "batch n node_width"], edges: Float[Tensor, "batch n n edge_width"]
    ) -> Float[Tensor, "batch n n edge_width"]:
        """New states of all pairs, from both directions of a pair and its two nodes."""
        pair = self.edge_pair(torch.cat([edges, edges.transpose(1, 2)], dim=-1))
        source, target = self.edge_source(nodes).unsqueeze(1), self.edge_target(nodes).unsqueeze(2)
        edges = self.edge_norm1(edges + self.dropout(self.edge_output(F.gelu(pair + source + target))))
        return self.edge_norm2(edges + self.dropout(self.edge_feed2(F.gelu(self.edge_feed1(edges)))))


class PlainNGT(nn.Module):
    """NG-T classifier of MLPs: a relational transformer over the nodes (paper, equation 5).

    376,586 parameters for 2-32-32-1 networks and 10 classes.
    """

    def __init__(self, wiring: Wiring, num_classes: int, *, probes: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        self.num_outputs = wiring.groups[-1].size
        self.encoder = Encoder(wiring, probes, SIGMA, positions=True)
        self.layers = nn.ModuleList(Layer(dropout, last=k == NUM_LAYERS - 1) for k in range(NUM_LAYERS))
        self.head = nn.Sequential(
            nn.Linear(self.num_outputs * NODE_WIDTH, 2 * NODE_WIDTH),
            nn.ReLU(),
            nn.Linear(2 * NODE_WIDTH, num_classes),
        )

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of networks."""
        nodes, edges = self.encoder(graph)
        for layer in self.layers:
            nodes, edges = layer(nodes, edges)
        return self.head(nodes[:, -self.num_outputs :].flatten(1))


class PlainEquivariantNGT(nn.Module):
    """NG-T with `outputs` numbers for every parameter of an MLP: every layer updates all pairs, and none is pooled.

    Args:
        sigma: scale of the Fourier frequencies, None for Linears of biases and weights.
    """

    def __init__(
        self,
        wiring: Wiring,
        outputs: int = 1,
        *,
        probes: int = 0,
        positions: bool = True,
        dropout: float = 0.3,
        sigma: float | None = 3.0,
    ) -> None:
        super().__init__()
        self.wiring = wiring
        self.encoder = Encoder(wiring, probes, sigma, positions)
        self.layers = nn.ModuleList(Layer(dropout, last=False) for _ in range(NUM_LAYERS))
        self.node_head = nn.Linear(NODE_WIDTH, outputs)
        self.edge_head = nn.Linear(EDGE_WIDTH, outputs)

    def forward(self, graph: NeuralGraph) -> dict[str, Tensor]:
        """Numbers for a batch of networks, by parameter: (batch, *its shape, outputs)."""
        nodes, edges = self.encoder(graph)
        for layer in self.layers:
            nodes, edges = layer(nodes, edges)
        numbers = {}
        for block in self.wiring.blocks:
            target, source = _rows(self.wiring, block.target), _rows(self.wiring, block.source)
            numbers[block.weight] = self.edge_head(edges[:, target, source])
            numbers[self.wiring.groups[block.target].bias] = self.node_head(nodes[:, target])
        return numbers
