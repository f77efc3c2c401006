"""One procedure for every run: load the data, look the result up, and where there is none, produce and store it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngcore.precision import products
from ngcore.processes import is_over, until
from ngcore.study.execution import DEFAULT, Execution, OutOfTime
from ngcore.study.lock import exclusive
from ngcore.study.methods import Method, Methods
from ngcore.study.runs import Record, StoredRun, cache_directory, environment

Report = Callable[[int, Mapping[str, float]], None]  # (epoch, its scores)


def silent(epoch: int, scores: Mapping[str, float]) -> None:
    """Report nothing."""


class Outcome(NamedTuple):
    """What a run gives; `compiled` says whether it was in the end, None for as its job asks."""

    metrics: dict[str, Any]
    weights: dict[str, Tensor]
    seconds: float
    compiled: bool | None = None


@dataclass(frozen=True)
class Job:
    """A run under way: where it is stored, how it is executed, and whom it tells.

    Args:
        micro_batch, compiled: see `Execution`; of this run's method.
        require: the place of another run, which is executed where it is not stored.
    """

    stored: StoredRun
    execution: Execution
    device: str
    micro_batch: int
    compiled: bool
    report: Report
    require: Callable[[Any], StoredRun]


@dataclass(frozen=True)
class Experiment:
    """What a task gives to `execute`.

    Args:
        config: the frozen dataclass of its runs, with fields dataset, method, seed and task.
        methods: by name, in the order of the tables' rows.
        load: (config, device) -> all data of a run, and a digest of it.
        produce: (config, data, job) -> the outcome.
        prepare: makes, with all workers, what several runs share and would otherwise make one by one.
    """

    config: type
    methods: Methods
    load: Callable[[Any, str], tuple[Any, str]]
    produce: Callable[[Any, Any, Job], Outcome]
    prepare: Callable[[Sequence[Any], Execution], None] = lambda configs, execution: None


Experiments = Mapping[str, Experiment]


def registry(*experiments: Experiment) -> Experiments:
    """Experiments by the name of their task."""
    return {experiment.config.task: experiment for experiment in experiments}


def experiment_of(experiments: Experiments, config: Any) -> Experiment:
    """The experiment that a config is of.

    Raises:
        ValueError: there is none.
    """
    if config.task not in experiments:
        raise ValueError(f"no experiment runs the task {config.task!r}; there are {', '.join(experiments)}")
    return experiments[config.task]


def prepare(experiments: Experiments, configs: Sequence[Any], execution: Execution) -> None:
    """Make what the runs share.

    Raises:
        OutOfTime: the execution's deadline came first; what is finished is stored.
    """
    with until(execution.deadline):
        for name in dict.fromkeys(config.task for config in configs):
            own = [config for config in configs if config.task == name]
            execution.leave_in_time()
            try:
                experiment_of(experiments, own[0]).prepare(own, execution)
            except Exception as error:
                if is_over():  # at which processes end themselves, in the middle of their work
                    raise OutOfTime("the deadline came before all that the runs share was made") from error
                raise


def execute(experiments: Experiments, config: Any, execution: Execution = DEFAULT, report: Report = silent) -> Record:
    """The result of a run: read if it is stored, else produced (from its checkpoint, if there is one) and stored.

    Where another process is at the same run, its result is waited for, or taken over where that process has died.

    Raises:
        OutOfTime: the execution's deadline came first; a checkpoint stays where there is one.
    """
    experiment = experiment_of(experiments, config)
    device = execution.where
    data, digest = experiment.load(config, device)
    stored = StoredRun.of(config, digest, cache_directory())
    if (record := stored.result()) is not None:
        return record
    with exclusive(stored.directory / "lock", execution.leave_in_time):
        if (record := stored.result()) is not None:  # by whoever had the lock
            return record
        execution.leave_in_time()
        job = _job(experiments, experiment, config, execution, stored, report)
        with products(execution.matmul) if device == "cuda" else nullcontext():
            outcome = experiment.produce(config, data, job)
        return stored.finish(outcome.metrics, outcome.weights, _conditions(job, outcome))


def _job(
    experiments: Experiments,
    experiment: Experiment,
    config: Any,
    execution: Execution,
    stored: StoredRun,
    report: Report,
) -> Job:
    method = experiment.methods.get(config.method, Method())
    fitting = method.micro_batch if execution.where == "cpu" else 0

    def require(other: Any) -> StoredRun:
        execute(experiments, other, execution, report)
        _, digest = experiment_of(experiments, other).load(other, execution.where)
        return StoredRun.of(other, digest, cache_directory())

    return Job(
        stored,
        execution,
        execution.where,
        fitting if execution.micro_batch is None else execution.micro_batch,
        execution.compiles(config.method),
        report,
        require,
    )


def _conditions(job: Job, outcome: Outcome) -> dict[str, Any]:
    """What a record says of how and with what it was made."""
    compiled = job.compiled if outcome.compiled is None else outcome.compiled
    settings = {"micro_batch": job.micro_batch, "compiled": compiled, "threads": torch.get_num_threads()}
    if job.device == "cuda":
        settings |= {"matmul": job.execution.matmul, "captured": job.execution.captured}
    return environment(job.device) | settings | {"train_seconds": round(outcome.seconds, 1)}
