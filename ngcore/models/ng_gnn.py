"""NG-GNN: principal neighbourhood aggregation, FiLM messages, edge updates (paper, section 3, equations 3 and 4).

Written on blocks: layers are complete bipartite, so a message is a broadcast and an aggregation a reduction over the
source axis. Where Linears meet without a non-linearity between them they are rearranged: Linear([v_i, v_j]) is a Linear
of each, broadcast together, and a Linear of a Linear is one. What the head does not read is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.batch import Ends, GraphBatch, batch_of
from ngcore.graph.collection import Collection
from ngcore.graph.frame import Frame
from ngcore.models.affine import Affine
from ngcore.models.encoder import (
    COMPILATION,
    Encoder,
    Networks,
    Normalization,
    Probing,
    fourier_states,
    frame_of,
    graphs_of,
)
from ngcore.models.heads import Answer, Head, PerParameter, PerParameterHead, ScoresHead, rename_old, require_head
from ngcore.models.kernels.dropout import dropout
from ngcore.models.kernels.moments import Moments
from ngcore.models.messages import DIRECTIONS, Messages, Neighbours, copies_of, degrees, first_blocks, messages_of
from ngcore.models.reading import prepared

EPSILON = 1e-5  # under the root of a variance


class PNALayer(nn.Module):
    """One round of messages, their aggregation, and the updates of nodes and edges:

        m_ij = scale(e_ij) ⊙ (W [v_i, v_j] + b) + shift(e_ij)                     equation 4
        v_i' = v_i + U [v_i, mean, min, max, std of the m_ij, each as it is and amplified]
        e_ij' = W (SiLU(W_e e_ij + W_i v_i' + W_j v_j'))

    Norms are per node, and node updates are residual: the paper does not say, but a plain stack hides the input behind
    its own constants at first. Without, the new state takes the old one's place, and the norm is over a network.

    Args:
        updates_edges: the next layer or the head reads the edges after it.
        width: of the states of nodes and edges.
        residual: node updates are added to the state.
    """

    def __init__(self, updates_edges: bool, dropout: float, width: int, residual: bool = True) -> None:
        super().__init__()
        self.updates_edges, self.dropout, self.width, self.residual = updates_edges, dropout, width, residual
        self.film = nn.Linear(width, 2 * width)
        self.message = nn.Linear(2 * width, width)
        self.update = nn.Linear(9 * width, width)
        self.output = nn.Linear(width, width)
        if updates_edges:
            self.norm = nn.LayerNorm(width)
            self.edge_state = nn.Linear(width, width)
            self.edge_source = nn.Linear(width, width)
            self.edge_target = nn.Linear(width, width)
            self.edge_output = nn.Linear(width, width)

    def forward(
        self,
        nodes: tuple[Tensor, ...],
        edges: tuple[Tensor, ...],
        pending: tuple[Affine | None, Affine | None],
        messages: tuple[Messages, ...],
        updated: tuple[int, ...],
        isolated: tuple[bool, ...],
        degrees: tuple[Tensor, ...],
        scalers: tuple[Tensor, ...],
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """New states of the nodes, and of the first `updated` blocks' edges of each messages, these before their output
        Linear.

        Shapes:
            nodes[g]: (copies, nodes of tensor g, width)
            edges[k]: (blocks, targets, sources, f) of the k-th messages; their states are the affine map `pending` of
                it, one for each direction
            isolated[g]: tensor g never gets messages; others that get none are too far from what is read
            degrees[g], scalers[g]: (nodes of tensor g or 1, 1) number of messages (at least 1), PNA's amplification
        """
        film = [Affine.of(self.film).after(first) for first in pending]
        of_target, of_source = zip(*map(self._message_terms, nodes), strict=True)
        received: list[list[tuple[Ends, tuple[Tensor, ...]]]] = [[] for _ in nodes]
        for own, edge in zip(messages, edges, strict=True):
            scale, shift = film[own.reverse](edge).split(self.width, dim=-1)
            found = Moments.apply(scale, shift, own.to.of(of_target), own.of.of(of_source))
            received[own.to.tensor].append((own.to, found))
        changes = tuple(
            self._change(v, aggregate(found, v, degree), scaler) if found or is_isolated else None
            for v, found, is_isolated, degree, scaler in zip(nodes, received, isolated, degrees, scalers, strict=True)
        )
        nodes = self._updated(nodes, changes)
        if not any(updated):
            return nodes, ()
        # all biases as one, so that their gradient is one sum: PyTorch 2.13 can't compile two equal ones in bfloat16
        states = (Affine.of(self.edge_state).after(first) for first in pending)
        of_edge = [own._replace(bias=own.bias + self.edge_target.bias + self.edge_source.bias) for own in states]
        of_target, of_source = (
            tuple(F.linear(v, linear.weight) for v in nodes) for linear in (self.edge_target, self.edge_source)
        )
        states = []
        for own, edge, count in zip(messages, edges, updated, strict=True):
            if count:
                near = own.first(count)
                target, source = near.to.of(of_target), near.of.of(of_source)
                state = of_edge[own.reverse](edge[: len(target)])
                states.append(F.silu(state + target.unsqueeze(2) + source.unsqueeze(1)))
        return nodes, tuple(states)

    def _message_terms(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """What targets and sources add to a message: Linear([v_i, v_j]) is a Linear of each."""
        target, source = self.message.weight.split(self.width, dim=1)
        return F.linear(nodes, target, self.message.bias), F.linear(nodes, source)

    def _change(
        self, v: Float[Tensor, "copies n width"], gathered: Float[Tensor, "copies n 4*width"], scaler: Tensor
    ) -> Float[Tensor, "copies n width"]:
        """PNA's update: aggregates by identity and amplification through two Linears as one."""
        own, plain, amplified = self.update.weight.split([self.width, 4 * self.width, 4 * self.width], dim=1)
        alike = scaler.numel() == 1  # then the amplified aggregates are the plain ones by another weight
        first = torch.cat([own, plain + scaler * amplified if alike else plain], dim=1)
        change = Affine.of(self.output).after(Affine(first, self.update.bias))(torch.cat([v, gathered], dim=-1))
        if not alike:
            change = change + scaler * F.linear(gathered, self.output.weight @ amplified)
        return change

    def _updated(self, nodes: tuple[Tensor, ...], changes: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """New states from their changes; those without one stay as they are."""
        if self.updates_edges:  # another layer follows
            if not self.residual:
                changes = network_normalized(changes)
            scale, shift = self.norm.weight, self.norm.bias
            normed = [c if c is None else self.norm(c) if self.residual else scale * c + shift for c in changes]
            changes = tuple(c if c is None else dropout(F.silu(c), self.dropout, self.training) for c in normed)
        return tuple(v if c is None else v + c if self.residual else c for v, c in zip(nodes, changes, strict=True))


def network_normalized(
    changes: tuple[Float[Tensor, "copies _ width"] | None, ...],
) -> tuple[Float[Tensor, "copies _ width"] | None, ...]:
    """Numbers less the mean over all nodes of their network, divided by the deviation over them."""
    every = torch.cat([c.flatten(1) for c in changes if c is not None], dim=1)
    mean, std = every.mean(1), (every.var(1, correction=0) + EPSILON).sqrt()
    return tuple(c if c is None else (c - mean.view(-1, 1, 1)) / std.view(-1, 1, 1) for c in changes)


def aggregate(
    received: Sequence[tuple[Ends, tuple[Tensor, ...]]], v: Float[Tensor, "copies n width"], degree: Tensor
) -> Float[Tensor, "copies n 4*width"]:
    """Mean, minimum, maximum and standard deviation of all messages to the nodes of a tensor; zeros where there are
    none. `received` holds sums, sums of squares, minima and maxima from every block."""
    if not received:
        total = square = low = high = torch.zeros_like(v)
    elif all(to.nodes is None for to, _ in received):
        total, square, low, high = _combined([found for _, found in received])
    else:
        total, square, low, high = _scattered(received, v)
    mean = total / degree
    std = ((square / degree - mean.square()).relu() + EPSILON).sqrt()
    return torch.cat([mean, low, high, std], dim=-1)


def _combined(several: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Of messages from several blocks to the same nodes."""
    total, square, low, high = several[0]
    for more_total, more_square, more_low, more_high in several[1:]:
        total, square = total + more_total, square + more_square
        low, high = torch.minimum(low, more_low), torch.maximum(high, more_high)
    return total, square, low, high


def _scattered(received: Sequence[tuple[Ends, tuple[Tensor, ...]]], v: Tensor) -> tuple[Tensor, ...]:
    """Of messages from several blocks to some nodes each."""
    every = torch.arange(v.shape[1], device=v.device)
    index = torch.cat([every if to.nodes is None else to.nodes.flatten() for to, _ in received])
    total, square, low, high = (
        torch.cat([part.reshape(len(v), -1, part.shape[-1]) for part in parts], dim=1)
        for parts in zip(*(found for _, found in received), strict=True)
    )
    zero = total.new_zeros(v.shape)
    total, square = zero.index_add(1, index, total), zero.index_add(1, index, square)
    index = index.unsqueeze(1).expand_as(low)
    low = zero.scatter_reduce(1, index, low, "amin", include_self=False)
    return total, square, low, zero.scatter_reduce(1, index, high, "amax", include_self=False)


def propagate(
    layers: nn.ModuleList,
    nodes: tuple[Tensor, ...],
    edges: tuple[Tensor, ...],
    pending: tuple[Affine | None, Affine | None],
    messages: tuple[Messages, ...],
    neighbours: Neighbours,
    *,
    everything: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Affine | None]:
    """All layers: the last states of nodes, and of edges as numbers and the affine map still to come.

    Args:
        everything: all nodes are updated by every layer, and edges in the network's own direction by the last, if it
            updates any; else what is too far from the output neurons, which alone are read, is not computed.
    """
    reached = {own.to.tensor for own in messages}
    isolated = tuple(g not in reached for g in range(len(nodes)))
    for k, layer in enumerate(layers):
        left = len(layers) - 1 - k
        if everything:
            last = layer.updates_edges
            updated = tuple(own.near[-1] if left > 0 or (last and not own.reverse) else 0 for own in messages)
        else:
            messages, edges = first_blocks(messages, edges, [own.within(left) for own in messages])
            updated = tuple(own.within(left - 1) if left > 0 else 0 for own in messages)
        degrees, scalers = neighbours.degrees, neighbours.scalers
        nodes, edges = layer(nodes, edges, pending, messages, updated, isolated, degrees, scalers)
        messages = tuple(own.first(count) for own, count in zip(messages, updated, strict=True) if count)
        after = Affine.of(layer.edge_output) if layer.updates_edges else None
        pending = (after, after)
    return nodes, edges, pending[0]


class NGGNN(nn.Module):
    """NG-GNN: reads neural graphs by messages along their edges in both directions.

    With class scores for 10 classes and a 2-32-32-1 network it has 331,466 parameters, with 64 probe features 348,746
    (paper, appendix D.1); for the CNN Wild Park (kernels up to 7x7, 3 inputs, 5 hidden layers, 10 outputs, 6
    activations), with one score and Fourier features 369,025 (appendix D.2), without them 345,729.

    Args:
        networks: what it reads: a wiring, the frame of several, or a collection of networks.
        head: what is asked for: `Scores(classes)`, or `PerParameter(numbers)`.
        width: of the states of nodes and edges.
        layers: rounds of messages.
        probes: number of probe points (paper, section 2.4), 0 for none; `probing`: "learned", "random" or "grid".
        positions: give nodes their positional embeddings (section 2.4).
        activations: give nodes the embedding of their activation; None: where the networks have several.
        directions: in which directions messages run, a key of `DIRECTIONS`. Where they only run against the network's
            own, the head reads the input neurons.
        sigma: standard deviation of the Fourier frequencies of weights and biases; None for Linears of the numbers.
        edge_sigma: that of weights, where it is another.
        normalization: "layer": parameters are standardized per layer once `fit_normalization` is given; or "none".
        dropout: of node updates.
        residual: node updates are added to the state; else they replace it, and norms are over all nodes of a network,
            nearest to the public code, whose norms are over all of a batch. For networks of one wiring.

    Raises:
        ValueError: an option is unknown; numbers per parameter without messages in the network's own direction; no
            residual for several wirings.
    """

    def __init__(
        self,
        networks: Wiring | Frame | Collection,
        head: Head,
        *,
        width: int = 64,
        layers: int = 4,
        probes: int = 0,
        probing: Probing = "learned",
        positions: bool = True,
        activations: bool | None = None,
        directions: str = "both",
        sigma: float | None = 3.0,
        edge_sigma: float | None = None,
        normalization: Normalization = "layer",
        dropout: float = 0.2,
        residual: bool = True,
    ) -> None:
        super().__init__()
        require_head(head)
        if not (residual or isinstance(networks, Wiring)):
            raise ValueError("norms over a network, which residual=False has, are for networks of one wiring")
        self.residual = residual
        along, against = copies_of(directions)
        self.frame, self.directions = frame_of(networks), directions
        self.wiring = networks if isinstance(networks, Wiring) else None
        self.encoder = Encoder(
            self.frame,
            width,
            width,
            edge_copies=1 + max(along + against),
            sigma=sigma,
            edge_sigma=edge_sigma,
            probes=probes,
            probing=probing,
            positions=positions,
            activations=activations,
            normalization=normalization,
        )
        self.register_buffer("mean_log_degree", torch.ones(()))
        per_parameter = isinstance(head, PerParameter)
        self.layers = nn.ModuleList(
            PNALayer(per_parameter or k < layers - 1, dropout, width, residual) for k in range(layers)
        )
        if per_parameter:
            if not along:
                raise ValueError(f"numbers per parameter need messages along the edges, and {directions!r} has none")
            self.head: ScoresHead | PerParameterHead = PerParameterHead(self.frame, head, width, width)
        else:
            neurons = self.frame.outputs if along else self.frame.inputs
            self.head = ScoresHead(neurons, head, (width, width, width))
        if self.wiring is not None:
            self._fit_degrees(self.wiring.graph(_nothing(self.wiring)), None)
        self.register_load_state_dict_pre_hook(_load_old)

    def fit_normalization(self, networks: Networks, rows: Int[Tensor, " networks"] | None = None) -> None:
        """Take a training set's statistics, by which every input is standardized: the networks `rows`, or all.

        And PNA's δ, the mean of log(degree + 1) over their nodes.

        Raises:
            ValueError: a parameter is NaN or infinite.
        """
        self.encoder.standardize.fit(networks, rows)
        self._fit_degrees(networks, rows)

    @torch.no_grad()
    def _fit_degrees(self, networks: Networks, rows: Int[Tensor, " networks"] | None) -> None:
        total, count = 0.0, 0
        for numbers, graph in graphs_of(networks, rows):
            batch = batch_of(graph[:1], self.frame)
            total += len(numbers) * float(torch.log(degrees(batch, self.directions).double() + 1).sum())
            count += len(numbers) * graph.wiring.num_nodes
        self.mean_log_degree.fill_(total / count)

    def compile_parts(self) -> None:
        """Compile the parts that a training step spends its time in: for networks of one wiring, whose shapes stay."""
        self.encoder.transform = torch.compile(fourier_states, **COMPILATION)
        for layer in self.layers:
            layer.compile(**COMPILATION)

    def forward(self, graph: NeuralGraph | GraphBatch) -> Answer:
        """Scores (networks, count); or graphs of the same wirings, with `count` numbers for each on nodes and edges."""
        batch = prepared(self, graph)
        messages = messages_of(batch, self.directions)
        nodes = batch.split(self.encoder.nodes(batch))
        edges, pending = self._first_edges(batch, messages)
        per_parameter, role = isinstance(self.head, PerParameterHead), self._read_role
        nodes, edges, after = propagate(
            self.layers,
            nodes,
            edges,
            pending,
            messages,
            Neighbours.of(batch, self.directions, self.mean_log_degree),
            everything=per_parameter or role == "input" or not self.residual,
        )
        states = torch.cat(nodes, dim=1)
        if not per_parameter:
            return self.head(batch.of_role(states, role).flatten(1))
        edge = Affine.of(self.head.edge).after(after)
        return self.head(batch, self.head.node(states), tuple(map(edge, edges)))

    @property
    def _read_role(self) -> Literal["input", "output"]:
        """Whose states a head of scores reads: where messages only run against the network's direction, the inputs'."""
        return "output" if DIRECTIONS[self.directions][0] else "input"

    def _first_edges(
        self, batch: GraphBatch, messages: tuple[Messages, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Affine | None, Affine | None]]:
        """First states of the edges of all messages, as numbers, and an affine map for each direction."""
        weights = [self.encoder.standardize.edges(stack) for stack in batch.stacks]
        copies, affine = DIRECTIONS[self.directions], self.encoder.edge_affine()
        edges, pending = [], [None, None]
        for own in messages:
            values = weights[own.stack] if own.order is None else weights[own.stack][own.order]
            values = values.transpose(1, 2) if own.reverse else values
            found, pending[own.reverse] = self.encoder.edges(values, copies[own.reverse], affine)
            edges.append(found)
        return tuple(edges), tuple(pending)


def _nothing(wiring: Wiring) -> dict[str, Tensor]:
    """One network of zeros without memory."""
    return {name: torch.zeros(()).expand(1, *shape) for name, shape in wiring.parameters}


def _load_old(module: NGGNN, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Weights stored by earlier versions: δ was no part of them where the wiring tells it."""
    rename_old(state_dict, prefix)
    state_dict.setdefault(f"{prefix}mean_log_degree", module.mean_log_degree)
