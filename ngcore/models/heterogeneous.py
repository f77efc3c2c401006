"""NG-GNN and NG-T for networks of different depth, width, kernels, activations and skip connections in one batch.

They are the layers of `ng_gnn` and `ng_t` on a `GraphBatch`. NG-GNN computes blocks of one shape together, whichever
networks they belong to; NG-T fills up every network to the largest of its batch and masks what it filled in. Either
way a network's scores are the same alone and in any batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ngcore.graph.batch import Collection, Frame, GraphBatch
from ngcore.models.encoder import FREQUENCIES, fourier_features
from ngcore.models.kernels.moments import Moments
from ngcore.models.ng_gnn import DIRECTIONS, WIDTH, PNALayer
from ngcore.models.ng_t import EVERY, NGTLayer, Widths

LAYERS = 4
STATISTICS_BATCH = 256
WIDTHS = Widths(node=16, edge=8, attention=32, heads=1)  # of NG-T (paper, appendix D.2)


class Affine(NamedTuple):
    """An affine map that is no module's own."""

    weight: Float[Tensor, "width features"]
    bias: Float[Tensor, " width"]


class FrameStandardize(nn.Module):
    """One mean and standard deviation per layer of the frame, weights and biases apart; see `encoder.Standardize`.

    Numbers that no parameter stands for (slot 0 of the frame) stay as they are, and so do zeros around kernels. A layer
    that no network of the training set has is taken like the deepest before it that one has.
    """

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        for kind in ("node", "edge"):
            self.register_buffer(f"{kind}_mean", torch.zeros(frame.layers + 2))
            self.register_buffer(f"{kind}_std", torch.ones(frame.layers + 2))

    @torch.no_grad()
    def fit(self, networks: Collection, rows: Int[Tensor, " networks"]) -> None:
        """Take the statistics of a training set, the networks `rows`.

        Raises:
            ValueError: a parameter is NaN or infinite, the error names the network; the networks are in another frame.
        """
        self.check_frame(networks.frame)
        slots = len(self.node_mean)
        sums = {kind: torch.zeros(3, slots, dtype=torch.float64, device=rows.device) for kind in ("node", "edge")}
        for part in rows.split(STATISTICS_BATCH):
            batch = networks[part]
            if not is_finite(batch):
                bad = next(row for row in part.tolist() if not is_finite(networks[part.new_tensor([row])]))
                raise ValueError(f"network {bad} of the collection holds NaN or infinity")
            edge_slot = batch.edge_slot.unsqueeze(1).expand_as(batch.weights)[batch.present]
            add_powers(sums["node"], batch.node_slot, batch.biases)
            add_powers(sums["edge"], edge_slot, batch.weights[batch.present])
        for kind, own in sums.items():
            self._set(getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_std"), *own)

    @staticmethod
    def _set(mean: Tensor, std: Tensor, count: Tensor, total: Tensor, square: Tensor) -> None:
        """Statistics of every slot but the first from the count, sum and sum of squares of its numbers."""
        for slot in range(1, len(mean)):
            if count[slot] > 0:
                own = total[slot] / count[slot]
                variance = square[slot] / count[slot] - own**2
                constant = variance <= 1e-12 * square[slot] / count[slot]  # but for rounding
                mean[slot], std[slot] = own, 1.0 if constant else variance.sqrt()
            elif slot > 1:
                mean[slot], std[slot] = mean[slot - 1], std[slot - 1]

    def check_frame(self, frame: Frame) -> None:
        if frame != self.frame:
            raise ValueError(
                f"this model was built for {self.frame}, the networks are in {frame}: collect them in the model's own, "
                "Collection(graphs, model.frame)"
            )

    def forward(self, batch: GraphBatch) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "edges features"]]:
        """Standardized biases and weights.

        Raises:
            ValueError: the batch is in another frame.
        """
        self.check_frame(batch.frame)
        biases = (batch.biases - self.node_mean[batch.node_slot]) / self.node_std[batch.node_slot]
        mean, std = self.edge_mean[batch.edge_slot].unsqueeze(1), self.edge_std[batch.edge_slot].unsqueeze(1)
        return biases, torch.where(batch.present, (batch.weights - mean) / std, 0)


def add_powers(sums: Float[Tensor, "3 slots"], slot: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
    """Add the count, the sum and the sum of squares of the values of every slot."""
    values = values.double()
    for own, power in zip(sums, (torch.ones_like(values), values, values.square()), strict=True):
        own.index_add_(0, slot, power)


def is_finite(batch: GraphBatch) -> bool:
    """Whether no parameter is NaN or infinite."""
    return bool(batch.biases.isfinite().all() and batch.weights.isfinite().all())


class FrameEncoder(nn.Module):
    """First states of nodes and edges, as of `encoder.Encoder`, with an embedding of every neuron's activation.

    An edge's features are all of its window: its Fourier features are those of a vector.

    Args:
        edge_copies: 3 for [e, eᵀ, e + eᵀ], 1 for e alone.
        activations: give nodes the embedding of their activation.
    """

    def __init__(
        self,
        frame: Frame,
        node_width: int,
        edge_width: int,
        *,
        edge_copies: int,
        sigma: float | None,
        positions: bool,
        activations: bool,
    ) -> None:
        super().__init__()
        self.frame = frame
        self.standardize = FrameStandardize(frame)
        for kind, scalars in (("node", 1), ("edge", edge_copies * frame.features)):
            frequencies = None if sigma is None else torch.randn(scalars, FREQUENCIES) * sigma
            self.register_buffer(f"{kind}_frequencies", frequencies)
        self.node_fourier = nn.Linear(1 if sigma is None else 2 * FREQUENCIES, node_width)
        self.edge_fourier = nn.Linear(edge_copies * frame.features if sigma is None else 2 * FREQUENCIES, edge_width)
        self.node_linear = nn.Linear(node_width, node_width)
        self.edge_linear = nn.Linear(edge_width, edge_width)
        rows = frame.inputs + frame.layers + frame.outputs + frame.locations
        self.positions = nn.Parameter(torch.randn(rows, node_width)) if positions else None
        rows = len(frame.activations) + 1
        self.activations = nn.Parameter(torch.randn(rows, node_width)) if activations else None

    def nodes(self, batch: GraphBatch, biases: Float[Tensor, " nodes"]) -> Float[Tensor, "nodes width"]:
        """First states of all nodes from their standardized biases."""
        frequencies = None if self.node_frequencies is None else self.node_frequencies[0]
        states = self.node_linear(self.node_fourier(fourier_features(biases.unsqueeze(1), frequencies)))
        if self.positions is not None:
            states = states + self.positions[batch.position]
        return states if self.activations is None else states + self.activations[batch.activation]

    def edges(
        self, weights: Float[Tensor, "edges features"], copies: tuple[int, ...]
    ) -> tuple[Float[Tensor, "edges f"], Affine]:
        """What edges begin with, and the affine map of it to their first states.

        `copies` says in which of [e, eᵀ, e + eᵀ] the standardized weights stand. Without Fourier features the weights
        themselves are all that is needed: no gradient goes back to them.
        """
        weight = self.edge_linear.weight @ self.edge_fourier.weight
        bias = self.edge_linear.weight @ self.edge_fourier.bias + self.edge_linear.bias
        if self.edge_frequencies is None:
            return weights, Affine(weight.unflatten(1, (-1, self.frame.features))[:, copies].sum(1), bias)
        frequencies = self.edge_frequencies.unflatten(0, (-1, self.frame.features))[copies,].sum(0)
        phase = (2 * math.pi) * (weights @ frequencies)
        return torch.cat([phase.cos(), phase.sin()], dim=1), Affine(weight, bias)


@dataclass(frozen=True)
class Way:
    """Messages along the edges of a stack or, reversed, against them.

    Shapes:
        rows, columns: (blocks, _) the stack's targets and its sources, whichever way messages run
        hops: (blocks,) from those that get the messages to an output neuron
    """

    rows: Int[Tensor, "blocks t"]
    columns: Int[Tensor, "blocks s"]
    hops: Int[Tensor, " blocks"]
    reverse: bool

    @property
    def receivers(self) -> Int[Tensor, "blocks _"]:
        return self.columns if self.reverse else self.rows

    def ends(self, to: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' and the columns' of what nodes add to messages as targets and as sources, (blocks, _, width)."""
        rows, columns = (of, to) if self.reverse else (to, of)
        return rows[self.rows], columns[self.columns]

    def select(self, blocks: Tensor) -> Way:
        return Way(self.rows[blocks], self.columns[blocks], self.hops[blocks], self.reverse)


Messages = list[tuple[Way, Float[Tensor, "_ _"]]]  # ways, and what stands on their edges


def within(messages: Messages, hops: int) -> Messages:
    """The blocks whose messages go to neurons that are at most this far from an output neuron."""
    found = []
    for way, edges in messages:
        near = way.hops <= hops
        if near.all():
            found.append((way, edges))
        elif near.any():
            blocks = near.nonzero().squeeze(1)
            found.append((way.select(blocks), edges.unflatten(0, (len(near), -1))[blocks].flatten(0, 1)))
    return found


class StackedLayer(PNALayer):
    """A layer of NG-GNN on stacks of blocks."""

    def forward(
        self,
        nodes: Float[Tensor, "nodes width"],
        messages: Messages,
        film: dict[bool, tuple[Tensor, Tensor]],
        degrees: Float[Tensor, " nodes"],
        scaler: Float[Tensor, " nodes"],
    ) -> Float[Tensor, "nodes width"]:
        """New states of the nodes that get messages along all of their edges; `film` takes FiLM from the edges, by
        whether messages are reversed."""
        to, of = self.message_terms(nodes)
        index, found = [], []
        for way, edges in messages:
            rows, columns = way.ends(to, of)
            read = F.linear(edges, *film[way.reverse]).view(*rows.shape[:2], columns.shape[1], 2 * self.width)
            moments = Moments.apply(*read.split(self.width, dim=-1), rows, columns, 1 if way.reverse else 2)
            index.append(way.receivers.flatten())
            found.append([m.flatten(0, 1) for m in moments])
        index = torch.cat(index)
        total, square, low, high = (torch.cat(parts) for parts in zip(*found, strict=True))
        zero = torch.zeros_like(nodes)
        mean = zero.index_add(0, index, total) / degrees.unsqueeze(1)
        square = zero.index_add(0, index, square) / degrees.unsqueeze(1)
        std = ((square - mean.square()).relu() + 1e-5).sqrt()
        index = index.unsqueeze(1).expand_as(low)
        low = zero.scatter_reduce(0, index, low, "amin", include_self=False)
        high = zero.scatter_reduce(0, index, high, "amax", include_self=False)
        return self.added(nodes, self.change(nodes, torch.cat([mean, low, high, std], dim=1), scaler))

    def change(self, nodes: Tensor, gathered: Tensor, scaler: Tensor) -> Float[Tensor, "nodes width"]:
        """PNA's update: aggregates by identity and amplification, then two Linears as one."""
        own, plain, amplified = self.update.weight.split([self.width, 4 * self.width, 4 * self.width], dim=1)
        weight = self.output.weight @ torch.cat([own, plain], dim=1)
        bias = self.output.weight @ self.update.bias + self.output.bias
        change = F.linear(torch.cat([nodes, gathered], dim=1), weight, bias)
        return change + scaler.unsqueeze(1) * F.linear(gathered, self.output.weight @ amplified)

    def new_edges(self, nodes: Tensor, messages: Messages, affine: dict[bool, tuple[Tensor, Tensor]]) -> Messages:
        """New states of edges before their output Linear; `affine` is of their old states, as `film` is."""
        to, of = self.edge_target(nodes), self.edge_source(nodes)
        found = []
        for way, edges in messages:
            rows, columns = way.ends(to, of)
            state = F.linear(edges, *affine[way.reverse]).view(*rows.shape[:2], columns.shape[1], self.width)
            found.append((way, F.silu(state + rows.unsqueeze(2) + columns.unsqueeze(1)).flatten(0, 2)))
        return found


class HeterogeneousNGGNN(nn.Module):
    """NG-GNN for a property of networks of any shape.

    Of the CNN Wild Park (kernels up to 7x7, 3 inputs, 5 hidden layers, 10 outputs, 6 activations) it has 369,025
    parameters with one output and Fourier features (paper, appendix D.2), 345,729 without. Options are as of
    `NGGNNStack`.

    Args:
        outputs: numbers to predict.
        activations: give nodes the embedding of their activation (table 6 goes without).
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
        self.frame = frame
        self.encoder = FrameEncoder(
            frame, WIDTH, WIDTH, edge_copies=3, sigma=sigma, positions=positions, activations=activations
        )
        self.register_buffer("mean_log_degree", torch.ones(()))
        self.layers = nn.ModuleList(StackedLayer(k < LAYERS - 1, dropout) for k in range(LAYERS))
        self.head = nn.Sequential(
            nn.Linear(frame.outputs * WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, outputs),
        )

    @torch.no_grad()
    def fit_normalization(self, networks: Collection, rows: Int[Tensor, " networks"]) -> None:
        """Take the training set's statistics: of parameters, and PNA's δ, the mean of log(degree + 1) over nodes."""
        self.encoder.standardize.fit(networks, rows)
        logs = [torch.log(degrees(networks[part]) + 1) for part in rows.split(STATISTICS_BATCH)]
        self.mean_log_degree.copy_(torch.cat(logs).mean())

    def forward(self, batch: GraphBatch) -> Float[Tensor, "networks outputs"]:
        biases, weights = self.encoder.standardize(batch)
        nodes = self.encoder.nodes(batch, biases)
        messages: Messages = []
        before: dict[bool, Affine | nn.Linear | None] = {}
        for reverse, copies in zip((False, True), DIRECTIONS["both"], strict=True):
            edges, before[reverse] = self.encoder.edges(weights, copies)
            if edges.shape[1] > WIDTH:  # cheaper to apply the map now than together with the first layer's
                edges, before[reverse] = F.linear(edges, *before[reverse]), None
            for stack in batch.stacks:
                hops = stack.source_hops if reverse else stack.target_hops
                messages.append((Way(stack.targets, stack.sources, hops, reverse), edges[stack.edges]))
        degree = degrees(batch)
        scaler = torch.log(degree + 1) / self.mean_log_degree
        degree = degree.clamp(min=1)  # to divide by: inputs that nothing reads gather nothing
        messages = within(messages, LAYERS - 1)
        for hops, layer in zip(reversed(range(LAYERS)), self.layers, strict=True):
            read = {reverse: layer.edge_affine(own) for reverse, own in before.items()}
            film = {reverse: (weight[: 2 * WIDTH], bias[: 2 * WIDTH]) for reverse, (weight, bias) in read.items()}
            nodes = layer(nodes, messages, film, degree, scaler)
            if layer.updates_edges:
                state = {reverse: (weight[2 * WIDTH :], bias[2 * WIDTH :]) for reverse, (weight, bias) in read.items()}
                messages = layer.new_edges(nodes, within(messages, hops - 1), state)
                before = dict.fromkeys(before, layer.edge_output)
        return self.head(nodes[batch.outputs].flatten(1))


def degrees(batch: GraphBatch) -> Float[Tensor, " nodes"]:
    """Number of edges at every node, in both directions."""
    found = torch.zeros_like(batch.biases)
    for stack in batch.stacks:
        _, targets, sources = stack.shape
        for nodes, count in ((stack.targets, sources), (stack.sources, targets)):
            found.index_add_(0, nodes.flatten(), found.new_full((nodes.numel(),), count))
    return found


class HeterogeneousNGT(nn.Module):
    """NG-T for a property of networks of any shape; widths and heads as of the paper's appendix D.2.

    The width of its attention and of its head, which the paper does not say, keep the proportions of the model for
    INRs. Options are as of `HeterogeneousNGGNN`.
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
        self.frame, widths = frame, WIDTHS
        self.encoder = FrameEncoder(
            frame, widths.node, widths.edge, edge_copies=1, sigma=sigma, positions=positions, activations=activations
        )
        rows = [EVERY] * (LAYERS - 1) + [slice(frame.outputs)]  # the outputs come first
        updated = [*(((row, EVERY),) for row in rows[1:]), ()]
        self.layers = nn.ModuleList(NGTLayer(rows[k], updated[k], dropout, widths) for k in range(LAYERS))
        self.head = nn.Sequential(
            nn.Linear(frame.outputs * widths.node, 2 * widths.node), nn.ReLU(), nn.Linear(2 * widths.node, outputs)
        )

    def fit_normalization(self, networks: Collection, rows: Int[Tensor, " networks"]) -> None:
        """Take the training set's statistics, by which every input is standardized."""
        self.encoder.standardize.fit(networks, rows)

    def forward(self, batch: GraphBatch) -> Float[Tensor, "networks outputs"]:
        biases, weights = self.encoder.standardize(batch)
        place, present = padded(batch)
        states = self.encoder.nodes(batch, biases)
        nodes = states.new_zeros(*present.shape, states.shape[1]).index_put((batch.network, place), states)
        edges = (self.first_pairs(batch, weights, place, present.shape[1]),)
        for layer in self.layers:
            nodes, edges = layer(nodes, layer.gather(nodes, *edges, present), *edges)
        return self.head(nodes.flatten(1))

    def first_pairs(
        self, batch: GraphBatch, weights: Tensor, place: Int[Tensor, " nodes"], size: int
    ) -> Float[Tensor, "networks size size width"]:
        """First states of all pairs (target, source): what no edge joins has the state of an edge without features."""
        targets = torch.cat([s.targets.unsqueeze(2).expand(s.shape).flatten() for s in batch.stacks])
        sources = torch.cat([s.sources.unsqueeze(1).expand(s.shape).flatten() for s in batch.stacks])
        features, (weight, bias) = self.encoder.edges(weights, (0,))
        states = bias.expand(batch.num_networks, size, size, len(bias))
        index = batch.network[targets], place[targets], place[sources]
        return states.index_put(index, F.linear(features, weight), accumulate=True)


def padded(batch: GraphBatch) -> tuple[Int[Tensor, " nodes"], Bool[Tensor, "networks size"]]:
    """Every node's place in its network, output neurons first, and which places of a padded batch hold a node."""
    is_output = torch.zeros_like(batch.network, dtype=torch.bool)
    is_output[batch.outputs.flatten()] = True
    order = (2 * batch.network + ~is_output).argsort(stable=True)
    first = batch.sizes.cumsum(0) - batch.sizes
    place = torch.empty_like(batch.network)
    place[order] = torch.arange(len(order), device=order.device) - first[batch.network]
    present = torch.arange(int(batch.sizes.max()), device=place.device) < batch.sizes.unsqueeze(1)
    return place, present
