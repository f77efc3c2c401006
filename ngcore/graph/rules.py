"""How each operator is read: what it does to the spaces of its axes, and which neurons and edges it makes.

One function per family of operators. Operators that only move data are run on the neurons' ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngcore.graph.spaces import (
    IncompatibleError,
    Space,
    cut,
    is_pinned,
    pin,
    pinned_leaf,
    product_of,
    resolve,
    select,
    split_product,
    sum_of,
    uniform,
    unify,
)
from ngcore.graph.trace import NO_NEURON, Reader, Value, constant_axes, rule

aten = torch.ops.aten

# Moving data ----------------------------------------------------------------------------------------------------------


def moved(reader: Reader, value: Value, axes: Sequence[Space], move: Callable[[Tensor], Tensor]) -> Value:
    """The value after an operator that moves elements, run on its ids or on its place in a parameter."""
    if value.slot is not None:
        view = move(value.slot[1])
        if view.untyped_storage()._cdata != value.slot[1].untyped_storage()._cdata:
            raise reader.fail(f"parameter {value.slot[0]} is rearranged into new memory before it is used")
        return Value(tuple(view.shape), list(axes), slot=(value.slot[0], view))
    if value.constant is not None:
        constant = move(value.constant)
        return Value(tuple(constant.shape), list(axes), constant=constant)
    if value.ids is None:
        shape = tuple(move(torch.empty(value.shape, device="meta")).shape)
        return whole(reader, value, shape, axes, move)
    ids = move(value.ids.expand(value.shape))
    return reader.activation(ids.shape, axes, ids)


def whole(
    reader: Reader, value: Value, shape: tuple[int, ...], axes: Sequence[Space], move: Callable[[Tensor], Tensor]
) -> Value:
    """An input that is moved before it is read: what it holds stays unknown until then."""
    result = reader.activation(shape, axes, None)
    result.source = reader.node
    return result


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
            pin(joined)
            axes += [pinned_leaf(n) for n in after[first_j:j]]
    return axes


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def view(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    target = reader.node.target
    shape = tuple(target(torch.empty(value.shape, device="meta"), *arguments, **keywords).shape)
    return moved(
        reader, value, reshape_axes(value, shape), lambda x: x.reshape(shape) if value.slot is None else x.view(shape)
    )


@rule("permute", "transpose", "t", "movedim", "numpy_T", "mT", "swapaxes")
def transpose(reader: Reader, value: Value, *arguments: Any) -> Value:
    target = reader.node.target
    order = target(
        torch.empty(value.shape, device="meta").as_strided(value.shape, tuple(range(len(value.shape)))), *arguments
    )
    order = list(order.stride())
    result = moved(reader, value, [value.axes[i] for i in order], lambda x: target(x, *arguments))
    if value.kind == "activation" and value.ids is None:
        result.parent = value, order
    return result


@rule(
    "clone",
    "contiguous",
    "alias",
    "detach",
    "dropout",
    "lift_fresh_copy",
    "_to_copy",
    "to",
    "feature_dropout",
    "native_dropout",
    "_assert_tensor_metadata",
    "type_as",
    "copy",
)
def same(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    if str(reader.node.target.overloadpacket) == "aten.copy":
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
        pin(space)
        return pinned_leaf(length)


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
    "index",
    "index_select",
    "gather",
    "roll",
    "flip",
    "pixel_shuffle",
    "unfold",
    "im2col",
    "as_strided",
    "channel_shuffle",
)
def rearrange(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """Movement of which no structure is kept: axes that change are pinned."""
    if value.slot is not None:
        value = as_activation(reader, value)

    def numbers(x: Any) -> Any:
        if isinstance(x, Value):
            if x.constant is None:
                raise reader.fail("indices that depend on the network's input are not supported")
            return x.constant
        return [numbers(y) for y in x] if isinstance(x, (list, tuple)) else x

    arguments = [numbers(x) for x in arguments]
    shape = tuple(reader.node.target(torch.empty(value.shape, device="cpu"), *arguments, **keywords).shape)
    kept = len(shape) == len(value.shape)
    axes = []
    for dim, size in enumerate(shape):
        if kept and touched(str(reader.node.target), arguments, dim, len(shape)) is False and size == value.shape[dim]:
            axes.append(value.axes[dim])
        else:
            axes.append(pinned_leaf(size))
    pin(*(axis for axis in value.axes if all(axis is not other for other in axes)))
    return moved(reader, value, axes, lambda x: reader.node.target(x, *arguments, **keywords))


def touched(name: str, arguments: Sequence[Any], dim: int, count: int) -> bool:
    """Whether a rearrangement changes an axis; where that is not known it does."""
    if name.startswith(("aten.roll", "aten.flip")):
        dims = arguments[-1] if name.startswith("aten.flip") or len(arguments) > 1 else range(count)
        return dim in [d % count for d in dims]
    if name.startswith(("aten.index_select", "aten.gather")):
        return dim == arguments[0] % count
    if name.startswith("aten.index"):
        used = [d for d, index in enumerate(arguments[0]) if index is not None]
        return not (len(used) == 1 and dim != used[0] and arguments[0][used[0]].dim() == 1)
    return True


# Element-wise ---------------------------------------------------------------------------------------------------------


def joined_axes(several: Sequence[Sequence[Space]]) -> list[Space]:
    """Spaces of a broadcast: aligned axes are one space."""
    rank = max(len(axes) for axes in several)
    aligned = [[uniform(1)] * (rank - len(axes)) + list(axes) for axes in several]
    joined = []
    for column in zip(*aligned, strict=True):
        size = max(resolve(space).size for space in column)
        axis = uniform(size)
        for space in column:
            if resolve(space).size == size:
                axis = unify(axis, space)
        joined.append(axis)
    return joined


def known_ids(reader: Reader, value: Value, axis: int) -> Tensor:
    """Ids of any value; constants have none, an input's neurons lie along `axis`."""
    if value.constant is not None:
        return torch.full([1] * len(value.shape), NO_NEURON)
    return reader.neurons(value, axis)


def as_activation(reader: Reader, value: Value) -> Value:
    """A parameter that is used like an activation, e.g. a class token: neurons along its last axis, one edge each from
    a node per position."""
    if value.slot is None:
        return value
    shape, value = value.shape, unexpanded(value)
    last = next((d for d in reversed(range(len(value.shape))) if value.shape[d] > 1), len(value.shape) - 1)
    size = value.shape[last]
    positions = math.prod(value.shape) // size
    pin(*(axis for d, axis in enumerate(value.axes) if d != last))
    target = reader.new_neurons(size)
    place_on_positions(reader, value, last, target, positions)
    ids = target.view([size if d == last else 1 for d in range(len(shape))])
    axes = [axis if value.shape[d] == shape[d] else uniform(shape[d]) for d, axis in enumerate(value.axes)]
    return reader.activation(shape, axes, ids)


def unexpanded(value: Value) -> Value:
    """A parameter without the axes along which it is only repeated."""
    slot, axes = value.slot[1], list(value.axes)
    for d in range(slot.dim()):
        if slot.shape[d] > 1 and slot.stride(d) == 0:
            slot, axes[d] = slot.narrow(d, 0, 1), uniform(1)
    return Value(tuple(slot.shape), axes, slot=(value.slot[0], slot))


def place_on_positions(reader: Reader, value: Value, axis: int, targets: Tensor, positions: int) -> None:
    """A parameter that is added at every position: a bias if it is the same everywhere, else edges from a node each."""
    name, slot = value.slot
    last = slot.movedim(axis, 0).reshape(value.shape[axis], -1) if positions == 1 else slot.movedim(axis, 0).flatten(1)
    group = reader.groups[reader.group_of(int(targets[0]))]
    if positions == 1 and group.bias is None and group.size == len(targets):
        reader.give_bias(targets, (name, last.squeeze(1)))
        return
    key = ("positions", positions, reader.node)
    if key not in reader.vocabularies:
        reader.vocabularies[key] = reader.new_neurons(positions, "input")
    reader.connect(reader.vocabularies[key], targets, "embedding", (name, last.unsqueeze(0)))


@rule("add", "sub", "rsub", "add_", "lerp")
def add(reader: Reader, a: Any, b: Any, *arguments: Any, **keywords: Any) -> Value:
    return combine(reader, a, b, "residual")


@rule(
    "mul",
    "div",
    "pow",
    "maximum",
    "minimum",
    "where",
    "eq",
    "ne",
    "lt",
    "gt",
    "le",
    "ge",
    "masked_fill",
    "atan2",
    "fmod",
    "remainder",
    "mul_",
    "bitwise_and",
    "logical_and",
    "addcmul",
    "floor_divide",
)
def multiply(reader: Reader, *operands: Any, **keywords: Any) -> Value:
    values = [x for x in operands if isinstance(x, Value)]
    result = values[0]
    if len(values) == 1:
        return pointwise(reader, result)
    for other in values[1:]:
        result = combine(reader, result, other, "product")
    return result


def combine(reader: Reader, a: Any, b: Any, kind: str) -> Value:
    """Two operands, element by element."""
    if not isinstance(a, Value) or not isinstance(b, Value):
        return pointwise(reader, a if isinstance(a, Value) else b)
    if "parameter" in (a.kind, b.kind):
        return combine_parameter(reader, a, b, kind)
    axes = joined_axes([a.axes, b.axes])
    shape = torch.broadcast_shapes(a.shape, b.shape)
    if a.kind == "activation" and b.kind == "activation":
        a, b = read_input(reader, a), read_input(reader, b)
        return reader.activation(shape, axes, join(reader, a, b, shape, kind))
    known = a if a.kind == "activation" else b
    if known.ids is None:
        result = reader.activation(shape, axes, None)
        result.source = known.source
        return result
    ids = known.ids
    ids = ids.view([1] * (len(shape) - ids.dim()) + list(ids.shape))
    return reader.activation(shape, axes, ids)


def read_input(reader: Reader, value: Value) -> Value:
    """An input that meets another activation: its neurons lie along its last axis, or along an image's channels."""
    if value.ids is None:
        ids = reader.neurons(value, 1 if len(value.shape) > 3 else -1)
        return Value(value.shape, value.axes, ids, source=value.source)
    return value


def combine_parameter(reader: Reader, a: Value, b: Value, kind: str) -> Value:
    """A parameter that is added to neurons or multiplied with them."""
    if b.kind != "parameter":
        a, b = b, a
    if a.kind == "parameter":
        if math.prod(a.shape) < math.prod(b.shape):
            a, b = b, a
        a = as_activation(reader, a)
    if a.kind == "constant":
        joined_axes([a.axes, b.axes])
        if a.shape == b.shape or math.prod(a.shape) == 1:
            return b
        return combine(reader, as_activation(reader, b), a, kind)
    shape, b = torch.broadcast_shapes(a.shape, b.shape), unexpanded(b)
    axes = joined_axes([a.axes, b.axes])
    a = read_input(reader, a)
    rank = len(shape)
    name, slot = b.slot
    slot = slot.view([1] * (rank - len(b.shape)) + list(b.shape))
    ids = a.ids.view([1] * (rank - a.ids.dim()) + list(a.ids.shape))
    wide = [d for d in range(rank) if slot.shape[d] > 1]
    if not wide:
        return scalar(reader, b, shape, axes, ids)
    moving = [d for d in wide if ids.shape[d] > 1] or [d for d in wide if not is_pinned(axes[d])] or wide[-1:]
    if len(moving) > 1 and any(is_pinned(axes[d]) for d in moving):
        moving = [d for d in moving if not is_pinned(axes[d])][-1:] or moving[-1:]
        ids = merge_positions(reader, ids, axes, moving[0])
    if kind == "product":
        return scale(reader, name, slot, shape, axes, ids, moving)
    (axis,) = moving[-1:]
    if ids.shape[axis] == 1:
        return reader.activation(
            shape, axes, join(reader, Value(shape, axes, ids, source=a.source), as_activation(reader, b), shape, kind)
        )
    ids = merge_positions(reader, ids, axes, axis)
    rows = ids.movedim(axis, -1).reshape(-1, ids.shape[axis])
    positions = slot.numel() // slot.shape[axis]
    if len(rows) > 1 or bool((rows == NO_NEURON).any()):
        raise reader.fail(f"parameter {name} is added to several sets of neurons at once")
    targets = rows[0]
    if not reader.bare(targets, a.source):
        targets = successors(reader, targets, "residual")
    place_on_positions(reader, Value(tuple(slot.shape), axes, slot=(name, slot)), axis, targets, positions)
    new = torch.full([1] * rank, 0).expand([targets.numel() if d == axis else 1 for d in range(rank)]).clone()
    new.view(-1)[:] = targets
    return reader.activation(shape, axes, new)


def successors(reader: Reader, neurons: Tensor, kind: str) -> Tensor:
    """A new neuron for each of these, with an edge from it."""
    fresh = reader.new_neurons(len(neurons))
    reader.connect(neurons, fresh, kind, groups=len(neurons))
    return fresh


def scalar(reader: Reader, b: Value, shape: Sequence[int], axes: Sequence[Space], ids: Tensor) -> Value:
    """A parameter of one number: the bias of a neuron of its own, with edges to all that it acts on."""
    name, slot = b.slot
    known = torch.unique(ids[ids != NO_NEURON])
    if not len(known):
        return reader.activation(shape, axes, ids)
    node = reader.new_neurons(1, "input")
    reader.give_bias(node, (name, slot.reshape(1) if slot.dim() else slot.view(1)))
    fresh = successors(reader, known, "product")
    reader.connect(node, fresh, "product")
    return reader.activation(shape, axes, replaced(ids, known, fresh))


def replaced(ids: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Ids with some neurons (sorted) exchanged for others."""
    place = torch.searchsorted(old, ids.contiguous()).clamp(max=len(old) - 1)
    return torch.where(old[place] == ids, new[place], ids)


def scale(
    reader: Reader, name: str, slot: Tensor, shape: Sequence[int], axes: list[Space], ids: Tensor, moving: list[int]
) -> Value:
    """Every neuron times a parameter of its own: a diagonal block to a new group; positions are features."""
    wide = [d for d in range(len(shape)) if slot.shape[d] > 1]
    still = [d for d in wide if d not in moving]
    full = ids.expand([max(n, slot.shape[d]) if d in moving else n for d, n in enumerate(ids.shape)])
    others = [d for d in range(len(shape)) if d not in moving]
    for d in others:
        if full.shape[d] > 1 and is_pinned(axes[d]):
            full = merge_positions(reader, full, axes, moving[-1])
            break
    rows = full.permute([*others, *moving]).reshape(-1, math.prod(full.shape[d] for d in moving))
    features = slot.permute([*moving, *still, *(d for d in range(len(shape)) if d not in wide)])
    features = features.flatten(0, len(moving) - 1) if len(moving) > 1 else features
    features = features.reshape(features.shape[0], 1, 1, -1) if not still else features.flatten(1)[:, None, None, :]
    new = []
    for row in rows:
        if bool((row == NO_NEURON).any()):
            new.append(row)
            continue
        fresh = reader.new_neurons(len(row))
        reader.connect(row, fresh, "normalization", (name, features), groups=len(row))
        new.append(fresh)
    sizes = [full.shape[d] for d in others] + [full.shape[d] for d in moving]
    back = torch.stack(new).view(sizes).permute(_inverse([*others, *moving]))
    return reader.activation(shape, axes, back)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def merge_positions(reader: Reader, ids: Tensor, axes: Sequence[Space], axis: int) -> Tensor:
    """Where a neuron's place holds other neurons at other positions, e.g. class token and patches, join them."""
    axis %= len(axes)
    varying = [d for d in range(ids.dim()) if d != axis and ids.shape[d] > 1 and is_pinned(axes[d])]
    if not varying:
        return ids
    kept = [d for d in range(ids.dim()) if d not in varying]
    table = ids.permute([*kept, *varying]).reshape(math.prod(ids.shape[d] for d in kept), -1)
    columns = torch.unique(table, dim=1)
    columns = columns[:, (columns != NO_NEURON).any(0)]
    merged = columns[:, 0] if columns.shape[1] == 1 else reader.new_neurons(len(table))
    if columns.shape[1] > 1:
        for column in columns.T:
            present = column != NO_NEURON
            reader.connect(column[present], merged[present], "residual", groups=int(present.sum()))
    return merged.view([1 if d in varying else ids.shape[d] for d in range(ids.dim())])


def join(reader: Reader, a: Value, b: Value, shape: Sequence[int], kind: str) -> Tensor:
    """Ids of an element-wise operation of two activations.

    Neurons that meet themselves or no neuron stay. In a sum of two different ones the later joins the edges of the
    earlier to its own, if nothing else will read it bare; otherwise every pair makes a new neuron.
    """
    rank = len(shape)
    first, second = (v.ids.view([1] * (rank - v.ids.dim()) + list(v.ids.shape)) for v in (a, b))
    first, second = torch.broadcast_tensors(first, second)
    if torch.equal(first, second) or bool((second == NO_NEURON).all()):
        return first
    if bool((first == NO_NEURON).all()):
        return second
    pairs, place = torch.unique(torch.stack([first.flatten(), second.flatten()], 1), dim=0, return_inverse=True)
    meeting = (pairs != NO_NEURON).all(1) & (pairs[:, 0] != pairs[:, 1])
    new = pairs.amax(1)
    left, right = pairs[meeting].T
    if kind == "residual":
        for target, source, value in ((right, left, b), (left, right, a)):
            later = len(target) and int(target.min()) > int(source.max())
            if later and len(torch.unique(target)) == len(target) and reader.bare(target, value.source):
                reader.connect(source, target, kind, groups=len(target))
                new[meeting] = target
                return new[place].view(first.shape)
    fresh = reader.new_neurons(int(meeting.sum()))
    reader.connect(left, fresh, kind, groups=len(fresh))
    reader.connect(right, fresh, kind, groups=len(fresh))
    new[meeting] = fresh
    return new[place].view(first.shape)


ACTIVATIONS = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "leaky_relu": "leaky_relu", "gelu": "gelu", "silu": "silu",
    "silu_": "silu", "tanh": "tanh", "sigmoid": "sigmoid", "sin": "sine", "elu": "elu", "softplus": "softplus",
    "hardtanh": "hardtanh", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid", "mish": "mish", "selu": "selu",
    "celu": "celu", "log_sigmoid": "log_sigmoid", "erf": "erf", "softsign": "softsign", "hardswish_": "hardswish",
    "hardtanh_": "hardtanh", "leaky_relu_": "leaky_relu",
}  # fmt: skip


@rule(*ACTIVATIONS)
def activation(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """An activation function marks the neurons; where their sums are read as well, neurons of their own."""
    if value.slot is not None:
        return value
    result = reader.activation(value.shape, value.axes, value.ids)
    if value.ids is None:
        result.source = value.source
        return result
    name = ACTIVATIONS[str(reader.node.target.overloadpacket).removeprefix("aten.")]
    module = next(reversed((reader.node.meta.get("nn_module_stack") or {"": ("", "")}).values()))[1]
    named = next((known for known in ("gelu", "silu", "mish") if known in str(module).lower().split(".")[-1]), name)
    known = torch.unique(value.ids[value.ids != NO_NEURON])
    if not len(known):
        return result
    if not reader.bare(known, value.source):
        fresh = successors(reader, known, "residual")
        result.ids = replaced(value.ids, known, fresh)
        known = fresh
    for g in reader.groups_of(known):
        reader.groups[g].activation = named
    return result


@rule(
    "neg",
    "abs",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "cos",
    "square",
    "clamp",
    "clamp_min",
    "clamp_max",
    "sign",
    "floor",
    "round",
    "log1p",
    "expm1",
    "logical_not",
    "bitwise_not",
    "isinf",
    "isnan",
    "nan_to_num",
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "ones_like",
    "zeros_like",
    "full_like",
    "empty_like",
    "rand_like",
    "_safe_softmax",
    "bitwise_xor",
)
def pointwise(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """Functions that are not neurons' activations change nothing that the graph shows."""
    if str(reader.node.target).startswith(("aten.ones_like", "aten.zeros_like", "aten.full_like", "aten.empty_like")):
        example = reader.node.meta["val"]
        filled = reader.node.target(torch.empty(value.shape, dtype=example.dtype), *arguments)
        return Value(value.shape, constant_axes(filled), constant=filled)
    if value.slot is not None:
        return value
    result = reader.activation(value.shape, value.axes, value.ids)
    if value.ids is None:
        result.source = value.source
    return result


@rule("cumsum", "sort", "cumprod")
def ordered(reader: Reader, value: Value, dim: int, *arguments: Any) -> Value:
    """What runs along an axis holds its order."""
    pin(value.axes[dim])
    return pointwise(reader, value)


@rule("prelu")
def prelu(reader: Reader, value: Value, weight: Value) -> Value:
    axis = 1 if len(value.shape) > 1 else 0
    shape = [1] * len(value.shape)
    if weight.shape[0] > 1:
        shape[axis] = weight.shape[0]
    axes = [uniform(1)] * len(shape)
    axes[axis] = weight.axes[0]
    return combine_parameter(
        reader, value, Value(tuple(shape), axes, slot=(weight.slot[0], weight.slot[1].view(shape))), "product"
    )


# Reductions -----------------------------------------------------------------------------------------------------------


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "prod",
    "logsumexp",
    "linalg_vector_norm",
    "all",
    "any",
    "argmax",
    "max",
    "min",
)
def reduce(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """A reduction over positions keeps the neurons; one over neurons is a statistic, no neuron."""
    if value.slot is not None:
        return statistic(reader, value)
    dims = next((x for x in arguments if isinstance(x, (list, tuple))), keywords.get("dim"))
    if dims is None and arguments and isinstance(arguments[0], int) and len(value.shape):
        dims = [arguments[0]]
    dims = [d % len(value.shape) for d in (dims or range(len(value.shape)))]
    example = reader.node.meta["val"]
    shape = (example[0] if isinstance(example, (tuple, list)) else example).shape
    if "arg" in str(reader.node.target) or isinstance(example, (tuple, list)):
        pin(*(value.axes[d] for d in dims))  # places along the axis are among the results
    ids = read_input(reader, value).ids if value.ids is not None else None
    axes = list(value.axes)
    for d in dims:
        if ids is not None and ids.shape[d] > 1:
            if is_pinned(axes[d]) and len(ids.shape) > 1:
                rest = [k for k in range(ids.dim()) if k not in dims and ids.shape[k] > 1]
                ids = merge_positions(reader, ids, axes, rest[-1]) if rest else ids
            if ids.shape[d] > 1:
                ids = torch.full([1] * ids.dim(), NO_NEURON)
        axes[d] = uniform(1)
    if len(shape) < len(value.shape):
        axes = [axis for d, axis in enumerate(axes) if d not in dims]
        ids = None if ids is None else ids.narrow(dims[0], 0, 1).squeeze(dims)
    result = reader.activation(shape, axes, ids)
    return [result, result] if isinstance(example, (tuple, list)) else result


def statistic(reader: Reader, value: Value) -> Value:
    raise reader.fail(f"parameter {value.slot[0]} is reduced before it is used")


@rule(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_nearest1d",
    "max_pool2d_with_indices",
    "adaptive_max_pool2d",
    "upsample_bicubic2d",
    "_adaptive_avg_pool3d",
    "upsample_nearest3d",
    "reflection_pad2d",
    "replication_pad2d",
    "_upsample_bicubic2d_aa",
    "reflection_pad1d",
)
def pool(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Any:
    """Pooling and resizing keep channels and make new positions."""
    example = reader.node.meta["val"]
    shape = (example[0] if isinstance(example, (tuple, list)) else example).shape
    count = 1 if "1d" in str(reader.node.target) else 3 if "3d" in str(reader.node.target) else 2
    channel = len(shape) - 1 - count
    pin(*value.axes[channel + 1 :])
    axes = [*value.axes[: channel + 1], *(pinned_leaf(n) for n in shape[channel + 1 :])]
    ids = None if value.ids is None else merge_positions(reader, value.ids, value.axes, channel)
    if ids is None:
        ids = reader.neurons(value, channel)
    result = reader.activation(shape, axes, ids)
    return [result, result] if isinstance(example, (tuple, list)) else result


# Parameters -----------------------------------------------------------------------------------------------------------


def with_own_nodes(reader: Reader, row: Tensor) -> Tensor:
    """Sources of a layer, each with a node: inputs for what is no neuron, and after a flatten a virtual layer of one
    node per channel and position (paper, appendix C.2)."""
    known = row != NO_NEURON
    if not bool(known.all()):
        row = row.clone()
        row[~known] = reader.new_neurons(int((~known).sum()), "input")
    if len(torch.unique(row)) == len(row):
        return row
    virtual = reader.new_neurons(len(row))
    reader.connect(row, virtual, "flatten", groups=len(row))
    return virtual


def dense(
    reader: Reader, x: Value, axis: int, weight: Value, kind: str = "linear", kernel: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Edges of a weight (targets, sources, *features) from the neurons along an axis; ids of the targets.

    Returns:
        rows of new neurons (rows, targets), one row per set of sources that share the weight, and the shape of rows.
    """
    ids = merge_positions(reader, reader.neurons(x, axis), x.axes, axis)
    axis %= len(x.shape)
    table = ids.movedim(axis, -1)
    if table.shape[-1] == 1 and x.shape[axis] > 1:
        table = table.expand(*table.shape[:-1], x.shape[axis])
    rows = table.reshape(-1, x.shape[axis])
    name, slot = weight.slot
    targets = []
    for row in rows:
        row = with_own_nodes(reader, row)
        target = reader.new_neurons(slot.shape[0])
        reader.connect(row, target, kind, (name, slot.unsqueeze(0)), kernel=kernel)
        targets.append(target)
    return torch.stack(targets), torch.tensor(table.shape[:-1])


def with_bias(reader: Reader, targets: Tensor, bias: Value | None) -> None:
    if bias is None:
        return
    first, *rest = targets
    reader.give_bias(first, bias.slot)
    for row in rest:
        reader.give_bias(row, bias.slot)


@rule("linear")
def linear(reader: Reader, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if weight.kind != "parameter":
        product = matmul(reader, x, transpose_last(reader, weight))
        return product if bias is None else combine(reader, product, bias, "residual")
    if x.kind == "parameter":
        x = as_activation(reader, x)
    unify(x.axes[-1], weight.axes[1])
    if bias is not None:
        unify(weight.axes[0], bias.axes[0])
    targets, rows = dense(reader, x, -1, weight)
    with_bias(reader, targets, bias)
    ids = targets.view(*rows.tolist(), -1)
    return reader.activation([*x.shape[:-1], weight.shape[0]], [*x.axes[:-1], weight.axes[0]], ids)


def transpose_last(reader: Reader, value: Value) -> Value:
    axes = [*value.axes[:-2], value.axes[-1], value.axes[-2]]
    return moved(reader, value, axes, lambda x: x.transpose(-1, -2))


@rule("addmm")
def addmm(reader: Reader, bias: Value, x: Value, weight: Value, **keywords: Any) -> Value:
    if weight.kind == "parameter" and bias.kind == "parameter" and len(bias.shape) == 1:
        return linear(reader, x, transpose_last(reader, weight), bias)
    return combine(reader, matmul(reader, x, weight), bias, "residual")


@rule("baddbmm")
def baddbmm(reader: Reader, added: Value, a: Value, b: Value, **keywords: Any) -> Value:
    return combine(reader, matmul(reader, a, b), added, "residual")


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(reader: Reader, a: Value, b: Value) -> Value:
    """A product with a parameter is a linear layer; one of two activations makes a neuron of every pair that meets."""
    if len(b.shape) == 1:
        result = matmul(reader, a, insert_axis(reader, b, 1))
        return moved(reader, result, result.axes[:-1], lambda x: x.squeeze(-1))
    if b.kind == "parameter" and len(b.shape) == 2:
        return linear(reader, a, transpose_last(reader, b))
    if a.kind == "parameter" and len(a.shape) == 2:
        return transpose_last(reader, linear(reader, transpose_last(reader, b), a))
    a, b = as_activation(reader, a), as_activation(reader, b)
    if len(a.shape) == 1:
        result = matmul(reader, insert_axis(reader, a, 0), b)
        return moved(reader, result, result.axes[:-2] + result.axes[-1:], lambda x: x.squeeze(-2))
    batch = joined_axes([a.axes[:-2], b.axes[:-2]])
    unify(a.axes[-1], b.axes[-2])
    shape = [*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]]
    axes = [*batch, a.axes[-2], b.axes[-1]]
    left, right = (known_ids(reader, v, -1) for v in (a, b))
    return reader.activation(shape, axes, contract(reader, left, right))


def contract(reader: Reader, left: Tensor, right: Tensor) -> Tensor:
    """Ids (…, rows, columns) of a matrix product of activations (…, rows, inner) and (…, inner, columns)."""
    if bool((left == NO_NEURON).all()):
        return right.narrow(-2, 0, 1)
    if bool((right == NO_NEURON).all()):
        return left.narrow(-1, 0, 1)
    rank = max(left.dim(), right.dim())
    left, right = (x.view([1] * (rank - x.dim()) + list(x.shape)) for x in (left, right))
    first, second = torch.broadcast_tensors(left.narrow(-1, 0, 1), right.narrow(-2, 0, 1))
    pairs, place = torch.unique(torch.stack([first.flatten(), second.flatten()], 1), dim=0, return_inverse=True)
    fresh = reader.new_neurons(len(pairs))
    new = fresh[place].view(first.shape)
    for operand, inner in ((left, -1), (right, -2)):
        spread = new.unsqueeze(-1)  # (…, rows, columns, inner)
        source = operand.movedim(inner, -1).unsqueeze(-2 if inner == -1 else -3)
        source, target = torch.broadcast_tensors(source, spread)
        edges = torch.unique(torch.stack([target.flatten(), source.flatten()], 1), dim=0)
        edges = edges[(edges != NO_NEURON).all(1)]
        reader.connect(edges[:, 1], edges[:, 0], "product", groups=len(edges))
    return new


@rule("scaled_dot_product_attention")
def attention(
    reader: Reader, q: Value, k: Value, v: Value, mask: Value | None = None, *arguments: Any, **keywords: Any
) -> Value:
    """Softmax(Q Kᵀ) V: one neuron per head for the scores, and one per head and dimension for what is gathered."""
    if keywords.get("enable_gqa"):
        times = q.shape[-3] // k.shape[-3]
        k, v = (repeat_interleave(reader, x, times, len(x.shape) - 3) for x in (k, v))
    scores = matmul(reader, q, transpose_last(reader, k))
    if mask is not None:
        scores = combine(reader, scores, mask, "residual")
    return matmul(reader, scores, v)


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(reader: Reader, x: Value, weight: Value, bias: Value | None = None, *arguments: Any) -> Value:
    """Channels are neurons, a kernel's positions are features of the edges."""
    name = str(reader.node.target)
    count = len(weight.shape) - 2
    transposed = "transpose" in name or ("convolution" in name and bool(arguments[3]))
    place = 5 if "convolution" in name else 3
    groups = arguments[place] if len(arguments) > place else 1
    channel = len(x.shape) - 1 - count
    shape = tuple(reader.node.meta["val"].shape)
    slot = weight.slot[1].flatten(2)
    pin(*weight.axes[2:], *x.axes[channel + 1 :])
    if groups == 1:
        outer, inner = (weight.axes[1], weight.axes[0]) if transposed else weight.axes[:2]
        unify(x.axes[channel], inner)
        own = Value(tuple(slot.shape), weight.axes, slot=(weight.slot[0], slot.transpose(0, 1) if transposed else slot))
        if bias is not None:
            unify(outer, bias.axes[0])
        targets, rows = dense(reader, x, channel, own, "convolution", tuple(weight.shape[2:]))
        ids = targets.view(*rows.tolist(), -1).movedim(-1, channel)
    else:
        outer, ids = grouped(reader, x, channel, weight, slot, groups, transposed, bias)
        targets = ids.movedim(channel, -1).reshape(-1, shape[channel])
    with_bias(reader, targets, bias)
    axes = [*x.axes[:channel], outer, *(pinned_leaf(n) for n in shape[channel + 1 :])]
    return reader.activation(shape, axes, ids)


def grouped(
    reader: Reader,
    x: Value,
    channel: int,
    weight: Value,
    slot: Tensor,
    groups: int,
    transposed: bool,
    bias: Value | None,
) -> tuple[Space, Tensor]:
    """A convolution whose channels fall into groups: the groups permute, and channels inside each group."""
    sources, first = x.shape[channel], weight.shape[0]
    targets = weight.shape[1] * groups if transposed else first
    try:
        group, inside = split_product(x.axes[channel], [groups, sources // groups])
        weight_group, weight_inside = split_product(weight.axes[0], [groups, first // groups])
        unify(group, weight_group)
        if transposed:
            unify(inside, weight_inside)
            outer = product_of([weight_group, weight.axes[1]])
        else:
            unify(inside, weight.axes[1])
            outer = product_of([weight_group, weight_inside])
        if bias is not None:
            unify(outer, bias.axes[0])
    except IncompatibleError:
        pin(x.axes[channel], *weight.axes)
        outer = pinned_leaf(targets)
    ids = merge_positions(reader, reader.neurons(x, channel), x.axes, channel)
    row = ids.movedim(channel, -1).expand(*ids.movedim(channel, -1).shape[:-1], sources).reshape(-1, sources)
    if len(row) > 1:
        raise reader.fail("a grouped convolution is shared by several sets of neurons")
    fresh = reader.new_neurons(targets)
    features = slot.unflatten(0, (groups, first // groups))
    if transposed:
        features = features.transpose(1, 2)
    reader.connect(row[0], fresh, "convolution", (weight.slot[0], features), groups, tuple(weight.shape[2:]))
    return outer, fresh.view([targets if d == channel else 1 for d in range(len(x.shape))])


@rule("embedding")
def embedding(reader: Reader, weight: Value, indices: Value, *arguments: Any, **keywords: Any) -> Value:
    """Edges from a node per entry of the vocabulary to the features."""
    pin(weight.axes[0])
    name, slot = weight.slot
    key = ("vocabulary", name)
    if key not in reader.vocabularies:
        source = reader.new_neurons(weight.shape[0], "input")
        target = reader.new_neurons(weight.shape[1])
        reader.connect(source, target, "embedding", (name, slot.T.unsqueeze(0)))
        reader.vocabularies[key] = target
    target = reader.vocabularies[key]
    ids = target.view([1] * len(indices.shape) + [-1])
    return reader.activation([*indices.shape, weight.shape[1]], [*indices.axes, weight.axes[1]], ids)


def normalize(reader: Reader, x: Value, dims: Sequence[int], weight: Value | None, bias: Value | None) -> Value:
    """A norm: a neuron for every one that it normalizes, with weight γ from it and bias β."""
    rank = len(x.shape)
    shape = [x.shape[d] if d in dims else 1 for d in range(rank)]

    def laid(value: Value) -> Value:
        axes = [uniform(1)] * rank
        for d, axis in zip(dims, value.axes, strict=True):
            axes[d] = axis
        return Value(tuple(shape), axes, slot=(value.slot[0], value.slot[1].view(shape)))

    x = read_input(reader, x)
    result = x
    if weight is not None:
        result = combine_parameter(reader, result, laid(weight), "product")
        result.source = None
    if bias is not None:
        if weight is not None:
            joined_axes([result.axes, laid(bias).axes])
            ids = result.ids.movedim(dims[-1], -1).reshape(-1) if len(dims) == 1 else None
            if ids is None:
                ids = result.ids.reshape(-1)
            reader.give_bias(ids, (bias.slot[0], bias.slot[1].reshape(-1)))
        else:
            result = combine_parameter(reader, result, laid(bias), "residual")
    result.source = reader.node
    return result


@rule("layer_norm", "native_layer_norm", "rms_norm")
def layer_norm(
    reader: Reader, x: Value, size: Sequence[int], weight: Value | None = None, bias: Any = None, *arguments: Any
) -> Any:
    bias = bias if isinstance(bias, Value) else None
    result = normalize(reader, x, range(len(x.shape) - len(size), len(x.shape)), weight, bias)
    return [result] * 3 if "native" in str(reader.node.target) else result


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "instance_norm")
def batch_norm(
    reader: Reader,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    *arguments: Any,
) -> Any:
    """Running statistics are no edges, but they move with their neurons."""
    for statistics in (mean, var):
        if statistics is not None:
            known = reader.axes.setdefault(statistics.name, (Space(statistics.shape[0]),))
            unify(known[0], x.axes[1])
    result = normalize(reader, x, [1], weight, bias)
    return [result] * 3 if "native" in str(reader.node.target) else result


@rule("group_norm", "native_group_norm")
def group_norm(
    reader: Reader, x: Value, groups: Any, weight: Value | None = None, bias: Value | None = None, *arguments: Any
) -> Any:
    """Groups permute, and channels inside each group."""
    native = "native" in str(reader.node.target)
    if native:
        weight, bias, groups = groups, weight, arguments[3]
    try:
        split_product(x.axes[1], [groups, x.shape[1] // groups])
    except IncompatibleError:
        pin(x.axes[1])
    result = normalize(reader, x, [1], weight, bias)
    return [result] * 3 if native else result
