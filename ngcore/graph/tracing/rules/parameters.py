"""Operators with parameters, and products: linear layers, convolutions, attention, embeddings, norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ngcore.graph.symmetry.spaces import (
    IncompatibleError,
    Space,
    give_up,
    lost_leaf,
    pin,
    pinned_leaf,
    product_of,
    split_product,
    uniform,
    unify,
)
from ngcore.graph.tracing.expressions import Named
from ngcore.graph.tracing.reader import Reader, rule
from ngcore.graph.tracing.rules.elementwise import combine, with_parameter
from ngcore.graph.tracing.rules.moving import insert_axis, moved, repeat_interleave
from ngcore.graph.tracing.rules.operands import (
    as_activation,
    joined_axes,
    known_ids,
    merge_positions,
    read_input,
    with_inputs,
)
from ngcore.graph.tracing.values import NO_NEURON, Parameter, Value


def with_own_nodes(reader: Reader, row: Tensor) -> Tensor:
    """Sources of a layer, each with a node: inputs for what is no neuron, and after a flatten a virtual layer of one
    node per channel and position (paper, appendix C.2)."""
    row = with_inputs(reader, row)
    if len(torch.unique(row)) == len(row):
        return row
    virtual = reader.new_neurons(len(row))
    reader.groups[-1].locations = occurrences(row)
    reader.connect(row, virtual, "flatten", groups=len(row))
    return virtual


def occurrences(row: Tensor) -> tuple[int, ...]:
    """For every element how many before it are the same."""
    order = row.argsort(stable=True)
    counts = torch.unique_consecutive(row[order], return_counts=True)[1]
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.empty_like(row)
    places[order] = torch.arange(len(row)) - first
    return tuple(places.tolist())


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
    targets = []
    for row in rows:
        row = with_own_nodes(reader, row)
        target = reader.new_neurons(weight.shape[0])
        reader.connect(row, target, kind, (weight.name, weight.elements.unsqueeze(0)), kernel=kernel)
        targets.append(target)
    return torch.stack(targets), torch.tensor(table.shape[:-1])


def with_bias(reader: Reader, rows: Tensor, bias: Value | None) -> None:
    """Give every row of new neurons the same bias."""
    if bias is not None:
        for row in rows:
            reader.give_bias(row, (bias.name, bias.elements.flatten()))


@rule("linear")
def linear(reader: Reader, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if not isinstance(weight, Parameter):
        product = matmul(reader, x, transpose_last(reader, weight))
        return product if bias is None else combine(reader, product, bias, "residual")
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
    if isinstance(weight, Parameter) and isinstance(bias, Parameter) and len(bias.shape) == 1:
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
    if isinstance(b, Parameter) and len(b.shape) == 2:
        return linear(reader, a, transpose_last(reader, b))
    if isinstance(a, Parameter) and len(a.shape) == 2:
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
    if bool((left == NO_NEURON).all()):
        ids = mixed(reader, right.mT, shape[-2]).mT
    elif bool((right == NO_NEURON).all()):
        ids = mixed(reader, left, shape[-1])
    else:
        ids = contract(reader, left, right)
    return reader.activation(shape, axes, ids)


def mixed(reader: Reader, ids: Tensor, size: int) -> Tensor:
    """Ids (…, rows, size) of the product of neurons (…, rows, inner) with a matrix of numbers that are no neurons'."""
    if ids.shape[-1] == 1:  # what is mixed are a neuron's positions
        return ids
    targets = []
    for row in ids.flatten(0, -2):
        targets.append(reader.new_neurons(size))
        reader.connect(row[row != NO_NEURON], targets[-1], "product")
    return torch.stack(targets).view(*ids.shape[:-1], size)


def contract(reader: Reader, left: Tensor, right: Tensor) -> Tensor:
    """Ids (…, rows, columns) of a matrix product of activations (…, rows, inner) and (…, inner, columns)."""
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
    transposed, groups = form_of_convolution(reader.operator.removeprefix("aten."), arguments)
    channel = len(x.shape) + 1 - len(weight.shape)
    shape = tuple(reader.node.meta["val"].shape)
    slot = weight.elements.flatten(2)
    pin(*weight.axes[2:], *x.axes[channel + 1 :])
    if groups == 1:
        outer, inner = (weight.axes[1], weight.axes[0]) if transposed else weight.axes[:2]
        unify(x.axes[channel], inner)
        own = slot.transpose(0, 1) if transposed else slot
        own = Parameter(tuple(own.shape), weight.axes, weight.name, own)
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


def form_of_convolution(name: str, arguments: Sequence[Any]) -> tuple[bool, int]:
    """Whether a convolution is transposed, and its number of groups, from its arguments after the bias."""
    if name == "convolution":  # stride, padding, dilation, transposed, output padding, groups
        return arguments[3], arguments[5]
    return "transpose" in name, arguments[3] if len(arguments) > 3 else 1


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
    except IncompatibleError:
        give_up(x.axes[channel], *weight.axes)
        outer = lost_leaf(targets)
    if bias is not None:
        unify(outer, bias.axes[0])
    ids = merge_positions(reader, reader.neurons(x, channel), x.axes, channel)
    row = ids.movedim(channel, -1).expand(*ids.movedim(channel, -1).shape[:-1], sources).reshape(-1, sources)
    if len(row) > 1:
        raise reader.fail("a grouped convolution is shared by several sets of neurons")
    fresh = reader.new_neurons(targets)
    features = slot.unflatten(0, (groups, first // groups))
    if transposed:
        features = features.transpose(1, 2)
    reader.connect(row[0], fresh, "convolution", (weight.name, features), groups, tuple(weight.shape[2:]))
    return outer, fresh.view([targets if d == channel else 1 for d in range(len(x.shape))])


@rule("embedding")
def embedding(reader: Reader, weight: Value, indices: Value, *arguments: Any, **keywords: Any) -> Value:
    """Edges from a node per entry of the vocabulary to the features."""
    pin(weight.axes[0])
    name, slot = weight.slot
    key = ("vocabulary", name, reader.parameters.view(name, slot))
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
        return Parameter(tuple(shape), axes, value.name, value.elements.view(shape))

    result = x = read_input(reader, x)
    if weight is not None:
        result = with_parameter(reader, x, laid(weight), "product")
        if bias is not None:
            joined_axes([result.axes, laid(bias).axes])
            others = [d for d in range(rank) if d not in dims]
            with_bias(reader, result.ids.permute([*others, *dims]).reshape(-1, bias.elements.numel()), bias)
    elif bias is not None:
        result = with_parameter(reader, x, laid(bias), "residual")
    return replace(result, source=reader.node, region=None)


@rule("layer_norm", "native_layer_norm", "rms_norm")
def layer_norm(
    reader: Reader, x: Value, size: Sequence[int], weight: Value | None = None, bias: Any = None, *arguments: Any
) -> Any:
    bias = bias if isinstance(bias, Value) else None
    result = normalize(reader, x, range(len(x.shape) - len(size), len(x.shape)), weight, bias)
    return [result] * 3 if "native" in reader.operator else result


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
        if statistics is not None and isinstance(statistics.formula, Named):
            known = reader.parameters.axes.setdefault(statistics.formula.name, (Space(statistics.shape[0]),))
            unify(known[0], x.axes[1])
    result = normalize(reader, x, [1], weight, bias)
    return [result] * 3 if "native" in reader.operator else result


@rule("group_norm", "native_group_norm")
def group_norm(
    reader: Reader, x: Value, groups: Any, weight: Value | None = None, bias: Value | None = None, *arguments: Any
) -> Any:
    """Groups permute, and channels inside each group."""
    native = "native" in reader.operator
    if native:
        weight, bias, groups = groups, weight, arguments[3]
    try:
        split_product(x.axes[1], [groups, x.shape[1] // groups])
    except IncompatibleError:
        give_up(x.axes[1])
    result = normalize(reader, x, [1], weight, bias)
    return [result] * 3 if native else result
