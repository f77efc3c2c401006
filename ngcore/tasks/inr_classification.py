"""INR classification (paper, section 4.1; tables 3 and 4): name the class of an image from the weights of its INR."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngcore.data.inrs.augment import Augmentation
from ngcore.data.inrs.sets import INRSet
from ngcore.graph import Wiring
from ngcore.graph.dialects import bias_nodes
from ngcore.models import NGGNN, NGT, Scores
from ngcore.models.baselines import MLP, DWSNet, SetNN
from ngcore.models.entries import StandardizedEntries
from ngcore.models.signs import CanonicalSigns
from ngcore.study.methods import Method
from ngcore.study.plans import Plan, Runs
from ngcore.study.run import Experiment
from ngcore.study.training import Schedule, by_training
from ngcore.tasks.inr_sets import (
    WIRING,
    INRData,
    build,
    by_probes,
    data_of,
    evaluation_batches,
    load_data,
    prepare,
)
from ngcore.tasks.variants import changed

CLASSES = 10
FASHION_LABELS = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Boot",
)


@dataclass(frozen=True)
class Config:
    """One run: a method on a set of INRs with a seed.

    Args:
        method: a key of METHODS.
        probes: probe points of NG-GNN and NG-T.
        options: further arguments of the model, as pairs.
        recipe: "paper" for a row of the tables, else the key of `RECIPES` that it was made by.
    """

    dataset: str
    method: str
    probes: int
    seed: int
    data: INRData
    schedule: Schedule
    augmentation: Augmentation | None
    options: tuple[tuple[str, Any], ...] = ()
    recipe: str = "paper"
    task: str = "inr_classification"


def _graph_model(
    model: type[NGGNN | NGT], wiring: Wiring, classes: int, normalization: str = "layer", **options: Any
) -> nn.Module:
    """NG-GNN or NG-T; with normalization "neuron" every single weight and bias is standardized by itself."""
    if normalization == "neuron":
        return StandardizedEntries(model(wiring, Scores(classes), **options))
    return model(wiring, Scores(classes), normalization=normalization, **options)


METHODS = {
    "MLP": Method(MLP, colour=7),
    "SetNN": Method(SetNN, colour=1),
    "DWSNet": Method(DWSNet, colour=2),
    "NG-GNN": Method(partial(_graph_model, NGGNN), colour=0, probes=True, micro_batch=8),
    "NG-T": Method(partial(_graph_model, NGT), colour=3, probes=True, micro_batch=4),
}


ROWS = (
    ("MLP", 0),
    ("SetNN", 0),
    ("DWSNet", 0),
    *((method, probes) for method in ("NG-GNN", "NG-T") for probes in (0, 4, 16, 64)),
)  # of tables 3 and 4: method and number of probe features


# Ways of training that are not the paper's: what differs from a row of the tables, see `changed`. Under "smooth",
# nearby weights get nearby Fourier features.
RECIPES: dict[str, dict[str, Any]] = {
    "smooth": {"sigma": 0.3},
    "canonical signs": {"signs": "canonical"},
    "batches of 32": {"batch": 32},
    "constant rate": {"decay": False},
    "rate 3e-3": {"learning_rate": 3e-3},
    "200 warm-up steps": {"warmup": 200},
    "half the augmentation": {"augmentation": Augmentation(0.125, 22.5, 0.1, 5e-3)},
    "augmentation": {"augmentation": Augmentation()},
}


def row_configs(
    data: INRData,
    schedule: Schedule,
    method: str,
    probes: int,
    seeds: int,
    *,
    dropout: float,
    augmentation: Augmentation | None = None,
) -> list[Config]:
    """The runs of one row of a table, a seed each; dropout and augmentation are of all methods alike."""
    options = (("dropout", dropout),)
    return [Config(data.dataset, method, probes, seed, data, schedule, augmentation, options) for seed in range(seeds)]


def table_configs(data: INRData, schedule: Schedule, *, seeds: Mapping[int, int], **settings: Any) -> list[Config]:
    """The runs of one table: the paper's eleven rows.

    Args:
        seeds: number of probe features -> number of seeds.
        settings: of all rows, see `row_configs`.
    """
    return [
        config
        for method, probes in ROWS
        for config in row_configs(data, schedule, method, probes, seeds[probes], **settings)
    ]


def recipe_configs(configs: Collection[Config], recipe: str, rows: Collection[tuple[str, int, int]]) -> list[Config]:
    """Of some rows (method, probes, seeds) of a table the same runs by another recipe.

    Raises:
        ValueError: an unknown recipe; a row that the table has not, or not with so many seeds.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
    found = []
    for method, probes, seeds in rows:
        own = [config for config in configs if (config.method, config.probes) == (method, probes)]
        if not 0 < seeds <= len(own):
            raise ValueError(
                f"{recipe!r} asks for {seeds} seeds of {method} with {probes} probe features, the table has {len(own)}"
            )
        found += [changed(config, **RECIPES[recipe], recipe=recipe) for config in own[:seeds]]
    return found


# How biases stand on the graph: as features of the neurons that they belong to, or as edges from nodes of their own.
BIASES = {"feature": WIRING, "node": bias_nodes(WIRING)}
SIGNS = {"fitted": lambda model: model, "canonical": CanonicalSigns}  # of hidden neurons, as a model reads them


def build_model(
    method: str, probes: int = 0, *, biases: str = "feature", signs: str = "fitted", **options: Any
) -> nn.Module:
    """A metanetwork by the name of its method, for graphs whose biases stand as `BIASES` says.

    Raises:
        ValueError: `biases` or `signs` is none of `BIASES` or `SIGNS`, or see `inr_sets.build`.
    """
    for what, value, known in (("biases", biases, BIASES), ("signs", signs, SIGNS)):
        if value not in known:
            raise ValueError(f"{what} is one of {', '.join(known)}, not {value!r}")
    return SIGNS[signs](build(METHODS, method, probes, BIASES[biases], CLASSES, **options))


class Classification:
    """The problem that the training loop solves (`ngcore.study.training.Problem`)."""

    def __init__(self, model: nn.Module, sets: dict[str, INRSet], augmentation: Augmentation | None) -> None:
        self.model, self.sets, self.augmentation = model, sets, augmentation
        self.train_size = len(sets["train"])
        self.graph = model.wiring.graph
        model.fit_normalization(self.graph(sets["train"].parameters))

    def loss(self, rows: Tensor) -> Tensor:
        train = self.sets["train"]
        parameters = {name: values[rows] for name, values in train.parameters.items()}
        if self.augmentation is not None:
            parameters = self.augmentation(parameters)
        return F.cross_entropy(self.model(self.graph(parameters)).float(), train.labels[rows], reduction="sum")

    def logits(self, inrs: INRSet) -> Tensor:
        """Class scores of every INR of a set, (n, classes), in evaluation batches of one size."""
        scores = [
            self.model(self.graph({name: values[rows] for name, values in inrs.parameters.items()})).float()
            for rows in evaluation_batches(inrs)
        ]
        return torch.cat(scores)[: len(inrs)]

    def validate(self) -> dict[str, float]:
        scores, labels = self.logits(self.sets["validation"]), self.sets["validation"].labels
        accuracy = (scores.argmax(1) == labels).float().mean().item()
        return {
            "val_loss": F.cross_entropy(scores, labels).item(),
            "val_score": accuracy,
            "val_accuracy": accuracy,
        }

    def test(self) -> dict[str, Any]:
        scores, labels = self.logits(self.sets["test"]), self.sets["test"].labels
        predicted = scores.argmax(1)
        confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.long, device=labels.device)
        confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
        return {
            "test_loss": F.cross_entropy(scores, labels).item(),
            "test_accuracy": (predicted == labels).float().mean().item(),
            "test_confusion": confusion.tolist(),
        }


def load(config: Config, device: str) -> tuple[dict[str, INRSet], str]:
    """The INRs of a run, and their digest."""
    return load_data(config.data, device)


def problem_of(
    config: Config, sets: dict[str, INRSet], device: str, problem: type[Classification] = Classification
) -> Classification:
    """What the training loop solves."""
    model = build_model(config.method, config.probes, **dict(config.options)).to(device)
    return problem(model, sets, config.augmentation)


EXPERIMENT = Experiment(Config, METHODS, load, by_training(problem_of), prepare)


def settings_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook's parameters say of all rows alike."""
    return {
        "dropout": parameters["dropout"],
        "augmentation": Augmentation() if parameters["augment"] else None,
    }


def schedule_of(parameters: Mapping[str, Any], epochs: int) -> Schedule:
    shared = {name: parameters[name] for name in ("warmup", "decay", "precision")}
    return Schedule(epochs, parameters["batch"], **shared)


def runs(parameters: Mapping[str, Any]) -> Runs:
    """Tables 3 and 4, and some of their rows by other recipes."""
    configs = []
    for name in parameters["datasets"]:
        data, schedule = data_of(parameters, name), schedule_of(parameters, parameters["epochs"][name])
        seeds = by_probes(parameters["seeds"][name])
        table = table_configs(data, schedule, seeds=seeds, **settings_of(parameters))
        configs += table
        for recipe, rows in parameters["recipes"][name].items():
            configs += recipe_configs(table, recipe, [tuple(row) for row in rows])
    return (yield configs)


PLAN = Plan(runs, ("inr_classification",))
