"""NG-T: a transformer with relational attention, modulated values and edge updates (paper, section 3, equation 5).

Attention runs over all pairs of nodes (i target, j source), so the pairs are what costs. The algebra is that of the
relational transformer (Diao & Loynd 2023), rearranged so that as little as possible is formed per pair:

- scores: with q = q_i + Q e_ij and k = k_j + K e_ij, q·k = q_i·k_j + e_ij·(Kᵀq_i + Qᵀk_j + QᵀK e_ij), one product
  of the pair's state by QᵀK instead of two by Q and K;
- values: Σ_j a_ij (S e_ij ⊙ v_j + T e_ij) = Σ_j a_ij (S e_ij ⊙ v_j) + T Σ_j a_ij e_ij;
- the last layer is computed for the rows that the head reads alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.dropout import dropout
from ngcore.models.encoder import COMPILATION, Encoder, fourier_features

NODE_WIDTH = 64
EDGE_WIDTH = 32
ATTENTION_WIDTH = 128
HEADS = 4
HEAD_WIDTH = ATTENTION_WIDTH // HEADS
LAYERS = 4


class RelationalAttention(nn.Module):
    """Attention in which pairs of nodes have states of their own, up to and including its output Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.node_qkv = nn.Linear(NODE_WIDTH, 3 * ATTENTION_WIDTH, bias=False)
        self.edge_qkss = nn.Linear(EDGE_WIDTH, 4 * ATTENTION_WIDTH, bias=False)  # q, k, shift, scale
        self.attention_output = nn.Linear(ATTENTION_WIDTH, NODE_WIDTH)
        self.attention_linear = nn.Linear(NODE_WIDTH, NODE_WIDTH)

    def forward(
        self,
        nodes: Float[Tensor, "batch n 64"],
        edges: Float[Tensor, "batch rows n 32"],
        rows: slice,
    ) -> Float[Tensor, "batch rows 64"]:
        """What the nodes `rows` gather from all nodes; `edges` are the pairs of these rows."""
        query, key, value = self.node_qkv(nodes).unflatten(-1, (3, HEADS, HEAD_WIDTH)).unbind(2)
        query = query[:, rows]
        edge_query, edge_key, shift, scale = self.edge_qkss.weight.unflatten(0, (4, HEADS, HEAD_WIDTH))
        mixed = torch.einsum("hdc,hde->hce", edge_query, edge_key).flatten(0, 1)  # QᵀK of every head
        products = F.linear(edges, torch.cat([mixed, scale.flatten(0, 1)]))
        bilinear, scaled = products.unflatten(-1, (2, HEADS, HEAD_WIDTH)).unbind(3)

        from_query = torch.einsum("brhd,hdc->brhc", query, edge_key)
        from_key = torch.einsum("bnhd,hdc->bnhc", key, edge_query)
        relational = bilinear + from_query.unsqueeze(2) + from_key.unsqueeze(1)
        scores = (relational * edges.unsqueeze(3)).sum(-1) + torch.einsum("brhd,bnhd->brnh", query, key)
        attention = (scores * HEAD_WIDTH**-0.5).softmax(dim=2)

        gathered = (attention.unsqueeze(-1) * scaled * value.unsqueeze(1)).sum(2)
        mean_edge = torch.einsum("brnh,brnc->brhc", attention, edges)
        gathered = gathered + torch.einsum("brhc,hdc->brhd", mean_edge, shift)
        weight = self.attention_linear.weight @ self.attention_output.weight
        bias = self.attention_linear.weight @ self.attention_output.bias + self.attention_linear.bias
        return F.linear(gathered.flatten(2), weight, bias)


class NGTLayer(nn.Module):
    """Relational attention and feed-forward on nodes, then the update of the edges from their new states.

    Args:
        attended: rows (targets) of the pairs that enter: the others are not computed.
        updated: rows of the pairs that leave, None in the last layer.
    """

    def __init__(self, attended: slice, updated: slice | None, dropout: float) -> None:
        super().__init__()
        self.attended, self.updated, self.dropout = attended, updated, dropout
        self.attention = RelationalAttention()
        self.node_norm1 = nn.LayerNorm(NODE_WIDTH)
        self.node_feed1 = nn.Linear(NODE_WIDTH, 2 * NODE_WIDTH, bias=False)
        self.node_feed2 = nn.Linear(2 * NODE_WIDTH, NODE_WIDTH)
        self.node_norm2 = nn.LayerNorm(NODE_WIDTH)
        if updated is not None:
            self.edge_pair = nn.Linear(2 * EDGE_WIDTH, 2 * EDGE_WIDTH)
            self.edge_source = nn.Linear(NODE_WIDTH, 2 * EDGE_WIDTH)
            self.edge_target = nn.Linear(NODE_WIDTH, 2 * EDGE_WIDTH)
            self.edge_output = nn.Linear(2 * EDGE_WIDTH, EDGE_WIDTH)
            self.edge_norm1 = nn.LayerNorm(EDGE_WIDTH)
            self.edge_feed1 = nn.Linear(EDGE_WIDTH, 2 * EDGE_WIDTH, bias=False)
            self.edge_feed2 = nn.Linear(2 * EDGE_WIDTH, EDGE_WIDTH)
            self.edge_norm2 = nn.LayerNorm(EDGE_WIDTH)

    def drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)

    def forward(
        self, nodes: Float[Tensor, "batch n 64"], edges: Float[Tensor, "batch rows n 32"]
    ) -> tuple[Float[Tensor, "batch rows 64"], Tensor]:
        """States of the attended nodes and of the updated pairs (as they came in the last layer)."""
        gathered = self.drop(self.attention(nodes, edges, self.attended))
        nodes = self.node_norm1(nodes[:, self.attended] + gathered)
        nodes = self.node_norm2(nodes + self.drop(self.node_feed2(F.gelu(self.node_feed1(nodes)))))
        return nodes, edges if self.updated is None else self.update_edges(nodes, edges, self.updated)

    def update_edges(self, nodes: Tensor, edges: Tensor, rows: slice) -> Float[Tensor, "batch rows n 32"]:
        """New states of the pairs (i, j) with i in `rows`, from e_ij, e_ji, v_i and v_j."""
        own, mirrored = edges[:, rows], edges[:, :, rows].transpose(1, 2)
        pair = self.edge_pair(torch.cat([own, mirrored], dim=-1))
        hidden = F.gelu(pair + self.edge_target(nodes[:, rows]).unsqueeze(2) + self.edge_source(nodes).unsqueeze(1))
        edges = self.edge_norm1(own + self.drop(self.edge_output(hidden)))
        return self.edge_norm2(edges + self.drop(self.edge_feed2(F.gelu(self.edge_feed1(edges)))))


class NGT(nn.Module):
    """NG-T for a property of the whole input network: class scores of an INR's image.

    4 layers, node width 64, edge width 32, 4 heads over an attention width of 128; norms follow the residual sums.
    Pairs that are no edge of the network have a state of their own: a weight that is 0 stays an edge. For 10 classes
    and a 2-32-32-1 network it has 376,586 parameters (the paper states 378,090).

    Args: as of `NGGNN`; the head reads one row per output neuron.
    """

    def __init__(
        self,
        wiring: Wiring,
        num_classes: int,
        *,
        probes: int = 0,
        positions: bool = True,
        dropout: float = 0.2,
        sigma: float = 1.0,
    ) -> None:
        super().__init__()
        self.wiring = wiring
        self.encoder = Encoder(
            wiring, NODE_WIDTH, EDGE_WIDTH, edge_features=1, sigma=sigma, probes=probes, positions=positions
        )
        (output,) = wiring.with_role("output")
        read, every = slice(wiring.offsets[output], wiring.offsets[output + 1]), slice(None)
        rows = [every] * (LAYERS - 1) + [read]
        self.layers = nn.ModuleList(
            NGTLayer(rows[k], rows[k + 1] if k + 1 < LAYERS else None, dropout) for k in range(LAYERS)
        )
        self.head = nn.Sequential(
            nn.Linear(wiring.groups[output].size * NODE_WIDTH, 2 * NODE_WIDTH),
            nn.ReLU(),
            nn.Linear(2 * NODE_WIDTH, num_classes),
        )

    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Take the training set's statistics, by which every input is standardized."""
        self.encoder.standardize.fit(graph)

    def compile_parts(self) -> None:
        """Compile the parts that a training step spends its time in."""
        for layer in self.layers:
            layer.compile(**COMPILATION)

    def first_edges(self, graph: NeuralGraph) -> Float[Tensor, "batch n n 32"]:
        """First states of all pairs; where the wiring has no edge the Fourier features are masked out."""
        weight, bias = self.encoder.edge_affine()
        offsets, size = self.wiring.offsets, self.wiring.num_nodes
        states = bias.expand(graph.num_networks, size, size, EDGE_WIDTH).clone()
        for block, values in zip(self.wiring.blocks, self.encoder.standardize(graph).edges, strict=True):
            targets = slice(offsets[block.target], offsets[block.target + 1])
            sources = slice(offsets[block.source], offsets[block.source + 1])
            features = fourier_features(values, self.encoder.edge_frequencies[0])
            states[:, targets, sources] = F.linear(features, weight, bias)
        return states

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        nodes, edges = self.encoder.nodes(graph), self.first_edges(graph)
        for layer in self.layers:
            nodes, edges = layer(nodes, edges)
        return self.head(nodes.flatten(1))
