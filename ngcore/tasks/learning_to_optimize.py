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

from ngcore.digests import tensor_digest
from ngcore.models.optimizers import LearnedOptimizer
from ngcore.models.optimizers.files import provenance, shipped
from ngcore.models.optimizers.problem import FIRST_SEED, Task, train_network
from ngcore.study import runs
from ngcore.study.claims import order_agreement
from ngcore.study.methods import Method
from ngcore.study.optimizer_figures import focus, step_curves
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.study.runs import Record, RunError
from ngcore.study.tables import beside_published, describe_scale, summarize
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


def optimizer_of(config: Config, example: Tensor) -> tuple[Optimize, str, dict[str, int]]:
    """What makes a run's optimizer of a network that reads such examples, a digest of its weights, and what
    `meta_training.describe` says of them. Learned and hand-designed ones are the same to the loop that trains.

    Raises:
        RunError: the meta-training run that is named is not there, or is of another method.
    """
    if config.method in HAND_DESIGNED:
        build = HAND_DESIGNED[config.method].build
        return lambda network: build(network.parameters(), lr=config.learning_rate), "", {}
    if config.weights == "shipped":
        rule, origin = shipped(config.method), provenance(config.method)
        about = meta_training.describe(origin, origin["best_step"])
    else:
        rule, record = meta_training.trained(config.weights)
        about = meta_training.describe(record["config"], record["metrics"]["best_step"])
        if rule.method != config.method:
            raise RunError(f"run {config.weights} is the meta-training of {rule.method}, not of {config.method}")
    digest = tensor_digest(rule.state_dict().values())  # a name does not tell what it stands for
    rule = rule.to(example.device)
    return lambda network: rule.bind(network, example), digest, about


@dataclass(frozen=True)
class Training:
    """What a run reads: the task, what makes the optimizer, and of a learned one what it was meta-trained on."""

    task: Task
    optimize: Optimize
    about: Mapping[str, int]


def load(config: Config, device: str) -> tuple[Training, str]:
    """The task and the optimizer of a run, and a digest of both."""
    task = config.trained.task(config.held, device)
    optimize, digest, about = optimizer_of(config, task.example)
    return Training(task, optimize, about), task.digest + digest


def produce(config: Config, training: Training, job: Job) -> Outcome:
    """Train one network.

    Metrics: as `train_network`; `measured`, the steps of `accuracy`; `final_accuracy`; of learned optimizers what
    `meta_training.describe` says.
    """
    started = time.monotonic()
    seed = FIRST_SEED[config.held] + config.seed
    found = train_network(training.task, training.optimize, seed, config.steps, config.measured, config.curve_images)
    metrics = found | {"measured": list(config.measured), "final_accuracy": found["accuracy"][-1]} | training.about
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
    return runs.having(records, **{"variation": "none"} | fields)


def caption(what: str, records: Sequence[Record], profile: str, adam_rate: float) -> str:
    """What a table shows, and the scale of its runs."""
    scale = {"trained.train_images": "training images", "trained.test_images": "test images", "steps": "steps"}
    (batch,) = {r["config"]["trained"]["batch"] for r in records}
    metas = sorted({r["metrics"]["meta_seed"] for r in records if "meta_seed" in r["metrics"]})
    return (
        f"{what} {describe_scale(records, profile, scale)} Batches of {batch}. ± is over all runs of a row. "
        f"Learned optimizers: meta-seeds {', '.join(map(str, metas))}, on FashionMNIST. "
        f"Learning rate of Adam: {adam_rate:g}."
    )


def pooled(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Runs whose seed names the meta-training too, so that those of all meta-seeds can be summarized as one row."""
    seeds = [f"{r['metrics'].get('meta_seed', '')}/{r['config']['seed']}" for r in records]
    return [dict(r, config=r["config"] | {"seed": seed}) for r, seed in zip(records, seeds, strict=True)]


RESULTS = {
    "seeds": "Runs",
    "by_meta_seed": "By meta-seed",
    "outer_steps": "Outer steps",
    "networks": "Networks seen",
    "paper_outer_steps": "Paper's outer steps",
}  # headings of `results`
PAPER_OUTER_STEPS = "up to 1,000"  # section 4.3; it does not say how many networks these are


def results(records: Sequence[Record], published: Mapping[str, Any]) -> pd.DataFrame:
    """Table 2: final test accuracies (%) of all runs of a method on a data set, beside the paper's.

    Returns:
        A row per data set and method: dataset, method, mean, std, seeds (all runs); by_meta_seed, the means of single
        meta-trainings; the outer_steps that these had and the networks that they saw, in the same order; the paper's.
    """
    table = summarize(pooled(records), metric="final_accuracy", scale=100, by=("dataset", "method"), methods=METHODS)
    told = []
    for row in table.to_dict("records"):
        own = [r for r in records if all(r["config"][name] == row[name] for name in ("dataset", "method"))]
        metas: dict[int, list[Record]] = {}
        for record in sorted(own, key=lambda record: record["metrics"].get("meta_seed", -1)):
            metas.setdefault(record["metrics"].get("meta_seed", -1), []).append(record)
        told.append(_of_meta_seeds(list(metas.values())) if row["method"] in LEARNED else {})
    about = pd.DataFrame(told).reindex(columns=["by_meta_seed", "outer_steps", "networks", "paper_outer_steps"])
    return beside_published(pd.concat([table.drop(columns="networks_seen", errors="ignore"), about], axis=1), published)


def _of_meta_seeds(groups: Sequence[Sequence[Record]]) -> dict[str, str]:
    means = [100 * statistics.mean(r["metrics"]["final_accuracy"] for r in own) for own in groups]
    counts = {name: [own[0]["metrics"][of] for own in groups] for name, of in _COUNTS.items()}
    told = {name: ", ".join(map(str, values)) for name, values in counts.items()}
    return {"by_meta_seed": ", ".join(f"{mean:.1f}" for mean in means), "paper_outer_steps": PAPER_OUTER_STEPS} | told


_COUNTS = {"outer_steps": "outer_steps", "networks": "networks_seen"}


GRAPH = ("NG-GNN", "NG-T")
NO_GRAPH = ("FF", "LSTM")


ORDER = {
    "tau": "Kendall's τ",
    "rows": "Rows",
    "graph": "Best that reads the graph",
    "other": "Best of FF, LSTM",
    "lead": "Lead (points)",
}  # headings of `agreement`


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Whether table 2 says what the paper's does, on every data set.

    Returns:
        A row per data set: dataset; tau, Kendall's between our means and the paper's, 1 for the same order, -1 for the
        reverse, of so many rows; graph and other, the best that reads the graph and the best learned one that reads no
        other scalar's place in the network (FF, LSTM), and by how many points the first leads.
    """
    found = []
    for name, own in table.groupby("dataset", sort=False):
        rows, means = own.dropna(subset=["paper_mean"]), own.set_index("method")["mean"]
        row = {"dataset": name, "tau": order_agreement(own), "rows": len(rows)}
        best = [means[means.index.intersection(names)] for names in (GRAPH, NO_GRAPH)]
        if not any(each.empty for each in best):
            row |= {"graph": best[0].idxmax(), "other": best[1].idxmax(), "lead": best[0].max() - best[1].max()}
        found.append(row)
    return pd.DataFrame(found)


def draw_curves(records: Sequence[Record], axes: Sequence[Axes] | np.ndarray, window: int) -> None:
    """Left the training loss on a logarithmic axis, right the test accuracy from a fifth of the steps on."""
    label = f"Training loss (mean of {window} steps)"
    step_curves(records, axes[0], "train_loss", window=window, ylabel=label, methods=METHODS)
    label = "Test accuracy (%)"
    step_curves(records, axes[1], "accuracy", at="measured", scale=100, ylabel=label, methods=METHODS)
    axes[0].set_yscale("log")
    focus(axes[1], records[0]["config"]["steps"] / 5)
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


def image_tasks(parameters: Mapping[str, Any]) -> dict[str, ImageTask]:
    """The tasks of a notebook's parameters, by data set."""
    return {name: ImageTask(name, **_fields(own)) for name, own in parameters["tasks"].items()}


def variations_of(parameters: Mapping[str, Any]) -> dict[str, ImageTask]:
    """The variations of the FashionMNIST task, by name."""
    fashion = image_tasks(parameters)["fashion_mnist"]
    return {name: replace(fashion, **_fields(own)) for name, own in parameters["variations"].items()}


def _fields(parameter: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parameter.items()}
