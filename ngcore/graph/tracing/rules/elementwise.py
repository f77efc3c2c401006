"""Operators that act element by element: sums, products, activation functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ngcore.graph.symmetry.spaces import Space, is_pinned, pin, uniform
from ngcore.graph.tracing.expressions import Apply, Named
from ngcore.graph.tracing.reader import Reader, rule
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
from ngcore.graph.tracing.values import NO_NEURON, Activation, Computed, Constant, Parameter, Value, applied


def composed(reader: Reader, *operands: Any, **keywords: Any) -> Value | None:
    """The result of an operator on numbers, if it is a function of one and the same number for every element.

    Its operands are functions of the numbers of one tensor, plain numbers, and constants of one element.
    """
    values = [x for x in (*operands, *keywords.values()) if isinstance(x, Value)]
    first = next((x for x in values if isinstance(x, Computed)), None)
    if first is None or tuple(reader.node.meta["val"].shape) != first.shape:
        return None
    if not all(_fits(x, first) for x in values):
        return None
    return reader.applied(first, applied(reader.node.target, operands, keywords))


def _fits(value: Value, first: Computed) -> bool:
    match value:
        case Computed():
            return value.origin is first.origin
        case Constant():
            return math.prod(value.shape) == 1
    return False


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
    match a, b:
        case Parameter(), Parameter():
            a, b = (a, b) if math.prod(a.shape) >= math.prod(b.shape) else (b, a)
            return with_parameter(reader, as_activation(reader, a), b, kind)
        case (Parameter(), Constant()) | (Constant(), Parameter()):
            parameter, constant = (a, b) if isinstance(a, Parameter) else (b, a)
            joined_axes([constant.axes, parameter.axes])
            if (
                torch.broadcast_shapes(a.shape, b.shape) == parameter.shape
            ):  # each number meets one: still the parameter
                return parameter
            return combine(reader, as_activation(reader, parameter), constant, kind)
        case (Computed(), Parameter()) | (Parameter(), Computed()):
            return with_parameter(reader, *((a, b) if isinstance(b, Parameter) else (b, a)), kind)
        case Computed(), Computed():
            shape, axes = torch.broadcast_shapes(a.shape, b.shape), joined_axes([a.axes, b.axes])
            return join(reader, read_input(reader, a), read_input(reader, b), shape, axes, kind)
        case (Computed(), Constant()) | (Constant(), Computed()):
            return with_constant(reader, *((a, b) if isinstance(b, Constant) else (b, a)))
    return unchanged(reader, a if isinstance(a, Value) else b)


def with_constant(reader: Reader, known: Computed, constant: Constant) -> Computed:
    """Neurons that meet numbers stay themselves."""
    shape, axes = torch.broadcast_shapes(known.shape, constant.shape), joined_axes([known.axes, constant.axes])
    if known.shape == shape:
        return reader.same(known, axes)
    ids = with_rank(known.ids, len(shape)) if isinstance(known, Activation) else None
    return reader.activation(shape, axes, ids, known.function)


def with_rank(tensor: Tensor, rank: int) -> Tensor:
    """A tensor with axes of length 1 before its own, as for a broadcast."""
    return tensor.view([1] * (rank - tensor.dim()) + list(tensor.shape))


@dataclass
class Meeting:
    """Neurons and a parameter that broadcast to a shape.

    Attributes:
        ids, elements: the neurons, and the parameter, with an axis for every one of the shape.
        source: the node that made the neurons.
    """

    shape: Sequence[int]
    axes: list[Space]
    ids: Tensor
    elements: Tensor
    name: str
    source: fx.Node | None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def wide(self) -> list[int]:
        """The axes along which the parameter varies."""
        return [d for d in range(self.rank) if self.elements.shape[d] > 1]

    def neurons_along(self, reader: Reader) -> list[int]:
        """The axes along which the parameter has a number for every neuron: not for every position."""
        wide, free = self.wide, [d for d in self.wide if not is_pinned(self.axes[d])]
        moving = [d for d in wide if self.ids.shape[d] > 1] or free or wide[-1:]
        if len(moving) > 1 and any(is_pinned(self.axes[d]) for d in moving):
            moving = [d for d in moving if not is_pinned(self.axes[d])][-1:] or moving[-1:]
            self.ids = merge_positions(reader, self.ids, self.axes, moving[0])
        return moving


def with_parameter(reader: Reader, a: Computed, b: Parameter, kind: str) -> Value:
    """A parameter that is added to neurons or multiplied with them."""
    shape, b = torch.broadcast_shapes(a.shape, b.shape), unexpanded(b)
    axes, a = joined_axes([a.axes, b.axes]), read(reader, a)
    ids, elements = with_rank(a.ids, len(shape)), with_rank(b.elements, len(shape))
    meeting = Meeting(shape, axes, ids, elements, b.name, a.source)
    if not meeting.wide:
        return scalar(reader, meeting)
    moving = meeting.neurons_along(reader)
    if kind == "product":
        return scale(reader, meeting, moving)
    if meeting.ids.shape[moving[-1]] == 1:
        neurons = Activation(tuple(shape), axes, a.source, ids=meeting.ids)
        return join(reader, neurons, as_activation(reader, b), shape, axes, kind)
    return shift(reader, meeting, moving[-1])


def shift(reader: Reader, meeting: Meeting, axis: int) -> Value:
    """Every neuron plus a parameter of its own: its bias, if it is still nothing but a sum."""
    ids = merge_positions(reader, meeting.ids, meeting.axes, axis)
    rows = ids.movedim(axis, -1).reshape(-1, ids.shape[axis])
    if len(rows) > 1 or bool((rows == NO_NEURON).any()):
        raise reader.fail(f"parameter {meeting.name} is added to several sets of neurons at once")
    targets = rows[0]
    if not reader.bare(targets, meeting.source):
        targets = successors(reader, targets, "residual")
    elements = meeting.elements
    place_on_positions(reader, Parameter(tuple(elements.shape), meeting.axes, meeting.name, elements), axis, targets)
    row = targets.view([len(targets) if d == axis else 1 for d in range(meeting.rank)])
    return reader.activation(meeting.shape, meeting.axes, row)


def scalar(reader: Reader, meeting: Meeting) -> Value:
    """A parameter of one number: the bias of a neuron of its own, with edges to all that it acts on."""
    known = torch.unique(meeting.ids[meeting.ids != NO_NEURON])
    node = reader.new_neurons(1, "input")
    reader.give_bias(node, (meeting.name, meeting.elements.reshape(1)))
    if not len(known):
        return reader.activation(meeting.shape, meeting.axes, node.view([1] * meeting.rank))
    fresh = successors(reader, known, "product")
    reader.connect(node, fresh, "product")
    return reader.activation(meeting.shape, meeting.axes, replaced(meeting.ids, known, fresh))


def scale(reader: Reader, meeting: Meeting, moving: list[int]) -> Value:
    """Every neuron times a parameter of its own: a diagonal block to a new group; positions are features."""
    ids, elements, axes = meeting.ids, meeting.elements, meeting.axes
    others = [d for d in range(meeting.rank) if d not in moving]
    full = ids.expand([max(n, elements.shape[d]) if d in moving else n for d, n in enumerate(ids.shape)])
    if any(full.shape[d] > 1 and is_pinned(axes[d]) for d in others):
        full = merge_positions(reader, full, axes, moving[-1])
    table = full.permute([*others, *moving])
    rows = table.reshape(-1, math.prod(full.shape[d] for d in moving))
    features = elements.permute([*moving, *others]).reshape(rows.shape[1], 1, 1, -1)
    new = []
    for row in rows:
        row = with_inputs(reader, row)
        new.append(reader.new_neurons(len(row)))
        reader.connect(row, new[-1], "normalization", (meeting.name, features), groups=len(row))
    back = torch.stack(new).view(table.shape).permute(_inverse([*others, *moving]))
    return reader.activation(meeting.shape, axes, back)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def join(reader: Reader, a: Activation, b: Activation, shape: Sequence[int], axes: Sequence[Space], kind: str) -> Value:
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


def meet(reader: Reader, a: Activation, b: Activation, pairs: Tensor, kind: str) -> Tensor:
    """The neurons of pairs of neurons (pairs, 2): new ones, unless they are sums that take in the others' edges.

    In a sum of two different neurons the later joins the edges of the earlier to its own, if nothing else will read it
    bare.
    """
    meeting = (pairs != NO_NEURON).all(1) & (pairs[:, 0] != pairs[:, 1])
    new = pairs.amax(1)
    left, right = pairs[meeting].T
    if kind == "residual":
        for target, source, value in ((right, left, b), (left, right, a)):
            later = len(target) and int(target.min()) > int(reader.groups.originals(source).max())
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
    return reader.same(value) if isinstance(value, Computed) else value


@rule("ones_like", "zeros_like", "full_like", "empty_like")
def filled(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Value:
    example = reader.node.meta["val"]
    numbers = reader.node.target(torch.empty(value.shape, dtype=example.dtype), *arguments)
    return Constant.of(numbers)


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
    slopes = Parameter(tuple(shape), axes, weight.name, weight.elements.view(shape))
    return with_parameter(reader, value, slopes, "product")
