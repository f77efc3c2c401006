"""Activation functions by their names on the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """ATen's operators that compute it, and the function where nothing but its name decides it."""

    operators: tuple[str, ...] = ()
    function: Callable[[Tensor], Tensor] | None = None


# New ones go to the end: stored models index into this order.
ACTIVATIONS = {
    "identity": Activation(function=lambda x: x),
    "relu": Activation(("relu", "relu_"), torch.relu),
    "sine": Activation(("sin",), torch.sin),
    "tanh": Activation(("tanh",), torch.tanh),
    "sigmoid": Activation(("sigmoid",), torch.sigmoid),
    "gelu": Activation(("gelu",)),
    "silu": Activation(("silu", "silu_")),
    "leaky_relu": Activation(("leaky_relu", "leaky_relu_")),
    "elu": Activation(("elu",)),
    "relu6": Activation(("relu6",)),
    "softplus": Activation(("softplus",)),
    "hardtanh": Activation(("hardtanh", "hardtanh_")),
    "hardswish": Activation(("hardswish", "hardswish_")),
    "hardsigmoid": Activation(("hardsigmoid",)),
    "mish": Activation(("mish",)),
    "selu": Activation(("selu",)),
    "celu": Activation(("celu",)),
    "log_sigmoid": Activation(("log_sigmoid",)),
    "erf": Activation(("erf",)),
    "softsign": Activation(("softsign",)),
    "siren": Activation(function=lambda x: torch.sin(30.0 * x)),  # Sitzmann et al. 2020, ω₀ = 30
}
NAMES = (*ACTIVATIONS, "other")
OF_OPERATOR = {operator: name for name, activation in ACTIVATIONS.items() for operator in activation.operators}


def function_of(name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name.

    Raises:
        ValueError: it is not known, or depends on numbers that the name does not tell.
    """
    function = ACTIVATIONS.get(name, Activation()).function
    if function is None:
        known = ", ".join(name for name, activation in ACTIVATIONS.items() if activation.function)
        raise ValueError(f"activation {name!r} has no function that its name alone decides; these have: {known}")
    return function
