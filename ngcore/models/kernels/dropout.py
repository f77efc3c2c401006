"""Dropout from 16 random bits a value: on a CPU a Bernoulli draw per value costs several times as much."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

LEVELS = 1 << 16


def dropout(x: Float[Tensor, "*shape"], probability: float, training: bool) -> Float[Tensor, "*shape"]:
    """`x` with values zeroed at `probability`, a multiple of 2⁻¹⁶, and the others scaled to the same mean."""
    dropped = round(probability * LEVELS)
    if not training or dropped == 0:
        return x
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (math.ceil(x.numel() / 4),), device=x.device)
    return x * dropout_factors(words, x.detach(), dropped)


# An operator of our own, so that a compiler meets numbers: masks that it fuses into other code are slow on CPUs. The
# bits come from outside, for a compiler takes two calls with the same arguments for one.
@torch.library.custom_op(
    "ngcore::dropout_factors", mutates_args=(), schema="(Tensor words, Tensor x, int dropped) -> Tensor"
)
def dropout_factors(words: Tensor, x: Tensor, dropped: int) -> Tensor:
    """What each value of `x` is multiplied by: 0 for `dropped` of `LEVELS`, by 16 bits of the 64 of each word."""
    levels = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (levels >= dropped - LEVELS // 2).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


@dropout_factors.register_fake
def _(words: Tensor, x: Tensor, dropped: int) -> Tensor:
    return x.new_empty(x.shape)
