"""Operators that act element by element: sums, products, activation functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngcore.graph.symmetry.spaces import Space, is_pinned, pin, uniform
from ngcore.graph.tracing.expressions import Apply, Named
from ngcore.graph.tracing.reader import NO_NEURON, Reader, Value, applied, constant_axes, rule
from ngcore.graph.tracing.rules.operands import (
    as_activation,
    joined_axes,
    merge_positions,
    place_on_positions,
    read,
    read_input,
    replaced,
    successors,
    unexpanded,
    with_inputs,
)


def composed(reader: Reader, *operands: Any, **keywords: Any) -> Value | None:
    """The result of an operator on numbers, if it is a function of one and the same number for every element.

    Its operands are functions of the numbers of one tensor, plain numbers, and constants of one element.
    """
    values = [x for x in (*operands, *keywords.values()) if isinstance(x, Value)]
    sums = [x for x in values if x.kind == "activation"]
    constants = [x for x in values if x.kind == "constant"]
    if not sums or len(sums) + len(constants) < len(values):
        return None
    if any(x.origin is not sums[0].origin or x.origin is None for x in sums):
        return None
    if any(math.prod(x.shape) != 1 for x in constants) or tuple(reader.node.meta["val"].shape) != sums[0].shape:
        return None
    return reader.applied(sums[0], applied(reader.node.target, operands, keywords))


@rule("add", "sub", "rsub", "add_", "lerp")
def add(reader: Reader, a: Any, b: Any, *arguments: Any, **keywords: Any) -> Value:
    return composed(reader, a, b, *arguments, **keywords) or combine(reader, a, b, "residual")


@rule(
    "mul", "div", "pow", "maximum", "minimum", "where", "eq", "ne", "lt", "gt", "le", "ge", "masked_fill", "atan2",
    "fmod", "remainder", "mul_", "bitwise_and", "logical_and", "addcmul", "floor_divide",
)  # fmt: skip
def multiply(reader: Reader, *operands: Any, **keywords: Any) -> Value:
    result = composed(reader, *operands, **keywords)
    if result is not None:
        return result
    values = [x for x in operands if isinstance(x, Value)]
    result = values[0]
    if len(values) == 1:
        return unchanged(reader, result)
    for other in values[1:]:
        result = combine(reader, result, other, "product")
    return result


def combine(reader: Reader, a: Any, b: Any, kind: str) -> Value:
    """Two operands, element by element."""
    if not isinstance(a, Value) or not isinstance(b, Value):
        return unchanged(reader, a if isinstance(a, Value) else b)
    if "parameter" in (a.kind, b.kind):
        return combine_parameter(reader, a, b, kind)
    axes = joined_axes([a.axes, b.axes])
    shape = torch.broadcast_shapes(a.shape, b.shape)
    if a.kind == "activation" and b.kind == "activation":
        return join(reader, read_input(reader, a), read_input(reader, b), shape, axes, kind)
    known = a if a.kind == "activation" else b
    if known.shape == shape:
        return reader.same(known, axes)
    ids = None if known.ids is None else with_rank(known.ids, len(shape))
    return reader.activation(shape, axes, ids, known.function)


def with_rank(tensor: Tensor, rank: int) -> Tensor:
    """A tensor with axes of length 1 before its own, as for a broadcast."""
    return tensor.view([1] * (rank - tensor.dim()) + list(tensor.shape))


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
        if torch.broadcast_shapes(a.shape, b.shape) == b.shape:  # still the parameter: each number meets one
            return b
        return combine(reader, as_activation(reader, b), a, kind)
    shape, b = torch.broadcast_shapes(a.shape, b.shape), unexpanded(b)
    axes = joined_axes([a.axes, b.axes])
    a = read(reader, a)
    rank = len(shape)
    name, slot = b.slot
    slot, ids = with_rank(slot, rank), with_rank(a.ids, rank)
    wide = [d for d in range(rank) if slot.shape[d] > 1]
    if not wide:
        return scalar(reader, (name, slot.reshape(1)), shape, axes, ids)
    moving = [d for d in wide if ids.shape[d] > 1] or [d for d in wide if not is_pinned(axes[d])] or wide[-1:]
    if len(moving) > 1 and any(is_pinned(axes[d]) for d in moving):
        moving = [d for d in moving if not is_pinned(axes[d])][-1:] or moving[-1:]
        ids = merge_positions(reader, ids, axes, moving[0])
    if kind == "product":
        return scale(reader, name, slot, shape, axes, ids, moving)
    axis = moving[-1]
    if ids.shape[axis] == 1:
        return join(reader, Value(shape, axes, ids, source=a.source), as_activation(reader, b), shape, axes, kind)
    ids = merge_positions(reader, ids, axes, axis)
    rows = ids.movedim(axis, -1).reshape(-1, ids.shape[axis])
    if len(rows) > 1 or bool((rows == NO_NEURON).any()):
        raise reader.fail(f"parameter {name} is added to several sets of neurons at once")
    targets = rows[0]
    if not reader.bare(targets, a.source):
        targets = successors(reader, targets, "residual")
    place_on_positions(reader, Value(tuple(slot.shape), axes, slot=(name, slot)), axis, targets)
    return reader.activation(shape, axes, targets.view([len(targets) if d == axis else 1 for d in range(rank)]))


def scalar(reader: Reader, slot: tuple[str, Tensor], shape: Sequence[int], axes: Sequence[Space], ids: Tensor) -> Value:
    """A parameter of one number: the bias of a neuron of its own, with edges to all that it acts on."""
    known = torch.unique(ids[ids != NO_NEURON])
    node = reader.new_neurons(1, "input")
    reader.give_bias(node, slot)
    if not len(known):
        return reader.activation(shape, axes, node.view([1] * len(shape)))
    fresh = successors(reader, known, "product")
    reader.connect(node, fresh, "product")
    return reader.activation(shape, axes, replaced(ids, known, fresh))


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
    features = features.reshape(rows.shape[1], 1, 1, -1)
    new = []
    for row in rows:
        row = with_inputs(reader, row)
        new.append(reader.new_neurons(len(row)))
        reader.connect(row, new[-1], "normalization", (name, features), groups=len(row))
    sizes = [full.shape[d] for d in others] + [full.shape[d] for d in moving]
    back = torch.stack(new).view(sizes).permute(_inverse([*others, *moving]))
    return reader.activation(shape, axes, back)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def join(reader: Reader, a: Value, b: Value, shape: Sequence[int], axes: Sequence[Space], kind: str) -> Value:
    """An element-wise operation of two activations.

    Neurons that meet no neuron stay, and so do those that meet themselves at other positions: a statistic of theirs, or
    the same function of their sums.
    """
    first, second = torch.broadcast_tensors(with_rank(a.ids, len(shape)), with_rank(b.ids, len(shape)))
    if bool((second == NO_NEURON).all()):
        return reader.activation(shape, axes, first, a.function)
    if bool((first == NO_NEURON).all()):
        return reader.activation(shape, axes, second, b.function)
    if torch.equal(first, second) and (a.function == b.function or a.shape != b.shape):
        larger = a if math.prod(a.shape) >= math.prod(b.shape) else b
        return reader.activation(shape, axes, first, larger.function)
    a, b = read(reader, a), read(reader, b)
    first, second = torch.broadcast_tensors(with_rank(a.ids, len(shape)), with_rank(b.ids, len(shape)))
    pairs, place = torch.unique(torch.stack([first.flatten(), second.flatten()], 1), dim=0, return_inverse=True)
    return reader.activation(shape, axes, meet(reader, a, b, pairs, kind)[place].view(first.shape))


def meet(reader: Reader, a: Value, b: Value, pairs: Tensor, kind: str) -> Tensor:
    """The neurons of pairs of neurons (pairs, 2): new ones, unless they are sums that take in the others' edges.

    In a sum of two different neurons the later joins the edges of the earlier to its own, if nothing else will read it
    bare.
    """
    meeting = (pairs != NO_NEURON).all(1) & (pairs[:, 0] != pairs[:, 1])
    new = pairs.amax(1)
    left, right = pairs[meeting].T
    if kind == "residual":
        for target, source, value in ((right, left, b), (left, right, a)):
            later = len(target) and int(target.min()) > int(reader.originals(source).max())
            if later and len(torch.unique(target)) == len(target) and reader.bare(target, value.source):
                reader.connect(source, target, kind, groups=len(target))
                new[meeting] = target
                return new
    fresh = reader.new_neurons(int(meeting.sum()))
    reader.connect(left, fresh, kind, groups=len(fresh))
    reader.connect(right, fresh, kind, groups=len(fresh))
    new[meeting] = fresh
    return new


@rule(
    "relu", "relu_", "sin", "tanh", "sigmoid", "gelu", "silu", "silu_", "leaky_relu", "leaky_relu_", "elu", "relu6",
    "softplus", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "mish", "selu", "celu",
    "log_sigmoid", "erf", "softsign", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "cos", "square",
    "clamp", "clamp_min", "clamp_max", "sign", "floor", "round", "log1p", "expm1", "logical_not", "bitwise_not",
    "isinf", "isnan", "nan_to_num", "bitwise_xor",
)  # fmt: skip
def pointwise(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """The same function of every number: neurons' activations, where it is read. Parameters stay what they are."""
    return composed(reader, value, *arguments, **keywords) or unchanged(reader, value)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "rand_like")
def unchanged(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """What is no function of one number alone changes nothing that the graph shows."""
    return value if value.slot is not None else reader.same(value)


@rule("ones_like", "zeros_like", "full_like", "empty_like")
def filled(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    example = reader.node.meta["val"]
    numbers = reader.node.target(torch.empty(value.shape, dtype=example.dtype), *arguments)
    return Value(value.shape, constant_axes(numbers), constant=numbers)


@rule("cumsum", "sort", "cumprod")
def ordered(reader: Reader, value: Value, dim: int, *arguments: Any) -> Value:
    """What runs along an axis holds its order."""
    pin(value.axes[dim])
    return unchanged(reader, value)


@rule("prelu")
def prelu(reader: Reader, value: Value, weight: Value) -> Value:
    axis = 1 if len(value.shape) > 1 else 0
    shape = [1] * len(value.shape)
    if weight.shape[0] > 1:
        shape[axis] = weight.shape[0]
    axes = [uniform(1)] * len(shape)
    axes[axis] = weight.axes[0]
    value = reader.applied(value, Apply(reader.node.target, (value.function, Named("slope"))))
    return combine_parameter(
        reader, value, Value(tuple(shape), axes, slot=(weight.slot[0], weight.slot[1].view(shape))), "product"
    )
