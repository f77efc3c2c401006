"""The INRs that the tasks on INRs share: which, their images, and how they reach a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ngcore.data.images.subsets import load_images
from ngcore.data.inrs.sets import INRSet, Recipe, fit_set, siren
from ngcore.data.inrs.siren import render
from ngcore.digests import tensor_digest
from ngcore.graph import mlp
from ngcore.study.execution import Execution, best_device, default_workers
from ngcore.study.methods import Methods, known
from ngcore.study.runs import Record, cache_directory
from ngcore.study.tables import describe_scale
from ngcore.tasks.archives import archive_of, read_inrs
from ngcore.tasks.rows import of_dataset

EVALUATION_BATCH = {"cpu": 64, "cuda": 256}
WIRING = mlp(siren.SIZES, "siren")


@dataclass(frozen=True)
class INRData:
    """Which INRs: the first `train + validation` of the train split, the last of them for validation, and `test`.

    Args:
        steps, learning_rate: of their fitting; the papers' for MNIST where not given.
        archive: the name of the published archive that they are read from instead, see `archives`.
    """

    dataset: str
    train: int
    validation: int
    test: int
    steps: int = 1450
    learning_rate: float = 1e-3
    archive: str | None = None


def data_of(parameters: Mapping[str, Any], dataset: str) -> INRData:
    """The INRs that a notebook's parameters ask for: published ones where the user has them, else fitted ones. Every
    parameter may be given by data set."""
    archive = archive_of(dataset)
    names = ("train_size", "validation_size", "test_size", "inr_steps", "inr_learning_rate")
    *counts, steps, rate = (of_dataset(parameters[name], dataset) for name in names)
    if archive is not None:
        return INRData(dataset, *counts, archive=archive)
    return INRData(dataset, *counts, steps, rate)


def fit_inrs(data: INRData, *, workers: int | None = None, compiled: bool = False) -> dict[str, INRSet]:
    """The train, validation and test INRs; fitted where they are not stored yet.

    Args:
        workers: processes; None for one per core, or one with a GPU.
    """
    if data.archive is not None:
        return read_inrs(data.archive, {"train": data.train, "validation": data.validation, "test": data.test})
    sets = {
        split: fit_set(
            Recipe(data.dataset, split, data.steps, data.learning_rate),
            count,
            cache_directory(),
            device=best_device(),
            workers=workers or default_workers(),
            compiled=compiled,
        )
        for split, count in (("train", data.train + data.validation), ("test", data.test))
    }
    return {
        "train": sets["train"][: data.train],
        "validation": sets["train"][data.train :],
        "test": sets["test"],
    }


def fit_all(parameters: Mapping[str, Any], datasets: Sequence[str]) -> dict[str, dict[str, INRSet]]:
    """The INRs that a notebook's parameters ask for: data set -> split -> INRs."""
    execution = Execution.of(parameters)
    settings = {"workers": execution.workers, "compiled": execution.compiles()}
    return {name: fit_inrs(data_of(parameters, name), **settings) for name in datasets}


def prepare(configs: Sequence[Any], execution: Execution) -> None:
    """Fit the INRs that runs read, by all workers."""
    for data in dict.fromkeys(config.data for config in configs):
        fit_inrs(data, workers=execution.workers, compiled=execution.compiles())


def images_of(data: INRData) -> dict[str, Float[Tensor, "n 28 28"]]:
    """The images that every split's INRs were fitted to, 0 to 1; of published ones, what they draw."""
    if data.archive is not None:
        return {split: render(inrs.parameters).clamp(0, 1) for split, inrs in fit_inrs(data).items()}
    known, test = (
        load_images(data.dataset, split, count, cache=cache_directory()).pixels.float() / 255
        for split, count in (("train", data.train + data.validation), ("test", data.test))
    )
    return {"train": known[: data.train], "validation": known[data.train :], "test": test}


@cache
def load_data(data: INRData, device: str) -> tuple[dict[str, INRSet], str]:
    """The INRs on a device and the digest of all of them; kept for the process's further runs.

    What is not stored is fitted in this process and uncompiled: `prepare` fits it faster.
    """
    sets = fit_inrs(data, workers=1)
    tensors = (t for inrs in sets.values() for t in (*inrs.parameters.values(), inrs.labels))
    digest = tensor_digest(tensors)
    return {split: inrs.to(device) for split, inrs in sets.items()}, digest


def build(methods: Methods, method: str, probes: int, *sizes: Any, **options: Any) -> Any:
    """A model by the name of its method, from its sizes and options.

    Raises:
        ValueError: an unknown method, or probe features for one that has none.
    """
    found = known(methods, method)
    if probes and not found.probes:
        raise ValueError(f"{method} takes no probe features, but probes = {probes}")
    return found.build(*sizes, **({"probes": probes} if probes else {}), **options)


def describe(records: Sequence[Record], profile: str) -> str:
    """The scale of runs on INRs, for captions."""
    archives = sorted({record["config"]["data"].get("archive") or "" for record in records})
    fields = {
        "data.train": "training INRs",
        "data.steps": "fitting steps each",
        "schedule.epochs": "epochs",
        "schedule.batch": "INRs a batch",
        "schedule.warmup": "warm-up steps",
    }
    if archives == [""]:
        return describe_scale(records, profile, fields)
    del fields["data.steps"]
    return f"{describe_scale(records, profile, fields)} Published INRs of {', '.join(archives)}."


def evaluation_batches(inrs: INRSet) -> Iterator[Int[Tensor, " batch"]]:
    """Rows of a whole set in batches of one size: the last one is filled up by repeating the last row."""
    size, device = EVALUATION_BATCH[inrs.labels.device.type], inrs.labels.device
    for first in range(0, len(inrs), size):
        yield torch.arange(first, first + size, device=device).clamp(max=len(inrs) - 1)


def row_of(record: Record) -> tuple[str, str, int]:
    """The table row that a run belongs to: data set, method, probe features."""
    config = record["config"]
    return config["dataset"], config["method"], config["probes"]
