"""From a neural graph's numbers to the first states of its nodes and edges, as NG-GNN and NG-T both read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.batch import GraphBatch, Stack, edge_slot
from ngcore.graph.collection import Collection
from ngcore.graph.forward import activations as run
from ngcore.graph.frame import Frame
from ngcore.models.affine import Affine
from ngcore.precision import exact

FREQUENCIES = 128
STATISTICS_BATCH = 4096  # networks whose numbers are summed at a time

# How models compile their parts. Inductor's own random numbers cost a quarter of NG-T's step on a CPU: use ATen's.
COMPILATION = {"dynamic": False, "options": {"fallback_random": True}}

Normalization = Literal["layer", "none"]
Probing = Literal["learned", "random", "grid"]
Networks = NeuralGraph | Collection


def fourier_features(
    x: Float[Tensor, "*batch scalars"], frequencies: Float[Tensor, "scalars k"] | None
) -> Float[Tensor, "*batch features"]:
    """Gaussian Fourier features [cos(2π x B), sin(2π x B)] (Tancik et al. 2020); x itself without B."""
    if frequencies is None:
        return x
    phase = (2 * math.pi) * (x * frequencies[0] if len(frequencies) == 1 else x @ frequencies)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


class Standardize(nn.Module):
    """Numbers less their mean, divided by their standard deviation over a training set (paper, section 2.4).

    One mean and deviation per layer, for weights and biases apart. They are buffers, so that they are stored with a
    model. Until `fit` they are the identity. Numbers that no parameter stands for (slot 0 of the frame) stay as they
    are, and so do zeros around kernels. A layer that no network of the training set has is read like the deepest before
    it that one has.
    """

    def __init__(self, frame: Frame, normalization: Normalization = "layer") -> None:
        super().__init__()
        if normalization not in ("layer", "none"):
            raise ValueError(f"normalization is 'layer' or 'none', not {normalization!r}")
        self.frame, self.normalization = frame, normalization
        self.is_fitted = normalization == "none"
        for kind in ("node", "edge"):
            self.register_buffer(f"{kind}_mean", torch.zeros(frame.slots))
            self.register_buffer(f"{kind}_std", torch.ones(frame.slots))
        self.register_load_state_dict_pre_hook(_with_row_for_inputs)
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "is_fitted", True))

    @torch.no_grad()
    def fit(self, networks: Networks, rows: Int[Tensor, " networks"] | None = None) -> None:
        """Take the statistics of a training set, the networks `rows` or all.

        Raises:
            ValueError: a parameter is NaN or infinite, the error names it and the network; a wiring does not fit into
                the frame.
        """
        sums = {kind: torch.zeros(3, self.frame.slots, dtype=torch.float64) for kind in ("node", "edge")}
        for numbers, graph in graphs_of(networks, rows):
            self.frame.check(graph.wiring)
            check_finite(graph, numbers)
            for block, edges in zip(graph.wiring.blocks, graph.edges, strict=True):
                if block.weight is not None:
                    source, target = graph.wiring.groups[block.source], graph.wiring.groups[block.target]
                    _add_powers(sums["edge"], self.frame.slot(target, source.kind), edges)
            for group, biases in zip(graph.wiring.groups, graph.nodes, strict=True):
                if group.bias is not None:
                    _add_powers(sums["node"], self.frame.slot(group), biases)
        if self.normalization == "layer":
            for kind, own in sums.items():
                self._set(getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_std"), *own.unbind())
        self.is_fitted = True

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

    def graph(self, graph: NeuralGraph) -> NeuralGraph:
        """A graph with its numbers standardized."""
        groups = graph.wiring.groups
        node_slots = [0 if group.bias is None else self.frame.slot(group) for group in groups]
        edge_slots = [edge_slot(graph.wiring, block, self.frame) for block in graph.wiring.blocks]
        nodes = ((x - self.node_mean[s]) / self.node_std[s] for x, s in zip(graph.nodes, node_slots, strict=True))
        edges = ((x - self.edge_mean[s]) / self.edge_std[s] for x, s in zip(graph.edges, edge_slots, strict=True))
        return NeuralGraph(graph.wiring, tuple(nodes), tuple(edges))

    def nodes(self, batch: GraphBatch) -> Float[Tensor, "copies nodes 1"]:
        """Standardized biases."""
        slot = batch.nodes.slot
        return (batch.biases - self.node_mean[slot].unsqueeze(1)) / self.node_std[slot].unsqueeze(1)

    def edges(self, stack: Stack) -> Float[Tensor, "blocks targets sources features"]:
        """Standardized weights of a stack, its copies and blocks in one axis."""
        mean, std = (x[stack.slot].view(-1, 1, 1, 1) for x in (self.edge_mean, self.edge_std))
        values = (stack.weights - mean) / std
        if stack.present is not None:
            values = torch.where(stack.present[:, None, None], values, 0)
        return values.flatten(0, 1)


def _with_row_for_inputs(module: Standardize, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Earlier statistics of a single wiring's weights had no row for its inputs, to which none lead."""
    for statistic, fill in (("edge_mean", 0.0), ("edge_std", 1.0)):
        known = state_dict.get(f"{prefix}{statistic}")
        if known is not None and len(known) == module.frame.slots - 1:
            state_dict[f"{prefix}{statistic}"] = nn.functional.pad(known, (1, 0), value=fill)


def graphs_of(
    networks: Networks, rows: Int[Tensor, " networks"] | None
) -> Iterator[tuple[Int[Tensor, " some"], NeuralGraph]]:
    """The networks `rows`, some at a time, each time of one wiring: their numbers and their graph."""
    if rows is None:
        rows = torch.arange(len(networks) if isinstance(networks, Collection) else networks.num_networks)
    for part in rows.split(STATISTICS_BATCH):
        if isinstance(networks, NeuralGraph):
            yield part, networks[part]
        else:
            yield from ((part[own], graph) for own, graph in networks.graphs_of(part))


def check_finite(graph: NeuralGraph, numbers: Int[Tensor, " networks"] | None = None) -> None:
    """Raise a ValueError that names the first parameter with NaN or infinite elements, and its network."""
    blocks, groups = graph.wiring.blocks, graph.wiring.groups
    named = [(block.weight, values) for block, values in zip(blocks, graph.edges, strict=True)]
    named += [(group.bias, values) for group, values in zip(groups, graph.nodes, strict=True)]
    for name, values in named:
        if not torch.isfinite(values.sum()):  # one number to look at: NaN and infinity stay in a sum
            bad = (~torch.isfinite(values)).flatten(1).any(1).nonzero()
            if len(bad):
                network = int(bad[0, 0]) if numbers is None else int(numbers[bad[0, 0]])
                raise ValueError(f"parameter {name} of network {network} is not finite")


def _add_powers(sums: Float[Tensor, "3 slots"], slot: int, values: Tensor) -> None:
    """Add the count, the sum and the sum of squares of values."""
    values = values.double()
    sums[0, slot] += values.numel()
    sums[1, slot] += values.sum().cpu()
    sums[2, slot] += values.square().sum().cpu()


def spread(values: Tensor) -> Tensor:
    """Standard deviation to divide by: 1 where all values are the same."""
    std = values.std(correction=0)
    return torch.where(std > 0, std, 1.0)


class ProbeFeatures(nn.Module):
    """Activations of the input network at some inputs, projected per layer (paper, equation 2).

    Args:
        frame: of networks whose inputs have one shape.
        count: M, how many inputs.
        probing: "learned", points (M, *inputs) that start uniform in [-1, 1], the range of an INR's coordinates;
            "random", those that stay where they are; "grid", the centres of M equal cubes that [-1, 1]^inputs is cut
            into.

    Raises:
        ValueError: the networks' inputs are not known or not of one shape; there is no such grid.
    """

    def __init__(self, frame: Frame, count: int, width: int, probing: Probing = "learned") -> None:
        super().__init__()
        points = probe_points(frame, count, probing)
        if probing == "learned":
            self.points = nn.Parameter(points)
        else:
            self.register_buffer("points", points)
        self.frame = frame
        self.project = nn.ModuleList(nn.Linear(count, width) for _ in range(frame.slots))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(frame.slots))

    def forward(self, batch: GraphBatch) -> Float[Tensor, "copies nodes width"]:
        if batch.is_static:
            return self.of_graph(batch.graphs[0][1])
        first = batch.sizes.cumsum(0) - batch.sizes
        found: Tensor | None = None
        for rows, graph in batch.graphs:
            own = self.of_graph(graph)
            found = own.new_zeros(1, len(batch.network), own.shape[-1]) if found is None else found
            places = first[rows].unsqueeze(1) + torch.arange(own.shape[1], device=rows.device)
            found = found.index_copy(1, places.flatten(), own.flatten(0, 1).unsqueeze(0))
        return found

    def of_graph(self, graph: NeuralGraph) -> Float[Tensor, "networks nodes width"]:
        """Of networks with one wiring."""
        with exact(self.points.device.type):  # a sine's phase needs all of its digits
            values = run(graph, self.points)
        slots = [self.frame.slot(group, group.kind) for group in graph.wiring.groups]
        return torch.cat([self.norm[s](self.project[s](x)) for x, s in zip(values, slots, strict=True)], dim=1)


def probe_points(frame: Frame, count: int, probing: Probing) -> Float[Tensor, "count ..."]:
    """Inputs of networks at which probes start or stay, see `ProbeFeatures`.

    Raises:
        ValueError: the networks' inputs are not known or not of one shape; there is no such grid; an unknown `probing`.
    """
    if probing not in ("learned", "random", "grid"):
        raise ValueError(f"probing is one of learned, random, grid, not {probing!r}")
    shape = frame.input_shape
    if shape is None:
        raise ValueError(
            "probe features run the input networks, and these do not have inputs of one known shape: read them "
            "with `trace`, which knows the operators between their neurons"
        )
    return grid(count, shape[0]) if probing == "grid" else torch.empty(count, *shape).uniform_(-1, 1)


def grid(count: int, inputs: int) -> Float[Tensor, "count inputs"]:
    """The centres of `count` equal cubes that [-1, 1]^inputs is cut into.

    Raises:
        ValueError: there is no such number of cubes.
    """
    side = round(count ** (1 / inputs))
    if side**inputs != count:
        raise ValueError(f"a grid over {inputs} inputs has a number of points to the power {inputs}, not {count}")
    axis = (2 * torch.arange(side) + 1) / side - 1
    return torch.cartesian_prod(*[axis] * inputs).view(count, inputs)


class Encoder(nn.Module):
    """First states of nodes, and what the first states of edges are made of.

    Biases and weights are standardized per layer and pass Gaussian Fourier features and two Linears; an edge's features
    are all of its window, whose Fourier features are those of a vector. Probe features join the nodes between the two
    Linears, embeddings of positions and activations after them.

    Args:
        frame: of the networks.
        edge_copies: how often a weight may stand among an edge's features: 3 for [e, eᵀ, e + eᵀ], 1 for e alone.
        sigma: standard deviation of the Fourier frequencies; None for a Linear of the scalars themselves.
        edge_sigma: that of edges, where it is another.
        probes: number of probe points (paper, section 2.4), 0 for none.
        probing: where they are, see `ProbeFeatures`.
        positions: give nodes their positional embeddings (paper, section 2.4).
        activations: give nodes the embedding of their activation; None: where the networks have several.
        normalization: "layer" or "none", see `Standardize`.
    """

    def __init__(
        self,
        frame: Frame,
        node_width: int,
        edge_width: int,
        *,
        edge_copies: int,
        sigma: float | None,
        edge_sigma: float | None = None,
        probes: int = 0,
        probing: Probing = "learned",
        positions: bool = True,
        activations: bool | None = None,
        normalization: Normalization = "layer",
    ) -> None:
        super().__init__()
        self.frame = frame
        self.standardize = Standardize(frame, normalization)
        scalars = {"node": 1, "edge": edge_copies * frame.features}
        scales = {"node": sigma, "edge": sigma if edge_sigma is None else edge_sigma}
        for kind, count in scalars.items():
            frequencies = None if sigma is None else torch.randn(count, FREQUENCIES) * scales[kind]
            self.register_buffer(f"{kind}_frequencies", frequencies)
        inputs = scalars if sigma is None else dict.fromkeys(scalars, 2 * FREQUENCIES)
        self.node_fourier = nn.Linear(inputs["node"], node_width)
        self.edge_fourier = nn.Linear(inputs["edge"], edge_width)
        self.node_linear = nn.Linear(node_width, node_width)
        self.edge_linear = nn.Linear(edge_width, edge_width)
        self.probe = ProbeFeatures(frame, probes, node_width, probing) if probes else None
        self.positions = nn.Parameter(torch.randn(frame.positions, node_width)) if positions else None
        rows = len(frame.activations) + 1
        activations = rows > 2 if activations is None else activations
        self.activations = nn.Parameter(torch.randn(rows, node_width)) if activations else None
        self.transform: Callable[..., Tensor] = fourier_states

    def nodes(self, batch: GraphBatch) -> Float[Tensor, "copies nodes width"]:
        """First states of all nodes; what has no bias holds the feature 0 (equation 1)."""
        states = self.node_fourier(fourier_features(self.standardize.nodes(batch), self.node_frequencies))
        if self.probe is not None:
            states = states + self.probe(batch)
        states = self.node_linear(states)
        if self.positions is not None:
            states = states + self.positions[batch.nodes.position]
        return states if self.activations is None else states + self.activations[batch.nodes.activation]

    def edge_affine(self) -> Affine:
        """The two edge Linears as one: nothing stands between them."""
        return Affine.of(self.edge_linear).after(Affine.of(self.edge_fourier))

    def edges(
        self, weights: Float[Tensor, "blocks targets sources features"], copies: tuple[int, ...], affine: Affine
    ) -> tuple[Float[Tensor, "blocks targets sources f"], Affine | None]:
        """First states of edges with these standardized weights, as numbers and an affine map that is still to come;
        None where there is none.

        `copies` says in which of [e, eᵀ, e + eᵀ] the weights stand. Without Fourier features the weights themselves are
        all that is needed, unless a layer would rather read states, which are fewer.
        """
        if self.edge_frequencies is not None:
            return self.transform(weights, self.edge_frequencies, copies, affine), None
        columns = affine.weight.unflatten(1, (-1, self.frame.features))[:, list(copies)].sum(1)
        pending = Affine(columns, affine.bias)
        return (weights, pending) if weights.shape[-1] <= len(affine.bias) else (pending(weights), None)


def fourier_states(
    weights: Float[Tensor, "*edges features"],
    frequencies: Float[Tensor, "scalars k"],
    copies: tuple[int, ...],
    affine: Affine,
) -> Float[Tensor, "*edges width"]:
    """First states of edges: the Fourier features of a weight that stands several times have the frequencies' sum."""
    own = frequencies.unflatten(0, (-1, weights.shape[-1]))[list(copies)].sum(0)
    return affine(fourier_features(weights, own))


def frame_of(networks: Wiring | Frame | Collection) -> Frame:
    """The frame that a model is made for: of one wiring, of a collection, or given."""
    if isinstance(networks, Wiring):
        return Frame.of([networks])
    return networks.frame if isinstance(networks, Collection) else networks
