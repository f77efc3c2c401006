"""NG-GNN: principal neighbourhood aggregation, FiLM messages, edge updates (paper, section 3, equations 3 and 4).

Written on blocks: layers are complete bipartite, so a message is a broadcast and an aggregation a reduction over the
source axis. The algebra is that of the paper's equations, rearranged where Linears meet without a non-linearity
between them: Linear([v_i, v_j]) is a Linear of each, broadcast together; a Linear of a Linear is one Linear; the two
degree scalers are one weight matrix per group. What the head does not read is not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.encoder import COMPILATION, Encoder, fourier_features
from ngcore.models.kernels.dropout import dropout
from ngcore.models.kernels.moments import Moments

WIDTH = 64
LAYERS = 4


# Which ways messages run (paper, section 2.4), and in which of their edges' features the weight e stands: along the
# network's own direction, and against it.
DIRECTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "both": ((0, 2), (1, 2)),  # [e, 0, e] and [0, e, e], i.e. E, Eᵀ and E + Eᵀ
    "without_sum": ((0,), (1,)),  # [e, 0] and [0, e]
    "sum": ((0,), (0,)),  # e either way, i.e. E + Eᵀ alone: undirected
    "forward": ((0,), ()),
    "reversed": ((), (0,)),
}


@dataclass(frozen=True)
class Direction:
    """A block of messages: all of `source`'s nodes to all of `target`'s, along a wiring's block or against it.

    Of the features of its edges those of the numbers `copies` are the weight, and the others 0.
    """

    block: int
    source: int
    target: int
    reverse: bool
    copies: tuple[int, ...]


def directions_of(wiring: Wiring, directions: str = "both") -> tuple[Direction, ...]:
    """The blocks of messages, those along the wiring's blocks first; `directions` is a key of `DIRECTIONS`.

    Raises:
        ValueError: it is none.
    """
    if directions not in DIRECTIONS:
        raise ValueError(f"directions is one of {', '.join(DIRECTIONS)}, not {directions!r}")
    along, against = DIRECTIONS[directions]
    blocks = list(enumerate(wiring.blocks))
    forward = [Direction(b, block.source, block.target, False, along) for b, block in blocks if along]
    return (*forward, *(Direction(b, block.target, block.source, True, against) for b, block in blocks if against))


def needed_directions(
    directions: tuple[Direction, ...], read: tuple[int, ...], layers: int
) -> list[tuple[Direction, ...]]:
    """For each layer the messages on which the states of the groups `read` depend after the last one."""
    needed: list[tuple[Direction, ...]] = []
    groups = set(read)
    for _ in range(layers):
        needed.append(tuple(d for d in directions if d.target in groups))
        groups |= {d.source for d in needed[-1]}
    return needed[::-1]


class PNALayer(nn.Module):
    """What one round of messages and the update of the edges after it learn, for blocks however they are laid out.

    Args:
        updates_edges: the next layer or the head reads the edges after it (not where the head reads nodes alone).
        width: of the states of nodes and edges.
    """

    def __init__(self, updates_edges: bool, dropout: float, width: int = WIDTH) -> None:
        super().__init__()
        self.updates_edges, self.dropout, self.width = updates_edges, dropout, width
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

    def edge_affine(self, before: Any | None) -> tuple[Tensor, Tensor]:
        """What this layer takes from the edges (scale, shift, state), and the affine map `before` it, which has a
        weight and a bias, as one."""
        weight, bias = self.film.weight, self.film.bias
        if self.updates_edges:
            weight = torch.cat([weight, self.edge_state.weight])
            bias = torch.cat([bias, self.edge_state.bias])
        return (weight, bias) if before is None else (weight @ before.weight, weight @ before.bias + bias)

    def message_terms(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """What targets and sources add to a message: Linear([v_i, v_j]) is a Linear of each."""
        target, source = self.message.weight.split(self.width, dim=1)
        return F.linear(nodes, target, self.message.bias), F.linear(nodes, source)

    def added(self, v: Tensor, change: Tensor) -> Tensor:
        """The state with its change, which is normalized where another layer follows."""
        if self.updates_edges:
            change = dropout(F.silu(self.norm(change)), self.dropout, self.training)
        return v + change


class NGGNNLayer(PNALayer):
    """A layer for networks of one wiring: messages along `directions`, and new states of the `updated` edges.

    Args:
        directions: the blocks whose messages are computed.
        updated: those whose edges are read after it, maybe none.
        scalers: PNA's amplification log(degree + 1) / δ of every group.
        degrees: number of incoming edges of a node of every group.
    """

    def __init__(
        self,
        directions: tuple[Direction, ...],
        updated: tuple[Direction, ...],
        scalers: tuple[float, ...],
        degrees: tuple[int, ...],
        dropout: float,
    ) -> None:
        super().__init__(bool(updated), dropout)
        self.directions, self.updated = directions, updated
        self.scalers, self.degrees = scalers, degrees

    def forward(
        self, nodes: tuple[Tensor, ...], edges: tuple[Tensor, ...], affine: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """New states of all groups, and of the `updated` edges before their output Linear.

        Shapes:
            nodes[g]: (batch, size of g, 64)
            edges[i]: (batch, targets, sources, f) of the i-th direction, f as `affine` takes it
        """
        weight, bias = affine
        film = weight[: 2 * WIDTH], bias[: 2 * WIDTH]
        read = [
            F.linear(edge, *(affine if direction in self.updated else film)).split(WIDTH, dim=-1)
            for direction, edge in zip(self.directions, edges, strict=True)
        ]
        of_target, of_source = zip(*map(self.message_terms, nodes), strict=True)
        moments: dict[int, tuple[Tensor, ...]] = {}
        for direction, (scale, shift, *_) in zip(self.directions, read, strict=True):
            found = Moments.apply(scale, shift, of_target[direction.target], of_source[direction.source])
            known = moments.get(direction.target)
            moments[direction.target] = found if known is None else combine(known, found)
        for g, v in enumerate(nodes):
            if self.degrees[g] == 0:  # gathers nothing
                moments[g] = (torch.zeros_like(v),) * 4
        nodes = tuple(self.updated_nodes(g, v, moments[g]) if g in moments else v for g, v in enumerate(nodes))
        if not self.updated:
            return nodes, ()
        of_target = [F.linear(v, self.edge_target.weight, self.edge_target.bias) for v in nodes]
        of_source = [F.linear(v, self.edge_source.weight, self.edge_source.bias) for v in nodes]
        states = []
        for direction, (*_, state) in zip(self.directions, read, strict=True):
            if direction in self.updated:
                target, source = of_target[direction.target], of_source[direction.source]
                states.append(F.silu(state + target.unsqueeze(2) + source.unsqueeze(1)))
        return nodes, tuple(states)

    def updated_nodes(self, group: int, v: Tensor, moments: tuple[Tensor, ...]) -> Tensor:
        """PNA's update, added to the state: aggregates by identity and amplification, then two Linears as one."""
        total, square, low, high = moments
        degree = max(1, self.degrees[group])
        mean = total / degree
        std = ((square / degree - mean.square()).relu() + 1e-5).sqrt()
        own, plain, amplified = self.update.weight.split([WIDTH, 4 * WIDTH, 4 * WIDTH], dim=1)
        weight = self.output.weight @ torch.cat([own, plain + self.scalers[group] * amplified], dim=1)
        bias = self.output.weight @ self.update.bias + self.output.bias
        return self.added(v, F.linear(torch.cat([v, mean, low, high, std], dim=-1), weight, bias))


def combine(known: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sum, sum of squares, minimum and maximum over two sets of messages to the same nodes."""
    total, square, low, high = zip(known, found, strict=True)
    return sum(total), sum(square), torch.minimum(*low), torch.maximum(*high)


def first_edges(
    weights: Float[Tensor, "batch targets sources 1"],
    frequencies: Float[Tensor, "features k"] | None,
    affine: tuple[Tensor, Tensor],
    reverse: bool,
    copies: tuple[int, ...],
) -> Float[Tensor, "batch _ _ 64"]:
    """First states of a block's edges, of whose features those of the numbers `copies` are the weight, the others 0."""
    values = weights.transpose(1, 2) if reverse else weights
    weight, bias = affine
    if frequencies is None:  # a Linear of copies of w is one of w
        return F.linear(values, sum(weight[:, copy, None] for copy in copies), bias)
    return F.linear(fourier_features(values, sum(frequencies[copy] for copy in copies)), weight, bias)


class NGGNNStack(nn.Module):
    """Encoder and layers of NG-GNN: by default reversed edges, edge features [e, eᵀ, e + eᵀ]; 4 layers of width 64.

    Layer norm is per node, and node updates are residual: the paper does not say, but a plain stack hides the input
    behind its own constants at first (after 64 steps of 32 MNIST INRs, 64 probe features, it is at chance, the
    residual one above 50 %).

    Args:
        wiring: of the input networks.
        read: the groups whose states are read after the last layer.
        read_edges: the directions whose edges are read after it.
        directions: which ways messages run, a key of `DIRECTIONS`.
        encoding: options of `Encoder`.
    """

    def __init__(
        self,
        wiring: Wiring,
        read: tuple[int, ...],
        read_edges: tuple[Direction, ...],
        *,
        dropout: float,
        directions: str = "both",
        **encoding: Any,
    ) -> None:
        super().__init__()
        self.wiring = wiring
        every = directions_of(wiring, directions)
        if not set(read_edges) <= set(every):
            raise ValueError(
                f"the head reads edges as directions 'both' have them, and {directions!r} does not: leave it at 'both'"
            )
        features = 1 + max(copy for direction in every for copy in direction.copies)
        self.encoder = Encoder(wiring, WIDTH, WIDTH, edge_features=features, **encoding)
        needed = [*needed_directions(every, read, LAYERS), read_edges]
        degrees = tuple(
            sum(wiring.groups[d.source].size for d in every if d.target == g) for g in range(len(wiring.groups))
        )
        logs = [math.log(degree + 1) for degree in degrees]
        delta = sum(group.size * log for group, log in zip(wiring.groups, logs, strict=True)) / wiring.num_nodes
        scalers = tuple(log / delta for log in logs)
        self.layers = nn.ModuleList(
            NGGNNLayer(needed[k], needed[k + 1], scalers, degrees, dropout) for k in range(LAYERS)
        )
        self.first_edges = first_edges

    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Take the training set's statistics, by which every input is standardized."""
        self.encoder.standardize.fit(graph)

    def compile_parts(self) -> None:
        """Compile the parts that a training step spends its time in."""
        self.first_edges = torch.compile(first_edges, **COMPILATION)
        for layer in self.layers:
            layer.compile(**COMPILATION)

    def states(self, graph: NeuralGraph) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Last states of all groups (of those that are read they are complete), and of the edges that are read,
        before the last layer's `edge_output`."""
        standardized = self.encoder.standardize(graph)
        nodes = self.encoder.nodes(graph, standardized).split([group.size for group in self.wiring.groups], dim=1)
        weights, affine = standardized.edges, self.encoder.edge_affine()
        edges = tuple(
            self.first_edges(weights[d.block], self.encoder.edge_frequencies, affine, d.reverse, d.copies)
            for d in self.layers[0].directions
        )
        before = None
        for layer in self.layers:
            nodes, edges = layer(nodes, edges, layer.edge_affine(before))
            before = layer.edge_output if layer.updated else None
        return nodes, edges


class NGGNN(NGGNNStack):
    """NG-GNN for a property of the whole input network: class scores of an INR's image.

    For 10 classes and a 2-32-32-1 network it has 331,466 parameters, with 64 probe features 348,746 (paper, appendix
    D.1).

    Args: as of `NGGNNStack`. The head reads output neurons; where messages only run against the network's direction
        and reach none of them, it reads input neurons.
    """

    def __init__(
        self,
        wiring: Wiring,
        num_classes: int,
        *,
        dropout: float = 0.2,
        sigma: float | None = 3.0,
        directions: str = "both",
        **encoding: Any,
    ) -> None:
        self.read = wiring.with_role("input" if directions == "reversed" else "output")
        super().__init__(wiring, self.read, (), dropout=dropout, sigma=sigma, directions=directions, **encoding)
        outputs = sum(wiring.groups[g].size for g in self.read)
        self.head = nn.Sequential(
            nn.Linear(outputs * WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, num_classes),
        )

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        nodes, _ = self.states(graph)
        return self.head(torch.cat([nodes[g] for g in self.read], dim=1).flatten(1))


class EquivariantNGGNN(NGGNNStack):
    """NG-GNN with numbers for every parameter: the stack without its aggregation over nodes (paper, appendix D.1).

    The last layer updates edges as the others do. A Linear of their states, of both kinds, is the head. Weights and
    biases enter through Linears by default, without Fourier features, as in the public editing model.

    Args:
        outputs: numbers per parameter.
        others: as of `NGGNNStack`.
    """

    def __init__(
        self,
        wiring: Wiring,
        outputs: int = 1,
        *,
        dropout: float = 0.2,
        sigma: float | None = None,
        **encoding: Any,
    ) -> None:
        every = tuple(range(len(wiring.groups)))
        forward = tuple(direction for direction in directions_of(wiring) if not direction.reverse)
        super().__init__(wiring, every, forward, dropout=dropout, sigma=sigma, **encoding)
        self.node_head = nn.Linear(WIDTH, outputs)
        self.edge_head = nn.Linear(WIDTH, outputs)

    def forward(self, graph: NeuralGraph) -> NeuralGraph:
        """The same wiring with `outputs` features on nodes and edges."""
        nodes, edges = self.states(graph)
        before = self.layers[-1].edge_output  # two Linears as one
        weight = self.edge_head.weight @ before.weight
        bias = self.edge_head.weight @ before.bias + self.edge_head.bias
        return NeuralGraph(
            self.wiring, tuple(map(self.node_head, nodes)), tuple(F.linear(edge, weight, bias) for edge in edges)
        )
