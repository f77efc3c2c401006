"""Activation functions by their names on the graph: the one table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]


class Activation(NamedTuple):
    """A function with PyTorch's default arguments, whether it is odd, f(-x) = -f(x), and another form of its name."""

    function: Function
    odd: bool = False
    approximation: Function | None = None


# New ones go to the end: stored models index into this order.
ACTIVATIONS = {
    "identity": Activation(lambda x: x, odd=True),
    "relu": Activation(torch.relu),
    "sine": Activation(torch.sin, odd=True),
    "tanh": Activation(torch.tanh, odd=True),
    "sigmoid": Activation(torch.sigmoid),
    # PyTorch and papers give both forms this one name; they differ by 0.0005 at most
    "gelu": Activation(F.gelu, approximation=lambda x: F.gelu(x, approximate="tanh")),
    "silu": Activation(F.silu),
    "leaky_relu": Activation(F.leaky_relu),
    "elu": Activation(F.elu),
    "relu6": Activation(F.relu6),
    "softplus": Activation(F.softplus),
    "hardtanh": Activation(F.hardtanh, odd=True),
    "hardswish": Activation(F.hardswish),
    "hardsigmoid": Activation(F.hardsigmoid),
    "mish": Activation(F.mish),
    "selu": Activation(F.selu),
    "celu": Activation(F.celu),
    "log_sigmoid": Activation(F.logsigmoid),
    "erf": Activation(torch.erf, odd=True),
    "softsign": Activation(F.softsign, odd=True),
    "siren": Activation(lambda x: torch.sin(30.0 * x), odd=True),  # Sitzmann et al. 2020, ω₀ = 30
}
NAMES = (*ACTIVATIONS, "other")


def function_of(name: str) -> Function:
    """The function of this name.

    Raises:
        ValueError: the table has no such name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not in the table, which has: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name].function
