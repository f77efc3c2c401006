"""From a neural graph's numbers to the first states of its nodes and edges, as NG-GNN and NG-T both read them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.simulate import activations

FREQUENCIES = 128

# How models compile their parts. Inductor's own random numbers cost a quarter of NG-T's step on a CPU: use ATen's.
COMPILATION = {"dynamic": False, "options": {"fallback_random": True}}


def fourier_features(
    x: Float[Tensor, "*batch 1"], frequencies: Float[Tensor, " k"] | None
) -> Float[Tensor, "*batch features"]:
    """Gaussian Fourier features [cos(2π x B), sin(2π x B)] (Tancik et al. 2020) of one scalar; x itself without B."""
    if frequencies is None:
        return x
    phase = (2 * math.pi) * x * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


NORMALIZATIONS = ("layer", "neuron", "none")


class Standardize(nn.Module):
    """Numbers less their mean, divided by their standard deviation over a training set (paper, section 2.4).

    Buffers, so that they are stored with a model: `node_mean`, `node_std`, `edge_mean`, `edge_std`. Until `fit` they
    are the identity. Groups without biases stay at zero.

    Args:
        per: "layer", one mean and deviation per layer, weights and biases apart; "neuron", one for every single weight
            and bias, which permuting neurons does not respect; "none", everything stays as it is.
    """

    def __init__(self, wiring: Wiring, per: str = "layer") -> None:
        super().__init__()
        if per not in NORMALIZATIONS:
            raise ValueError(f"normalization is one of {', '.join(NORMALIZATIONS)}, not {per!r}")
        self.wiring, self.per = wiring, per
        empty = wiring.graph({name: torch.empty(shape, device="meta") for name, shape in wiring.parameters})
        self.shapes = {"node": [x.shape for x in empty.nodes], "edge": [x.shape for x in empty.edges]}
        if per != "neuron":
            self.shapes = {kind: [torch.Size(())] * len(shapes) for kind, shapes in self.shapes.items()}
        for kind, shapes in self.shapes.items():
            count = sum(shape.numel() for shape in shapes)
            self.register_buffer(f"{kind}_mean", torch.zeros(count))
            self.register_buffer(f"{kind}_std", torch.ones(count))

    def parts(self, kind: str, statistic: str) -> list[Tensor]:
        """Views of a buffer, for every group ("node") or block ("edge")."""
        shapes = self.shapes[kind]
        parts = getattr(self, f"{kind}_{statistic}").split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def fit(self, graph: NeuralGraph) -> None:
        """Take the statistics of a training set.

        Raises:
            ValueError: a parameter holds NaN or infinity, the error names it; the graph is of another wiring.
        """
        self._check_wiring(graph)
        for name, values in graph.state_dict().items():
            if not torch.isfinite(values).all():
                network = int(torch.nonzero(~torch.isfinite(values))[0, 0])
                raise ValueError(f"parameter {name} of network {network} is not finite")
        if self.per == "none":
            return
        known = {
            "node": [group.bias is not None for group in graph.wiring.groups],
            "edge": [True] * len(graph.wiring.blocks),
        }
        axes = 0 if self.per == "neuron" else None
        for kind, numbers in (("node", graph.nodes), ("edge", graph.edges)):
            means, stds = self.parts(kind, "mean"), self.parts(kind, "std")
            for values, mean, std, is_known in zip(numbers, means, stds, known[kind], strict=True):
                if is_known:
                    mean.copy_(values.mean(axes))
                    std.copy_(spread(values, axes))

    def forward(self, graph: NeuralGraph) -> NeuralGraph:
        """The standardized graph.

        Raises:
            ValueError: it is of another wiring, or has not one batch axis.
        """
        self._check_wiring(graph)
        nodes, edges = (
            tuple(
                (x - mean) / std
                for x, mean, std in zip(numbers, self.parts(kind, "mean"), self.parts(kind, "std"), strict=True)
            )
            for kind, numbers in (("node", graph.nodes), ("edge", graph.edges))
        )
        return NeuralGraph(graph.wiring, nodes, edges)

    def _check_wiring(self, graph: NeuralGraph) -> None:
        if graph.wiring is not self.wiring and graph.wiring != self.wiring:
            raise ValueError(
                f"this model was built for {describe(self.wiring)}, the graph is of {describe(graph.wiring)}: "
                "build the model with the graph's own wiring"
            )
        if graph.edges[0].dim() != 4:
            raise ValueError(f"graphs have one batch axis, of their networks, not {graph.edges[0].dim() - 3}")


def check_blocks(wiring: Wiring) -> None:
    """Models of one wiring read dense blocks: one weight from every neuron of a group to every one of another.

    Raises:
        ValueError: names a block that is none.
    """
    sizes = [group.size for group in wiring.groups]
    for block in wiring.blocks:
        ends = (block.source_nodes, block.source), (block.target_nodes, block.target)
        some = any(nodes is not None and len(nodes) < sizes[group] for nodes, group in ends)
        if some or block.groups > 1 or block.weight is None or math.prod(block.kernel) > 1:
            name = block.weight or f"groups {block.source} -> {block.target}"
            raise ValueError(
                f"the {block.kind} block of {name} is not one weight for every pair of neurons of two layers: "
                "networks with such blocks are read by HeterogeneousNGGNN and HeterogeneousNGT"
            )


def describe(wiring: Wiring) -> str:
    """What tells a wiring from others at a glance."""
    return f"layers of {[group.size for group in wiring.groups]} neurons ({wiring.groups[1].activation})"


def spread(values: Tensor, axes: int | None = None) -> Tensor:
    """Standard deviation to divide by: 1 where all values are the same."""
    std = values.std(axes, correction=0)
    return torch.where(std > 0, std, 1.0)


PROBINGS = ("learned", "random", "grid")


class ProbeFeatures(nn.Module):
    """Activations of the input network at some inputs, projected per layer (paper, equation 2).

    Args:
        probing: "learned", `points` (M, inputs) that start uniform in [-1, 1], the range of an INR's coordinates;
            "random", those that stay where they are; "grid", the centres of M equal cubes that [-1, 1]^inputs is cut
            into.
    """

    def __init__(self, wiring: Wiring, count: int, width: int, probing: str = "learned") -> None:
        super().__init__()
        if probing not in PROBINGS:
            raise ValueError(f"probing is one of {', '.join(PROBINGS)}, not {probing!r}")
        (source,) = wiring.with_role("input")
        inputs = wiring.groups[source].size
        points = grid(count, inputs) if probing == "grid" else torch.empty(count, inputs).uniform_(-1, 1)
        if probing == "learned":
            self.points = nn.Parameter(points)
        else:
            self.register_buffer("points", points)
        self.project = nn.ModuleList(nn.Linear(count, width) for _ in wiring.groups)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in wiring.groups)

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch nodes width"]:
        with torch.autocast(self.points.device.type, enabled=False):  # a sine's phase needs all of its digits
            values = activations(graph, self.points)
        return torch.cat(
            [norm(project(x)) for x, project, norm in zip(values, self.project, self.norm, strict=True)],
            dim=1,
        )


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
    """First states of nodes, and the Fourier features that the models turn into first states of edges.

    Biases and weights are standardized per layer and pass Gaussian Fourier features and two Linears; probe features
    join the nodes between the two, positional embeddings after them.

    Args:
        edge_features: scalars per edge: 3 for [e, eᵀ, e + eᵀ], 1 for e alone.
        sigma: standard deviation of the Fourier frequencies; None for a Linear of the scalars themselves.
        edge_sigma: that of edges, where it is another.
        probes: number of probe points (paper, section 2.4), 0 for none.
        probing: where they are, as of `ProbeFeatures`.
        positions: give nodes their positional embeddings (paper, section 2.4).
        normalization: as of `Standardize`.

    Raises:
        ValueError: as of `check_blocks`.
    """

    def __init__(
        self,
        wiring: Wiring,
        node_width: int,
        edge_width: int,
        *,
        edge_features: int,
        sigma: float | None,
        edge_sigma: float | None = None,
        probes: int = 0,
        probing: str = "learned",
        positions: bool = True,
        normalization: str = "layer",
    ) -> None:
        super().__init__()
        check_blocks(wiring)
        self.standardize = Standardize(wiring, normalization)
        for kind, scalars, scale in (
            ("node", 1, sigma),
            ("edge", edge_features, sigma if edge_sigma is None else edge_sigma),
        ):
            frequencies = None if sigma is None else torch.randn(scalars, FREQUENCIES) * scale
            self.register_buffer(f"{kind}_frequencies", frequencies)
        self.node_fourier = nn.Linear(1 if sigma is None else 2 * FREQUENCIES, node_width)
        self.edge_fourier = nn.Linear(edge_features if sigma is None else 2 * FREQUENCIES, edge_width)
        self.node_linear = nn.Linear(node_width, node_width)
        self.edge_linear = nn.Linear(edge_width, edge_width)
        self.probe = ProbeFeatures(wiring, probes, node_width, probing) if probes else None
        index = position_index(wiring)
        self.register_buffer("position_index", index, persistent=False)
        self.positions = nn.Parameter(torch.randn(int(index.max()) + 1, node_width)) if positions else None

    def nodes(self, graph: NeuralGraph, standardized: NeuralGraph) -> Float[Tensor, "batch nodes width"]:
        """First states of all nodes; the input neurons, which have no bias, hold the feature 0 (equation 1).

        The graph itself is what probe features run, its standardized form what is encoded.
        """
        biases = torch.cat(standardized.nodes, dim=1)
        frequencies = None if self.node_frequencies is None else self.node_frequencies[0]
        states = self.node_fourier(fourier_features(biases, frequencies))
        if self.probe is not None:
            states = states + self.probe(graph)
        states = self.node_linear(states)
        return states if self.positions is None else states + self.positions[self.position_index]

    def edge_affine(self) -> tuple[Float[Tensor, "width features"], Float[Tensor, " width"]]:
        """Weight and bias of the two edge Linears as one: nothing stands between them."""
        weight = self.edge_linear.weight @ self.edge_fourier.weight
        return weight, self.edge_linear.weight @ self.edge_fourier.bias + self.edge_linear.bias


def position_index(wiring: Wiring) -> Tensor:
    """Row of every node's positional embedding, (nodes,): one per input and output neuron, one per hidden group."""
    index, row = [], 0
    for group in wiring.groups:
        own = group.role != "hidden"
        index.append(row + (torch.arange(group.size) if own else torch.zeros(group.size, dtype=torch.long)))
        row += group.size if own else 1
    return torch.cat(index)
