"""Operators that move elements: views, slices, concatenation, indexing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngcore.graph.symmetry.spaces import (
    IncompatibleError,
    Space,
    cut,
    give_up,
    lost_leaf,
    pinned_leaf,
    product_of,
    resolve,
    select,
    split_product,
    sum_of,
    uniform,
    unify,
)
from ngcore.graph.tracing.reader import Reader, rule
from ngcore.graph.tracing.rules.operands import as_activation, joined_axes, known_ids
from ngcore.graph.tracing.values import NO_NEURON, Constant, Parameter, Unread, Value

aten = torch.ops.aten


def moved(reader: Reader, value: Value, axes: Sequence[Space], move: Callable[[Tensor], Tensor]) -> Value:
    """The value after an operator that moves elements, run on its ids or on its place in a parameter."""
    match value:
        case Parameter():
            elements = move(value.elements)
            return Parameter(tuple(elements.shape), list(axes), value.name, elements)
        case Constant():
            numbers = move(value.numbers)
            return Constant(tuple(numbers.shape), list(axes), numbers)
        case Unread():  # an input's neurons are made when it is read
            shape = move(torch.empty(value.shape, device="meta")).shape
            return reader.activation(shape, axes, None, value.function)
    ids = move(value.ids.expand(value.shape))
    return reader.activation(ids.shape, axes, ids, value.function)


def reshape_axes(value: Value, shape: Sequence[int]) -> list[Space]:
    """Axes after a view: runs of axes are joined and cut apart again."""
    before, after = list(value.shape), list(shape)
    axes: list[Space] = []
    i = j = 0
    while i < len(before) or j < len(after):
        if j < len(after) and after[j] == 1:
            axes.append(uniform(1))
            j += 1
            continue
        if i < len(before) and before[i] == 1:
            i += 1
            continue
        first_i, first_j = i, j
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= before[i]
                i += 1
            else:
                right *= after[j]
                j += 1
        joined = value.axes[first_i] if i - first_i == 1 else product_of(value.axes[first_i:i])
        try:
            axes += split_product(joined, after[first_j:j])
        except IncompatibleError:
            give_up(joined)
            axes += [lost_leaf(n) for n in after[first_j:j]]
    return axes


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def view(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    target = reader.node.target
    shape = tuple(target(torch.empty(value.shape, device="meta"), *arguments, **keywords).shape)
    return moved(reader, value, reshape_axes(value, shape), lambda x: x.reshape(shape))


@rule("permute", "transpose", "t", "movedim", "numpy_T", "mT", "swapaxes")
def transpose(reader: Reader, value: Value, *arguments: Any) -> Value:
    target = reader.node.target
    order = target(
        torch.empty(value.shape, device="meta").as_strided(value.shape, tuple(range(len(value.shape)))), *arguments
    )
    order = list(order.stride())
    result = moved(reader, value, [value.axes[i] for i in order], lambda x: target(x, *arguments))
    if isinstance(value, Unread):
        result.parent = value, order
    return result


@rule(
    "clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy", "_to_copy", "to", "feature_dropout",
    "native_dropout", "_assert_tensor_metadata", "type_as", "copy",
)  # fmt: skip
def same(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    if reader.operator == "aten.copy":
        return expand(reader, arguments[0], value.shape)
    return value


@rule("expand", "expand_as", "broadcast_to")
def expand(reader: Reader, value: Value, shape: Any, **keywords: Any) -> Value:
    shape = shape.shape if isinstance(shape, Value) else shape
    new = len(shape) - len(value.shape)
    full = [value.shape[d - new] if n == -1 else n for d, n in enumerate(shape)]
    axes = [value.axes[d - new] if d >= new and value.shape[d - new] == n else uniform(n) for d, n in enumerate(full)]
    return moved(reader, value, axes, lambda x: x.expand(full))


def narrowed(space: Space, start: int, stop: int, step: int = 1) -> Space:
    """The space of a slice of an axis."""
    size = resolve(space).size
    if (start, stop, step) == (0, size, 1):
        return space
    length = len(range(start, stop, step))
    if resolve(space).kind == "uniform" or length == 0:
        return uniform(length)
    try:
        if step != 1:
            raise IncompatibleError
        sizes = [n for n in (start, length, size - stop) if n]
        return cut(space, sizes)[1 if start else 0]
    except IncompatibleError:
        give_up(space)
        return lost_leaf(length)


@rule("slice")
def slice_(
    reader: Reader, value: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    start, stop, step = slice(start, end, step).indices(value.shape[dim])
    axes = list(value.axes)
    axes[dim] = narrowed(axes[dim], start, stop, step)
    return moved(reader, value, axes, lambda x: aten.slice.Tensor(x, dim, start, stop, step))


@rule("select")
def select_(reader: Reader, value: Value, dim: int, index: int) -> Value:
    dim, index = dim % len(value.shape), index % value.shape[dim]
    return moved(reader, value, select(value.axes, dim, index), lambda x: x.select(dim, index))


@rule("unbind")
def unbind(reader: Reader, value: Value, dim: int = 0) -> list[Value]:
    return [select_(reader, value, dim, i) for i in range(value.shape[dim])]


@rule("split_with_sizes", "split", "chunk", "tensor_split")
def split(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> list[Value]:
    pieces = reader.node.target(torch.empty(value.shape, device="meta"), *arguments, **keywords)
    dim = (arguments[1] if len(arguments) > 1 else keywords.get("dim", 0)) % len(value.shape)
    result, start = [], 0
    for piece in pieces:
        result.append(slice_(reader, value, dim, start, start + piece.shape[dim]))
        start += piece.shape[dim]
    return result


@rule("cat", "concat", "concatenate")
def cat(reader: Reader, values: Sequence[Value], dim: int = 0) -> Value:
    values = [as_activation(reader, value) for value in values if math.prod(value.shape)]
    dim %= len(values[0].shape)
    axes = joined_axes([[*value.axes[:dim], uniform(1), *value.axes[dim + 1 :]] for value in values])
    axes[dim] = sum_of(value.axes[dim] for value in values)
    ids = torch.cat([known_ids(reader, value, dim).expand(value.shape) for value in values], dim)
    return reader.activation(ids.shape, axes, ids)


@rule("stack")
def stack(reader: Reader, values: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(values[0].shape) + 1
    return cat(reader, [insert_axis(reader, value, dim) for value in values], dim)


def insert_axis(reader: Reader, value: Value, dim: int) -> Value:
    return moved(reader, value, [*value.axes[:dim], uniform(1), *value.axes[dim:]], lambda x: x.unsqueeze(dim))


@rule("slice_scatter")
def slice_scatter(
    reader: Reader,
    value: Value,
    part: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    start, stop, step = slice(start, end, step).indices(value.shape[dim])
    axes = list(value.axes)
    piece = narrowed(axes[dim], start, stop, step)
    for mine, other in zip([*axes[:dim], piece, *axes[dim + 1 :]], part.axes, strict=True):
        unify(mine, other)
    ids = known_ids(reader, value, dim).expand(value.shape)
    written = known_ids(reader, part, dim).expand(part.shape)
    return reader.activation(value.shape, axes, aten.slice_scatter(ids.contiguous(), written, dim, start, stop, step))


@rule("constant_pad_nd", "pad")
def pad(reader: Reader, value: Value, amounts: Sequence[int], *arguments: Any) -> Value:
    axes = list(value.axes)
    for i in range(len(amounts) // 2):
        dim = len(axes) - 1 - i
        low, high = amounts[2 * i], amounts[2 * i + 1]
        if (low, high) != (0, 0):
            known = axes[dim] if low >= 0 and high >= 0 else pinned_leaf(value.shape[dim] + min(low, 0) + min(high, 0))
            axes[dim] = sum_of([uniform(max(low, 0)), known, uniform(max(high, 0))])
    ids = aten.constant_pad_nd(known_ids(reader, value, 1).expand(value.shape), list(amounts), NO_NEURON)
    return reader.activation(ids.shape, axes, ids)


@rule("repeat")
def repeat(reader: Reader, value: Value, counts: Sequence[int]) -> Value:
    new = len(counts) - len(value.shape)
    axes = [uniform(1)] * new + list(value.axes)
    axes = [product_of([uniform(n), axis]) if n > 1 else axis for n, axis in zip(counts, axes, strict=True)]
    return moved(reader, value, axes, lambda x: x.repeat(*counts))


@rule("repeat_interleave")
def repeat_interleave(reader: Reader, value: Value, count: int, dim: int, **keywords: Any) -> Value:
    axes = list(value.axes)
    axes[dim] = product_of([axes[dim], uniform(count)])
    return moved(reader, value, axes, lambda x: x.repeat_interleave(count, dim))


@rule(
    "index", "index_select", "gather", "roll", "flip", "pixel_shuffle", "unfold", "im2col", "as_strided",
    "channel_shuffle",
)  # fmt: skip
def rearrange(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """Movement of which no structure is kept: axes that change are given up."""
    value = as_activation(reader, value)

    def numbers(x: Any) -> Any:
        if isinstance(x, Value):
            if not isinstance(x, Constant):
                raise reader.fail("indices that depend on the network's input are not supported")
            return x.numbers
        return [numbers(y) for y in x] if isinstance(x, (list, tuple)) else x

    arguments = [numbers(x) for x in arguments]
    shape = tuple(reader.node.target(torch.empty(value.shape, device="cpu"), *arguments, **keywords).shape)
    kept = [
        len(shape) == len(value.shape) and n == size and not touched(reader.operator, arguments, d, len(shape))
        for d, (n, size) in enumerate(zip(shape, value.shape, strict=False))
    ]
    give_up(*(axis for d, axis in enumerate(value.axes) if not (d < len(kept) and kept[d])))
    axes = [value.axes[d] if d < len(kept) and kept[d] else lost_leaf(n) for d, n in enumerate(shape)]
    return moved(reader, value, axes, lambda x: reader.node.target(x, *arguments, **keywords))


def touched(operator: str, arguments: Sequence[Any], dim: int, count: int) -> bool:
    """Whether a rearrangement changes an axis; where that is not known it does."""
    if operator in ("aten.roll", "aten.flip"):
        dims = arguments[-1] if operator == "aten.flip" or len(arguments) > 1 else range(count)
        return dim in [d % count for d in dims]
    if operator in ("aten.index_select", "aten.gather"):
        return dim == arguments[0] % count
    if operator == "aten.index":
        used = [d for d, index in enumerate(arguments[0]) if index is not None]
        return not (len(used) == 1 and dim != used[0] and arguments[0][used[0]].dim() == 1)
    return True
