"""The neuron permutations that leave a network's function unchanged, and how they move its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ngcore.graph.symmetry.spaces import Space, dependencies, leaves, parts, resolve, unify

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

    Sound always: each of its elements keeps the network's function. It is smaller than the largest such group where an
    operator cuts through a structure that spaces can't express (`given_up` says where), where a constant varies along
    an axis but some of its values are equal, and where neurons that share a parameter could still permute together.
    Signs, scales and rotations are not in it.
    """

    axes: Mapping[str, tuple[Space, ...]]
    tensors: Sequence[tuple[Space, ...]] = ()
    free: list[Space] = field(init=False)
    depends: dict[Space, list[Space]] = field(init=False)

    def __post_init__(self) -> None:
        tensors = list(dict.fromkeys([*self.axes.values(), *self.tensors]))
        for axes in tensors:  # before dependencies are read
            _merge_members(axes)
        object.__setattr__(self, "depends", _allowed_dependencies(tensors))
        found = dict.fromkeys(leaf for axes in self.axes.values() for leaf in _leaves(axes))
        object.__setattr__(self, "free", [leaf for leaf in found if not leaf.pinned and leaf.size > 1])

    @cached_property
    def factors(self) -> list[Factor]:
        """The symmetric groups of which this group is made."""
        moved: dict[Space, list[str]] = {leaf: [] for leaf in self.free}
        for name, axes in self.axes.items():
            for leaf in dict.fromkeys(_leaves(axes)):
                if leaf in moved:
                    moved[leaf].append(name)
        return [
            Factor(leaf.size, tuple(d.size for d in self.depends[leaf]), tuple(names)) for leaf, names in moved.items()
        ]

    @cached_property
    def given_up(self) -> dict[str, tuple[str, ...]]:
        """Parameters with axes that are pinned because no structure describes them, each with its operators.

        Empty for a network whose operators are all understood.
        """
        found = {
            name: tuple(dict.fromkeys(leaf.pinned for leaf in _leaves(axes) if isinstance(leaf.pinned, str)))
            for name, axes in self.axes.items()
        }
        return {name: operators for name, operators in found.items() if operators}

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
        opened = _opened(axes)
        tensor = values.reshape(*values.shape[:batch], *(factor.size for factor in opened))
        dim, pieces = _pieces(opened)
        if pieces:
            cuts = tensor.split([piece[dim].size for piece in pieces], batch + dim)
            done = [self._permute(cut, piece, orders) for cut, piece in zip(cuts, pieces, strict=True)]
            return torch.cat(done, batch + dim).reshape(values.shape)
        moving = [dim for dim, space in enumerate(opened) if space in orders]
        for dim in sorted(moving, key=lambda dim: len(self.depends[opened[dim]])):
            order = orders[opened[dim]].to(values.device)
            if order.dim() == 1:
                tensor = tensor.index_select(batch + dim, order)
            else:
                tensor = tensor.gather(batch + dim, self._index(order, dim, opened, tensor))
        return tensor.reshape(values.shape)

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


def _leaves(axes: Sequence[Space]) -> Iterator[Space]:
    return (leaf for axis in axes for leaf in leaves(axis))


def _opened(axes: Sequence[Space]) -> list[Space]:
    """A tensor's axes with products as several axes."""
    return [factor for axis in axes for factor in parts(axis, "product")]


def _pieces(opened: list[Space]) -> tuple[int, list[list[Space]]]:
    """The axis along which a tensor falls into pieces where its first sum or family is opened, and their axes.

    Without sums and families there are no pieces. A family is a single piece where the tensor has no axis that tells
    its members apart: they are one.
    """
    for dim, space in enumerate(opened):
        if space.kind == "sum":
            return dim, [[*opened[:dim], part, *opened[dim + 1 :]] for part in parts(space, "sum")]
        if space.kind == "family":
            index = resolve(space.index)
            if index not in opened:
                return dim, [[*opened[:dim], resolve(space.parts[0]), *opened[dim + 1 :]]]
            place = _nearest(index, dim, opened)
            return place, [[_member(k, place, i, opened) for k in range(len(opened))] for i in range(len(space.parts))]
    return 0, []


def _merge_members(axes: Sequence[Space]) -> None:
    """Unify the members of families that a tensor does not distinguish."""
    opened = _opened(axes)
    dim, pieces = _pieces(opened)
    if len(pieces) == 1:
        for member in opened[dim].parts[1:]:
            unify(opened[dim].parts[0], member)
    for piece in pieces:
        _merge_members(piece)


def _simple(axes: Sequence[Space]) -> Iterator[list[Space]]:
    """A tensor's axes, products opened, once for every choice of the parts of sums and the members of families."""
    opened = _opened(axes)
    _, pieces = _pieces(opened)
    if not pieces:
        yield opened
    for piece in pieces:
        yield from _simple(piece)


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
