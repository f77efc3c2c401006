"""NG-GNN written the plain way: torch_geometric message passing over one `Data` object per network.

It states `ngcore.models.NGGNN` independently, which is tested and timed against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.data import Batch
from torch_geometric.nn import LayerNorm, MessagePassing
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.utils import degree, to_dense_batch

from ngcore.graph.frame import Frame
from ngcore.models import PerParameter, Scores
from ngcore.reference.encoder import OUTPUT, Encoder, head_of

WIDTH = 64
NUM_LAYERS = 4


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

    def __init__(self, delta: float, dropout: float, last: bool, residual: bool = True) -> None:
        super().__init__()
        self.last, self.residual = last, residual
        self.propagation = FiLMPropagation(delta)
        self.film = nn.Linear(WIDTH, 2 * WIDTH)
        self.message = nn.Linear(2 * WIDTH, WIDTH)
        self.update = nn.Linear(9 * WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        if not last:
            self.norm = nn.LayerNorm(WIDTH) if residual else LayerNorm(WIDTH, mode="graph")
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
        network: Int[Tensor, " nodes"] | None = None,
    ) -> tuple[Float[Tensor, "nodes width"], Float[Tensor, "edges width"]]:
        aggregated = self.propagation(nodes, edge_index, self.film(edges), self.message)
        change = self.output(self.update(torch.cat([nodes, aggregated], dim=-1)))
        kept = nodes if self.residual else 0
        if self.last:
            return kept + change, edges
        normed = self.norm(change) if self.residual else self.norm(change, network)
        nodes = kept + self.dropout(F.silu(normed))
        source, target = edge_index
        mixed = self.edge_state(edges) + self.edge_source(nodes[source]) + self.edge_target(nodes[target])
        return nodes, self.edge_output(F.silu(mixed))


class PlainNGGNN(nn.Module):
    """NG-GNN: PNA with FiLM messages and edge updates (paper, equations 3 and 4).

    For parameters' numbers every layer updates the edges, and none is pooled. Arguments as in `Encoder`, and `residual`
    as in `NGGNN`.
    """

    def __init__(
        self,
        frame: Frame,
        head: Scores | PerParameter,
        *,
        probes: int = 0,
        positions: bool = True,
        activations: bool | None = None,
        dropout: float = 0.2,
        sigma: float | None = 3.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.outputs, self.per_parameter = frame.outputs, isinstance(head, PerParameter)
        self.encoder = Encoder(
            *(frame, WIDTH, WIDTH),
            edge_copies=3,
            probes=probes,
            positions=positions,
            activations=activations,
            sigma=sigma,
        )
        self.register_buffer("mean_log_degree", torch.ones(()))
        lasts = [not self.per_parameter and k == NUM_LAYERS - 1 for k in range(NUM_LAYERS)]
        self.layers = nn.ModuleList(Layer(1.0, dropout, last, residual) for last in lasts)
        self.head = head_of(head, frame, (WIDTH, WIDTH, WIDTH), WIDTH)

    def forward(self, batch: Batch) -> Float[Tensor, "networks scores"] | tuple[Tensor, Tensor]:
        """Scores of the networks of a batch from `to_batch`; or numbers for all nodes and, in the network's own
        direction, all edges, (nodes, numbers) and (edges, features * numbers), network after network."""
        nodes = self.encoder.nodes(batch)
        edges = self.encoder.edges(self.encoder.encoded(batch, torch.ones_like(batch.edge_reversed)))
        for layer in self.layers:
            layer.propagation.aggr_module.delta = self.mean_log_degree  # a buffer: it is loaded with the weights
            nodes, edges = layer(nodes, batch.edge_index, edges, batch.batch)
        if self.per_parameter:
            return self.head["node"](nodes), self.head["edge"](edges[~batch.edge_reversed])
        read = batch.role == OUTPUT
        states, _ = to_dense_batch(nodes[read], batch.batch[read], max_num_nodes=self.outputs)
        return self.head(states.flatten(1))
