"""One optimizer step: the same work every time, which looks at no value of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ngcore.study.captured import Captured
from ngcore.study.problem import Problem, Schedule


class Step:
    """Steps of an optimizer on a problem's batches, and the sum of their losses since `begin`.

    On a GPU rows, rates and losses stay there, and where `is_captured`, a step is one CUDA graph.

    Args:
        micro_batch: networks per forward and backward pass, 0 for the whole batch.
        captured: capture the step, where the networks have one wiring: then its shapes are always the same.
    """

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer,
        micro_batch: int = 0,
        captured: bool = False,
    ) -> None:
        self.problem, self.schedule, self.optimizer = problem, schedule, optimizer
        self.micro_batch = micro_batch or schedule.batch
        self.device = next(problem.model.parameters()).device
        self.total = torch.zeros((), device=self.device)
        self.is_captured = captured and self.device.type == "cuda" and has_one_wiring(problem.model)
        if self.device.type == "cuda":
            self.rate = torch.zeros((), device=self.device)
            for group in optimizer.param_groups:
                group["lr"] = self.rate
        self._repeated = Captured(self._take) if self.is_captured else self._take

    def begin(self, rates: Sequence[float]) -> None:
        """Before the steps of an epoch, which have these learning rates."""
        self.total.zero_()
        self.rates = torch.tensor(rates, device=self.device) if self.device.type == "cuda" else list(rates)

    def __call__(self, number: int, rows: Tensor) -> None:
        """The step with this number in the epoch, on these rows of the training set."""
        if self.device.type == "cuda":
            self._repeated(rows, self.rates[number])
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[number]
        self._take(rows)

    def _take(self, rows: Tensor, rate: Tensor | None = None) -> None:
        if rate is not None:
            self.rate.copy_(rate)
        self.optimizer.zero_grad()
        losses = []
        for part in rows.split(self.micro_batch):
            loss = loss_of(self.problem, self.schedule, part)
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(self.problem.model.parameters(), self.schedule.clip)
        self.optimizer.step()
        for loss in losses:
            self.total += loss


def loss_of(problem: Problem, schedule: Schedule, rows: Tensor) -> Tensor:
    """What some rows of a batch add to its mean loss."""
    with autocast(schedule, rows.device):
        return problem.loss(rows) / schedule.batch


def autocast(schedule: Schedule, device: torch.device) -> AbstractContextManager[Any]:
    """The schedule's precision."""
    return torch.autocast(device.type, torch.bfloat16) if schedule.precision == "bfloat16" else nullcontext()


def has_one_wiring(model: nn.Module) -> bool:
    """Whether all networks that a metanetwork, or an editor's, reads have one wiring."""
    return getattr(getattr(model, "metanetwork", model), "wiring", None) is not None
