"""The study's experiments: what each one runs, and one function that runs any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

from ngcore.study import executor as executors
from ngcore.study import plans, run
from ngcore.study.execution import DEFAULT, Execution
from ngcore.study.run import Report, silent
from ngcore.study.runs import Record
from ngcore.tasks import (
    ablations,
    architectural_noise,
    generalization,
    inr_classification,
    inr_editing,
    learning_to_optimize,
    meta_training,
    optimizer_cost,
    optimizer_plan,
    optimizer_trajectories,
    zoos,
)

EXPERIMENTS = run.registry(
    inr_classification.EXPERIMENT,
    inr_editing.EXPERIMENT,
    zoos.EXPERIMENT,
    generalization.EXPERIMENT,
    architectural_noise.EXPERIMENT,
    meta_training.EXPERIMENT,
    learning_to_optimize.EXPERIMENT,
    optimizer_trajectories.EXPERIMENT,
    optimizer_cost.EXPERIMENT,
)

PLANS = {
    "01": inr_classification.PLAN,
    "02": inr_editing.PLAN,
    "03": generalization.PLAN,
    "04": optimizer_plan.PLAN,
    "05": ablations.PLAN,
}  # by the number of the notebook that shows the runs


def execute(config: Any, execution: Execution = DEFAULT, report: Report = silent) -> Record:
    """The result of a run of any of the experiments, see `study.run.execute`."""
    return run.execute(EXPERIMENTS, config, execution, report)


def execute_all(
    configs: Sequence[Any], execution: Execution = DEFAULT, executor: Executor | None = None
) -> list[Record]:
    """The results of many runs, in the order of `configs`, see `study.executor.execute_all`."""
    run.prepare(EXPERIMENTS, configs, execution)
    return executors.execute_all(execute, configs, execution, executor)


def train_all(
    notebooks: Mapping[str, Mapping[str, Any]],
    worth: plans.Worth,
    execution: Execution,
    note: Callable[[str, int], None] = lambda number, count: None,
) -> None:
    """Execute and publish the runs of several notebooks, given by number and parameters, what is worth most first.

    See `study.plans.carry_out_by_worth`. Each notebook says what is compiled and how many workers there are. On a GPU
    all runs share a process, for starting one and reading data there takes as long as a short run.

    Args:
        note: told the number of each notebook whose runs are complete, and how many records it has.

    Raises:
        ValueError: an entry of `worth` names a field that no config has.
        RunsFailed, OutOfTime: see `study.plans.carry_out_by_worth`.
    """
    known = {field.name for experiment in EXPERIMENTS.values() for field in fields(experiment.config)} | {"notebook"}
    if unknown := {name for entry in worth for name in entry} - known:
        raise ValueError(f"worth: no run has {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    told = {number: Execution.of(parameters) for number, parameters in notebooks.items()}
    own = {n: replace(execution, compiled=each.compiled, workers=each.workers) for n, each in told.items()}
    on_gpu = execution.where == "cuda"
    with executors.processes_of(execution) if on_gpu else nullcontext() as processes:

        def publish(number: str, found: Sequence[Record], complete: bool) -> None:
            plans.publish_some(PLANS[number], notebooks[number]["profile"], found, complete)
            if complete:
                note(number, len(found))

        plans.carry_out_by_worth(
            {number: PLANS[number].runs(parameters) for number, parameters in notebooks.items()},
            worth,
            lambda number, configs: execute_all(configs, own[number], processes),
            publish,
        )


def records(
    plan: plans.Plan,
    parameters: Mapping[str, Any],
    *,
    deadline: float | None = None,
    executor: Executor | None = None,
) -> list[Record]:
    """The records that a notebook shows, by its parameters, see `study.plans.records_of`.

    Args:
        deadline, executor: see `Execution` and `study.executor.execute_all`.
    """
    execution = Execution.of(parameters, deadline=deadline) if parameters["train"] else DEFAULT
    return plans.records_of(plan, parameters, partial(execute_all, execution=execution, executor=executor))
