"""How exactly float32 products of matrices are computed, where a device can do them faster and less exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.amp import is_autocast_available


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Products of float32 matrices as `torch.set_float32_matmul_precision` has it: "highest", or "high" for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact(device_type: str) -> Iterator[None]:
    """All digits of float32: without autocast and without TF32.

    A sine's phase needs them: with ω₀ = 30 it is some tens, and 10 fraction bits would leave it off by hundredths.
    """
    with without_autocast(device_type), products("highest"):
        yield


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Everything in its own precision; as it is on devices that have no other."""
    return torch.autocast(device_type, enabled=False) if is_autocast_available(device_type) else nullcontext()
