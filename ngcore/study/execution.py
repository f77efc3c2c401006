"""How runs are executed: what changes their speed and memory alone, and is no part of what they are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ngcore.processes import default_workers as default_workers


class OutOfTime(Exception):
    """The deadline came first; what is finished is stored, and the next start goes on from there.

    Attributes:
        finished: of several runs the results of those that are done, by config.
    """

    def __init__(self, message: str, finished: Mapping[Any, Any] | None = None) -> None:
        super().__init__(message)
        self.finished = dict(finished or {})


@dataclass(frozen=True)
class Execution:
    """Where and how runs are executed. Two executions of one config are one run, up to rounding.

    Args:
        device: "cpu" or "cuda"; None for the GPU where there is one.
        micro_batch: networks per forward and backward pass, 0 for the whole batch; gradients add up. None: on a CPU
            what the method says, on a GPU the whole batch.
        compiled: methods whose hot parts are compiled, and populations whose training is, where that works.
        workers: processes at a time; None for one per core, or one on a GPU.
        deadline: `time.time()` at which runs end; None for never.
        matmul: of float32 products in training on a GPU, as `torch.set_float32_matmul_precision` has it: "highest", or
            "high" for TF32, which reads the first 10 of 23 fraction bits of what it multiplies. What needs all digits
            has them (`ngcore.precision`).
        captured: on a GPU a training step is one CUDA graph where its shapes are always the same.
    """

    device: str | None = None
    micro_batch: int | None = None
    compiled: tuple[str, ...] = ()
    workers: int | None = None
    deadline: float | None = None
    matmul: str = "highest"
    captured: bool = True

    @property
    def where(self) -> str:
        return self.device or best_device()

    def compiles(self, name: str | None = None) -> bool:
        """Whether a method or population, or anything at all, is compiled."""
        wanted = bool(self.compiled) if name is None else name in self.compiled
        return wanted and can_compile()

    def leave_in_time(self, seconds: float = 0.0) -> None:
        """To be called before work of so many seconds.

        Raises:
            OutOfTime: it would end after the deadline.
        """
        if self.deadline is not None and time.time() + seconds > self.deadline:
            raise OutOfTime(f"{seconds:.0f} more seconds would pass the deadline")

    @classmethod
    def of(cls, parameters: Mapping[str, Any], **settings: Any) -> Execution:
        """Of the parameters of a notebook that are about execution, where it has them."""
        compiled = tuple(parameters.get("compiled", ()))
        if compiled and not can_compile():
            print("torch.compile does not work here (it needs a C++ compiler): running slower, without it")
            compiled = ()
        return cls(compiled=compiled, workers=parameters.get("workers"), **settings)


DEFAULT = Execution()


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def can_compile() -> bool:
    """Whether torch.compile works here: it needs a C++ compiler and Python's headers. Found out by trying."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=best_device()))
    except Exception:  # of many kinds: no compiler, one that fails, no headers
        return False
    return True
