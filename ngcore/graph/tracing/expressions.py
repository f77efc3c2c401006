"""What a network does to its neurons' sums: functions of one number, as expressions over ATen's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ngcore.activations import ACTIVATIONS

# Where functions are compared: apart from 0 so that no two sides of a kink look alike, and far out for bounds.
GRID = torch.cat([torch.linspace(-9.9, 10, 400), torch.tensor([-100.0, -30.0, 0.0, 30.0, 100.0])]).double()
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Argument:
    """The sum itself."""

    def __str__(self) -> str:
        return "x"


@dataclass(frozen=True)
class Named:
    """A number of the state dict, which other networks of this architecture may have another of."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Apply:
    """An operator on expressions and numbers."""

    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        arguments = [_text(x) for x in self.arguments] + [f"{name}={_text(x)}" for name, x in self.keywords]
        return f"{getattr(self.operator, 'overloadpacket', self.operator).__name__}({', '.join(arguments)})"


Expression = Argument | Named | Apply
X = Argument()


def _text(value: Any) -> str:
    return format(value, ".12g") if isinstance(value, float) else str(value)


def compose(outer: Expression, inner: Expression) -> Expression:
    """The outer function of the inner one."""
    if isinstance(outer, Apply) and inner != X:
        arguments = tuple(compose(x, inner) if isinstance(x, Expression) else x for x in outer.arguments)
        keywords = tuple((k, compose(x, inner) if isinstance(x, Expression) else x) for k, x in outer.keywords)
        return Apply(outer.operator, arguments, keywords)
    return inner if outer == X else outer


def evaluate(expression: Any, x: Tensor) -> Any:
    """The function's values; arguments that are no expressions are themselves."""
    if isinstance(expression, Apply):
        keywords = {name: evaluate(value, x) for name, value in expression.keywords}
        return expression.operator(*(evaluate(value, x) for value in expression.arguments), **keywords)
    return x if expression == X else expression


def _parts(expression: Any) -> Iterator[Any]:
    yield expression
    if isinstance(expression, Apply):
        for part in (*expression.arguments, *dict(expression.keywords).values()):
            yield from _parts(part)


@cache
def name_of(expression: Expression) -> str:
    """The name of a function: that of the table's function with the same values, else the expression as text."""
    if expression == X:
        return "identity"
    if any(isinstance(part, Named) for part in _parts(expression)):
        return str(expression)
    try:
        values = evaluate(expression, GRID).double()
    except (RuntimeError, TypeError):  # e.g. of integers alone
        return str(expression)
    for name, activation in ACTIVATIONS.items():
        for function in (activation.function, activation.approximation):
            if function and torch.allclose(values, function(GRID), TOLERANCE, TOLERANCE, equal_nan=True):
                return name
    return str(expression)
