"""Learning to optimize (paper, section 4.3; table 2, figure 3): networks trained by learned optimizers, and by Adam."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ngcore.digests import tensor_digest
from ngcore.models.optimizers import LearnedOptimizer
from ngcore.models.optimizers.files import provenance, shipped
from ngcore.models.optimizers.problem import FIRST_SEED, Task, train_network
from ngcore.study.figures import step_curves
from ngcore.study.methods import Method
from ngcore.study.plans import Plan, Runs
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.study.runs import Record, RunError
from ngcore.study.tables import describe_scale
from ngcore.tasks import meta_training
from ngcore.tasks.optimization import ImageTask

LEARNED = meta_training.METHODS
HAND_DESIGNED = {"Adam": Method(torch.optim.Adam, colour=7)}
METHODS = HAND_DESIGNED | LEARNED
Optimize = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Config:
    """One run: an optimizer trains one network.

    Args:
        method: one of METHODS.
        seed: of the network's weights and of the batches, the same for all methods.
        trained: the task.
        variation: what the task is called among its variations, "none" for the paper's own.
        steps: of training.
        held: what is measured on, "test" or "validation" images.
        weights: of a learned optimizer: "shipped", or the name of the stored meta-training run.
        learning_rate: of a hand-designed one.
        curve_every: steps between measurements; the last one is always made.
        curve_images: held images that all measurements but the last are made on.
    """

    dataset: str
    method: str
    seed: int
    trained: ImageTask
    variation: str
    steps: int
    held: str
    weights: str | None
    learning_rate: float | None
    curve_every: int
    curve_images: int
    task: str = "learning_to_optimize"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; there are {', '.join(METHODS)}")
        if (self.method in LEARNED) != (self.weights is not None):
            raise ValueError(f"{self.method}: learned optimizers, and no others, have weights")
        if (self.method in HAND_DESIGNED) != (self.learning_rate is not None):
            raise ValueError(f"{self.method}: hand-designed optimizers, and no others, have a learning rate")
        if self.dataset != self.trained.dataset:
            raise ValueError(f"dataset {self.dataset!r}, but the task is on {self.trained.dataset!r}")
        if min(self.steps, self.curve_every) < 1:
            raise ValueError(f"steps and curve_every must be at least 1, got {self.steps} and {self.curve_every}")

    @property
    def measured(self) -> tuple[int, ...]:
        """Numbers of steps after which the accuracy is measured."""
        return (*range(0, self.steps, self.curve_every), self.steps)


def optimizer_of(config: Config, example: Tensor) -> tuple[Optimize, str, int | None]:
    """What makes a run's optimizer of a network that reads such examples, a digest of its weights, and the number of
    outer steps that they had. Learned and hand-designed ones are the same to the loop that trains the network.

    Raises:
        RunError: the meta-training run that is named is not there, or is of another method.
    """
    if config.method in HAND_DESIGNED:
        build = HAND_DESIGNED[config.method].build
        return lambda network: build(network.parameters(), lr=config.learning_rate), "", None
    if config.weights == "shipped":
        rule, steps = shipped(config.method), provenance(config.method)["best_step"]
    else:
        rule, record = meta_training.trained(config.weights)
        steps = record["metrics"]["best_step"]
        if rule.method != config.method:
            raise RunError(f"run {config.weights} is the meta-training of {rule.method}, not of {config.method}")
    digest = tensor_digest(rule.state_dict().values())  # a name does not tell what it stands for
    rule = rule.to(example.device)
    return lambda network: rule.bind(network, example), digest, steps


@dataclass(frozen=True)
class Training:
    """What a run reads: the task, and what makes the optimizer, whose weights had so many outer steps."""

    task: Task
    optimize: Optimize
    outer_steps: int | None


def load(config: Config, device: str) -> tuple[Training, str]:
    """The task and the optimizer of a run, and a digest of both."""
    task = config.trained.task(config.held, device)
    optimize, digest, outer_steps = optimizer_of(config, task.example)
    return Training(task, optimize, outer_steps), task.digest + digest


def produce(config: Config, training: Training, job: Job) -> Outcome:
    """Train one network.

    Metrics: as `train_network`; `measured`, the steps of `accuracy`; `final_accuracy`; `outer_steps` that the
    optimizer's weights had, None for hand-designed ones.
    """
    started = time.monotonic()
    seed = FIRST_SEED[config.held] + config.seed
    found = train_network(training.task, training.optimize, seed, config.steps, config.measured, config.curve_images)
    metrics = found | {
        "measured": list(config.measured),
        "final_accuracy": found["accuracy"][-1],
        "outer_steps": training.outer_steps,
    }
    job.report(config.steps, {"train_loss": found["train_loss"][-1]})
    return Outcome(metrics, {}, time.monotonic() - started)


EXPERIMENT = Experiment(Config, METHODS, load, produce)


def configs_of(
    methods: Sequence[str],
    tasks: Mapping[str, ImageTask],
    seeds: int,
    weights: Mapping[str, str],
    learning_rate: float,
    *,
    steps: int,
    curve_every: int,
    curve_images: int,
    held: str = "test",
) -> list[Config]:
    """The runs of methods on tasks, by the name of their variation ("none" for the paper's own).

    Args:
        weights: of learned optimizers, by method.
        learning_rate: of hand-designed ones.
    """
    return [
        Config(
            dataset=task.dataset,
            method=method,
            seed=seed,
            trained=task,
            variation=variation,
            steps=steps,
            held=held,
            weights=weights[method] if method in LEARNED else None,
            learning_rate=learning_rate if method in HAND_DESIGNED else None,
            curve_every=curve_every,
            curve_images=curve_images,
        )
        for seed in range(seeds)  # outermost, so that what is stopped early has some seeds of all
        for variation, task in tasks.items()
        for method in methods
    ]


def tuning_configs(
    method: str, task: ImageTask, learning_rates: Sequence[float], seeds: int, steps: int
) -> list[Config]:
    """The runs of a grid over a hand-designed optimizer's learning rates, measured on validation images at the end."""
    return [
        replace(config, learning_rate=rate)
        for rate in learning_rates
        for config in configs_of(
            [method], {"none": task}, seeds, {}, rate, steps=steps, curve_every=steps, curve_images=1, held="validation"
        )
    ]


def best_learning_rate(records: Sequence[Record]) -> float:
    """The rate with the highest mean accuracy of the grid's runs."""
    scores: dict[float, list[float]] = {}
    for record in records:
        scores.setdefault(record["config"]["learning_rate"], []).append(record["metrics"]["final_accuracy"])
    return max(scores, key=lambda rate: statistics.mean(scores[rate]))


def having(records: Sequence[Record], **fields: Any) -> list[Record]:
    """Those of some records whose configs have these fields, of the paper's own task where nothing else is said."""
    expected = {"variation": "none"} | fields
    return [r for r in records if all(r["config"][name] == value for name, value in expected.items())]


def caption(what: str, records: Sequence[Record], profile: str, adam_rate: float) -> str:
    """What a table shows, and the scale of its runs."""
    scale = {"trained.train_images": "training images", "trained.test_images": "test images", "steps": "steps"}
    outer = {r["config"]["method"]: r["metrics"]["outer_steps"] for r in records}
    told = ", ".join(f"{method} {outer[method]}" for method in LEARNED if method in outer)
    (batch,) = {r["config"]["trained"]["batch"] for r in records}
    return (
        f"{what} {describe_scale(records, profile, scale)} Batches of {batch}. Outer steps of "
        f"meta-training on FashionMNIST, one seed: {told}. Learning rate of Adam: {adam_rate:g}."
    )


def draw_curves(records: Sequence[Record], axes: Sequence[Axes] | np.ndarray, window: int) -> None:
    """Left the training loss, right the test accuracy, against the step."""
    label = f"Training loss (mean of {window} steps)"
    step_curves(records, axes[0], "train_loss", window=window, ylabel=label, methods=METHODS)
    label = "Test accuracy (%)"
    step_curves(records, axes[1], "accuracy", at="measured", scale=100, ylabel=label, methods=METHODS)
    axes[0].get_legend().remove()


def can_read(method: str, task: Task) -> bool:
    """Whether a method's optimizer is able to train the task's network: NFN's coefficients belong to certain layers."""
    if method in HAND_DESIGNED:
        return True
    try:
        LearnedOptimizer(method).bind(task.network(0), task.example)
    except ValueError:
        return False
    return True


COST_REPETITIONS = 20


@dataclass(frozen=True)
class CostConfig:
    """What a step of every optimizer costs on a task's network."""

    dataset: str
    trained: ImageTask
    methods: tuple[str, ...]
    method: str = "all"
    seed: int = 0
    task: str = "optimizer_cost"


COST_HEADINGS = {
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
    return costs[["dataset", "method", *COST_HEADINGS]].round(2)


def _load_cost(config: CostConfig, device: str) -> tuple[Task, str]:
    task = config.trained.task("test", device)
    return task, task.digest


def _produce_cost(config: CostConfig, task: Task, job: Job) -> Outcome:
    """Metrics: `cost`, the rows of the function of this name."""
    return Outcome({"cost": cost(task, config.methods).round(4).to_dict("records")}, {}, 0.0)


COST = Experiment(CostConfig, {}, _load_cost, _produce_cost)


def image_tasks(parameters: Mapping[str, Any]) -> dict[str, ImageTask]:
    """The tasks of a notebook's parameters, by data set."""
    return {name: ImageTask(name, **_fields(own)) for name, own in parameters["tasks"].items()}


def variations_of(parameters: Mapping[str, Any]) -> dict[str, ImageTask]:
    """The variations of the FashionMNIST task, by name."""
    fashion = image_tasks(parameters)["fashion_mnist"]
    return {name: replace(fashion, **_fields(own)) for name, own in parameters["variations"].items()}


def _fields(parameter: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parameter.items()}


def runs(parameters: Mapping[str, Any]) -> Runs:
    """Meta-training; Adam's grid; then table 2 with its best rate, other networks, long training; what a step costs."""
    p, tasks = parameters, image_tasks(parameters)
    fashion = tasks["fashion_mnist"]
    meta = yield [
        meta_training.Config("fashion_mnist", method, p["meta_seed"], fashion, **p["meta"])
        for method in p["meta_methods"]
    ]
    tuned = yield tuning_configs("Adam", fashion, p["adam_rates"], p["adam_seeds"], p["steps"])
    weights = {method: "shipped" for method in p["methods"] if method in LEARNED}
    if p["weights"] == "trained":
        weights |= {record["config"]["method"]: record["hash"] for record in meta}
    rate, curve = best_learning_rate(tuned), {name: p[name] for name in ("curve_every", "curve_images")}

    def configs(methods: Sequence[str], tasks: Mapping[str, ImageTask], seeds: int, steps: int) -> list[Config]:
        return configs_of(methods, tasks, seeds, weights, rate, steps=steps, **curve)

    every = []
    for name, task in tasks.items():
        every += configs(p["methods"], {"none": task}, p["seeds"][name], p["steps"])
    for name, task in variations_of(p).items():
        readers = [method for method in p["variation_methods"] if can_read(method, task.task())]
        every += configs(readers, {name: task}, p["variation_seeds"], p["steps"])
    every += configs(p["long_methods"], {"none": fashion}, p["long_seeds"], p["long_steps"])
    found = meta + tuned + (yield every)
    for task in tasks.values():  # one after the other, with nothing beside it
        found = found + (yield [CostConfig(task.dataset, task, tuple(p["methods"]))])
    return found


PLAN = Plan(runs, ("meta_training", "learning_to_optimize", "optimizer_cost"))


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
    for _ in range(COST_REPETITIONS + 2):
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
