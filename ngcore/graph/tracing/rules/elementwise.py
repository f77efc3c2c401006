"""Operators that act element by element: sums, products, activation functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngcore.activations import OF_OPERATOR
from ngcore.graph.symmetry.spaces import Space, is_pinned, pin, uniform
from ngcore.graph.tracing.reader import NO_NEURON, Reader, Value, constant_axes, rule
from ngcore.graph.tracing.rules.operands import (
    as_activation,
    joined_axes,
    merge_positions,
    place_on_positions,
    read_input,
    replaced,
    successors,
    unexpanded,
    with_inputs,
)


@rule("add", "sub", "rsub", "add_", "lerp")
def add(reader: Reader, a: Any, b: Any, *arguments: Any, **keywords: Any) -> Value:
    return combine(reader, a, b, "residual")


@rule(
    "mul", "div", "pow", "maximum", "minimum", "where", "eq", "ne", "lt", "gt", "le", "ge", "masked_fill", "atan2",
    "fmod", "remainder", "mul_", "bitwise_and", "logical_and", "addcmul", "floor_divide",
)  # fmt: skip
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
    if known.shape == shape:
        return reader.same(known, axes)
    return reader.activation(shape, axes, None if known.ids is None else with_rank(known.ids, len(shape)))


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
    a = read_input(reader, a)
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
        return reader.activation(
            shape, axes, join(reader, Value(shape, axes, ids, source=a.source), as_activation(reader, b), shape, kind)
        )
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


def join(reader: Reader, a: Value, b: Value, shape: Sequence[int], kind: str) -> Tensor:
    """Ids of an element-wise operation of two activations.

    Neurons that meet themselves or no neuron stay. In a sum of two different ones the later joins the edges of the
    earlier to its own, if nothing else will read it bare; otherwise every pair makes a new neuron.
    """
    first, second = torch.broadcast_tensors(with_rank(a.ids, len(shape)), with_rank(b.ids, len(shape)))
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


@rule(*OF_OPERATOR)
def activation(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """An activation function marks the neurons; where their sums are read as well, neurons of their own."""
    if value.slot is not None:
        return value
    result = reader.same(value)
    if value.ids is None:
        return result
    name = OF_OPERATOR[reader.operator.removeprefix("aten.")]
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
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "cos", "square", "clamp", "clamp_min", "clamp_max",
    "sign", "floor", "round", "log1p", "expm1", "logical_not", "bitwise_not", "isinf", "isnan", "nan_to_num", "softmax",
    "_softmax", "log_softmax", "_log_softmax", "ones_like", "zeros_like", "full_like", "empty_like", "rand_like",
    "_safe_softmax", "bitwise_xor",
)  # fmt: skip
def pointwise(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    """Functions that are not neurons' activations change nothing that the graph shows."""
    if reader.operator in ("aten.ones_like", "aten.zeros_like", "aten.full_like", "aten.empty_like"):
        example = reader.node.meta["val"]
        filled = reader.node.target(torch.empty(value.shape, dtype=example.dtype), *arguments)
        return Value(value.shape, constant_axes(filled), constant=filled)
    return value if value.slot is not None else reader.same(value)


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
