"""INR editing (paper, section 4.1; table 5, figure 2c): change an INR's weights so that it draws the edited image."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ngcore.data.inrs.edits import EDITS
from ngcore.data.inrs.sets import INRSet
from ngcore.data.inrs.siren import render
from ngcore.models import Editor, EquivariantNGGNN, EquivariantNGT
from ngcore.models.baselines import EquivariantDWSNet, EquivariantNFN
from ngcore.study.runs import Record, StoredRun, cache_directory, tensor_digest
from ngcore.study.training import Schedule, train
from ngcore.tasks.inr_sets import WIRING, INRData, build, evaluation_batches, images_of, load_data


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


METHODS: dict[str, Callable[..., nn.Module]] = {
    "DWSNet": EquivariantDWSNet,
    "DWSNet_mean": partial(EquivariantDWSNet, reduction="mean"),  # not the paper's
    "NFN_HNP": partial(EquivariantNFN, group="HNP"),
    "NFN_NP": partial(EquivariantNFN, group="NP"),
    "NG-GNN": EquivariantNGGNN,
    "NG-T": EquivariantNGT,
}

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
    micro_batch: Mapping[str, int],
    compiled: Collection[str],
    dropout: Mapping[str, float],
) -> list[Config]:
    """The runs of table 5.

    Args:
        seeds: number of probe features -> number of seeds.
        micro_batch: method -> networks per forward and backward pass; the whole batch where not named.
        compiled: the methods that are compiled.
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
            replace(schedule, micro_batch=micro_batch.get(method, 0), compiled=method in compiled),
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
    for record in records:
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


def run(config: Config, on_epoch: Callable[[int, Record], None] = lambda epoch, scores: None) -> Record:
    """The result of a run: read if it is stored, else trained (from its checkpoint, if there is one) and stored."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sets, digest = load_data(config.data, device)
    targets = targets_of(config.data, config.edit, device)
    transfer = None
    if config.transfer is not None:
        others, other_digest = load_data(config.transfer, device)
        transfer = others["test"], targets_of(config.transfer, config.edit, device)["test"]
        digest = f"{digest}+{other_digest}"
    stored = StoredRun.of(config, f"{digest}+{tensor_digest(targets.values())}", cache_directory())
    record = stored.result()
    if record is not None:
        return record
    torch.manual_seed(config.seed)
    model = build_editor(config.method, config.probes, config.networks, **dict(config.options)).to(device)
    problem = Editing(model, sets, targets, transfer)
    return train(problem, config.schedule, config.seed, stored, on_epoch)
