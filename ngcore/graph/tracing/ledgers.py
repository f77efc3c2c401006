"""What reading a network collects: groups of neurons, blocks of edges, and the places of parameters."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ngcore.graph.structure import Block, Role, View
from ngcore.graph.symmetry.spaces import Space, uniform
from ngcore.graph.tracing.expressions import Expression
from ngcore.graph.tracing.values import NO_NEURON, Parameter


class PlaceError(Exception):
    """A parameter that can't have its place on the graph."""


@dataclass
class Neurons:
    """A group of neurons; `copy`: of another group, through a function of its sums."""

    start: int
    size: int
    role: Role
    where: str
    copy: tuple[int, Expression] | None = None
    bias: tuple[str, View] | None = None
    tied: bool = False
    read: bool = False
    locations: tuple[int, ...] | None = None


class NeuronLedger(list[Neurons]):
    """All groups, in the order in which they were made; neurons are counted through them."""

    def new(self, size: int, role: Role, where: str) -> Tensor:
        """A new group; its ids, (size,)."""
        start = self[-1].start + self[-1].size if self else 0
        self.append(Neurons(start, size, role, where))
        return torch.arange(start, start + size)

    def of(self, neuron: int) -> Neurons:
        """The group of a neuron."""
        return self[bisect_right(self, neuron, key=lambda group: group.start) - 1]

    def numbers(self, ids: Tensor) -> list[int]:
        """The groups in which these neurons are."""
        return torch.unique(self.places(ids[ids != NO_NEURON])).tolist()

    def places(self, ids: Tensor) -> Tensor:
        """Number of the group of every neuron."""
        starts = np.array([group.start for group in self])
        return torch.from_numpy(np.searchsorted(starts, ids.numpy(), side="right") - 1)

    def originals(self, ids: Tensor) -> Tensor:
        """The neurons of which copies are copies, others themselves."""
        shift = torch.tensor([0 if g.copy is None else self[g.copy[0]].start - g.start for g in self])
        return ids + shift[self.places(ids)]


@dataclass
class ParameterLedger:
    """The parameters' spaces, and which of their elements have a place on the graph."""

    axes: dict[str, tuple[Space, ...]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    """A meta tensor of every parameter."""
    placed: dict[str, Tensor | None] = field(default_factory=dict)
    """Which elements have their place; None for all of them."""

    def value(self, name: str, shape: Sequence[int]) -> Parameter:
        """A whole parameter; where it occurs again its axes have the same spaces."""
        if name not in self.axes:
            self.axes[name] = tuple(Space(n) if n != 1 else uniform(1) for n in shape)
            self.whole[name] = torch.empty(tuple(shape), device="meta")
        return Parameter(tuple(shape), list(self.axes[name]), name, self.whole[name])

    def view(self, name: str, values: Tensor) -> View:
        """Which elements of a parameter these are.

        Raises:
            PlaceError: they are in memory of their own.
        """
        if values.untyped_storage()._cdata != self.whole[name].untyped_storage()._cdata:
            raise PlaceError(f"parameter {name} is rearranged into new memory before it is used")
        strides = list(values.stride())
        for d in reversed(range(values.dim())):
            if values.shape[d] == 1:  # of no effect: always the same
                strides[d] = values.shape[d + 1] * strides[d + 1] if d + 1 < values.dim() else 1
        return View(tuple(values.shape), tuple(strides), values.storage_offset())

    def as_block(self, name: str) -> View | None:
        """All of a parameter as a bias or as a block of edges, for which a wiring has no view; None for more axes."""
        values = self.whole[name]
        if values.dim() not in (1, 2):
            return None
        return self.view(name, values if values.dim() == 1 else values.unsqueeze(0))

    def place(self, name: str, view: View) -> bool:
        """Give elements of a parameter their place on the graph, unless they have one from an earlier use.

        Returns:
            whether they have.

        Raises:
            PlaceError: some of them have, others not; or one occurs twice.
        """
        count = self.whole[name].numel()
        if any(stride == 0 and n > 1 for n, stride in zip(view.size, view.stride, strict=True)):
            raise PlaceError(f"parameter {name} is repeated before it is used")
        if name not in self.placed and math.prod(view.size) == count:
            self.placed[name] = None  # all of it: no need to look at every element
            return False
        if name not in self.placed:
            self.placed[name] = torch.zeros(count, dtype=torch.bool)
        if self.placed[name] is None:
            return True
        places = view(self.placed[name], 0)
        tied = bool(places.any())
        if tied and not places.all():
            raise PlaceError(f"parameter {name} is used in parts that overlap")
        places.fill_(True)
        return tied

    def missing(self) -> tuple[str, int] | None:
        """A parameter of which some elements have no place, and how many have."""
        some = ((name, int(places.sum())) for name, places in self.placed.items() if places is not None)
        return next(((name, count) for name, count in some if count < self.whole[name].numel()), None)


class BlockLedger(list[Block]):
    """All edges."""

    def connect(
        self,
        neurons: NeuronLedger,
        parameters: ParameterLedger,
        sources: Tensor,
        targets: Tensor,
        kind: str,
        slot: tuple[str, Tensor] | None,
        groups: int,
        kernel: tuple[int, ...],
    ) -> None:
        """See `Reader.connect`."""
        name, view = (None, None) if slot is None else (slot[0], parameters.view(*slot))
        pieces = [(_ends(neurons, sources, groups), _ends(neurons, targets, groups), view)]
        for axis in (0, 2, 1):
            pieces = [smaller for piece in pieces for smaller in _cut(*piece, axis)]
        for own_sources, own_targets, own_view in pieces:
            source, target = int(own_sources[1, 0, 0]), int(own_targets[1, 0, 0])
            neurons[source].read = True
            self.append(
                Block(
                    source,
                    target,
                    name,
                    kind=kind,
                    view=own_view,
                    groups=own_sources.shape[1],
                    kernel=kernel,
                    source_nodes=as_nodes(own_sources[0].flatten() - neurons[source].start),
                    target_nodes=as_nodes(own_targets[0].flatten() - neurons[target].start),
                    tied=own_view is not None and parameters.place(name, own_view),
                )
            )


def _ends(neurons: NeuronLedger, ids: Tensor, groups: int) -> Tensor:
    """Ids, and the groups in which the neurons are: (2, parts of a block, neurons of a part)."""
    return torch.stack([ids, neurons.places(ids)]).view(2, groups, -1)


def _cut(
    sources: Tensor, targets: Tensor, view: View | None, axis: int
) -> Iterator[tuple[Tensor, Tensor, View | None]]:
    """Cut edges where the neurons at their ends change groups: along parts (axis 0), targets (1) or sources (2)."""
    # after a cut along parts, all parts of a piece change groups at the same places as the first
    groups = {0: torch.cat([sources[1], targets[1]], 1), 1: targets[1, :1].T, 2: sources[1, :1].T}[axis]
    changes = torch.nonzero((groups[1:] != groups[:-1]).any(1)).flatten() + 1
    for start, end in pairwise([0, *changes.tolist(), len(groups)]):
        yield (
            sources if axis == 1 else sources.narrow(1 if axis == 0 else 2, start, end - start),
            targets if axis == 2 else targets.narrow(1 if axis == 0 else 2, start, end - start),
            None if view is None else view.narrow(axis, start, end - start),
        )


def as_nodes(indices: Tensor) -> range | tuple[int, ...]:
    """Indices as a range where they are consecutive."""
    first, count = int(indices[0]), len(indices)
    if torch.equal(indices, torch.arange(first, first + count)):
        return range(first, first + count)
    return tuple(indices.tolist())
