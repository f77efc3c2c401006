"""The runs of learning to optimize, in the order of their worth: a list that stops early has the first of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ngcore.study.plans import Plan, Runs
from ngcore.study.runs import Record
from ngcore.tasks import learning_to_optimize, meta_training, optimizer_cost, optimizer_trajectories
from ngcore.tasks.learning_to_optimize import LEARNED, Config, configs_of
from ngcore.tasks.optimization import ImageTask

Weights = Mapping[str, str]  # of learned optimizers, by method


def runs(parameters: Mapping[str, Any]) -> Runs:
    """Adam's grid; then for every meta-seed meta-training and what it gave on all tasks; then why; then the costs."""
    p, tasks = parameters, learning_to_optimize.image_tasks(parameters)
    fashion = tasks["fashion_mnist"]
    found = yield learning_to_optimize.tuning_configs("Adam", fashion, p["adam_rates"], p["adam_seeds"], p["steps"])
    rate = learning_to_optimize.best_learning_rate(found)
    trained: list[Weights] = []
    for meta_seed in p["meta_seeds"]:
        meta = yield _meta_configs(fashion, p["meta_methods"], meta_seed, p["meta"])
        trained.append(_weights(p, meta))
        found = found + meta + (yield _evaluations(p, trained[-1], rate, with_adam=meta_seed == p["meta_seeds"][0]))
    contrast = yield _meta_configs(fashion, p["contrast_methods"], p["meta_seeds"][0], p["contrast"])
    before = {record["config"]["method"]: record["hash"] for record in contrast}
    found = found + contrast + (yield _contrast(p, before, rate) + _trajectories(p, trained[0], before, rate))
    for task in tasks.values():  # one after the other, with nothing beside it
        found = found + (yield [optimizer_cost.Config(task.dataset, task, tuple(p["methods"]))])
    return found


PLAN = Plan(runs, ("meta_training", "learning_to_optimize", "optimizer_trajectories", "optimizer_cost"))


def _meta_configs(
    task: ImageTask, methods: Sequence[str], seed: int, settings: Mapping[str, Any]
) -> list[meta_training.Config]:
    return [meta_training.Config("fashion_mnist", method, seed, task, **settings) for method in methods]


def _weights(p: Mapping[str, Any], meta: Sequence[Record]) -> Weights:
    """Of the optimizers that are evaluated: those that were meta-trained, or those that are shipped."""
    weights = {method: "shipped" for method in p["methods"] if method in LEARNED}
    if p["weights"] == "trained":
        weights |= {record["config"]["method"]: record["hash"] for record in meta}
    return weights


def _evaluations(p: Mapping[str, Any], weights: Weights, rate: float, with_adam: bool) -> list[Config]:
    """Table 2, other networks, longer training, of one meta-seed's optimizers. Adam needs to run once."""

    def configs(methods: Sequence[str], tasks: Mapping[str, ImageTask], seeds: int, steps: int) -> list[Config]:
        own = [method for method in methods if with_adam or method in LEARNED]
        return configs_of(own, tasks, seeds, weights, rate, steps=steps, **_curve(p))

    tasks, every = learning_to_optimize.image_tasks(p), []
    for name, task in tasks.items():
        every += configs(p["methods"], {"none": task}, p["seeds"][name], p["steps"])
    for name, task in learning_to_optimize.variations_of(p).items():
        readers = [m for m in p["variation_methods"] if learning_to_optimize.can_read(m, task.task())]
        every += configs(readers, {name: task}, p["variation_seeds"], p["steps"])
    return every + configs(p["long_methods"], {"none": tasks["fashion_mnist"]}, p["long_seeds"], p["long_steps"])


def _contrast(p: Mapping[str, Any], before: Weights, rate: float) -> list[Config]:
    """What optimizers do on FashionMNIST that were meta-trained on young networks alone."""
    tasks, seeds = {"none": learning_to_optimize.image_tasks(p)["fashion_mnist"]}, p["seeds"]["fashion_mnist"]
    return configs_of(list(before), tasks, seeds, before, rate, steps=p["steps"], **_curve(p))


def _trajectories(
    p: Mapping[str, Any], weights: Weights, before: Weights, rate: float
) -> list[optimizer_trajectories.Config]:
    """Where optimizers lead, those of young networks also with every intervention."""
    tasks = {"none": learning_to_optimize.image_tasks(p)["fashion_mnist"]}
    options = {"steps": p["steps"], "held": "validation"} | _curve(p)

    def configs(methods: Sequence[str], own: Weights, intervention: str) -> list[optimizer_trajectories.Config]:
        found = configs_of(methods, tasks, p["trajectory_seeds"], own, rate, **options)
        return [optimizer_trajectories.Config.of(c, p["trajectory_horizon"], intervention) for c in found]

    every = configs(p["trajectory_methods"], weights, "none")
    for intervention in optimizer_trajectories.INTERVENTIONS:
        every += configs(list(before), before, intervention)
    return every


def _curve(p: Mapping[str, Any]) -> dict[str, int]:
    return {name: p[name] for name in ("curve_every", "curve_images")}
