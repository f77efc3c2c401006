"""Learning to optimize (paper, section 4.3; table 2, figure 3): networks trained by learned optimizers, and by Adam."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ngcore.models.optimizers import METHODS as LEARNED
from ngcore.models.optimizers import LearnedOptimizer
from ngcore.models.optimizers.files import provenance, shipped
from ngcore.study.runs import Record, RunError, StoredRun, cache_directory, environment, run_hash, tensor_digest
from ngcore.tasks import meta_training
from ngcore.tasks.optimization import FIRST_SEED, ImageTask, Task, train_network

HAND_DESIGNED: dict[str, type[torch.optim.Optimizer]] = {"Adam": torch.optim.Adam}
METHODS = (*HAND_DESIGNED, *LEARNED)
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
        return lambda network: HAND_DESIGNED[config.method](network.parameters(), lr=config.learning_rate), "", None
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


def run(config: Config, on_epoch: Callable[[int, Record], None] = lambda step, scores: None) -> Record:
    """The result of a run: read if it is stored, else trained and stored.

    Metrics: as of `train_network`; `measured`, the steps of `accuracy`; `final_accuracy`; `outer_steps` that the
    optimizer's weights had, None for hand-designed ones.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = config.trained.task(config.held, device)
    optimize, digest, outer_steps = optimizer_of(config, task.example)
    stored = StoredRun.of(config, task.digest + digest, cache_directory())
    record = stored.result()
    if record is not None:
        return record
    started = time.monotonic()
    seed = FIRST_SEED[config.held] + config.seed
    found = train_network(task, optimize, seed, config.steps, config.measured, config.curve_images)
    seconds = time.monotonic() - started
    metrics = found | {
        "measured": list(config.measured),
        "final_accuracy": found["accuracy"][-1],
        "outer_steps": outer_steps,
    }
    on_epoch(config.steps, {"train_loss": found["train_loss"][-1]})
    return stored.finish(metrics, {}, environment(device) | {"train_seconds": round(seconds, 1)})


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


def cost_record(image_task: ImageTask, methods: Sequence[str]) -> Record:
    """`cost` as a record that is kept beside those of the runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = image_task.task("test", device)
    config = {
        "task": "optimizer_cost",
        "dataset": image_task.dataset,
        "method": "all",
        "seed": 0,
        "trained": asdict(image_task),
        "methods": list(methods),
    }
    return {
        "hash": run_hash(config, task.digest),
        "config": config,
        "data": task.digest,
        "metrics": {"cost": cost(task, methods).round(4).to_dict("records")},
        "environment": environment(device) | {"train_seconds": 0.0},
    }


def cost(task: Task, methods: Sequence[str]) -> pd.DataFrame:
    """What a step of every optimizer costs, and of the network's own forward and backward pass.

    Measured in turns, so that a busy spell of the machine slows all alike. A learned optimizer's weights do not matter.

    Returns:
        A row per method: `step_ms` of the optimizer and `task_ms` of the network (medians), `step_mb`, the most memory
        that a step takes at once (2**20 bytes), and `state_mb`, what it keeps between steps.
    """
    networks = {method: task.network(0) for method in methods}
    optimizers = {
        method: HAND_DESIGNED[method](network.parameters(), lr=1e-3)
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
