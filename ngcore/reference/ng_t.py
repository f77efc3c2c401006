"""NG-T written the plain way: dense n x n edge states, queries, keys and values materialized for all pairs.

It states `ngcore.models.NGT` independently, which is tested and timed against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.data import Batch

from ngcore.graph.frame import Frame
from ngcore.models import INR_WIDTHS, PerParameter, Scores, Widths
from ngcore.reference.encoder import OUTPUT, Encoder, head_of

NUM_LAYERS = 4


class Attention(nn.Module):
    """Relational attention over all pairs of nodes (paper, equation 5)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.num_heads = widths.heads
        self.node_qkv = nn.Linear(widths.node, 3 * widths.attention, bias=False)
        self.edge_qkss = nn.Linear(widths.edge, 4 * widths.attention, bias=False)
        self.attention_output = nn.Linear(widths.attention, widths.node)
        self.attention_linear = nn.Linear(widths.node, widths.node)

    def forward(
        self, nodes: Float[Tensor, "batch n node_width"], edges: Float[Tensor, "batch n n edge_width"]
    ) -> Float[Tensor, "batch n node_width"]:
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in self.node_qkv(nodes).chunk(3, dim=-1))
        edge_query, edge_key, shift, scale = (
            x.unflatten(-1, (self.num_heads, -1)) for x in self.edge_qkss(edges).chunk(4, dim=-1)
        )
        query = query.unsqueeze(2) + edge_query  # (batch, i, j, heads, head width)
        key = key.unsqueeze(1) + edge_key
        value = scale * value.unsqueeze(1) + shift
        score = (query * key).sum(dim=-1) / math.sqrt(query.shape[-1])
        attention = score.softmax(dim=2)
        gathered = (attention.unsqueeze(-1) * value).sum(dim=2).flatten(-2)
        return self.attention_linear(self.attention_output(gathered))


class Layer(nn.Module):
    """Attention and feed-forward on nodes; all but the last also update the edges."""

    def __init__(self, dropout: float, last: bool, widths: Widths = INR_WIDTHS) -> None:
        super().__init__()
        self.last = last
        node_width, edge_width, *_ = widths
        self.attention = Attention(widths)
        self.dropout = nn.Dropout(dropout)
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
        nodes = self.node_norm1(nodes + self.dropout(self.attention(nodes, edges)))
        nodes = self.node_norm2(nodes + self.dropout(self.node_feed2(F.gelu(self.node_feed1(nodes)))))
        if not self.last:
            edges = self.update_edges(nodes, edges)
        return nodes, edges

    def update_edges(
        self, nodes: Float[Tensor, "batch n node_width"], edges: Float[Tensor, "batch n n edge_width"]
    ) -> Float[Tensor, "batch n n edge_width"]:
        """New states of all pairs, from both directions of a pair and its two nodes."""
        pair = self.edge_pair(torch.cat([edges, edges.transpose(1, 2)], dim=-1))
        source, target = self.edge_source(nodes).unsqueeze(1), self.edge_target(nodes).unsqueeze(2)
        edges = self.edge_norm1(edges + self.dropout(self.edge_output(F.gelu(pair + source + target))))
        return self.edge_norm2(edges + self.dropout(self.edge_feed2(F.gelu(self.edge_feed1(edges)))))


class PlainNGT(nn.Module):
    """NG-T: a relational transformer over all pairs of nodes (paper, equation 5).

    For parameters' numbers every layer updates all pairs, and none is pooled. Arguments as in `Encoder`.
    """

    def __init__(
        self,
        frame: Frame,
        head: Scores | PerParameter,
        *,
        widths: Widths = INR_WIDTHS,
        probes: int = 0,
        positions: bool = True,
        activations: bool | None = None,
        dropout: float = 0.2,
        sigma: float | None = 1.0,
    ) -> None:
        super().__init__()
        self.outputs, self.per_parameter = frame.outputs, isinstance(head, PerParameter)
        self.encoder = Encoder(
            *(frame, widths.node, widths.edge),
            edge_copies=1,
            probes=probes,
            positions=positions,
            activations=activations,
            sigma=sigma,
        )
        lasts = [not self.per_parameter and k == NUM_LAYERS - 1 for k in range(NUM_LAYERS)]
        self.layers = nn.ModuleList(Layer(dropout, last, widths) for last in lasts)
        self.head = head_of(head, frame, (widths.node, 2 * widths.node), widths.edge)

    def forward(self, batches: Sequence[Batch]) -> Float[Tensor, "networks scores"] | tuple[Tensor, Tensor]:
        """Answers as `PlainNGGNN` gives them, for batches from `to_batch` of one wiring each, one after the other."""
        found = [self.answer(batch) for batch in batches]
        if self.per_parameter:
            return tuple(torch.cat(numbers) for numbers in zip(*found, strict=True))
        return torch.cat(found)

    def answer(self, batch: Batch) -> Float[Tensor, "networks scores"] | tuple[Tensor, Tensor]:
        """Of networks of one wiring."""
        size = batch.num_nodes // batch.num_graphs
        nodes = self.encoder.nodes(batch).unflatten(0, (-1, size))
        ahead = ~batch.edge_reversed
        source, target = batch.edge_index[:, ahead]
        places = batch.batch[source], target % size, source % size
        edges = self.pairs(self.encoder.encoded(batch, ahead), places, batch.num_graphs, size)
        for layer in self.layers:
            nodes, edges = layer(nodes, edges)
        if self.per_parameter:
            return self.head["node"](nodes.flatten(0, 1)), self.head["edge"](edges[places])
        states = nodes[(batch.role == OUTPUT).view(-1, size)].view(batch.num_graphs, -1, nodes.shape[-1])
        return self.head(F.pad(states, (0, 0, 0, self.outputs - states.shape[1])).flatten(1))

    def pairs(
        self, encoded: Float[Tensor, "edges encoding"], places: tuple[Tensor, ...], networks: int, size: int
    ) -> Float[Tensor, "networks size size edge_width"]:
        """First states of all pairs. A weight of 0 is still an edge; parallel edges add up."""
        pairs = encoded.new_zeros(networks, size, size, encoded.shape[1])
        return self.encoder.edges(pairs.index_put(places, encoded, accumulate=True))
