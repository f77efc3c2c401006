"""INR classification (paper, section 4.1; tables 3 and 4): name the class of an image from the weights of its INR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ngcore.data.inrs.augment import Augmentation
from ngcore.data.inrs.sets import INRSet
from ngcore.graph import Wiring
from ngcore.graph.dialects import bias_nodes
from ngcore.models import NGGNN, NGT, Scores
from ngcore.models.baselines import MLP, DWSNet, PointsMLP, SetNN
from ngcore.models.entries import StandardizedEntries
from ngcore.models.signs import CanonicalSigns
from ngcore.study.evidence import mean_of, with_intervals
from ngcore.study.methods import Method
from ngcore.study.plans import Plan, Runs
from ngcore.study.run import Experiment
from ngcore.study.runs import Record
from ngcore.study.tables import beside_published, summarize
from ngcore.study.training import Schedule, by_training
from ngcore.tasks import inr_sets
from ngcore.tasks.inr_sets import (
    WIRING,
    INRData,
    build,
    data_of,
    evaluation_batches,
    load_data,
    prepare,
)
from ngcore.tasks.rows import PAPER, Row, of_dataset, rows_of
from ngcore.tasks.variants import changed

CLASSES = 10
FITTED = 500  # training INRs whose loss is measured after every epoch as that of validation INRs is
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
        recipe: "paper" for the paper's way of training but for its scale, else what this one is called.
    """

    dataset: str
    method: str
    probes: int
    seed: int
    data: INRData
    schedule: Schedule
    augmentation: Augmentation | None
    options: tuple[tuple[str, Any], ...] = ()
    recipe: str = PAPER
    task: str = "inr_classification"


def _graph_model(
    model: type[NGGNN | NGT], wiring: Wiring, classes: int, normalization: str = "layer", **options: Any
) -> nn.Module:
    """NG-GNN or NG-T; with normalization "neuron" every single weight and bias is standardized by itself."""
    if normalization == "neuron":
        return StandardizedEntries(model(wiring, Scores(classes), **options))
    return model(wiring, Scores(classes), normalization=normalization, **options)


# The controls, "Pixels" and "Points", see an INR's picture at as many points as there are probes, and no weight.
METHODS = {
    "MLP": Method(MLP, colour=7),
    "SetNN": Method(SetNN, colour=1),
    "DWSNet": Method(DWSNet, colour=2),
    "Pixels": Method(partial(PointsMLP, probing="grid"), colour=5, probes=True, is_control=True),
    "Points": Method(PointsMLP, colour=8, probes=True, is_control=True),
    "NG-GNN": Method(partial(_graph_model, NGGNN), colour=0, probes=True, micro_batch=8),
    "NG-T": Method(partial(_graph_model, NGT), colour=3, probes=True, micro_batch=4),
}


def base_config(
    data: INRData,
    schedule: Schedule,
    method: str,
    probes: int,
    seed: int,
    *,
    dropout: float,
    augmentation: Augmentation | None = None,
) -> Config:
    """A run as the paper has it, but for the scale; dropout and augmentation are of all methods alike."""
    return Config(data.dataset, method, probes, seed, data, schedule, augmentation, (("dropout", dropout),))


def row_config(row: Row, *base: Any, **settings: Any) -> Config:
    """The run of a table's row; `base` and `settings` are those of `base_config`.

    A row's changes are those of `changed`, and `augment`: whether INRs are augmented.
    """
    changes = dict(row.changes)
    if "augment" in changes:
        changes["augmentation"] = Augmentation() if changes.pop("augment") else None
    config = base_config(*base, row.method, row.probes, row.seed, **settings)
    return changed(config, recipe=row.recipe, **changes)


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
        fitted = self.sets["train"][:FITTED]
        return {
            "fitted_loss": F.cross_entropy(self.logits(fitted), fitted.labels).item(),
            "val_loss": F.cross_entropy(scores, labels).item(),
            "val_score": accuracy,
            "val_accuracy": accuracy,
        }

    def test(self) -> dict[str, Any]:
        scores, labels = self.logits(self.sets["test"]), self.sets["test"].labels
        predicted = scores.argmax(1)
        return {
            "test_loss": F.cross_entropy(scores, labels).item(),
            "test_accuracy": (predicted == labels).float().mean().item(),
            "test_labels": "".join(map(str, labels.tolist())),
            "test_predicted": "".join(map(str, predicted.tolist())),
        }


def is_right(record: Record) -> Bool[np.ndarray, " n"]:
    """Whether each test INR was classified as what it is."""
    predicted, labels = (list(record["metrics"][f"test_{name}"]) for name in ("predicted", "labels"))
    return np.array(predicted) == np.array(labels)


ACCURACY = mean_of(is_right, 100)  # in per cent


def table_of(records: Sequence[Record], published: Mapping[str, Any]) -> pd.DataFrame:
    """Table 3 or 4: accuracies in per cent, their intervals, and the paper's of rows trained as it has them."""
    by = ("dataset", "method", "probes", "recipe")
    table = summarize(records, metric="test_accuracy", scale=100, by=by, methods=METHODS)
    table = beside_published(with_intervals(table, records, ACCURACY, by=by), published)
    paper = ["paper_mean", "paper_std"]
    table.loc[table["recipe"] != PAPER, paper] = np.nan
    return table


def describe(records: Sequence[Record], profile: str) -> str:
    """The scale of a table's runs and how they were trained, for its caption."""
    configs = [record["config"] for record in records]
    dropouts = sorted({f"{dict(config['options'])['dropout']:g}" for config in configs})
    augmented = {bool(config["augmentation"]) for config in configs}
    words = {(False,): "no augmentation", (True,): "with augmentation", (False, True): "augmentation in some rows"}
    augmentation = words[tuple(sorted(augmented))]
    rates = sorted({"cosine" if config["schedule"]["decay"] else "constant" for config in configs})
    regime = f"dropout {' to '.join(dropouts)}, {augmentation}, {' or '.join(rates)} learning rate"
    return f"{inr_sets.describe(records, profile)} Training: {regime}."


def confusion(records: Sequence[Record]) -> Int[np.ndarray, "classes classes"]:
    """Test INRs of runs by true (rows) and predicted class."""
    counts = np.zeros((CLASSES, CLASSES), dtype=int)
    for record in records:
        labels, predicted = (np.array([*map(int, record["metrics"][f"test_{n}"])]) for n in ("labels", "predicted"))
        np.add.at(counts, (labels, predicted), 1)
    return counts


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


OVERFITTING = "a few INRs"  # the recipe of runs that show whether a model can fit at all


def overfitting_configs(parameters: Mapping[str, Any]) -> list[Config]:
    """Models that read weights alone, trained on a few INRs again and again: can they tell them apart at all?

    The parameter `overfitting` has `methods`, `train` (how many INRs) and `epochs`.
    """
    few = parameters["overfitting"]
    data = replace(data_of(parameters, parameters["datasets"][0]), train=few["train"], validation=16, test=16)
    schedule = Schedule(few["epochs"], batch=16, warmup=8)
    base = partial(base_config, data, schedule, probes=0, seed=0, dropout=0.0)
    return [replace(base(method=method), recipe=OVERFITTING) for method in few["methods"]]


def runs(parameters: Mapping[str, Any]) -> Runs:
    """Tables 3 and 4, row by row, and whether models that read weights alone can fit a few INRs."""
    configs = overfitting_configs(parameters)
    for name in parameters["datasets"]:
        base = data_of(parameters, name), schedule_of(parameters, of_dataset(parameters["epochs"], name))
        rows = rows_of(parameters["rows"][name])
        configs += [row_config(row, *base, **settings_of(parameters)) for row in rows]
    return (yield configs)


PLAN = Plan(runs, ("inr_classification",))
