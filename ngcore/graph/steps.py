"""Running the operators of a traced network, one after the other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ngcore.graph.structure import Reference, Step


def call(step: Step, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Run a step's operator."""
    if step.operator == "getitem":
        return operator.getitem(*arguments)
    library, name, overload = step.operator.split(".")
    return getattr(getattr(getattr(torch.ops, library), name), overload)(*arguments, **keywords)


def resolved(arguments: Any, results: Sequence[Any]) -> Any:
    """Arguments with the steps' results in place of references."""
    if isinstance(arguments, Reference):
        return results[arguments.step]
    if isinstance(arguments, Mapping):
        return {name: resolved(x, results) for name, x in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(resolved(x, results) for x in arguments)
    return arguments


def run_steps(steps: Sequence[Step], state: Mapping[str, Tensor], *inputs: Tensor) -> list[Any]:
    """The result of every step of one network."""
    results: list[Any] = []
    left, device = list(inputs), inputs[0].device
    for step in steps[:-1]:
        if step.operator == "input":
            results.append(left.pop(0))
        elif step.operator in ("parameter", "buffer"):
            results.append(state.get(step.arguments[0]))  # none that no operator reads
        elif step.operator == "constant":
            (value,) = step.arguments
            results.append(value.to(device) if isinstance(value, Tensor) else value)
        else:
            keywords = dict(step.keywords) | ({"device": device} if "device" in step.keywords else {})
            run = BATCHED.get(step.name, partial(call, step))
            results.append(run(resolved(step.arguments, results), resolved(keywords, results)))
    return results


def _batch_norm(arguments: Sequence[Any], _: Mapping[str, Any]) -> tuple[Tensor, None, None]:
    x, weight, bias, mean, var, _, epsilon = arguments
    return F.batch_norm(x, mean, var, weight, bias, eps=epsilon), None, None


def _copy(arguments: Sequence[Any], _: Mapping[str, Any]) -> Tensor:
    into, values = arguments[:2]
    return values.to(into.dtype).expand(into.shape)


def _attention(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    q, k, v, *rest = arguments
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, *rest, **keywords)[0]


def _view(arguments: Sequence[Any], _: Mapping[str, Any]) -> Tensor:
    return arguments[0].reshape(arguments[1])


BATCHED: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], Any]] = {
    "_native_batch_norm_legit_no_training": _batch_norm,
    "copy": _copy,
    "scaled_dot_product_attention": _attention,
    "view": _view,
}
"""Operators that vmap refuses, or would run network by network, in other words."""
