"""What is known of a network's tensors while its operators are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ngcore.graph.symmetry.spaces import Space, pinned_leaf, uniform
from ngcore.graph.tracing.expressions import Apply, Expression, Named, X

NO_NEURON = -1


@dataclass(eq=False)
class Value:
    """A tensor of the network; `axes` holds the space of every axis."""

    shape: tuple[int, ...]
    axes: list[Space]


@dataclass(eq=False)
class Parameter(Value):
    """A parameter, or a part of it: `elements` is the view of a meta tensor of the parameter's shape."""

    name: str
    elements: Tensor

    @property
    def slot(self) -> tuple[str, Tensor]:
        """What edges and biases are made of."""
        return self.name, self.elements


@dataclass(eq=False)
class Constant(Value):
    """Numbers that depend on no parameter and no input; `formula`: on buffers of the state dict, and how."""

    numbers: Tensor
    formula: Expression | None = None

    @classmethod
    def of(cls, numbers: Tensor, formula: Expression | None = None) -> Constant:
        """A constant pins the axes along which it varies."""
        axes = []
        for dim, size in enumerate(numbers.shape):
            varies = numbers.numel() > 0 and not bool((numbers == numbers.narrow(dim, 0, 1)).all())
            axes.append(pinned_leaf(size) if varies else uniform(size))
        return cls(tuple(numbers.shape), axes, numbers, formula)


@dataclass(eq=False)
class Computed(Value):
    """What depends on the network's input.

    Attributes:
        source: the node of the exported graph that made it.
        function: what has been applied to the sums of its neurons, number by number.
        region: the node whose numbers `function` was applied to; None for the source itself.
    """

    source: fx.Node | None
    function: Expression = X
    region: fx.Node | None = None

    @property
    def origin(self) -> fx.Node | None:
        """Values of one origin are functions of the same numbers."""
        return self.region or self.source


@dataclass(eq=False)
class Activation(Computed):
    """Numbers of neurons.

    `ids`: the neuron behind every element, int64, broadcastable to the shape: an axis along which it does not vary has
    length 1; `NO_NEURON` where there is none (a statistic).
    """

    ids: Tensor = field(kw_only=True)


@dataclass(eq=False)
class Unread(Computed):
    """An input of the network of which no neurons have been made yet.

    Attributes:
        made: its neurons once they have been, by the axis along which they lie; shared with what acts on every number
            of the input by itself.
        parent: where it has only been transposed: the input, and which of its axes each axis is.
    """

    made: dict[int, Tensor] = field(default_factory=dict)
    parent: tuple[Unread, list[int]] | None = None


def expression_of(value: Any) -> Any:
    """What an expression holds for an operand: an activation's function, a constant's number or name."""
    match value:
        case Computed():
            return value.function
        case Constant(formula=None):
            return value.numbers.item() if value.numbers.numel() == 1 else Named(str(value.numbers.tolist()))
        case Constant():
            return value.formula
        case list() | tuple():
            return tuple(map(expression_of, value))
    return value


def applied(operator: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Apply:
    """An operator's result as an expression of its operands'."""
    pairs = tuple((name, expression_of(value)) for name, value in keywords.items())
    return Apply(operator, expression_of(tuple(arguments)), pairs)


def collapse(ids: Tensor) -> Tensor:
    """Give axes along which the neurons do not change the length 1."""
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1 and (ids.stride(dim) == 0 or bool((ids == ids.narrow(dim, 0, 1)).all())):
            ids = ids.narrow(dim, 0, 1)
    return ids


def none(rank: int) -> Tensor:
    """Ids of what belongs to no neuron."""
    return torch.full([1] * rank, NO_NEURON)
