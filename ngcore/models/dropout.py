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
    levels = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x * (levels >= dropped - LEVELS // 2) * (LEVELS / (LEVELS - dropped))
