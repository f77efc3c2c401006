"""Predicting generalization (paper, section 4.2; table 1): a CNN's test accuracy from its parameters.

And what else can be told from them: other targets, all within 0 and 1, are predicted in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.stats import kendalltau
from torch import Tensor, nn

from ngcore.data.zoos import cifar10_gs, wild_park
from ngcore.graph import NeuralGraph
from ngcore.graph.collection import Collection
from ngcore.models import CNN_WIDTHS, NGGNN, NGT, Scores
from ngcore.models.baselines import NFN, StatNN
from ngcore.study.methods import Method, known
from ngcore.study.plans import Plan, Runs
from ngcore.study.run import Experiment
from ngcore.study.training import DivergedError, Schedule, by_training
from ngcore.tasks import zoos
from ngcore.tasks.zoos import Networks, Zoo, population_config, split_rows

EVALUATION_BATCH = 64
FOURIER = 0.1  # scale of the Fourier frequencies of "NG-GNN_Fourier", the better of 0.1 and 1 in a trial
CONTROL_SEED = 1_000_000  # far from the seeds of training, which draw the order of batches
SHALLOW = 3  # convolutions, at most
NARROW = 14  # channels on average, at most


@dataclass(frozen=True)
class Config:
    """One run: a method on one or both populations with a seed.

    Args:
        dataset: "cifar10_gs", "cifar10_wild_park", or "both" for one model trained on both.
        method: a key of METHODS.
        loss: on the sigmoid of what the model returns: "bce", binary cross entropy, or "mse", mean squared error.
        target: what is predicted, see `targets_of`. Activations are hidden from models that are asked for them.
        split: "random", or see `trained_shapes`: train and select on some shapes and test on the others too.
        split_seed: which training runs are for what, see `zoos.split_rows`.
        shuffled: give the training networks each other's targets, so that there is nothing to learn: the control.
        options: further arguments of the model, as pairs.
    """

    dataset: str
    method: str
    loss: str
    target: str
    split: str
    shuffled: bool
    seed: int
    data: tuple[Zoo, ...]
    schedule: Schedule
    options: tuple[tuple[str, Any], ...] = ()
    split_seed: int = 0
    task: str = "generalization"


class RegressionNFN(NFN):
    """NFN on the networks `rows` of one graph."""

    def fit_normalization(self, graph: NeuralGraph, rows: Int[Tensor, " networks"]) -> None:
        super().fit_normalization(graph[rows])


TABLE_1 = {"loss": "bce", "target": "accuracy", "split": "random", "shuffled": False, "split_seed": 0}
ROWS = {
    "cifar10_gs": ("StatNN", "NFN_HNP", "NG-GNN", "NG-T"),
    "cifar10_wild_park": ("StatNN", "NG-GNN", "NG-T"),
}  # of table 1


def configs_of(
    dataset: str,
    zoos: Sequence[Zoo],
    methods: Sequence[str],
    seeds: int,
    schedule: Schedule,
    learning_rates: Mapping[str, float],
    **changes: Any,
) -> list[Config]:
    """The runs of some methods on the populations of a data set, "both" for all of them.

    Args:
        learning_rates: by method.
        changes: fields of `Config` that differ from table 1's: binary cross entropy on accuracies, a random split.

    Raises:
        ValueError: an unknown method.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    fields = TABLE_1 | changes
    return [
        Config(
            dataset,
            method,
            seed=seed,
            data=tuple(zoo for zoo in zoos if dataset in (zoo.dataset, "both")),
            schedule=replace(schedule, learning_rate=learning_rates[method]),
            **fields,
        )
        for method in methods
        for seed in range(seeds)
    ]


OPTIONS = {"sigma": None, "activations": True, "dropout": 0.0}  # of the graph models


def _ng_gnn(networks: Networks, **options: Any) -> nn.Module:
    return _ng_gnn_on(networks.collection, **options)


def _ng_gnn_on(collection: Collection, **options: Any) -> nn.Module:
    return NGGNN(collection, Scores(), **OPTIONS | options)


def _ng_t(networks: Networks, **options: Any) -> nn.Module:
    return NGT(networks.collection, Scores(), widths=CNN_WIDTHS, **OPTIONS | options)


def _collection(networks: Networks) -> Any:
    return networks.collection


# What builds a model for networks, and the form in which it reads them, indexed by rows. NG-T fills up every network to
# the largest, so it reads those of like size together.
METHODS = {
    "StatNN": Method(
        lambda networks, **o: StatNN(networks.statistics.shape[1], **o),
        lambda networks: networks.statistics,
        colour=9,
    ),
    "NFN_HNP": Method(
        lambda networks, **o: RegressionNFN(networks.stacked.wiring, 1, group="HNP", **o),
        lambda networks: networks.stacked,
        colour=4,
    ),
    "NG-GNN": Method(_ng_gnn, _collection, colour=0),
    "NG-GNN_Fourier": Method(partial(_ng_gnn, sigma=FOURIER), _collection),
    "NG-GNN_linear": Method(
        lambda networks, **o: _ng_gnn_on(networks.linear_collection, **o),
        lambda networks: networks.linear_collection,
    ),
    "NG-GNN_repeat": Method(
        lambda networks, **o: _ng_gnn_on(networks.repeated_collection, **o),
        lambda networks: networks.repeated_collection,
    ),
    "NG-T": Method(_ng_t, _collection, colour=3, chunk=8),
}


def build_model(method: str, networks: Networks, **options: Any) -> nn.Module:
    """A metanetwork by the name of its method, with one output.

    Raises:
        ValueError: an unknown method, or one that can't read these networks.
    """
    return known(METHODS, method).build(networks, **options)


def targets_of(table: pd.DataFrame, target: str) -> Float[np.ndarray, " networks"]:
    """What is to be predicted, within 0 and 1: an accuracy, "tanh" (1) or "relu" (0), the logarithm of a learning rate
    between the smallest and the largest, the share of the training that is done.

    Raises:
        ValueError: an unknown target, or one that these networks do not have.
    """
    columns = {"accuracy": "accuracy", "activation": "activation", "learning_rate": "learning_rate", "epoch": "step"}
    if target not in columns:
        raise ValueError(f"unknown target {target!r}; there are {', '.join(columns)}")
    if columns[target] not in table or table[columns[target]].isna().any():
        raise ValueError(f"these networks have no {columns[target]!r} to predict")
    values = table[columns[target]].to_numpy()
    if target == "activation":
        return (values == "tanh").astype(float)
    if target == "learning_rate":
        values = np.log(values.astype(float))
        span = values.max() - values.min()
        if span == 0:
            raise ValueError("all networks have the same learning rate: there is nothing to predict")
        return (values - values.min()) / span
    return values / values.max() if target == "epoch" else values


def trained_shapes(table: pd.DataFrame, split: str) -> Bool[np.ndarray, " networks"]:
    """Whether a network has one of the shapes that are trained on.

    Raises:
        ValueError: an unknown split.
    """
    if split == "random":
        return np.ones(len(table), dtype=bool)
    if split == "shallow_to_deep":
        return (table["layers"] <= SHALLOW).to_numpy()
    if split == "narrow_to_wide":
        return table["channels"].map(np.mean).to_numpy() <= NARROW
    raise ValueError(f"unknown split {split!r}; there are random, shallow_to_deep and narrow_to_wide")


class Prediction:
    """The problem that the training loop solves (`ngcore.study.training.Problem`).

    Args:
        inputs: what the model reads, indexed by rows of the table.
        sizes: of the networks, for methods that read networks of like size together.
        rows: the networks of every split, see `rows_of`.
        runs: the training run of every network, by which predictions are judged.
        known: targets that training and selection see; `targets` are the true ones.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        sizes: Int[Tensor, " all"],
        rows: Mapping[str, Int[Tensor, " networks"]],
        runs: Sequence[Any],
        known: Float[Tensor, " all"],
        targets: Float[Tensor, " all"],
        loss: str,
        chunk: int | None,
    ) -> None:
        self.model, self.inputs, self.sizes, self.rows, self.runs = model, inputs, sizes, rows, runs
        self.known, self.targets, self.chunk = known, targets, chunk
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; there are {', '.join(LOSSES)}")
        self.criterion = LOSSES[loss]
        self.train_size = len(rows["train"])
        model.fit_normalization(inputs, rows["train"])
        start_at(model, known[rows["train"]].mean())

    def chunks(self, rows: Int[Tensor, " networks"]) -> Sequence[Tensor]:
        return (rows,) if self.chunk is None else rows[self.sizes[rows].argsort()].split(self.chunk)

    def loss(self, rows: Tensor) -> Tensor:
        return sum(
            self.criterion(self.model(self.inputs[some]).squeeze(1).float(), self.known[some], reduction="sum")
            for some in self.chunks(self.rows["train"][rows])
        )

    def predictions(self, rows: Int[Tensor, " networks"]) -> Float[Tensor, " networks"]:
        """Of the networks `rows`, within 0 and 1."""
        return predict(self.model, self.inputs, self.sizes, rows, self.chunk)

    def validate(self) -> dict[str, float]:
        """Mean squared error of all, and the mean over the populations of τ, by which weights are selected."""
        groups = [rows for name, rows in self.rows.items() if name.startswith("validation")]
        found = [(self.predictions(rows), self.known[rows]) for rows in groups]
        error = F.mse_loss(*(torch.cat(parts) for parts in zip(*found, strict=True))).item()
        return {"val_loss": error, "val_score": sum(tau(*pair) for pair in found) / len(found)}

    def test(self) -> dict[str, Any]:
        """Of every test set τ, the squared error, all predictions with their networks' training runs, and of binary
        targets the share that is right.

        Raises:
            DivergedError: a prediction is not finite.
        """
        found: dict[str, Any] = {}
        for name, rows in self.rows.items():
            if name == "train" or name.startswith("validation"):
                continue
            predicted, true = self.predictions(rows), self.targets[rows]
            if not torch.isfinite(predicted).all():
                row = int(rows[~torch.isfinite(predicted)][0])
                raise DivergedError(
                    f"the prediction for network {row} of the table is not finite: are its weights huge?"
                )
            found |= {
                f"{name}_tau": tau(predicted, true),
                f"{name}_mse": F.mse_loss(predicted, true).item(),
                f"{name}_predicted": [round(value, 6) for value in predicted.tolist()],
                f"{name}_true": [round(value, 6) for value in true.tolist()],
                f"{name}_run": [self.runs[row] for row in rows.tolist()],
            }
            if set(true.tolist()) <= {0.0, 1.0}:
                found[f"{name}_right"] = ((predicted > 0.5) == (true > 0.5)).float().mean().item()
        return found


@torch.no_grad()
def predict(
    model: nn.Module, inputs: Any, sizes: Int[Tensor, " all"], rows: Int[Tensor, " networks"], chunk: int | None
) -> Float[Tensor, " networks"]:
    """A model's predictions for the networks `rows` of its inputs, networks of like size together; within 0 and 1."""
    found = torch.empty(len(rows), device=rows.device)
    for some in sizes[rows].argsort().split(chunk or EVALUATION_BATCH):
        found[some] = model(inputs[rows[some]]).squeeze(1).float().sigmoid()
    return found


@torch.no_grad()
def start_at(model: nn.Module, mean: Float[Tensor, ""]) -> None:
    """Let a model's last Linear start at a mean target.

    From 0.5 on it would first have to fall to the mean, and would fall faster where features are large: after little
    training such a slope, learned from nothing, remains. Where all training targets were one number, StatNN's τ on the
    Wild Park was 0.23 ± 0.08 over eight seeds when it started at 0.5, and 0.03 ± 0.11 when it started at the mean.
    """
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    last.bias.fill_(torch.logit(mean, eps=0.01))


def tau(predicted: Tensor, true: Tensor) -> float:
    """Kendall's τ-b; 0 where all predictions are the same, which put networks in no order."""
    found = kendalltau(predicted.cpu().numpy(), true.cpu().numpy()).statistic
    return 0.0 if np.isnan(found) else float(found)


def _squared_error(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(logits.sigmoid(), targets, reduction=reduction)


LOSSES = {"bce": F.binary_cross_entropy_with_logits, "mse": _squared_error}


def rows_of(networks: Networks, split: str, seed: int = 0) -> dict[str, Int[Tensor, " networks"]]:
    """Rows of every split: "train", and "validation_<dataset>" and "test_<dataset>" per population; where shapes are
    split, "train", "validation", and test networks of the shapes that are trained on, "same", and of others, "other".

    Raises:
        ValueError: a split is empty.
    """
    table, rows = networks.table, split_rows(networks.table, seed)

    def among(split: str, mask: np.ndarray | pd.Series) -> Tensor:
        return rows[split][torch.tensor(np.asarray(mask))[rows[split]]]

    if split == "random":
        own = {name: table["dataset"] == name for name in table["dataset"].unique()}
        found = {"train": rows["train"]}
        for kind in ("validation", "test"):
            found |= {f"{kind}_{name}": among(kind, mask) for name, mask in own.items()}
    else:
        seen = trained_shapes(table, split)
        found = {name: among(name, seen) for name in ("train", "validation")}
        found |= {"same": among("test", seen), "other": among("test", ~seen)}
    empty = [name for name, some in found.items() if len(some) == 0]
    if empty:
        raise ValueError(
            f"split {split!r} leaves no networks for {', '.join(empty)}: {table['run'].nunique()} training runs are "
            "too few, or their shapes are all alike"
        )
    return found


def load(config: Config, device: str) -> tuple[Networks, str]:
    """The networks of a run, on the CPU, and their digest."""
    networks = zoos.load(config.data, config.target == "activation")
    return networks, networks.digest


def problem_of(config: Config, networks: Networks, device: str) -> Prediction:
    """What the training loop solves."""
    rows = rows_of(networks, config.split, config.split_seed)
    targets = torch.tensor(targets_of(networks.table, config.target), dtype=torch.float32)
    known_targets = targets.clone()
    if config.shuffled:
        generator = torch.Generator().manual_seed(CONTROL_SEED + config.seed)
        for name in [name for name in rows if name.startswith(("train", "validation"))]:
            known_targets[rows[name]] = targets[rows[name][torch.randperm(len(rows[name]), generator=generator)]]
    model = build_model(config.method, networks, **dict(config.options)).to(device)
    return Prediction(
        model,
        inputs_of(config.method, networks, device),
        networks.collection.sizes.to(device),
        {name: some.to(device) for name, some in rows.items()},
        networks.table["run"].tolist(),
        known_targets.to(device),
        targets.to(device),
        config.loss,
        METHODS[config.method].chunk,
    )


def inputs_of(method: str, networks: Networks, device: str) -> Any:
    """Networks in the form that a method's model reads, indexed by rows."""
    inputs = METHODS[method].inputs(networks)
    return inputs.map(lambda values: values.to(device)) if isinstance(inputs, NeuralGraph) else inputs.to(device)


EXPERIMENT = Experiment(Config, METHODS, load, by_training(problem_of), zoos.prepare)


def populations_of(parameters: Mapping[str, Any]) -> tuple[Zoo, Zoo]:
    """CIFAR10-GS and the Wild Park, as a notebook's parameters ask for them."""
    return (
        zoos.zoo_of(parameters["small_zoo"], cifar10_gs.Recipe),
        zoos.zoo_of(parameters["wild_park"], wild_park.Recipe),
    )


def runs(parameters: Mapping[str, Any]) -> Runs:
    """Both populations; table 1, its control, other splits; other losses, a joint model, shapes apart, other targets.

    Only the Wild Park, with few training runs to test on, is split in several ways.
    """
    populations = populations_of(parameters)

    def configs(dataset: str, methods: Sequence[str], seeds: int = 1, **changes: Any) -> list[Config]:
        schedule = Schedule(
            **{name: parameters[name][dataset] for name in ("epochs", "batch", "warmup")},
            **{name: parameters[name] for name in ("weight_decay", "decay")},
        )
        return configs_of(dataset, populations, methods, seeds, schedule, parameters["learning_rate"], **changes)

    every = [population_config(zoo) for zoo in populations]
    for dataset, methods in ROWS.items():
        every += configs(dataset, methods, parameters["seeds"])
        every += configs(dataset, parameters["more_methods"], parameters["seeds"])
        for method, seeds in parameters["control"].items():
            every += configs(dataset, [method], seeds, shuffled=True)
        told = populations[1].archive is None or dataset != "cifar10_wild_park"  # its checkpoints tell accuracy alone
        for target in parameters["probing"].get(dataset, ()) if told else ():
            every += configs(dataset, parameters["probing_methods"], target=target)
    for method, count in parameters["park_splits"].items():
        for seed in range(1, count):
            every += configs("cifar10_wild_park", [method], split_seed=seed)
    every += configs("both", parameters["joint"])
    for split in parameters["splits"]:
        every += configs("cifar10_wild_park", parameters["split_methods"], split=split)
    for loss in parameters["losses"]:
        every += configs("cifar10_gs", parameters["loss_methods"], loss=loss)
    return (yield every)


PLAN = Plan(runs, ("cnn_zoos", "generalization"))
