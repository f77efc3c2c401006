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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.batch import GraphBatch
from ngcore.graph.collection import Collection
from ngcore.graph.frame import Frame
from ngcore.models.affine import Affine, composing
from ngcore.models.encoder import COMPILATION, Encoder, Networks, Normalization, Probing, frame_of
from ngcore.models.heads import Answer, Head, PerParameter, PerParameterHead, ScoresHead, rename_old, require_head
from ngcore.models.kernels.dropout import dropout
from ngcore.models.kernels.moments import at_least_float32
from ngcore.models.pairs import EVERY, Pairs, Places, of_stacks, pair_states, pairs_of
from ngcore.models.reading import prepared


class Widths(NamedTuple):
    """Of the states of nodes and of pairs, and of the attention, all heads together."""

    node: int = 64
    edge: int = 32
    attention: int = 128
    heads: int = 4


INR_WIDTHS = Widths()  # of the paper's experiments on INRs (appendix D.1)
CNN_WIDTHS = Widths(node=16, edge=8, attention=32, heads=1)  # on CNNs (appendix D.2); attention's in proportion


class RelationalAttention(nn.Module):
    """Attention in which pairs of nodes have states of their own, up to and including its output Linears."""

    def __init__(self, widths: Widths = INR_WIDTHS) -> None:
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
        scores = at_least_float32(scores)
        from_query = from_query + (mixed + mixed.mT) @ common
        for (rows, columns), own in blocks:
            scores[:, rows, columns] += self.relational(own, mixed, from_query[:, rows], from_key[:, columns])
        attention = self.weights(scores)
        gathered = torch.einsum("brnh,bnhd->brhd", attention, value * (scale @ common) + shift @ common)
        gathered = at_least_float32(gathered)
        for (rows, columns), own in blocks:
            gathered[:, rows] += self.gathered(attention[:, rows, columns], own, value[:, columns], shift, scale)
        return self.output(gathered)

    def edge_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """QᵀK (heads, edge, edge), T and S (heads, width, edge)."""
        query, key, shift, scale = self.edge_qkss.weight.unflatten(0, (4, self.heads, -1))
        with composing(query):
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
        bilinear, from_query, from_key, edges = map(at_least_float32, (bilinear, from_query, from_key, edges))
        return ((bilinear + from_query.unsqueeze(2) + from_key.unsqueeze(1)) * edges.unsqueeze(3)).sum(-1)

    def gathered(
        self, attention: Tensor, edges: Tensor, value: Tensor, shift: Tensor, scale: Tensor
    ) -> Float[Tensor, "batch rows heads width"]:
        """Σ_j a_ij (S e_ij ⊙ v_j + T e_ij)"""
        scaled = F.linear(edges, scale.flatten(0, 1)).unflatten(-1, (self.heads, -1))
        mean_edge = torch.einsum("brnh,brnc->brhc", attention, edges)
        shifted = torch.einsum("brhc,hdc->brhd", mean_edge, shift)
        attention, scaled, value = map(at_least_float32, (attention, scaled, value))
        return (attention.unsqueeze(-1) * scaled * value.unsqueeze(1)).sum(2) + shifted

    def output(self, gathered: Float[Tensor, "batch rows heads width"]) -> Float[Tensor, "batch rows node"]:
        """Both output Linears as one."""
        both = Affine.of(self.attention_linear).after(Affine.of(self.attention_output))
        return both(gathered.flatten(2))


class NGTLayer(nn.Module):
    """Relational attention and feed-forward on nodes, then the update of the edges from their new states.

    In two steps, `gather` and the call itself: each is compiled apart, and what gathers from pairs that are known in
    another form takes the first one's place.

    Args:
        updates_edges: pairs are read after the layer.
    """

    def __init__(self, updates_edges: bool, dropout: float, widths: Widths = INR_WIDTHS) -> None:
        super().__init__()
        self.dropout = dropout
        node, edge = widths.node, widths.edge
        self.attention = RelationalAttention(widths)
        self.node_norm1 = nn.LayerNorm(node)
        self.node_feed1 = nn.Linear(node, 2 * node, bias=False)
        self.node_feed2 = nn.Linear(2 * node, node)
        self.node_norm2 = nn.LayerNorm(node)
        if updates_edges:
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
        self, nodes: Tensor, edges: Tensor, rows: slice = EVERY, present: Bool[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "batch rows node"]:
        """What the nodes `rows` gather; nodes that are not `present` are not read."""
        return self.attention(nodes, edges, rows, present)

    def forward(
        self,
        nodes: Float[Tensor, "batch n node"],
        gathered: Float[Tensor, "batch rows node"],
        edges: Float[Tensor, "batch rows n edge"],
        rows: slice = EVERY,
        updated: tuple[Pairs, ...] = (),
    ) -> tuple[Float[Tensor, "batch rows node"], tuple[Tensor, ...]]:
        """New states of the nodes `rows`, and of every set of pairs that is `updated`."""
        nodes = self.node_norm1(nodes[:, rows] + self.drop(gathered))
        nodes = self.node_norm2(nodes + self.drop(self.node_feed2(F.gelu(self.node_feed1(nodes)))))
        return nodes, tuple(self.update_edges(nodes, edges, *pairs) for pairs in updated)

    def update_edges(
        self, nodes: Tensor, edges: Tensor, rows: slice, columns: slice
    ) -> Float[Tensor, "batch rows columns edge"]:
        """New states of pairs (i, j) from e_ij, e_ji, v_i and v_j."""
        own, mirrored = edges[:, rows, columns], edges[:, columns, rows].transpose(1, 2)
        # all biases as one, so that their gradient is one sum: PyTorch 2.13 can't compile two equal ones in bfloat16
        bias = self.edge_pair.bias + self.edge_target.bias + self.edge_source.bias
        pair = F.linear(torch.cat([own, mirrored], dim=-1), self.edge_pair.weight, bias)
        target = F.linear(nodes[:, rows], self.edge_target.weight)
        source = F.linear(nodes[:, columns], self.edge_source.weight)
        hidden = F.gelu(pair + target.unsqueeze(2) + source.unsqueeze(1))
        edges = self.edge_norm1(own + self.drop(self.edge_output(hidden)))
        return self.edge_norm2(edges + self.drop(self.edge_feed2(F.gelu(self.edge_feed1(edges)))))


def transform(
    layers: nn.ModuleList,
    batch: GraphBatch,
    nodes: Float[Tensor, "copies nodes node"],
    common: Float[Tensor, " edge"],
    own: Sequence[Float[Tensor, "_ _ _ edge"]],
    read: slice | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers, on first states of nodes and of pairs: `common`, and where there are edges their own added to it.

    Args:
        read: the places of the nodes that are read after the last layer; None for everything.

    Returns:
        Last states of the nodes that are read, (networks, rows, node), and no edges; or of all nodes, (copies, nodes,
        node), and of the edges of every stack, (blocks, targets, sources, edge).
    """
    places = Places.of(batch)
    pairs = pairs_of(batch) if places.in_order else None
    nodes = places.spread(nodes)
    rows = [EVERY] * (len(layers) - 1) + [EVERY if read is None else read]
    updated: list[tuple[Pairs, ...]] = [((row, EVERY),) for row in rows[1:]]
    updated.append((pairs or ((EVERY, EVERY),)) if read is None else ())
    edges = (pair_states(batch, places, pairs, common, own),)
    for k, layer in enumerate(layers):
        if k == 0 and pairs is not None and rows[0] == EVERY:
            gathered = layer.attention.of_blocks(nodes, common, list(zip(pairs, own, strict=True)))
        else:
            gathered = layer.gather(nodes, *edges, rows[k], places.present)
        nodes, edges = layer(nodes, gathered, *edges, rows[k], updated[k])
    if read is not None:
        return nodes, ()
    return places.collect(nodes, batch.copies), edges if pairs else of_stacks(edges[0], batch, places)


class NGT(nn.Module):
    """NG-T: a transformer over all pairs of a network's neurons, of which the connected ones have the weights' states.

    Norms follow the residual sums. Pairs that are no edge of the network have a state of their own: a weight of 0 is
    another one, where weights have Fourier features. (By a Linear, a weight that is its layer's mean enters like none.)
    With class scores for 10 classes and a 2-32-32-1 network it has 376,586 parameters (the paper states 378,090).

    Args:
        networks: what it reads: a wiring, the frame of several, or a collection of networks.
        head: what is asked for: `Scores(classes)`, or `PerParameter(numbers)`.
        widths: of states and attention, `INR_WIDTHS` or `CNN_WIDTHS` in the paper.
        layers: of the transformer.
        probes: number of probe points (paper, section 2.4), 0 for none; `probing`: "learned", "random" or "grid".
        positions: give nodes their positional embeddings (section 2.4).
        activations: give nodes the embedding of their activation; None: where the networks have several.
        sigma: standard deviation of the Fourier frequencies of weights and biases; None for Linears of the numbers.
        normalization: "layer": parameters are standardized per layer once `fit_normalization` is given; or "none".
        dropout: of what attention gathers, of feed-forwards and of edge updates.
    """

    def __init__(
        self,
        networks: Wiring | Frame | Collection,
        head: Head,
        *,
        widths: Widths = INR_WIDTHS,
        layers: int = 4,
        probes: int = 0,
        probing: Probing = "learned",
        positions: bool = True,
        activations: bool | None = None,
        sigma: float | None = 1.0,
        normalization: Normalization = "layer",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        require_head(head)
        self.frame, self.widths = frame_of(networks), widths
        self.wiring = networks if isinstance(networks, Wiring) else None
        self.encoder = Encoder(
            self.frame,
            widths.node,
            widths.edge,
            edge_copies=1,
            sigma=sigma,
            probes=probes,
            probing=probing,
            positions=positions,
            activations=activations,
            normalization=normalization,
        )
        self.per_parameter = isinstance(head, PerParameter)
        self.layers = nn.ModuleList(
            NGTLayer(self.per_parameter or k < layers - 1, dropout, widths) for k in range(layers)
        )
        if self.per_parameter:
            self.head: ScoresHead | PerParameterHead = PerParameterHead(self.frame, head, widths.node, widths.edge)
        else:
            self.head = ScoresHead(self.frame.outputs, head, (widths.node, 2 * widths.node))
        self.register_load_state_dict_pre_hook(_load_old)

    def fit_normalization(self, networks: Networks, rows: Int[Tensor, " networks"] | None = None) -> None:
        """Take a training set's statistics, by which every input is standardized: the networks `rows`, or all.

        Raises:
            ValueError: a parameter is NaN or infinite.
        """
        self.encoder.standardize.fit(networks, rows)

    def compile_parts(self) -> None:
        """Compile the parts that a training step spends its time in: for networks of one wiring, whose shapes stay."""
        for layer in self.layers:
            layer.compile(**COMPILATION)
        for layer in self.layers[1:]:  # the first one's, over small blocks, runs as it is
            layer.attention.compile(**COMPILATION)

    def forward(self, graph: NeuralGraph | GraphBatch) -> Answer:
        """Scores (networks, count); or graphs of the same wirings, with `count` numbers for each on nodes and edges."""
        batch = prepared(self, graph)
        common, own = self._first_edges(batch)
        read = None if self.per_parameter else Places.of(batch).outputs
        nodes, edges = transform(self.layers, batch, self.encoder.nodes(batch), common, own, read)
        if self.per_parameter:
            return self.head(batch, self.head.node(nodes), tuple(map(self.head.edge, edges)))
        return self.head(self._of_outputs(batch, nodes).flatten(1))

    def _of_outputs(
        self, batch: GraphBatch, nodes: Float[Tensor, "networks rows node"]
    ) -> Float[Tensor, "networks outputs node"]:
        """States of output neurons, which are the first rows; zeros for those that a network lacks."""
        if nodes.shape[1] < self.frame.outputs:
            nodes = F.pad(nodes, (0, 0, 0, self.frame.outputs - nodes.shape[1]))
        present = (batch.outputs >= 0).repeat(batch.copies, 1).unsqueeze(2)
        return torch.where(present, nodes, 0)

    def _first_edges(self, batch: GraphBatch) -> tuple[Float[Tensor, " edge"], list[Float[Tensor, "_ _ _ edge"]]]:
        """First state of all pairs that no weight joins, and by how much those of the blocks differ from it.

        Where there is no edge the Fourier features are masked out."""
        affine = self.encoder.edge_affine()
        without_bias = affine._replace(bias=torch.zeros_like(affine.bias))
        own = []
        for stack in batch.stacks:
            numbers, pending = self.encoder.edges(self.encoder.standardize.edges(stack), (0,), without_bias)
            own.append(numbers if pending is None else pending(numbers))
        return affine.bias, own


def _load_old(module: NGT, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    rename_old(state_dict, prefix)
