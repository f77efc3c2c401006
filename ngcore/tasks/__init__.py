"""The study's experiments: what each one runs, and one function that runs any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
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
    loss_curves,
    meta_training,
    zoos,
)

EXPERIMENTS = run.registry(
    inr_classification.EXPERIMENT,
    loss_curves.EXPERIMENT,
    inr_editing.EXPERIMENT,
    zoos.EXPERIMENT,
    generalization.EXPERIMENT,
    architectural_noise.EXPERIMENT,
    meta_training.EXPERIMENT,
    learning_to_optimize.EXPERIMENT,
    learning_to_optimize.COST,
)

PLANS = {
    "01": inr_classification.PLAN,
    "02": inr_editing.PLAN,
    "03": generalization.PLAN,
    "04": learning_to_optimize.PLAN,
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
