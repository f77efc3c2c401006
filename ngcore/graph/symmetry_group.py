"""The neuron permutations that leave a network's function unchanged, and how they move its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ngcore.graph.spaces import Space, dependencies, leaves, parts, resolve, unify

Permutations = Mapping[int, Tensor]


@dataclass(frozen=True)
class Factor:
    """One symmetric group: `size` neurons, or dimensions of a head, that may change places.

    It occurs once for every value of the spaces on which it depends, of sizes `copies`: the dimensions of an attention
    head permute within every head by itself. `parameters` names the parameters that it moves.
    """

    size: int
    copies: tuple[int, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Symmetry:
    """The group of all permutations of a wiring's free spaces; `axes` holds the spaces of every parameter.

    Sound always: each of its elements keeps the network's function. It is smaller than the largest such group
    where an operator cuts through a structure that spaces can't express (what is not understood is pinned) and where
    neurons that share a parameter could still permute together; signs, scales and rotations are not in it.
    """

    axes: Mapping[str, tuple[Space, ...]]
    tensors: Sequence[tuple[Space, ...]] = ()
    free: list[Space] = field(init=False)
    depends: dict[Space, list[Space]] = field(init=False)

    def __post_init__(self) -> None:
        tensors = [*self.axes.values(), *self.tensors]
        for axes in tensors:
            for _ in _simple(axes):  # unifies what has to be before dependencies are read
                pass
        depends = _allowed_dependencies(tensors)
        found = dict.fromkeys(leaf for axes in self.axes.values() for axis in axes for leaf in leaves(axis))
        object.__setattr__(self, "depends", depends)
        object.__setattr__(self, "free", [leaf for leaf in found if not leaf.pinned and leaf.size > 1])

    @property
    def factors(self) -> list[Factor]:
        """The symmetric groups of which this group is made."""
        return [
            Factor(leaf.size, tuple(d.size for d in self.depends[leaf]), self._moved_by(leaf)) for leaf in self.free
        ]

    def _moved_by(self, leaf: Space) -> tuple[str, ...]:
        return tuple(name for name, axes in self.axes.items() if any(leaf in leaves(axis) for axis in axes))

    @property
    def order(self) -> int:
        """Number of the group's elements."""
        return math.prod(math.factorial(f.size) ** math.prod(f.copies) for f in self.factors)

    def random(self, generator: torch.Generator | None = None) -> dict[int, Tensor]:
        """A uniformly drawn element: for every factor, by its place in `factors`, orders of shape (*copies, size)."""
        drawn = {}
        for i, factor in enumerate(self.factors):
            orders = [torch.randperm(factor.size, generator=generator) for _ in range(math.prod(factor.copies))]
            drawn[i] = torch.stack(orders).view(*factor.copies, factor.size)
        return drawn

    def permute(self, state_dict: Mapping[str, Tensor], permutations: Permutations) -> dict[str, Tensor]:
        """Reorder the parameters: the neuron at place i becomes the one that was at place `permutations[factor][i]`.

        Parameters may have batch axes before their own; names without spaces stay as they are.

        Raises:
            ValueError: an order is not a permutation of its factor's elements.
        """
        orders = {}
        for i, order in permutations.items():
            leaf = self.free[i]
            expected = (*(d.size for d in self.depends[leaf]), leaf.size)
            if tuple(order.shape) != expected or not torch.equal(
                order.sort(-1).values, torch.arange(leaf.size).expand(expected)
            ):
                raise ValueError(f"factor {i} needs permutations of {leaf.size} neurons, of shape {expected}")
            orders[leaf] = order
        moved = {}
        for name, values in state_dict.items():
            axes = self.axes.get(name)
            moved[name] = values if axes is None else self._permute(values, list(axes), orders)
        return moved

    def _permute(self, values: Tensor, axes: list[Space], orders: Mapping[Space, Tensor]) -> Tensor:
        """Bring the last `len(axes)` axes of a tensor into a new order."""
        batch = values.dim() - len(axes)
        opened = [factor for axis in axes for factor in parts(axis, "product")]
        tensor = values.reshape(*values.shape[:batch], *(factor.size for factor in opened))
        for dim, space in enumerate(opened):
            if space.kind == "sum":
                pieces = [[*opened[:dim], part, *opened[dim + 1 :]] for part in parts(space, "sum")]
                return self._piecewise(tensor, dim, pieces, orders).reshape(values.shape)
            if space.kind == "family" and resolve(space.index) not in opened:
                return self._permute(tensor, [*opened[:dim], space.parts[0], *opened[dim + 1 :]], orders).reshape(
                    values.shape
                )
            if space.kind == "family":
                index = _nearest(resolve(space.index), dim, opened)
                pieces = [[_member(k, index, i, opened) for k in range(len(opened))] for i in range(len(space.parts))]
                return self._piecewise(tensor, index, pieces, orders).reshape(values.shape)
        moving = [dim for dim, space in enumerate(opened) if space in orders]
        for dim in sorted(moving, key=lambda dim: len(self.depends[opened[dim]])):
            order = orders[opened[dim]].to(values.device)
            if order.dim() == 1:
                tensor = tensor.index_select(batch + dim, order)
            else:
                tensor = tensor.gather(batch + dim, self._index(order, dim, opened, tensor))
        return tensor.reshape(values.shape)

    def _piecewise(self, tensor: Tensor, dim: int, pieces: list[list[Space]], orders: Mapping[Space, Tensor]) -> Tensor:
        """Permute consecutive pieces along an axis, each with spaces of its own."""
        along = tensor.dim() - len(pieces[0]) + dim
        cuts = tensor.split([spaces[dim].size for spaces in pieces], along)
        return torch.cat([self._permute(c, spaces, orders) for c, spaces in zip(cuts, pieces, strict=True)], along)

    def _index(self, order: Tensor, dim: int, opened: list[Space], tensor: Tensor) -> Tensor:
        """The order of one axis, which depends on the place along others, as an index for `gather`."""
        batch = tensor.dim() - len(opened)
        places = [*(_nearest(leaf, dim, opened) for leaf in self.depends[opened[dim]]), dim]
        shape = [1] * tensor.dim()
        for place in places:
            shape[batch + place] = tensor.shape[batch + place]
        by_place = sorted(range(len(places)), key=places.__getitem__)
        return order.permute(by_place).reshape(shape).expand(tensor.shape)


def _nearest(leaf: Space, dim: int, opened: list[Space]) -> int:
    """The axis that runs over a leaf on which the axis `dim` depends: the last one before it, if there are several."""
    places = [i for i, space in enumerate(opened) if space is leaf]
    return max((i for i in places if i < dim), default=places[0])


def _member(dim: int, index: int, i: int, opened: list[Space]) -> Space:
    """What an axis runs over where the axis `index` is fixed at `i`."""
    space = opened[dim]
    if dim == index:
        return Space(1, "uniform")
    if space.kind == "family" and resolve(space.index) is opened[index]:
        return resolve(space.parts[i]) if _nearest(opened[index], dim, opened) == index else space
    return space


def _simple(axes: Sequence[Space]) -> Iterator[list[Space]]:
    """A tensor's axes, products opened, once for every choice of the parts of sums and the members of families."""
    opened = [factor for axis in axes for factor in parts(axis, "product")]
    for dim, space in enumerate(opened):
        if space.kind == "sum":
            for part in parts(space, "sum"):
                yield from _simple([*opened[:dim], part, *opened[dim + 1 :]])
            return
        if space.kind == "family":
            index = resolve(space.index)
            if index not in opened:  # nothing tells its members apart here: they are one
                for member in space.parts[1:]:
                    unify(space.parts[0], member)
                yield from _simple([*opened[:dim], space.parts[0], *opened[dim + 1 :]])
                return
            place = _nearest(index, dim, opened)
            for i in range(len(space.parts)):
                yield from _simple([_member(k, place, i, opened) for k in range(len(opened))])
            return
    yield opened


def _allowed_dependencies(tensors: Iterable[tuple[Space, ...]]) -> dict[Space, list[Space]]:
    """The leaves on which each leaf depends: only such as are there wherever it is itself."""
    found: dict[Space, set[Space]] = {}
    order: dict[Space, int] = {}
    for axes in tensors:
        for opened in _simple(axes):
            present = {space for space in opened if space.kind == "leaf"}
            for leaf in present:
                order.setdefault(leaf, len(order))
                found[leaf] = (found[leaf] if leaf in found else dependencies(leaf)) & present
    return {leaf: sorted(known, key=order.__getitem__) for leaf, known in found.items()}
