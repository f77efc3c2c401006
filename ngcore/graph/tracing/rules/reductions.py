"""Reductions along axes, and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ngcore.graph.symmetry.spaces import Space, is_pinned, pin, pinned_leaf, uniform
from ngcore.graph.tracing.reader import Reader, rule
from ngcore.graph.tracing.rules.operands import merge_positions, read
from ngcore.graph.tracing.values import Activation, Parameter, Value, none


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "linalg_vector_norm", "all", "any", "argmax",
    "max", "min",
)  # fmt: skip
def reduce(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Any:
    """A reduction over positions keeps the neurons; one over neurons is a statistic, no neuron."""
    if isinstance(value, Parameter):
        raise reader.fail(f"parameter {value.name} is reduced before it is used")
    dims = reduced_dims(value, arguments, keywords)
    example = reader.node.meta["val"]
    several = isinstance(example, (tuple, list))
    if several or "arg" in reader.operator:
        pin(*(value.axes[d] for d in dims))  # places along the axis are among the results
    known = isinstance(value, Activation)
    if known and any(value.ids.shape[d] > 1 and is_pinned(value.axes[d]) for d in dims):
        value = read(reader, value)  # other neurons at other positions are joined
    ids = reduced_ids(reader, value.ids, value.axes, dims) if known else None
    axes = [uniform(1) if d in dims else axis for d, axis in enumerate(value.axes)]
    shape = (example[0] if several else example).shape
    if len(shape) < len(value.shape):
        axes = [axis for d, axis in enumerate(axes) if d not in dims]
        ids = None if ids is None else ids.squeeze(dims)
    result = reader.activation(shape, axes, ids, value.function)
    return [result, result] if several else result


def reduced_dims(value: Value, arguments: Sequence[Any], keywords: dict[str, Any]) -> list[int]:
    """The axes over which a reduction runs: all where none are named."""
    rank = len(value.shape)
    named = next((x for x in arguments if isinstance(x, (list, tuple))), keywords.get("dim"))
    if named is None and arguments and isinstance(arguments[0], int) and rank:
        named = [arguments[0]]
    return [d % rank for d in (named or range(rank))]


def reduced_ids(reader: Reader, ids: Tensor, axes: Sequence[Space], dims: Sequence[int]) -> Tensor:
    """Ids with length 1 along the axes that are reduced: positions join, neurons leave none."""
    for d in dims:
        if ids.shape[d] > 1 and is_pinned(axes[d]):
            rest = [k for k in range(ids.dim()) if k not in dims and ids.shape[k] > 1]
            ids = merge_positions(reader, ids, axes, rest[-1]) if rest else ids
        if ids.shape[d] > 1:
            ids = none(ids.dim())
    return ids


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d",
    "upsample_nearest1d", "max_pool2d_with_indices", "adaptive_max_pool2d", "upsample_bicubic2d",
    "_adaptive_avg_pool3d", "upsample_nearest3d", "reflection_pad2d", "replication_pad2d", "_upsample_bicubic2d_aa",
    "reflection_pad1d",
)  # fmt: skip
def pool(reader: Reader, value: Value, *arguments: Any, **keywords: Any) -> Any:
    """Pooling and resizing keep channels and make new positions."""
    example = reader.node.meta["val"]
    shape = (example[0] if isinstance(example, (tuple, list)) else example).shape
    count = next(n for n in (1, 2, 3) if f"{n}d" in reader.operator)
    channel = len(shape) - 1 - count
    pin(*value.axes[channel + 1 :])
    axes = [*value.axes[: channel + 1], *(pinned_leaf(n) for n in shape[channel + 1 :])]
    ids = merge_positions(reader, reader.neurons(value, channel), value.axes, channel)
    result = reader.activation(shape, axes, ids)
    return [result, result] if isinstance(example, (tuple, list)) else result
