"""Real images: small subsets that come with ngcore, the full sets where more is asked for.

A subset holds the first images of the official order of its split, so both give the same images. It is one
PNG sheet of tiles (100 images a row, so that it can be looked at) and one text file of labels (a digit each).
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from ngcore.data.images import sources
from ngcore.files import SHIPPED

SUBSETS = SHIPPED / "images"
CHECKSUMS = "SHA256SUMS"
COLUMNS = 100
SUBSET_SIZES = {
    "mnist": {"train": 10_000, "test": 2_000},
    "fashion_mnist": {"train": 10_000, "test": 2_000},
    "cifar10": {"train": 5_000, "test": 1_000},
}


@dataclass(frozen=True)
class Images:
    """Images of one split, in its official order.

    Shapes:
        pixels: (n, 28, 28) grey or (n, 3, 32, 32) RGB, 0 to 255
        labels: (n,) class, 0 to 9
        index: (n,) position in the official split

    Raises:
        ValueError: the three have different lengths.
    """

    pixels: UInt8[Tensor, "_ *image"]
    labels: Int64[Tensor, " _"]
    index: Int64[Tensor, " _"]

    def __post_init__(self) -> None:
        lengths = {"pixels": len(self.pixels), "labels": len(self.labels), "index": len(self.index)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"images need one label and one index each, got lengths {lengths}")

    def __len__(self) -> int:
        return len(self.pixels)


def load_images(name: str, split: str, count: int, *, cache: Path) -> Images:
    """The first `count` images of an official split.

    What fits in the embedded subset is read from there; more is read from the full set, which is downloaded
    into `cache` when it is not there yet.

    Args:
        name: "mnist", "fashion_mnist" or "cifar10".
        split: "train" or "test".
        count: how many images, at least 1.
        cache: directory for full sets.

    Raises:
        ValueError: an unknown name or split, a count that the split does not have, a truncated or altered
            file.
        FileNotFoundError: the embedded subset is not where ngcore has it.
        sources.SourceError: the full set is needed and no source could be reached.
    """
    size = sources.split_size(name, split)
    if not 1 <= count <= size:
        raise ValueError(f"{name} {split} has {size:,} images; count must be 1 to {size:,}, got {count:,}")
    if count <= SUBSET_SIZES[name][split]:
        pixels, labels = read_subset(name, split)
    else:
        pixels, labels = sources.load(name, split, cache)
    return Images(
        pixels=torch.from_numpy(pixels[:count].copy()),
        labels=torch.from_numpy(labels[:count].astype(np.int64)),
        index=torch.arange(count),
    )


def read_subset(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The whole embedded subset: pixels (n, *image shape) and labels (n,), both uint8, verified by sha256."""
    sheet, digits = subset_files(name, split)
    pixels = from_sheet(_read_verified(SUBSETS / sheet), sources.SETS[name].shape)
    labels = np.frombuffer(_read_verified(SUBSETS / digits).strip(), np.uint8) - ord("0")
    if len(pixels) != len(labels):
        raise ValueError(f"{SUBSETS / sheet} holds {len(pixels)} images, but {digits} {len(labels)} labels")
    return pixels, labels


def subset_files(name: str, split: str) -> tuple[str, str]:
    """Names of a subset's sheet and of its labels."""
    return f"{name}_{split}.png", f"{name}_{split}_labels.txt"


def to_sheet(pixels: np.ndarray) -> Image.Image:
    """Tile images, (n, h, w) or (n, 3, h, w) with n a multiple of 100, into one sheet of 100 a row."""
    tiles = pixels.reshape(-1, COLUMNS, *pixels.shape[1:])
    if pixels.ndim == 3:
        sheet = tiles.transpose(0, 2, 1, 3)
    else:
        sheet = tiles.transpose(0, 3, 1, 4, 2)
    rows, height, columns, width, *channels = sheet.shape
    return Image.fromarray(np.ascontiguousarray(sheet).reshape(rows * height, columns * width, *channels))


def from_sheet(png: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The images of a sheet, (n, *shape): the inverse of `to_sheet` for an encoded sheet."""
    height, width = shape[-2:]
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    tiles = sheet.reshape(-1, height, COLUMNS, width, *sheet.shape[2:])
    if len(shape) == 2:
        tiles = tiles.transpose(0, 2, 1, 3)
    else:
        tiles = tiles.transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(tiles).reshape(-1, *shape)


def _read_verified(path: Path) -> bytes:
    """The bytes of a file of the embedded subsets, if its sha256 is the committed one."""
    checksums = path.parent / CHECKSUMS
    for file in (checksums, path):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: install ngcore again, or in a clone restore it with `git checkout -- data/images`"
            )
    content = path.read_bytes()
    if f"{hashlib.sha256(content).hexdigest()}  {path.name}" not in checksums.read_text().splitlines():
        raise ValueError(
            f"{path} is truncated or altered (its sha256 is not the one in {CHECKSUMS}): restore it with "
            f"`git checkout -- data/images`, or make it again with `python data/make/subsets.py`"
        )
    return content
