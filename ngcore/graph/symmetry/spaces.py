"""Spaces: what the axes of a network's tensors run over, and which of their permutations the network allows.

Tracing gives every axis of every tensor a space. Operators relate spaces: an addition makes two of them one, a view
splits one into a product, a slice into a sum, a constant that varies along one pins it. What is left free when the
whole network has been read is its group of neuron permutations: one symmetric group per free leaf, once for every
value of the leaves on which it depends (every head permutes its dimensions by itself).

Anything that is not recognised is pinned, with a note of the operator. Permutations only, no signs,
scales or rotations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Literal

Kind = Literal["leaf", "uniform", "sum", "product", "family"]
Pinned = bool | str

reading: ContextVar[str] = ContextVar("reading", default="the network as a whole")
"""The operator that is being read and where it is: what spaces are given up for."""


class Space:
    """A finite set that an axis runs over.

    Kinds: a leaf has no structure; a `uniform` one carries equal values, like an expanded axis, and is never bound; a
    sum or a product is made of `parts`, in the order of the axis; a family is a leaf that differs with another one,
    `index`, of which it has one part for every value.

    `pinned` says whether a leaf holds its order; it names the operator where no structure describes what that allows.
    """

    __slots__ = ("depends", "index", "kind", "link", "parts", "pinned", "size")

    def __init__(self, size: int, kind: Kind = "leaf", parts: Sequence[Space] = (), pinned: Pinned = False) -> None:
        self.size, self.kind, self.parts, self.pinned = size, kind, list(parts), pinned
        self.link: Space | None = None  # the space that this one is part of
        self.index: Space | None = None
        # a leaf depends on the spaces that occur in every one of these lists, if there is any list
        self.depends: list[list[Space]] = []

    def become(self, other: Space) -> None:
        """From now on this leaf is `other`, whose leaves may depend on each other and on what this one did."""
        self.link = other
        for leaf in leaves(other):
            leaf.depends += [[*known, other] for known in self.depends]
        _pin([other], self.pinned)


def uniform(size: int) -> Space:
    return Space(size, "uniform")


def resolve(space: Space) -> Space:
    while space.link is not None:
        space = space.link
    return space


def parts(space: Space, kind: Kind) -> list[Space]:
    """The parts of a sum or product, nested ones opened; any other space is its own single part."""
    space = resolve(space)
    if space.kind != kind:
        return [space]
    return [inner for part in space.parts for inner in parts(part, kind)]


def sum_of(spaces: Iterable[Space]) -> Space:
    """Concatenation."""
    flat = [p for space in spaces for p in parts(space, "sum") if p.size]
    return flat[0] if len(flat) == 1 else Space(sum(p.size for p in flat), "sum", flat)


def product_of(spaces: Iterable[Space]) -> Space:
    """Several axes flattened into one."""
    flat = [p for space in spaces for p in parts(space, "product") if p.size != 1]
    if not flat:
        return uniform(1)
    if all(p.kind == "uniform" for p in flat):
        return uniform(math.prod(p.size for p in flat))
    return flat[0] if len(flat) == 1 else Space(math.prod(p.size for p in flat), "product", flat)


def leaves(space: Space) -> list[Space]:
    """All leaves, in order; those of a family's parts too."""
    space = resolve(space)
    if space.kind == "leaf":
        return [space]
    return [leaf for part in space.parts for leaf in leaves(part)]


def pin(*spaces: Space) -> None:
    """Allow no permutation: the network allows none."""
    _pin(spaces, True)


def give_up(*spaces: Space) -> None:
    """Allow no permutation: no structure says which ones the operator that is being read allows."""
    _pin(spaces, reading.get())


def _pin(spaces: Iterable[Space], why: Pinned) -> None:
    for space in spaces:
        for leaf in leaves(space):
            leaf.pinned = _stronger(leaf.pinned, why)


def _stronger(a: Pinned, b: Pinned) -> Pinned:
    return True if True in (a, b) else a or b


def pinned_leaf(size: int) -> Space:
    return Space(size, pinned=True) if size != 1 else uniform(1)


def lost_leaf(size: int) -> Space:
    """The space of an axis that the operator being read makes in a way that no structure expresses."""
    return Space(size, pinned=reading.get()) if size != 1 else uniform(1)


def is_pinned(space: Space) -> bool:
    return all(leaf.pinned for leaf in leaves(space))


class IncompatibleError(Exception):
    """Two structures of one space that have no common refinement."""


def split_product(space: Space, sizes: Sequence[int]) -> list[Space]:
    """Axes of these sizes whose flattening is the space.

    Raises:
        IncompatibleError: the space has a structure that these sizes cut through.
    """
    space = resolve(space)
    if len(sizes) == 1:
        return [space]
    if space.kind == "uniform":
        return [uniform(size) for size in sizes]
    if space.kind == "leaf":
        children: list[Space] = []
        for size in sizes:
            child = uniform(1) if size == 1 else Space(size, pinned=space.pinned)
            child.depends = [[*known, *children] for known in space.depends] or ([children.copy()] if children else [])
            children.append(child)
        space.link = product_of(children)
        return children
    if space.kind == "product":
        return _regroup(parts(space, "product"), sizes, split_product, _divided, product_of)
    if space.kind == "sum":
        return _split_sum_as_product(space, sizes)
    raise IncompatibleError


def _divided(size: int, by: int) -> int:
    if size % by:
        raise IncompatibleError
    return size // by


def _regroup(
    inner: Sequence[Space],
    sizes: Sequence[int],
    apart: Callable[[Space, Sequence[int]], list[Space]],
    less: Callable[[int, int], int],
    together: Callable[[list[Space]], Space],
) -> list[Space]:
    """Take the parts of a sum or a product apart and together to these sizes; `less` is what is left of a size."""
    waiting, found = list(inner), []
    for size in sizes:
        taken: list[Space] = []
        missing, nothing = size, less(size, size)
        while missing != nothing:
            part = resolve(waiting.pop(0))
            if part.size > missing:
                part, rest = apart(part, [missing, less(part.size, missing)])
                waiting.insert(0, rest)
            taken.append(part)
            missing = less(missing, part.size)
        found.append(together(taken))
    return found


def _split_sum_as_product(space: Space, sizes: Sequence[int]) -> list[Space]:
    """The outermost axis is cut where the sum is; the inner axes are the same for all of its parts."""
    inner = math.prod(sizes[1:])
    if any(part.size % inner for part in parts(space, "sum")):
        raise IncompatibleError
    split = [split_product(part, [part.size // inner, *sizes[1:]]) for part in parts(space, "sum")]
    outer = sum_of(columns[0] for columns in split)
    axes = [columns for columns in zip(*split, strict=True)][1:]
    joined = []
    for column in axes:
        axis = column[0]
        for other in column[1:]:
            axis = unify(axis, other)
        joined.append(axis)
    return [outer, *joined]


def cut(space: Space, sizes: Sequence[int]) -> list[Space]:
    """Consecutive pieces of these sizes, of which the space becomes the sum.

    Raises:
        IncompatibleError: the space is a product whose rows these sizes cut through.
    """
    space = resolve(space)
    if len(sizes) == 1:
        return [space]
    if space.kind == "uniform":
        return [uniform(size) for size in sizes]
    if space.kind == "leaf":
        pieces = [Space(size, pinned=space.pinned or size == 1) for size in sizes]
        for piece in pieces:
            piece.depends = [list(known) for known in space.depends]
        space.link = sum_of(pieces)
        return pieces
    if space.kind == "sum":
        return _regroup(parts(space, "sum"), sizes, cut, operator.sub, sum_of)
    if space.kind == "product":
        first, *rest = parts(space, "product")
        inner = math.prod(factor.size for factor in rest)
        if any(size % inner for size in sizes):
            raise IncompatibleError
        return [product_of([piece, *rest]) for piece in cut(first, [size // inner for size in sizes])]
    raise IncompatibleError


def unify(a: Space, b: Space) -> Space:
    """Make two spaces one, index by index; what has no common structure is pinned."""
    a, b = resolve(a), resolve(b)
    if a is b or b.kind == "uniform":
        return a
    if a.kind == "uniform":
        return b
    if a.kind == "leaf" and b.kind == "leaf":
        b.link = a
        a.pinned = _stronger(a.pinned, b.pinned)
        a.depends += b.depends
        return a
    try:
        if b.kind == "leaf":
            a, b = b, a
        if a.kind == "leaf":
            return _bind(a, b)
        return _unify_structures(a, b)
    except IncompatibleError:
        give_up(a, b)
        return a


def _bind(leaf: Space, structure: Space) -> Space:
    """Give a leaf the structure of another space; where that is uniform the leaf stays free."""
    _pin([structure], leaf.pinned)
    if structure.kind == "family":
        leaf.become(structure)
        return structure
    inner = parts(structure, structure.kind)
    sizes = [part.size for part in inner]
    own = split_product(leaf, sizes) if structure.kind == "product" else cut(leaf, sizes)
    joined = [unify(mine, other) for mine, other in zip(own, inner, strict=True)]
    return product_of(joined) if structure.kind == "product" else sum_of(joined)


def _unify_structures(a: Space, b: Space) -> Space:
    kinds = {a.kind, b.kind}
    if kinds == {"product"}:
        sizes = _common_factors([p.size for p in parts(a, "product")], [p.size for p in parts(b, "product")])
        pairs = zip(split_product(a, sizes), split_product(b, sizes), strict=True)
        return product_of([unify(x, y) for x, y in pairs])
    if kinds <= {"product", "sum"}:
        sizes = _common_pieces([p.size for p in parts(a, "sum")], [p.size for p in parts(b, "sum")])
        return sum_of([unify(x, y) for x, y in zip(cut(a, sizes), cut(b, sizes), strict=True)])
    raise IncompatibleError


def _common_factors(first: list[int], second: list[int]) -> list[int]:
    """The sizes of the coarsest product that refines two products of the same size."""
    a, b, sizes = list(first), list(second), []
    while a and b:
        x, y = a.pop(0), b.pop(0)
        small, large, rest = (x, y, b) if x <= y else (y, x, a)
        if large % small:
            raise IncompatibleError
        sizes.append(small)
        if large > small:
            rest.insert(0, large // small)
    return sizes


def _common_pieces(first: list[int], second: list[int]) -> list[int]:
    """The sizes of the coarsest sum that refines two sums of the same size."""
    ends = sorted({*_running(first), *_running(second)})
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _running(sizes: Iterable[int]) -> list[int]:
    total, ends = 0, []
    for size in sizes:
        total += size
        ends.append(total)
    return ends


def select(axes: Sequence[Space], dim: int, position: int) -> list[Space]:
    """The axes left of a tensor when one of them is fixed; spaces that depended on it turn into families."""
    axis = resolve(axes[dim])
    others = [*axes[:dim], *axes[dim + 1 :]]
    if axis.kind == "sum":
        for part in parts(axis, "sum"):
            if position < part.size:
                return select([*axes[:dim], part, *axes[dim + 1 :]], dim, position)
            position -= part.size
    if axis.kind != "leaf":
        give_up(axis)
        return others
    axis.pinned = True
    _make_families(axis, others)
    return [_at(other, axis, position) for other in others]


def _make_families(index: Space, axes: Sequence[Space]) -> None:
    """Turn the leaves that depend on `index` into families over it."""
    found = dict.fromkeys(leaf for axis in axes for leaf in leaves(axis))
    for leaf in [leaf for leaf in found if not leaf.pinned and index in dependencies(leaf)]:
        members = [Space(leaf.size) for _ in range(index.size)]
        for i, member in enumerate(members):
            member.depends = [
                [_at(other, index, i) for other in known if resolve(other) is not index] for known in leaf.depends
            ]
        leaf.kind, leaf.index, leaf.parts = "family", index, members


def _at(space: Space, index: Space, position: int) -> Space:
    """The space where `index` has this value."""
    space = resolve(space)
    if space.kind == "family" and resolve(space.index) is index:
        return resolve(space.parts[position])
    if space.kind == "product":
        return product_of([_at(part, index, position) for part in parts(space, "product")])
    if space.kind == "sum":
        return sum_of([_at(part, index, position) for part in parts(space, "sum")])
    return space


def dependencies(leaf: Space) -> set[Space]:
    """The leaves on which this one may depend."""
    known = [{inner for space in spaces for inner in leaves(space)} for spaces in leaf.depends]
    return set.intersection(*known) - {leaf} if known else set()
