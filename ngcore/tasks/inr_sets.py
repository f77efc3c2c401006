"""The INRs that the tasks on INRs share: which, their images, and how they reach a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ngcore.data.images.subsets import load_images
from ngcore.data.inrs.sets import INRSet, Recipe, fit_set, siren
from ngcore.graph import mlp
from ngcore.study.runs import Record, cache_directory, tensor_digest

EVALUATION_BATCH = {"cpu": 64, "cuda": 256}
WIRING = mlp(siren.SIZES, "siren")


@dataclass(frozen=True)
class INRData:
    """Which INRs: the first `train + validation` of the train split, the last of them for validation, and `test`."""

    dataset: str
    train: int
    validation: int
    test: int
    steps: int
    learning_rate: float


def fit_inrs(data: INRData, *, workers: int | None = None, compiled: bool = False) -> dict[str, INRSet]:
    """The train, validation and test INRs; fitted where they are not stored yet.

    Args:
        workers: processes; None for one per core, or one with a GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = workers or (1 if device == "cuda" else torch.get_num_threads())
    sets = {
        split: fit_set(
            Recipe(data.dataset, split, data.steps, data.learning_rate),
            count,
            cache_directory(),
            device=device,
            workers=workers,
            compiled=compiled,
        )
        for split, count in (("train", data.train + data.validation), ("test", data.test))
    }
    return {
        "train": sets["train"][: data.train],
        "validation": sets["train"][data.train :],
        "test": sets["test"],
    }


def images_of(data: INRData) -> dict[str, Float[Tensor, "n 28 28"]]:
    """The images that every split's INRs were fitted to, 0 to 1."""
    known, test = (
        load_images(data.dataset, split, count, cache=cache_directory()).pixels.float() / 255
        for split, count in (("train", data.train + data.validation), ("test", data.test))
    )
    return {"train": known[: data.train], "validation": known[data.train :], "test": test}


@cache
def load_data(data: INRData, device: str) -> tuple[dict[str, INRSet], str]:
    """The INRs on a device and the digest of all of them; kept for the process's further runs.

    What is not stored is fitted in this process and uncompiled: fit with `fit_inrs` first, so that all runs find it.
    """
    sets = fit_inrs(data, workers=1)
    tensors = (t for inrs in sets.values() for t in (*inrs.parameters.values(), inrs.labels))
    digest = tensor_digest(tensors)
    return {split: inrs.to(device) for split, inrs in sets.items()}, digest


def build(
    methods: Mapping[str, Callable[..., nn.Module]], method: str, probes: int, *sizes: Any, **options: Any
) -> Any:
    """A model by the name of its method, from its sizes and options.

    Raises:
        ValueError: an unknown method, or probe features for one that has none.
    """
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(methods)}")
    if probes and not method.startswith("NG-"):
        raise ValueError(f"{method} takes no probe features, but probes = {probes}")
    return methods[method](*sizes, **({"probes": probes} if probes else {}), **options)


def evaluation_batches(inrs: INRSet) -> Iterator[Int[Tensor, " batch"]]:
    """Rows of a whole set in batches of one size: the last one is filled up by repeating the last row."""
    size, device = EVALUATION_BATCH[inrs.labels.device.type], inrs.labels.device
    for first in range(0, len(inrs), size):
        yield torch.arange(first, first + size, device=device).clamp(max=len(inrs) - 1)


def row_of(record: Record) -> tuple[str, str, int]:
    """The table row that a run belongs to: data set, method, probe features."""
    config = record["config"]
    return config["dataset"], config["method"], config["probes"]
