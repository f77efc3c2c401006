"""Linear maps between the parameters of networks that commute with permutations of neurons.

DWSNet (Navon et al., 2023) and NFN (Zhou et al., 2023a) stack such maps. Two groups of permutations:

- HNP: hidden neurons are permuted, those of the input and the output keep their places.
- NP: the neurons of every layer are permuted.

Call the permuted groups of neurons that index a parameter its support: {l, l + 1} for a weight matrix between
permuted groups, {l} for the bias of one. Permutations act on the axes of the support alone; every other index of a
parameter counts channels: neurons that keep their places, and the positions of a convolution's kernel.

One rule then gives every term of both papers. A linear map from a tensor with support S to one with support T
commutes with the permutations if and only if it is a sum, over the sets K within both S and T, of: average over
S - K, map the channels, repeat over T - K. Such a map ties the groups K of its input to those of its output. From
a weight matrix to itself, and with NP, these are its global mean (K = {}), its row and column means (one group) and
its entries (both); from a layer's weights to its neighbours' and to biases, what the two have in common.

Maps that tie the same groups read the same pooled features, so all of them are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ngcore.graph import NeuralGraph, Wiring

PermutationGroup = Literal["HNP", "NP"]
Reduction = Literal["mean", "max"]
Support = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a parameter lies on the graph: `nodes[index]` or `edges[index]`, its axes running over the groups `axes`.

    `positions` counts its scalars on one node or edge: the positions of a kernel.
    """

    kind: Literal["nodes", "edges"]
    index: int
    axes: tuple[int, ...]
    positions: int = 1


class WeightSpace:
    """The parameters of a chain of fully connected and convolutional layers, sorted by support.

    Attributes:
        support: for each parameter, by name, the permuted groups that index it, in the order of its axes.
            Parameters with the same support stand together, smaller supports first.
        entries: for each parameter, how many scalars it holds per index of its support.
        supports: the distinct supports.
        ties: every set of groups that a map between two parameters may tie together, smaller ones first; where
            biases make them all supports, they are the same.
        multiplicity: `entries` summed over the parameters of each support.

    Raises:
        ValueError: the wiring is no chain of layers; the error names the block.
    """

    def __init__(self, wiring: Wiring, group: PermutationGroup = "HNP") -> None:
        self.wiring = wiring
        self._permuted = frozenset(wiring.with_role("hidden") if group == "HNP" else range(len(wiring.groups)))
        places = _places(wiring)
        support = {name: tuple(g for g in place.axes if g in self._permuted) for name, place in places.items()}
        self.supports: tuple[Support, ...] = tuple(sorted(dict.fromkeys(support.values()), key=len))
        parts = [part for s in self.supports for size in range(len(s) + 1) for part in combinations(s, size)]
        self.ties: tuple[Support, ...] = tuple(sorted(dict.fromkeys([*self.supports, *parts]), key=len))
        self.support = {name: s for s in self.supports for name in support if support[name] == s}
        self._places = {name: places[name] for name in self.support}
        self.entries = {
            name: math.prod(self._fixed_sizes(place)) * place.positions for name, place in self._places.items()
        }
        self.multiplicity = tuple(sum(self.entries[name] for name in self.having(s)) for s in self.supports)

    def having(self, support: Support) -> list[str]:
        """Names of the parameters with exactly this support."""
        return [name for name, found in self.support.items() if found == support]

    def fold(self, name: str, graph: NeuralGraph) -> Float[Tensor, "batch ..."]:
        """The features of parameter `name` as (batch, *sizes of its support, entries * channels).

        A graph has one channel per scalar, so `positions * channels` features; ones that layers return have more.
        """
        place = self._places[name]
        values = getattr(graph, place.kind)[place.index]
        order = self._permuted_first(place)
        return values.permute(0, *(1 + axis for axis in order), -1).flatten(1 + len(self.support[name]))

    def features(self, graph: NeuralGraph) -> list[Float[Tensor, "batch ..."]]:
        """A graph as one tensor per support: (batch, *sizes of the support, multiplicity * channels)."""
        return [torch.cat([self.fold(name, graph) for name in self.having(s)], dim=-1) for s in self.supports]

    def graph(self, features: Sequence[Float[Tensor, "batch ..."]], channels: int) -> NeuralGraph:
        """The inverse of `features`. Neurons without biases get zeros.

        Shapes: nodes[g] (batch, size, channels), edges[b] (batch, targets, sources, positions * channels), the
        channels of a position side by side.
        """
        first = features[0]
        nodes = [first.new_zeros(len(first), group.size, channels) for group in self.wiring.groups]
        edges = [first.new_zeros(0)] * len(self.wiring.blocks)
        for x, support in zip(features, self.supports, strict=True):
            names = self.having(support)
            for name, part in zip(names, x.split([self.entries[n] * channels for n in names], dim=-1), strict=True):
                place = self._places[name]
                order = self._permuted_first(place)
                values = part.unflatten(-1, (*self._fixed_sizes(place), place.positions * channels))
                values = values.permute(0, *(1 + order.index(axis) for axis in range(len(order))), -1)
                (nodes if place.kind == "nodes" else edges)[place.index] = values
        return NeuralGraph(self.wiring, tuple(nodes), tuple(edges))

    def _permuted_first(self, place: Place) -> list[int]:
        """The axes of a parameter, those that permutations act on before the others."""
        return sorted(range(len(place.axes)), key=lambda axis: place.axes[axis] not in self._permuted)

    def _fixed_sizes(self, place: Place) -> list[int]:
        return [self.wiring.groups[g].size for g in place.axes if g not in self._permuted]


def _places(wiring: Wiring) -> dict[str, Place]:
    """Place of every parameter of a chain of layers, by name, from the input to the output.

    Raises:
        ValueError: the wiring is no such chain; the error names the block.
    """
    places: dict[str, Place] = {}
    for b, block in enumerate(wiring.blocks):
        sizes = wiring.groups[block.source].size, wiring.groups[block.target].size
        nodes = block.source_nodes, block.target_nodes
        whole = all(own is None or own == range(size) for own, size in zip(nodes, sizes, strict=True))
        bias = wiring.groups[block.target].bias
        next_layer = (block.source, block.target) == (b, b + 1) and block.kind in ("linear", "convolution")
        if not next_layer or not whole or block.groups > 1 or block.weight in places or bias in places:
            module = wiring.groups[block.target].where
            raise ValueError(
                "this model reads chains of layers, linear or convolutional, every neuron of one connected to every "
                f"neuron of the next: block {b} is not such a layer (kind {block.kind}, parameter {block.weight}, from "
                f"group {block.source} to group {block.target}{f', module {module!r}' if module else ''})"
            )
        positions = 1 if block.view is None else math.prod(block.view.size[3:])
        places[block.weight] = Place("edges", b, (block.target, block.source), positions)
        if bias is not None:
            places[bias] = Place("nodes", block.target, (block.target,))
    left = [group.bias for group in wiring.groups if group.bias is not None and group.bias not in places]
    if left:
        raise ValueError(f"this model reads chains of layers: {', '.join(left)} belong to none of its layers")
    return places


def poolings(x: Tensor, support: Support, reduction: Reduction) -> dict[Support, Tensor]:
    """`x` pooled over every subset of its support, by the groups that are kept.

    Shapes: x (batch, *sizes of the support, channels), results (batch, *sizes of the kept groups, channels).
    """
    reduce = max_over if reduction == "max" else torch.mean
    found = {support: x}
    for group in support:
        found |= {
            tuple(g for g in kept if g != group): reduce(values, dim=1 + kept.index(group))
            for kept, values in found.items()
        }
    return found


def max_over(x: Float[Tensor, "batch ... channels"], dim: int) -> Float[Tensor, "batch ... channels"]:
    """`x.amax(dim)` as a pooling of channels-last images, whose backward pass is several times faster."""
    images = x.reshape(math.prod(x.shape[:dim]), x.shape[dim], -1, x.shape[-1]).permute(0, 3, 1, 2)
    pooled = functional.max_pool2d(images, (x.shape[dim], 1))
    return pooled.permute(0, 2, 3, 1).reshape(*x.shape[:dim], *x.shape[dim + 1 :])


def repeat_over(x: Tensor, kept: Support, support: Support) -> Tensor:
    """View of `x`, indexed by the kept groups, that broadcasts over the rest of `support`."""
    return x[(slice(None), *(slice(None) if g in kept else None for g in support))]


class EquivariantLayer(nn.Module):
    """All affine maps that commute with the permutations of a weight space.

    With mean reduction this is the DWS layer and, with the group HNP or NP, the NF-Layer. With max reduction
    (Navon et al.) a maximum takes the place of each average: the layer still commutes, but is no longer affine.

    Every scalar of the input network has `in_width` channels before and `out_width` after. `maps[k]` holds
    every map that ties the groups `ties[k]`; the maps that tie none carry the biases.

    Weights start with variance 1 / fan-in, the fan-in counted over everything that is summed into an output.

    Shapes: features and output: per support (batch, *sizes of the support, width * multiplicity).
    """

    def __init__(self, space: WeightSpace, in_width: int, out_width: int, reduction: Reduction) -> None:
        super().__init__()
        self.supports, self.ties, self.reduction = space.supports, space.ties, reduction
        self.out_channels = tuple(out_width * m for m in space.multiplicity)
        self.holders = tuple(tuple(i for i, s in enumerate(self.supports) if set(tie) <= set(s)) for tie in self.ties)
        sizes = [sum(space.multiplicity[i] for i in holders) for holders in self.holders]
        self.maps = nn.ModuleList(
            nn.Linear(in_width * size, out_width * size, bias=not tie)
            for size, tie in zip(sizes, self.ties, strict=True)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        fan_in = [0] * len(self.supports)
        for linear, holders in zip(self.maps, self.holders, strict=True):
            for i in holders:
                fan_in[i] += linear.in_features
        for linear, holders in zip(self.maps, self.holders, strict=True):
            for i, rows in zip(holders, linear.weight.split(self._rows(holders)), strict=True):
                bound = math.sqrt(3 / fan_in[i])
                rows.uniform_(-bound, bound)
        self.maps[0].bias.zero_()

    def forward(self, features: Sequence[Float[Tensor, "batch ..."]]) -> list[Float[Tensor, "batch ..."]]:
        pooled = [poolings(x, s, self.reduction) for x, s in zip(features, self.supports, strict=True)]
        outputs: dict[int, Tensor] = {}
        for tie, holders, linear in zip(self.ties, self.holders, self.maps, strict=True):
            mapped = linear(torch.cat([pooled[i][tie] for i in holders], dim=-1))
            for i, part in zip(holders, mapped.split(self._rows(holders), dim=-1), strict=True):
                part = repeat_over(part, tie, self.supports[i])
                outputs[i] = outputs[i] + part if i in outputs else part
        return [outputs[i] for i in range(len(self.supports))]

    def _rows(self, holders: Sequence[int]) -> list[int]:
        return [self.out_channels[i] for i in holders]
