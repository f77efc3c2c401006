"""What a step of every optimizer costs: time and memory, beside the network's own pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ngcore.models.optimizers import LearnedOptimizer
from ngcore.models.optimizers.problem import Task
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.study.runs import Record
from ngcore.tasks.learning_to_optimize import HAND_DESIGNED
from ngcore.tasks.optimization import ImageTask

REPETITIONS = 20


@dataclass(frozen=True)
class Config:
    """What a step of every optimizer costs on a task's network."""

    dataset: str
    trained: ImageTask
    methods: tuple[str, ...]
    method: str = "all"
    seed: int = 0
    task: str = "optimizer_cost"


HEADINGS = {
    "step_ms": "Step (ms)",
    "of_task": "Share of the network's pass",
    "of_adam": "Steps of Adam",
    "step_mb": "Memory of a step (MB)",
    "state_mb": "State (MB)",
}


def cost_table(records: Sequence[Record]) -> pd.DataFrame:
    """What a step costs, also as a share of the network's pass, and in steps of Adam."""
    parts = [pd.DataFrame(r["metrics"]["cost"]).assign(dataset=r["config"]["dataset"]) for r in records]
    costs = pd.concat(parts, ignore_index=True)
    adam = costs[costs["method"] == "Adam"].set_index("dataset")["step_ms"]
    costs["of_task"] = (costs["step_ms"] / costs["task_ms"]).round(2)
    costs["of_adam"] = (costs["step_ms"] / costs["dataset"].map(adam)).round(1)
    return costs[["dataset", "method", *HEADINGS]].round(2)


def load(config: Config, device: str) -> tuple[Task, str]:
    task = config.trained.task("test", device)
    return task, task.digest


def produce(config: Config, task: Task, job: Job) -> Outcome:
    """Metrics: `cost`, the rows of the function of this name."""
    return Outcome({"cost": cost(task, config.methods).round(4).to_dict("records")}, {}, 0.0)


EXPERIMENT = Experiment(Config, {}, load, produce)


def cost(task: Task, methods: Sequence[str]) -> pd.DataFrame:
    """What a step of every optimizer costs, and of the network's own forward and backward pass.

    Measured in turns, so that other load on the machine slows all alike. A learned optimizer's weights do not matter.

    Returns:
        A row per method: `step_ms` of the optimizer and `task_ms` of the network (medians), `step_mb`, the most memory
        that a step takes at once (2**20 bytes), and `state_mb`, what it keeps between steps.
    """
    networks = {method: task.network(0) for method in methods}
    optimizers = {
        method: HAND_DESIGNED[method].build(network.parameters(), lr=1e-3)
        if method in HAND_DESIGNED
        else LearnedOptimizer(method).to(task.inputs.device).bind(network, task.example)
        for method, network in networks.items()
    }
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for _ in range(REPETITIONS + 2):
        for method in methods:
            started = _now()
            task.backward(networks[method], generator)
            between = _now()
            optimizers[method].step()
            times[method].append((between - started, _now() - between))
    rows = []
    for method in methods:
        pass_seconds, step_seconds = (statistics.median(own) for own in zip(*times[method][2:], strict=True))
        state = [x for own in optimizers[method].state.values() for x in own.values() if isinstance(x, Tensor)]
        rows.append(
            {
                "method": method,
                "step_ms": step_seconds * 1e3,
                "task_ms": pass_seconds * 1e3,
                "step_mb": peak_bytes(optimizers[method].step) / 2**20,
                "state_mb": sum(x.nbytes for x in state) / 2**20,
            }
        )
    return pd.DataFrame(rows)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that tensors made by a function take at once, beside those that are there before."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, profile_memory=True) as trace:
        function()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
