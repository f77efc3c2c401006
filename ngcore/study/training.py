"""The training loop: one for every task. A run is resumed from its last whole epoch to the same final numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ngcore.precision import products
from ngcore.study.compiling import compile_or_not
from ngcore.study.execution import can_compile as can_compile
from ngcore.study.problem import Problem as Problem
from ngcore.study.problem import Schedule as Schedule
from ngcore.study.run import Job, Outcome
from ngcore.study.runs import StoredRun
from ngcore.study.step import Step, autocast, loss_of


class DivergedError(FloatingPointError):
    """A loss that is not finite."""


def by_training(problem: Callable[[Any, Any, str], Problem]) -> Callable[[Any, Any, Job], Outcome]:
    """What produces a run whose problem, made of (config, data, device), the loop solves by the config's schedule."""

    def produce(config: Any, data: Any, job: Job) -> Outcome:
        torch.manual_seed(config.seed)
        return train(problem(config, data, job.device), config.schedule, config.seed, job)

    return produce


def train(problem: Problem, schedule: Schedule, seed: int, job: Job) -> Outcome:
    """Train, or go on training.

    Every epoch seeds the generators anew from (seed, epoch), so that one that was interrupted is repeated exactly.

    Raises:
        DivergedError: names the run and the epoch; the last checkpoint stays.
        OutOfTime: the next epoch would pass the deadline; the last checkpoint stays.
    """
    started, model = time.monotonic(), problem.model
    optimizer = optimizer_of(model, schedule)
    state = _resume(job.stored, model, optimizer)
    rows = torch.arange(min(job.micro_batch or schedule.batch, problem.train_size), device=job.device)
    compiled = job.compiled and compile_or_not(model, partial(loss_of, problem, schedule, rows), schedule.precision)
    step = Step(problem, schedule, optimizer, job.micro_batch, job.execution.captured)
    expected = state["seconds"] / max(1, state["epoch"])  # an epoch takes, what is compiled before the first counted in
    leave = lambda _: job.execution.leave_in_time(expected)  # noqa: E731
    for epoch, scores in epochs(step, seed, state, leave):
        _check_finite(job.stored, epoch, scores, model)
        expected = time.monotonic() - started
        state["seconds"] += expected
        started = time.monotonic()
        job.stored.save_checkpoint(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        job.report(epoch, scores)
    seen = networks_seen(problem, schedule)
    counts = {"best_epoch": state["best_epoch"], "networks_seen": seen, "steps": seen // schedule.batch}
    metrics = {**state["history"], **counts, **tested(problem, schedule, state)}
    return Outcome(metrics, state["best"], state["seconds"], compiled)


def networks_seen(problem: Problem, schedule: Schedule) -> int:
    """How many networks a whole training sees, in batches that are all full."""
    return schedule.epochs * (problem.train_size // schedule.batch) * schedule.batch


def optimizer_of(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW with amsgrad, as the papers have it."""
    rates = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
    device = next(model.parameters()).device.type
    fused, capturable = device in ("cpu", "cuda"), device == "cuda"
    return torch.optim.AdamW(model.parameters(), **rates, amsgrad=True, fused=fused, capturable=capturable)


def epochs(
    step: Step, seed: int, state: dict[str, Any], before: Callable[[int], None] = lambda epoch: None
) -> Iterator[tuple[int, dict[str, float]]]:
    """The epochs that `state` has still before it, each with its scores; `before` is called with each one's number.

    Raises:
        ValueError: there is nothing to train.
    """
    problem, schedule = step.problem, step.schedule
    if min(schedule.epochs, problem.train_size // schedule.batch) < 1:
        raise ValueError(
            f"nothing to train: {schedule.epochs} epochs of {problem.train_size} networks "
            f"in batches of {schedule.batch}; at least one epoch and one whole batch are needed"
        )
    for epoch in range(state["epoch"], schedule.epochs):
        before(epoch)
        loss = train_epoch(step, seed, epoch)
        with _evaluation(schedule, problem.model):
            scores = {"train_loss": loss, **problem.validate()}
        _note(state, epoch, scores, problem.model)
        yield epoch, scores


def tested(problem: Problem, schedule: Schedule, state: dict[str, Any]) -> dict[str, Any]:
    """Load the best weights, and measure on the test set."""
    problem.model.load_state_dict(state["best"])
    with _evaluation(schedule, problem.model):
        return problem.test()


def new_state() -> dict[str, Any]:
    """Of a training that has not begun."""
    return {"epoch": 0, "history": {}, "best": {}, "best_score": -math.inf, "best_epoch": 0, "seconds": 0.0}


def _note(state: dict[str, Any], epoch: int, scores: dict[str, float], model: nn.Module) -> None:
    """Enter an epoch's scores into the history, and its weights where they are the best so far."""
    for name, value in scores.items():
        state["history"].setdefault(name, []).append(value)
    if scores["val_score"] > state["best_score"]:
        state["best_score"], state["best_epoch"] = scores["val_score"], epoch
        state["best"] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state["epoch"] = epoch + 1


def _resume(stored: StoredRun, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = stored.checkpoint()
    if state is None:
        return new_state()
    model.load_state_dict(state.pop("model"))
    own = optimizer.state_dict()["param_groups"]  # a checkpoint may be another device's
    optimizer.load_state_dict({"state": state.pop("optimizer")["state"], "param_groups": own})
    return state


@contextmanager
def _evaluation(schedule: Schedule, model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with all digits of float32; not compiled: compiling again would cost more than it saves."""
    model.eval()
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        products("highest"),
        autocast(schedule, next(model.parameters()).device),
    ):
        yield


def learning_rate(schedule: Schedule, step: int, total: int) -> float:
    """The rate of one step: linear warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, schedule.warmup))
    if not schedule.decay:
        return schedule.learning_rate * warm
    progress = max(0, step - schedule.warmup) / max(1, total - schedule.warmup)
    return schedule.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


def train_epoch(step: Step, seed: int, epoch: int) -> float:
    """One pass over the training set; its mean loss. Of a GPU nothing is waited for before the end."""
    step.problem.model.train()
    torch.manual_seed(seed * 1_000_003 + epoch)
    size, schedule = step.problem.train_size, step.schedule
    batches = size // schedule.batch
    order = torch.randperm(size)[: batches * schedule.batch].to(step.device)
    first, last = epoch * batches, schedule.epochs * batches
    step.begin([learning_rate(schedule, first + i, last) for i in range(batches)])
    for i, rows in enumerate(order.split(schedule.batch)):
        step(i, rows)
    return (step.total / batches).item()


def _check_finite(stored: StoredRun, epoch: int, scores: dict[str, float], model: nn.Module) -> None:
    """Raise a DivergedError for numbers that are not finite: a last step may spoil the weights and no loss so far."""
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    bad += [name for name, weights in model.state_dict().items() if not torch.isfinite(weights).all()]
    if bad:
        raise DivergedError(
            f"run {stored.directory.name} diverged in epoch {epoch} (not finite: {', '.join(bad)}); "
            f"config {dict(stored.config)}"
        )
