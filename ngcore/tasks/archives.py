"""Published archives that a user has: where they are looked for, and what their networks are here."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ngcore.data.inrs.archive import DwsArchive, read_archive
from ngcore.data.inrs.sets import INRSet
from ngcore.data.inrs.siren import SHAPES

# data set -> names that its archive may have in the data directory
NAMES = {
    "mnist": ("mnist-inrs", "mnist-inrs.zip"),
    "fashion_mnist": ("fmnist_inrs", "fmnist_inrs.zip"),
    "cifar10_gs": ("small_cnn_zoo_cifar10",),
    "cifar10_wild_park": ("cnn_wild_park",),
}


def data_directory() -> Path | None:
    """Where a user's published archives are: $NGCORE_DATA, as `--data-dir` sets it."""
    given = os.environ.get("NGCORE_DATA")
    return Path(given) if given else None


def archive_of(dataset: str) -> str | None:
    """The name of the archive of a data set in the data directory, None where there is none."""
    directory = data_directory()
    names = NAMES.get(dataset, ()) if directory else ()
    return next((name for name in names if (directory / name).exists()), None)


def path_of(archive: str) -> Path:
    """Where an archive is.

    Raises:
        FileNotFoundError: it is not in the data directory, or there is no such directory.
    """
    directory = data_directory()
    if directory is None or not (directory / archive).exists():
        raise FileNotFoundError(
            f"{archive} is not in the data directory {directory}: say --data-dir or set NGCORE_DATA"
        )
    return directory / archive


def read_inrs(archive: str, counts: dict[str, int]) -> dict[str, INRSet]:
    """The first INRs of every split of an archive: "train", "validation" and "test", so many of each.

    An archive without INRs for validation gives the last of those for training.

    Raises:
        FileNotFoundError, ValueError: see `read_archive`; a split has fewer INRs; they have other layers than ours. The
            error names the file.
    """
    path = path_of(archive)
    found = read_archive(path)
    shapes = {name: tuple(values.shape[1:]) for name, values in found.parameters.items()}
    if shapes != SHAPES:
        raise ValueError(f"{path} holds INRs of layers {shapes}, but {SHAPES} are read")
    rows = {split: [i for i, own in enumerate(found.splits) if own == split] for split in ("train", "val", "test")}
    if not rows["val"]:
        rows["train"], rows["val"] = rows["train"][: counts["train"]], rows["train"][counts["train"] :]
    sets = {}
    for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        if len(rows[split]) < counts[name]:
            raise ValueError(f"{path} has {len(rows[split])} INRs for {name}, but {counts[name]} are asked for")
        sets[name] = _some(found, rows[split][: counts[name]])
    return sets


def _some(archive: DwsArchive, rows: list[int]) -> INRSet:
    """INRs of an archive; how well they fit their images is not told."""
    parameters = {name: values[rows] for name, values in archive.parameters.items()}
    return INRSet(parameters, archive.labels[rows], torch.tensor(rows), torch.full((len(rows),), torch.nan))
