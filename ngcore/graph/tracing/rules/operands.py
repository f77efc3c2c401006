"""What rules share: the spaces and neurons of operands, and new neurons where operands meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ngcore.graph.symmetry.spaces import Space, is_pinned, pin, resolve, uniform, unify
from ngcore.graph.tracing.expressions import X
from ngcore.graph.tracing.reader import Reader
from ngcore.graph.tracing.values import NO_NEURON, Activation, Computed, Constant, Parameter, Value, none


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
    return none(len(value.shape)) if isinstance(value, Constant) else reader.neurons(value, axis)


def read_input(reader: Reader, value: Computed) -> Activation:
    """An input that meets another activation: its neurons lie along its last axis, or along an image's channels."""
    if isinstance(value, Activation):
        return value
    ids = reader.sums(value, 1 if len(value.shape) > 3 else -1)
    return Activation(value.shape, value.axes, value.source, value.function, value.region, ids=ids)


def read(reader: Reader, value: Computed) -> Activation:
    """An activation as neurons that hold its numbers."""
    value = read_input(reader, value)
    return replace(value, ids=reader.neurons(value, -1), function=X)


def as_activation(reader: Reader, value: Value) -> Value:
    """A parameter that is used like an activation, e.g. a class token: neurons along its last axis, one edge each from
    a node per position."""
    if not isinstance(value, Parameter):
        return value
    shape, value = value.shape, unexpanded(value)
    rank = len(shape)
    features = next((d for d in reversed(range(rank)) if value.shape[d] > 1), rank - 1)
    pin(*(axis for d, axis in enumerate(value.axes) if d != features))
    target = reader.new_neurons(value.shape[features])
    place_on_positions(reader, value, features, target)
    ids = target.view([len(target) if d == features else 1 for d in range(rank)])
    axes = [axis if value.shape[d] == shape[d] else uniform(shape[d]) for d, axis in enumerate(value.axes)]
    return reader.activation(shape, axes, ids)


def with_inputs(reader: Reader, row: Tensor) -> Tensor:
    """Neurons, with new ones of an input for what is no neuron."""
    missing = row == NO_NEURON
    if not bool(missing.any()):
        return row
    return row.masked_scatter(missing, reader.new_neurons(int(missing.sum()), "input"))


def unexpanded(value: Parameter) -> Parameter:
    """A parameter without the axes along which it is only repeated."""
    elements, axes = value.elements, list(value.axes)
    for d in range(elements.dim()):
        if elements.shape[d] > 1 and elements.stride(d) == 0:
            elements, axes[d] = elements.narrow(d, 0, 1), uniform(1)
    return Parameter(tuple(elements.shape), axes, value.name, elements)


def place_on_positions(reader: Reader, value: Parameter, axis: int, targets: Tensor) -> None:
    """A parameter that is added at every position: a bias if it is the same everywhere, else edges from a node each."""
    by_position = value.elements.movedim(axis, 0).reshape(len(targets), -1)
    positions = by_position.shape[1]
    group = reader.groups.of(int(targets[0]))
    if positions == 1 and group.bias is None and group.size == len(targets):
        reader.give_bias(targets, (value.name, by_position.squeeze(1)))
        return
    key = ("positions", positions, reader.node)
    if key not in reader.vocabularies:
        reader.vocabularies[key] = reader.new_neurons(positions, "input")
    reader.connect(reader.vocabularies[key], targets, "embedding", (value.name, by_position.unsqueeze(0)))


def successors(reader: Reader, neurons: Tensor, kind: str) -> Tensor:
    """A new neuron for each of these, with an edge from it."""
    fresh = reader.new_neurons(len(neurons))
    reader.connect(neurons, fresh, kind, groups=len(neurons))
    return fresh


def replaced(ids: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Ids with some neurons (sorted) exchanged for others."""
    place = torch.searchsorted(old, ids.contiguous()).clamp(max=len(old) - 1)
    return torch.where(old[place] == ids, new[place], ids)


def merge_positions(reader: Reader, ids: Tensor, axes: Sequence[Space], axis: int) -> Tensor:
    """Where a neuron's place holds other neurons at other positions, e.g. class token and patches, join them."""
    axis %= len(axes)
    varying = [d for d in range(ids.dim()) if d != axis and ids.shape[d] > 1 and is_pinned(axes[d])]
    if not varying:
        return ids
    kept = [d for d in range(ids.dim()) if d not in varying]
    table = ids.permute([*kept, *varying]).flatten(len(kept)).flatten(0, len(kept) - 1)
    columns = torch.unique(table, dim=1)
    columns = columns[:, (columns != NO_NEURON).any(0)]
    merged = columns[:, 0] if columns.shape[1] == 1 else reader.new_neurons(len(table))
    if columns.shape[1] > 1:
        for column in columns.T:
            present = column != NO_NEURON
            reader.connect(column[present], merged[present], "residual", groups=int(present.sum()))
    return merged.view([1 if d in varying else ids.shape[d] for d in range(ids.dim())])
