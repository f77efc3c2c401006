"""INR editing (paper, section 4.1; table 5, figure 2c): change an INR's weights so that it draws the edited image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ngcore.data.inrs.edits import EDITS
from ngcore.data.inrs.sets import INRSet
from ngcore.data.inrs.siren import render
from ngcore.digests import tensor_digest
from ngcore.graph import Wiring
from ngcore.models import NGGNN, NGT, Editor, PerParameter
from ngcore.models.baselines import EquivariantDWSNet, EquivariantNFN
from ngcore.study.execution import Execution
from ngcore.study.methods import Method, method_order
from ngcore.study.plans import Plan, Runs
from ngcore.study.run import Experiment
from ngcore.study.runs import Record
from ngcore.study.training import Schedule, by_training
from ngcore.tasks.inr_sets import (
    WIRING,
    INRData,
    build,
    by_probes,
    data_of,
    evaluation_batches,
    fit_inrs,
    images_of,
    load_data,
)


@dataclass(frozen=True)
class Config:
    """One run: a method that edits INRs of one data set, with a seed.

    Args:
        method: a key of METHODS.
        probes: probe points of NG-GNN and NG-T.
        networks: how many networks a method makes of one, whose renderings are averaged.
        edit: a key of `ngcore.data.inrs.edits.EDITS`.
        transfer: INRs of another data set, whose test split is edited as well; None for none.
        options: further arguments of the model, as pairs.
    """

    dataset: str
    method: str
    probes: int
    networks: int
    edit: str
    seed: int
    data: INRData
    transfer: INRData | None
    schedule: Schedule
    options: tuple[tuple[str, Any], ...] = ()
    task: str = "inr_editing"


def _ng_gnn(wiring: Wiring, networks: int, sigma: float | None = None, **options: Any) -> NGGNN:
    """Weights and biases enter through Linears, without Fourier features, as in the public editing model."""
    return NGGNN(wiring, PerParameter(networks), sigma=sigma, **options)


def _ng_t(wiring: Wiring, networks: int, sigma: float | None = 3.0, dropout: float = 0.3, **options: Any) -> NGT:
    return NGT(wiring, PerParameter(networks), sigma=sigma, dropout=dropout, **options)


METHODS = {
    "DWSNet": Method(EquivariantDWSNet, colour=2),
    "DWSNet_mean": Method(partial(EquivariantDWSNet, reduction="mean"), colour=9),  # not the paper's
    "NFN_HNP": Method(partial(EquivariantNFN, group="HNP"), colour=4),
    "NFN_NP": Method(partial(EquivariantNFN, group="NP"), colour=8),
    "NG-GNN": Method(_ng_gnn, colour=0, probes=True, micro_batch=8),
    "NG-T": Method(_ng_t, colour=3, probes=True, micro_batch=4),
}
SHOWN = {"no edit": Method()} | METHODS  # in tables, with the INRs as they are

ROWS = (
    ("DWSNet", 0),
    ("DWSNet_mean", 0),
    ("NFN_HNP", 0),
    ("NFN_NP", 0),
    *((method, probes) for method in ("NG-GNN", "NG-T") for probes in (0, 4, 16, 64)),
)  # of table 5, and one more: method and number of probe features


def table_configs(
    data: INRData,
    transfer: INRData | None,
    schedule: Schedule,
    *,
    seeds: Mapping[int, int],
    dropout: Mapping[str, float],
) -> list[Config]:
    """The runs of table 5.

    Args:
        seeds: number of probe features -> number of seeds.
        dropout: method -> probability; the model's own where not named.
    """
    return [
        Config(
            data.dataset,
            method,
            probes,
            1,
            "dilation",
            seed,
            data,
            transfer,
            schedule,
            (("dropout", dropout[method]),) if method in dropout else (),
        )
        for method, probes in ROWS
        for seed in range(seeds[probes])
    ]


def variant(configs: Sequence[Config], method: str, probes: int, **changes: Any) -> Config:
    """The first seed's run of a row, with fields changed.

    Raises:
        ValueError: there is no such row.
    """
    for config in configs:
        if (config.method, config.probes, config.seed) == (method, probes, 0):
            return replace(config, **changes)
    raise ValueError(f"no run of {method} with {probes} probe features to vary")


def build_editor(method: str, probes: int = 0, networks: int = 1, **options: Any) -> Editor:
    """An editor by the name of its method; raises as `inr_sets.build`."""
    return Editor(build(METHODS, method, probes, WIRING, networks, **options))


def rendered(model: Editor, parameters: Mapping[str, Tensor]) -> Float[Tensor, "n side side"]:
    """What edited INRs draw: the mean over the networks that the editor makes of each."""
    edited = model(WIRING.graph(parameters)).state_dict()
    return render({name: values.float() for name, values in edited.items()}).mean(0)


def error(drawn: Tensor, wanted: Tensor) -> Float[Tensor, " n"]:
    """Mean squared error of every image."""
    return (drawn - wanted).square().mean(dim=(1, 2))


class Editing:
    """The problem that the training loop solves (`ngcore.study.training.Problem`).

    `targets` holds the edited images of every split; `transfer` test INRs of another data set and theirs.
    """

    def __init__(
        self,
        model: Editor,
        sets: Mapping[str, INRSet],
        targets: Mapping[str, Tensor],
        transfer: tuple[INRSet, Tensor] | None,
    ) -> None:
        self.model, self.sets, self.targets, self.transfer = model, sets, targets, transfer
        self.train_size = len(sets["train"])
        model.fit_normalization(WIRING.graph(sets["train"].parameters))

    def loss(self, rows: Tensor) -> Tensor:
        parameters = {name: values[rows] for name, values in self.sets["train"].parameters.items()}
        return error(rendered(self.model, parameters), self.targets["train"][rows]).sum()

    def mse(self, inrs: INRSet, targets: Tensor) -> float:
        """Mean over a whole set."""
        errors = [
            error(rendered(self.model, {name: v[rows] for name, v in inrs.parameters.items()}), targets[rows])
            for rows in evaluation_batches(inrs)
        ]
        return torch.cat(errors)[: len(inrs)].mean().item()

    def validate(self) -> dict[str, float]:
        found = self.mse(self.sets["validation"], self.targets["validation"])
        return {"val_loss": found, "val_score": -found}

    def test(self) -> dict[str, Any]:
        inrs, targets = self.sets["test"], self.targets["test"]
        found: dict[str, Any] = {"test_mse": self.mse(inrs, targets), "unedited_mse": unedited_mse(inrs, targets)}
        if self.transfer is not None:
            found |= {
                "transfer_mse": self.mse(*self.transfer),
                "transfer_unedited_mse": unedited_mse(*self.transfer),
            }
        rows = example_rows(inrs.labels)
        parameters = {name: values[rows] for name, values in inrs.parameters.items()}
        pictures = {
            "unedited": render(parameters),
            "target": targets[rows],
            "edited": rendered(self.model, parameters),
        }
        return found | {f"examples_{name}": encode(drawn) for name, drawn in pictures.items()}


def unedited_mse(inrs: INRSet, targets: Tensor) -> float:
    """What INRs as they are score: the row 'no edit'."""
    return error(render(inrs.parameters), targets).mean().item()


def example_rows(labels: Int[Tensor, " n"]) -> Int[Tensor, " k"]:
    """The first row of every class that there is: what pictures show."""
    return torch.stack([torch.nonzero(labels == label)[0, 0] for label in labels.unique()])


def encode(images: Float[Tensor, "k side side"]) -> list[str]:
    """Grey values from 0 to 1 as two hexadecimal digits each: small enough to stand in a stored record."""
    return [bytes(image.tolist()).hex() for image in (images.clamp(0, 1) * 255).round().to(torch.uint8).flatten(1)]


def decode(texts: Sequence[str]) -> Float[Tensor, "k side side"]:
    """The inverse of `encode`."""
    grey = torch.tensor([list(bytes.fromhex(text)) for text in texts])
    side = math.isqrt(grey.shape[1])
    return grey.view(-1, side, side) / 255


def example_pictures(records: Sequence[Record]) -> dict[str, Float[Tensor, "k side side"]]:
    """What runs of one edit make of the same examples, after what these draw and should draw; name -> pictures."""
    first = records[0]["metrics"]
    pictures = {"INR": first["examples_unedited"], "target": first["examples_target"]}
    for record in sorted(records, key=lambda record: method_order(METHODS, record["config"]["method"])):
        method, probes = record["config"]["method"], record["config"]["probes"]
        pictures[f"{method}, {probes}" if probes else method] = record["metrics"]["examples_edited"]
    return {name: decode(texts) for name, texts in pictures.items()}


def unedited_records(records: Sequence[Record]) -> list[Record]:
    """The row 'no edit' as a record: the INRs as they are, held against the edited images."""
    first = records[0]
    config = {**first["config"], "method": "no edit", "probes": 0, "seed": 0}
    metrics = {
        name: first["metrics"][own]
        for name, own in (("test_mse", "unedited_mse"), ("transfer_mse", "transfer_unedited_mse"))
        if own in first["metrics"]
    }
    return [{**first, "config": config, "metrics": metrics}]


@cache
def targets_of(data: INRData, edit: str, device: str) -> dict[str, Float[Tensor, "n side side"]]:
    """The edited images of every split on a device; kept for the process's further runs.

    Raises:
        ValueError: an unknown edit.
    """
    if edit not in EDITS:
        raise ValueError(f"unknown edit {edit!r}; there are {', '.join(EDITS)}")
    return {split: EDITS[edit](images).to(device) for split, images in images_of(data).items()}


@dataclass(frozen=True)
class Pictures:
    """What a run reads: INRs of every split with the edited images, and test INRs of another data set with theirs."""

    sets: dict[str, INRSet]
    targets: dict[str, Tensor]
    transfer: tuple[INRSet, Tensor] | None


def load(config: Config, device: str) -> tuple[Pictures, str]:
    """The INRs and edited images of a run, and their digest."""
    sets, digest = load_data(config.data, device)
    targets = targets_of(config.data, config.edit, device)
    transfer = None
    if config.transfer is not None:
        others, other_digest = load_data(config.transfer, device)
        transfer = others["test"], targets_of(config.transfer, config.edit, device)["test"]
        digest = f"{digest}+{other_digest}"
    return Pictures(sets, targets, transfer), f"{digest}+{tensor_digest(targets.values())}"


def problem_of(config: Config, pictures: Pictures, device: str) -> Editing:
    """What the training loop solves."""
    model = build_editor(config.method, config.probes, config.networks, **dict(config.options)).to(device)
    return Editing(model, pictures.sets, pictures.targets, pictures.transfer)


def prepare(configs: Sequence[Config], execution: Execution) -> None:
    """Fit the INRs that runs read, by all workers."""
    read = [data for config in configs for data in (config.data, config.transfer) if data is not None]
    for data in dict.fromkeys(read):
        fit_inrs(data, workers=execution.workers, compiled=execution.compiles())


EXPERIMENT = Experiment(Config, METHODS, load, by_training(problem_of), prepare)


def runs(parameters: Mapping[str, Any]) -> Runs:
    """Table 5, another edit, and several networks in place of one."""
    shared = {name: parameters[name] for name in ("warmup", "decay", "clip", "precision")}
    schedule = Schedule(parameters["epochs"], parameters["batch"], parameters["learning_rate"], **shared)
    data, transfer = (data_of(parameters, parameters[name]) for name in ("dataset", "transfer"))
    seeds = by_probes(parameters["seeds"])
    table = table_configs(data, transfer, schedule, seeds=seeds, dropout=parameters["dropout"])
    edits = [variant(table, method, probes, edit=parameters["edit"]) for method, probes in parameters["edit_rows"]]
    several = [variant(table, method, probes, networks=count) for method, probes, count in parameters["networks"]]
    return (yield [*table, *edits, *several])


PLAN = Plan(runs, ("inr_editing",))
