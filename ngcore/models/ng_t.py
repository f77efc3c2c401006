"""NG-T: a transformer with relational attention, modulated values and edge updates (paper, section 3, equation 5).

Attention runs over all pairs of nodes (i target, j source), so the pairs are what costs. The algebra is that of the
relational transformer (Diao & Loynd 2023), rearranged so that as little as possible is formed per pair:

- scores: with q = q_i + Q e_ij and k = k_j + K e_ij, q·k = q_i·k_j + e_ij·(Kᵀq_i + Qᵀk_j + QᵀK e_ij), one product
  of the pair's state by QᵀK instead of two by Q and K;
- values: Σ_j a_ij (S e_ij ⊙ v_j + T e_ij) = Σ_j a_ij (S e_ij ⊙ v_j) + T Σ_j a_ij e_ij;
- in the first layer the pairs that no weight joins, three of four in an INR, share one state: scores and values are
  expanded about it;
- the last layer is computed for the rows that the head reads alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.encoder import COMPILATION, Encoder, fourier_features
from ngcore.models.kernels.dropout import dropout

LAYERS = 4


class Widths(NamedTuple):
    """Of the states of nodes and of pairs, and of the attention, all heads together."""

    node: int = 64
    edge: int = 32
    attention: int = 128
    heads: int = 4


WIDTHS = Widths()  # of the paper's experiments on INRs


Pairs = tuple[slice, slice]  # rows (targets) and columns (sources) of the pairs of nodes
EVERY = slice(None)


class RelationalAttention(nn.Module):
    """Attention in which pairs of nodes have states of their own, up to and including its output Linears."""

    def __init__(self, widths: Widths = WIDTHS) -> None:
        super().__init__()
        node, edge, attention, self.heads = widths
        self.node_qkv = nn.Linear(node, 3 * attention, bias=False)
        self.edge_qkss = nn.Linear(edge, 4 * attention, bias=False)  # q, k, shift, scale
        self.attention_output = nn.Linear(attention, node)
        self.attention_linear = nn.Linear(node, node)

    def forward(
        self,
        nodes: Float[Tensor, "batch n node"],
        edges: Float[Tensor, "batch rows n edge"],
        rows: slice,
        present: Bool[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, "batch rows node"]:
        """What the nodes `rows` gather from all nodes, or from those that are `present`; `edges` are the pairs of
        these rows."""
        mixed, shift, scale = self.edge_maps()
        scores, from_query, from_key, value = self.node_terms(nodes, rows)
        scores = scores + self.relational(edges, mixed, from_query, from_key)
        if present is not None:
            scores = scores.masked_fill(~present[:, None, :, None], -torch.inf)
        return self.output(self.gathered(self.weights(scores), edges, value, shift, scale))

    def of_blocks(
        self,
        nodes: Float[Tensor, "batch n node"],
        common: Float[Tensor, " edge"],
        blocks: Sequence[tuple[Pairs, Float[Tensor, "batch _ _ edge"]]],
    ) -> Float[Tensor, "batch n node"]:
        """The same for pairs that all have one state c, those of some blocks c + d: most pairs cost next to nothing.

        Expanded about c: (c + d)·M(c + d) = c·Mc + d·(Md + (M + Mᵀ)c), and all other terms are linear in d. No two
        blocks have pairs in common.
        """
        mixed, shift, scale = self.edge_maps()
        scores, from_query, from_key, value = self.node_terms(nodes, EVERY)
        scores = (
            scores + (from_query @ common).unsqueeze(2) + (from_key @ common).unsqueeze(1) + mixed @ common @ common
        )
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # as a sum of products is under autocast
        from_query = from_query + (mixed + mixed.mT) @ common
        for (rows, columns), own in blocks:
            scores[:, rows, columns] += self.relational(own, mixed, from_query[:, rows], from_key[:, columns])
        attention = self.weights(scores)
        gathered = torch.einsum("brnh,bnhd->brhd", attention, value * (scale @ common) + shift @ common)
        for (rows, columns), own in blocks:
            gathered[:, rows] += self.gathered(attention[:, rows, columns], own, value[:, columns], shift, scale)
        return self.output(gathered)

    def edge_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """QᵀK (heads, edge, edge), T and S (heads, width, edge)."""
        query, key, shift, scale = self.edge_qkss.weight.unflatten(0, (4, self.heads, -1))
        return torch.einsum("hdc,hde->hce", query, key), shift, scale

    def node_terms(self, nodes: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_i·k_j (batch, rows, n, heads), Kᵀq_i, Qᵀk_j and v_j (batch, nodes, heads, width)."""
        query, key, value = self.node_qkv(nodes).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query = query[:, rows]
        edge_query, edge_key, _, _ = self.edge_qkss.weight.unflatten(0, (4, self.heads, -1))
        scores = torch.einsum("brhd,bnhd->brnh", query, key)
        from_query = torch.einsum("brhd,hdc->brhc", query, edge_key)
        from_key = torch.einsum("bnhd,hdc->bnhc", key, edge_query)
        return scores, from_query, from_key, value

    def weights(self, scores: Float[Tensor, "batch rows n heads"]) -> Float[Tensor, "batch rows n heads"]:
        """Softmax over the sources."""
        width = self.node_qkv.out_features // (3 * self.heads)
        return (scores * width**-0.5).softmax(dim=2)

    def relational(
        self, edges: Tensor, mixed: Tensor, from_query: Tensor, from_key: Tensor
    ) -> Float[Tensor, "batch rows columns heads"]:
        """e_ij·(QᵀK e_ij + Kᵀq_i + Qᵀk_j)"""
        bilinear = F.linear(edges, mixed.flatten(0, 1)).unflatten(-1, (self.heads, -1))
        return ((bilinear + from_query.unsqueeze(2) + from_key.unsqueeze(1)) * edges.unsqueeze(3)).sum(-1)

    def gathered(
        self, attention: Tensor, edges: Tensor, value: Tensor, shift: Tensor, scale: Tensor
    ) -> Float[Tensor, "batch rows heads width"]:
        """Σ_j a_ij (S e_ij ⊙ v_j + T e_ij)"""
        scaled = F.linear(edges, scale.flatten(0, 1)).unflatten(-1, (self.heads, -1))
        mean_edge = torch.einsum("brnh,brnc->brhc", attention, edges)
        shifted = torch.einsum("brhc,hdc->brhd", mean_edge, shift)
        return (attention.unsqueeze(-1) * scaled * value.unsqueeze(1)).sum(2) + shifted

    def output(self, gathered: Float[Tensor, "batch rows heads width"]) -> Float[Tensor, "batch rows node"]:
        """Both output Linears as one."""
        weight = self.attention_linear.weight @ self.attention_output.weight
        bias = self.attention_linear.weight @ self.attention_output.bias + self.attention_linear.bias
        return F.linear(gathered.flatten(2), weight, bias)


class NGTLayer(nn.Module):
    """Relational attention and feed-forward on nodes, then the update of the edges from their new states.

    In two steps, `gather` and the call itself: each is compiled apart, and what gathers from pairs that are known in
    another form takes the first one's place.

    Args:
        attended: rows (targets) of the pairs that enter: the others are not computed.
        updated: the sets of pairs that leave, none where the head reads nodes alone.
    """

    def __init__(self, attended: slice, updated: tuple[Pairs, ...], dropout: float, widths: Widths = WIDTHS) -> None:
        super().__init__()
        self.attended, self.updated, self.dropout = attended, updated, dropout
        node, edge = widths.node, widths.edge
        self.attention = RelationalAttention(widths)
        self.node_norm1 = nn.LayerNorm(node)
        self.node_feed1 = nn.Linear(node, 2 * node, bias=False)
        self.node_feed2 = nn.Linear(2 * node, node)
        self.node_norm2 = nn.LayerNorm(node)
        if updated:
            self.edge_pair = nn.Linear(2 * edge, 2 * edge)
            self.edge_source = nn.Linear(node, 2 * edge)
            self.edge_target = nn.Linear(node, 2 * edge)
            self.edge_output = nn.Linear(2 * edge, edge)
            self.edge_norm1 = nn.LayerNorm(edge)
            self.edge_feed1 = nn.Linear(edge, 2 * edge, bias=False)
            self.edge_feed2 = nn.Linear(2 * edge, edge)
            self.edge_norm2 = nn.LayerNorm(edge)

    def drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)

    def gather(
        self, nodes: Tensor, edges: Tensor, present: Bool[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "batch rows node"]:
        """What the attended nodes gather; nodes that are not `present` are not read."""
        return self.attention(nodes, edges, self.attended, present)

    def forward(
        self,
        nodes: Float[Tensor, "batch n node"],
        gathered: Float[Tensor, "batch rows node"],
        edges: Float[Tensor, "batch rows n edge"],
    ) -> tuple[Float[Tensor, "batch rows node"], tuple[Tensor, ...]]:
        """New states of the attended nodes, and of every set of updated pairs."""
        nodes = self.node_norm1(nodes[:, self.attended] + self.drop(gathered))
        nodes = self.node_norm2(nodes + self.drop(self.node_feed2(F.gelu(self.node_feed1(nodes)))))
        return nodes, tuple(self.update_edges(nodes, edges, *pairs) for pairs in self.updated)

    def update_edges(
        self, nodes: Tensor, edges: Tensor, rows: slice, columns: slice
    ) -> Float[Tensor, "batch rows columns edge"]:
        """New states of pairs (i, j) from e_ij, e_ji, v_i and v_j."""
        own, mirrored = edges[:, rows, columns], edges[:, columns, rows].transpose(1, 2)
        pair = self.edge_pair(torch.cat([own, mirrored], dim=-1))
        target, source = self.edge_target(nodes[:, rows]), self.edge_source(nodes[:, columns])
        hidden = F.gelu(pair + target.unsqueeze(2) + source.unsqueeze(1))
        edges = self.edge_norm1(own + self.drop(self.edge_output(hidden)))
        return self.edge_norm2(edges + self.drop(self.edge_feed2(F.gelu(self.edge_feed1(edges)))))


def block_pairs(wiring: Wiring) -> tuple[Pairs, ...]:
    """The pairs that every block of a wiring connects."""
    nodes = [slice(*ends) for ends in pairwise(wiring.offsets)]
    return tuple((nodes[block.target], nodes[block.source]) for block in wiring.blocks)


class NGTStack(nn.Module):
    """Encoder and layers of NG-T: node width 64, edge width 32, 4 heads over an attention width of 128, 4 layers.

    Norms follow the residual sums. Pairs that are no edge of the network have a state of their own: a weight of 0 is
    another one, where weights have Fourier features. (By a Linear, a weight that is its layer's mean enters like none.)

    Args:
        read: rows (nodes) whose states are read after the last layer.
        read_edges: sets of pairs whose states are read after it.
        dropout: of what attention gathers, of feed-forwards and of edge updates.
        encoding: options of `Encoder`.
    """

    def __init__(
        self,
        wiring: Wiring,
        read: slice,
        read_edges: tuple[Pairs, ...],
        *,
        dropout: float,
        **encoding: Any,
    ) -> None:
        super().__init__()
        self.wiring = wiring
        self.widths = WIDTHS
        self.encoder = Encoder(wiring, self.widths.node, self.widths.edge, edge_features=1, **encoding)
        rows = [EVERY] * (LAYERS - 1) + [read]
        updated = [*(((row, EVERY),) for row in rows[1:]), read_edges]
        self.layers = nn.ModuleList(NGTLayer(rows[k], updated[k], dropout) for k in range(LAYERS))

    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Take the training set's statistics, by which every input is standardized."""
        self.encoder.standardize.fit(graph)

    def compile_parts(self) -> None:
        """Compile the parts that a training step spends its time in."""
        for layer in self.layers:
            layer.compile(**COMPILATION)
        for layer in self.layers[1:]:  # the first one's, over small blocks, runs as it is
            layer.attention.compile(**COMPILATION)

    def first_edges(self, standardized: NeuralGraph) -> tuple[Float[Tensor, " edge"], list[tuple[Pairs, Tensor]]]:
        """First state of all pairs that no weight joins, and by how much those of the blocks differ from it: where the
        wiring has no edge the Fourier features are masked out."""
        weight, common = self.encoder.edge_affine()
        frequencies = self.encoder.edge_frequencies
        features = [
            fourier_features(values, None if frequencies is None else frequencies[0]) for values in standardized.edges
        ]
        return common, list(zip(block_pairs(self.wiring), [F.linear(x, weight) for x in features], strict=True))

    def states(self, graph: NeuralGraph) -> tuple[Float[Tensor, "batch rows node"], tuple[Tensor, ...]]:
        """Last states of the nodes and of the sets of pairs that are read."""
        standardized = self.encoder.standardize(graph)
        nodes = self.encoder.nodes(graph, standardized)
        common, blocks = self.first_edges(standardized)
        first, *layers = self.layers
        gathered = first.attention.of_blocks(nodes, common, blocks)
        nodes, edges = first(nodes, gathered, laid_out(common, blocks, self.wiring.num_nodes))
        for layer in layers:
            nodes, edges = layer(nodes, layer.gather(nodes, *edges), *edges)
        return nodes, edges


def laid_out(common: Tensor, blocks: Sequence[tuple[Pairs, Tensor]], size: int) -> Float[Tensor, "batch n n edge"]:
    """States of all pairs: `common`, and in the blocks their own added to it."""
    states = common.expand(len(blocks[0][1]), size, size, len(common)).clone()
    for (rows, columns), own in blocks:
        states[:, rows, columns] += own
    return states


class NGT(NGTStack):
    """NG-T for a property of the whole input network: class scores of an INR's image.

    For 10 classes and a 2-32-32-1 network it has 376,586 parameters (the paper states 378,090).

    Args: as of `NGTStack`; the head reads one row per output neuron.

    Raises:
        ValueError: the network has several layers of outputs.
    """

    def __init__(
        self,
        wiring: Wiring,
        num_classes: int,
        *,
        dropout: float = 0.2,
        sigma: float | None = 1.0,
        **encoding: Any,
    ) -> None:
        output, *others = wiring.with_role("output")
        if others:
            raise ValueError(f"the head reads one layer of outputs, and this network has {1 + len(others)}: use NGGNN")
        read = slice(wiring.offsets[output], wiring.offsets[output + 1])
        super().__init__(wiring, read, (), dropout=dropout, sigma=sigma, **encoding)
        self.head = nn.Sequential(
            nn.Linear(wiring.groups[output].size * self.widths.node, 2 * self.widths.node),
            nn.ReLU(),
            nn.Linear(2 * self.widths.node, num_classes),
        )

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        nodes, _ = self.states(graph)
        return self.head(nodes.flatten(1))


class EquivariantNGT(NGTStack):
    """NG-T with numbers for every parameter: the stack without its aggregation over nodes (paper, appendix D.1).

    The last layer updates the pairs that are edges of the network. A Linear of the states, of both kinds, is the head.

    Args:
        outputs: numbers per parameter.
        others: as of `NGTStack`.
    """

    def __init__(
        self,
        wiring: Wiring,
        outputs: int = 1,
        *,
        dropout: float = 0.3,
        sigma: float | None = 3.0,
        **encoding: Any,
    ) -> None:
        pairs = block_pairs(wiring)
        super().__init__(wiring, EVERY, pairs, dropout=dropout, sigma=sigma, **encoding)
        self.node_head = nn.Linear(self.widths.node, outputs)
        self.edge_head = nn.Linear(self.widths.edge, outputs)

    def forward(self, graph: NeuralGraph) -> NeuralGraph:
        """The same wiring with `outputs` features on nodes and edges."""
        nodes, edges = self.states(graph)
        sizes = [group.size for group in self.wiring.groups]
        return NeuralGraph(self.wiring, self.node_head(nodes).split(sizes, dim=1), tuple(map(self.edge_head, edges)))
