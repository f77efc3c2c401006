"""Affine maps that are no module's own, and their composition: a Linear of a Linear is one Linear."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.precision import without_autocast


def composing(weight: Tensor) -> AbstractContextManager[Any]:
    """While maps are composed: in their own precision, since the result is rounded where it is applied."""
    return without_autocast(weight.device.type)


class Affine(NamedTuple):
    """x -> weight x + bias"""

    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"]

    @classmethod
    def of(cls, linear: nn.Linear) -> Affine:
        return cls(linear.weight, linear.bias)

    def after(self, first: Affine | None) -> Affine:
        """The map that does `first`, then this one."""
        if first is None:
            return self
        with composing(self.weight):
            return Affine(self.weight @ first.weight, self.weight @ first.bias + self.bias)

    def __call__(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return F.linear(x, self.weight, self.bias)
