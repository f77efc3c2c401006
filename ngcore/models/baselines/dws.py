"""DWSNet: linear layers that commute with permutations of hidden neurons (Navon et al., 2023).

Call the hidden groups that index a parameter tensor its support: {l, l + 1} for a weight matrix between
hidden layers, {l} for the bias of a hidden layer and for the first and the last weight matrix, {} for the
last bias. Permutations act on the axes of the support alone; input and output neurons are channels.

One rule then gives every block of the paper (weight to weight, weight to bias, bias to weight, bias to bias):
a linear map from a tensor with support S to one with support T commutes with the permutations if and only if
it is a sum, over the sets K within both S and T, of: average over S - K, map the channels, repeat over T - K.
Such a map ties the groups K of its input to those of its output.

Maps that tie the same groups read the same pooled features, so all of them are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.baselines.mlp import ParameterReader, perceptron

Reduction = Literal["mean", "max"]
Support = tuple[int, ...]


class WeightSpace:
    """The parameters of an MLP, sorted by support.

    Attributes:
        support: for each parameter, by name, the hidden groups that index it, in the order of its axes.
            Parameters with the same support stand together, smaller supports first.
        entries: for each parameter, how many scalars it holds per index of its support.
        supports: the distinct supports.
        multiplicity: `entries` summed over the parameters of each support.

    Raises:
        ValueError: a layer has no bias.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._hidden = frozenset(wiring.with_role("hidden"))
        axes: dict[str, tuple[int, ...]] = {}
        for block in wiring.blocks:
            bias = wiring.groups[block.target].bias
            if bias is None:
                raise ValueError(f"DWSNet reads MLPs with biases: the layer of parameter {block.weight} has none")
            axes[block.weight] = (block.target, block.source)
            axes[bias] = (block.target,)
        support = {name: tuple(g for g in groups if g in self._hidden) for name, groups in axes.items()}
        self.supports: tuple[Support, ...] = tuple(sorted(dict.fromkeys(support.values()), key=len))
        self.support = {name: s for s in self.supports for name in support if support[name] == s}
        self._axes = {name: axes[name] for name in self.support}
        self.entries = {
            name: math.prod(wiring.groups[g].size for g in groups if g not in self._hidden)
            for name, groups in self._axes.items()
        }
        self.multiplicity = tuple(sum(self.entries[name] for name in self.having(s)) for s in self.supports)

    def having(self, support: Support) -> list[str]:
        """Names of the parameters with exactly this support."""
        return [name for name, found in self.support.items() if found == support]

    def fold(self, name: str, values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ... entries"]:
        """Parameter `name` (batch, *its own shape) as (batch, *sizes of its support, entries)."""
        axes = self._axes[name]
        hidden_first = sorted(range(len(axes)), key=lambda axis: axes[axis] not in self._hidden)
        folded = values.permute(0, *(1 + axis for axis in hidden_first)).unsqueeze(-1)
        return folded.flatten(1 + len(self.support[name]))

    def features(self, parameters: Mapping[str, Tensor]) -> list[Float[Tensor, "batch ..."]]:
        """Parameters by name as one tensor per support: (batch, *sizes of the support, multiplicity)."""
        return [
            torch.cat([self.fold(name, parameters[name]) for name in self.having(s)], dim=-1) for s in self.supports
        ]


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


class DWSLayer(nn.Module):
    """All affine maps that commute with the permutations of hidden neurons.

    Every scalar of the input network has `in_width` channels before and `out_width` after. `maps[k]` holds
    every map that ties the groups `supports[k]`; the maps that tie none carry the biases. With max reduction
    a maximum takes the place of each average: the layer still commutes, but is no longer affine.

    Weights start with variance 1 / fan-in, the fan-in counted over everything that is summed into an output.

    Shapes: features and output: per support (batch, *sizes of the support, width * multiplicity).
    """

    def __init__(self, space: WeightSpace, in_width: int, out_width: int, reduction: Reduction) -> None:
        super().__init__()
        self.supports, self.reduction = space.supports, reduction
        self.out_channels = tuple(out_width * m for m in space.multiplicity)
        self.holders = tuple(
            tuple(i for i, s in enumerate(self.supports) if set(kept) <= set(s)) for kept in self.supports
        )
        sizes = [sum(space.multiplicity[i] for i in holders) for holders in self.holders]
        self.maps = nn.ModuleList(
            nn.Linear(in_width * size, out_width * size, bias=not kept)
            for size, kept in zip(sizes, self.supports, strict=True)
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
        for kept, holders, linear in zip(self.supports, self.holders, self.maps, strict=True):
            mapped = linear(torch.cat([pooled[i][kept] for i in holders], dim=-1))
            for i, part in zip(holders, mapped.split(self._rows(holders), dim=-1), strict=True):
                part = repeat_over(part, kept, self.supports[i])
                outputs[i] = outputs[i] + part if i in outputs else part
        return [outputs[i] for i in range(len(self.supports))]

    def _rows(self, holders: Sequence[int]) -> list[int]:
        return [self.out_channels[i] for i in holders]


class NormReLU(nn.ModuleList):
    """Batch norm of every channel over networks and neurons, then ReLU, for each support."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__(map(nn.BatchNorm1d, channels))

    def forward(self, features: Sequence[Float[Tensor, "batch ..."]]) -> list[Float[Tensor, "batch ..."]]:
        return [torch.relu(norm(x.flatten(0, -2)).view_as(x)) for norm, x in zip(self, features, strict=True)]


class DWSNet(ParameterReader):
    """Invariant DWSNet (Navon et al., 2023): DWS layers with batch norm and ReLU, then pooling and an MLP.

    The first layer lifts each scalar of the input network to `width` channels; `depth` hidden layers follow.
    Then all hidden neurons are pooled; a Linear layer on the result (the invariant layer) opens the head.

    552,586 parameters for ten classes of 2-32-32-1 INRs, 310,720 of them in the DWS layers. The published
    model has about 550,000; the sizes of its head are not stated, ours are set to meet that number.
    """

    def __init__(
        self,
        wiring: Wiring,
        num_classes: int,
        *,
        width: int = 32,
        depth: int = 4,
        head_width: int = 384,
        reduction: Reduction = "max",
        dropout: float = 0.2,
    ) -> None:
        super().__init__(wiring)
        self.space = WeightSpace(wiring)
        self.reduction: Reduction = reduction
        channels = [width * m for m in self.space.multiplicity]
        widths = [1, *[width] * (depth + 1)]
        self.layers = nn.ModuleList(DWSLayer(self.space, *pair, reduction) for pair in pairwise(widths))
        self.norms = nn.ModuleList(NormReLU(channels) for _ in self.layers)
        self.head = perceptron([sum(channels), head_width, head_width, num_classes], dropout)

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        features = self.space.features(self.standardized(graph))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            features = norm(layer(features))
        pooled = [poolings(x, s, self.reduction)[()] for x, s in zip(features, self.space.supports, strict=True)]
        return self.head(torch.cat(pooled, dim=-1))
