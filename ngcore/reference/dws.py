"""DWSNet block by block: the reference that the merged form in `ngcore.models.baselines` is held against.

One module per pair of parameter tensors, with one Linear for every set of hidden groups that the two may tie
together and with poolings of its own. Same function, same parameters, many small steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.baselines.mlp import ParameterReader, perceptron
from ngcore.models.baselines.weight_space import Reduction, Support, WeightSpace


class PlainBlock(nn.Module):
    """All equivariant maps from one parameter tensor to another, summed.

    Shapes: input (batch, *sizes of `source`, in_channels), output broadcasts to (batch, *sizes of `target`,
    out_channels).
    """

    def __init__(
        self, source: Support, target: Support, in_channels: int, out_channels: int, reduction: Reduction
    ) -> None:
        super().__init__()
        self.source, self.target, self.reduction = source, target, reduction
        self.ties = subsets(tuple(g for g in source if g in target))
        self.maps = nn.ModuleList(nn.Linear(in_channels, out_channels, bias=False) for _ in self.ties)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return sum(
            self._spread(linear(self._pool(x, tie)), tie) for tie, linear in zip(self.ties, self.maps, strict=True)
        )

    def _pool(self, x: Tensor, tie: Support) -> Tensor:
        axes = tuple(1 + axis for axis, group in enumerate(self.source) if group not in tie)
        return pool(x, axes, self.reduction)

    def _spread(self, x: Tensor, tie: Support) -> Tensor:
        for axis, group in enumerate(self.target):
            if group not in tie:
                x = x.unsqueeze(1 + axis)
        return x


class PlainLayer(nn.Module):
    """A DWS layer, batch norm and ReLU, on one tensor per parameter of the input network."""

    def __init__(self, space: WeightSpace, in_width: int, out_width: int, reduction: Reduction) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                PlainBlock(
                    space.support[source],
                    space.support[target],
                    in_width * space.entries[source],
                    out_width * space.entries[target],
                    reduction,
                )
                for source in space.support
            )
            for target in space.support
        )
        channels = [out_width * entries for entries in space.entries.values()]
        self.biases = nn.ParameterList(torch.zeros(count) for count in channels)
        self.norms = nn.ModuleList(map(nn.BatchNorm1d, channels))

    def forward(self, tensors: Sequence[Float[Tensor, "batch ..."]]) -> list[Float[Tensor, "batch ..."]]:
        outputs = []
        for blocks, bias, norm in zip(self.blocks, self.biases, self.norms, strict=True):
            y = sum(block(x) for block, x in zip(blocks, tensors, strict=True)) + bias
            outputs.append(torch.relu(norm(y.flatten(0, -2)).view_as(y)))
        return outputs


class PlainDWSNet(ParameterReader):
    """The function of `DWSNet`, and its arguments; `cut` brings the parameters over."""

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
        self.names = list(self.space.support)
        self.reduction: Reduction = reduction
        self.widths = [1, *[width] * (depth + 1)]
        self.layers = nn.ModuleList(PlainLayer(self.space, *pair, reduction) for pair in pairwise(self.widths))
        channels = width * sum(self.space.entries.values())
        self.head = perceptron([channels, head_width, head_width, num_classes], dropout)

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        standardized = self.standardized_graph(graph)
        tensors = [self.space.fold(name, standardized) for name in self.names]
        for layer in self.layers:
            tensors = layer(tensors)
        pooled = [pool(x, tuple(range(1, x.dim() - 1)), self.reduction) for x in tensors]
        return self.head(torch.cat(pooled, dim=-1))

    def cut(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut the tensors of a `DWSNet`'s state dict, or their gradients, into this model's, by name."""
        found = {}
        for key, value in merged.items():
            match key.split("."):
                case ["layers", layer, "maps", tie, "weight"]:
                    found |= self._cut_map(int(layer), self.space.ties[int(tie)], value)
                case ["layers", layer, "maps", _, "bias"]:
                    parts = value.split(self._channels(int(layer) + 1, self.names))
                    found |= {f"layers.{layer}.biases.{t}": part for t, part in enumerate(parts)}
                case ["norms", layer, support, kind]:
                    names = self.space.having(self.space.supports[int(support)])
                    counts = self._channels(int(layer) + 1, names)
                    parts = value.split(counts) if value.dim() else [value] * len(names)
                    for name, part in zip(names, parts, strict=True):
                        found[f"layers.{layer}.norms.{self.names.index(name)}.{kind}"] = part
                case _:
                    found[key] = value
        return found

    def _cut_map(self, layer: int, tied: Support, weight: Tensor) -> dict[str, Tensor]:
        """The blocks of one merged matrix, which ties the groups `tied` of every parameter that has them."""
        names = [name for name in self.names if set(tied) <= set(self.space.support[name])]
        found = {}
        for target, rows in zip(names, weight.split(self._channels(layer + 1, names)), strict=True):
            for source, part in zip(names, rows.split(self._channels(layer, names), dim=1), strict=True):
                t, s = self.names.index(target), self.names.index(source)
                number = self.layers[layer].blocks[t][s].ties.index(tied)
                found[f"layers.{layer}.blocks.{t}.{s}.maps.{number}.weight"] = part
        return found

    def _channels(self, stage: int, names: Sequence[str]) -> list[int]:
        return [self.widths[stage] * self.space.entries[name] for name in names]


def pool(x: Tensor, axes: tuple[int, ...], reduction: Reduction) -> Tensor:
    """`x` reduced over these axes."""
    if not axes:
        return x
    return x.amax(axes) if reduction == "max" else x.mean(axes)


def subsets(groups: Support) -> list[Support]:
    """Every subset, in the order of `groups`."""
    return [subset for size in range(len(groups) + 1) for subset in combinations(groups, size)]
