"""The embedded subsets, and that they are the first images of the full sets."""

import hashlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ngcore.data.images import sources
from ngcore.data.images import subsets as images
from ngcore.data.images.subsets import Images, load_images

NO_CACHE = Path("/nonexistent")
SUBSETS = [(name, split) for name, sizes in images.SUBSET_SIZES.items() for split in sizes]
FIRST_LABELS = {
    ("mnist", "train"): [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    ("mnist", "test"): [7, 2, 1, 0, 4, 1, 4, 9, 5, 9],
    ("fashion_mnist", "train"): [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
    ("fashion_mnist", "test"): [9, 2, 1, 1, 6, 1, 4, 6, 5, 7],
    ("cifar10", "train"): [6, 9, 9, 4, 1, 1, 2, 7, 8, 3],
    ("cifar10", "test"): [3, 8, 8, 0, 6, 6, 1, 6, 3, 1],
}


@pytest.mark.parametrize(("name", "split"), SUBSETS)
def test_embedded_subset(name: str, split: str) -> None:
    count = images.SUBSET_SIZES[name][split]
    subset = load_images(name, split, count, cache=NO_CACHE)
    shape = (3, 32, 32) if name == "cifar10" else (28, 28)
    assert subset.pixels.shape == (count, *shape)
    assert subset.labels.shape == (count,)
    assert len(subset) == count
    assert subset.pixels.dtype == torch.uint8
    assert subset.labels.dtype == torch.int64
    assert torch.equal(subset.index, torch.arange(count))
    assert subset.labels[:10].tolist() == FIRST_LABELS[name, split]
    assert set(subset.labels.tolist()) == set(range(10))
    few = load_images(name, split, 7, cache=NO_CACHE)
    assert torch.equal(few.pixels, subset.pixels[:7])
    assert torch.equal(few.labels, subset.labels[:7])


def test_embedded_images_are_upright_and_in_place() -> None:
    """Published facts: row 5 of MNIST's first image, a 5, and the first two pixels of CIFAR-10's, a frog."""
    five = load_images("mnist", "train", 1, cache=NO_CACHE).pixels[0]
    row = [3, 18, 18, 18, 126, 136, 175, 26, 166, 255, 247, 127]
    assert five[5].tolist() == [0] * 12 + row + [0] * 4
    frog = load_images("cifar10", "train", 1, cache=NO_CACHE).pixels[0]
    assert frog[:, 0, :2].T.tolist() == [[59, 62, 63], [43, 46, 45]]


def test_embedded_subsets_stay_small() -> None:
    assert sum(file.stat().st_size for file in images.SUBSETS.iterdir()) < 25e6


def test_checksums_cover_every_file() -> None:
    lines = (images.SUBSETS / images.CHECKSUMS).read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    files = [file for file in images.SUBSETS.iterdir() if file.name != images.CHECKSUMS]
    assert listed == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with full sets of random images, whose first ones are embedded in a directory of their own."""
    cache = tmp_path / "cache"
    random = np.random.default_rng(0)
    sizes = {"train": 400, "test": 300}
    for name, full in list(sources.SETS.items()):
        (cache / name).mkdir(parents=True)
        digests = {}
        for split, size in sizes.items():
            arrays = {
                f"{split}_pixels": random.integers(0, 256, (size, *full.shape), np.uint8),
                f"{split}_labels": random.integers(0, 10, size, np.uint8),
            }
            for key, array in arrays.items():
                np.save(cache / name / f"{key}.npy", array)
                digests[key] = hashlib.sha256(array.tobytes()).hexdigest()
        monkeypatch.setitem(sources.SETS, name, replace(full, sizes=sizes, sha256=digests))
        monkeypatch.setitem(images.SUBSET_SIZES, name, {"train": 200, "test": 100})
    monkeypatch.setattr(images, "SUBSETS", tmp_path / "subsets")
    images.SUBSETS.mkdir()
    make_subsets(cache, monkeypatch)
    return cache


def make_subsets(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run data/make/subsets.py."""
    script = Path(__file__).parents[1] / "data" / "make" / "subsets.py"
    spec = importlib.util.spec_from_file_location("make_subsets", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["subsets.py", "--cache", str(cache)])
    module.main()


@pytest.mark.parametrize(("name", "split"), SUBSETS)
def test_subset_is_the_start_of_the_full_set(name: str, split: str, fake: Path) -> None:
    embedded = images.SUBSET_SIZES[name][split]
    subset = load_images(name, split, embedded, cache=NO_CACHE)
    full = load_images(name, split, embedded + 1, cache=fake)
    assert len(full) == embedded + 1
    assert torch.equal(full.index, torch.arange(embedded + 1))
    assert torch.equal(subset.pixels, full.pixels[:-1])
    assert torch.equal(subset.labels, full.labels[:-1])
    assert torch.equal(full.pixels, torch.from_numpy(np.load(fake / name / f"{split}_pixels.npy"))[: embedded + 1])


def test_images_may_be_changed(fake: Path) -> None:
    """What is returned belongs to the caller: a change does not reach the next one."""
    for count in (200, 201):
        load_images("mnist", "train", count, cache=fake).pixels.zero_()
        assert load_images("mnist", "train", count, cache=fake).pixels.any()


def test_making_the_subsets_leaves_nothing_else(fake: Path) -> None:
    expected = {file for name, split in SUBSETS for file in images.subset_files(name, split)}
    assert {file.name for file in images.SUBSETS.iterdir()} == expected | {images.CHECKSUMS}


@pytest.mark.parametrize("file", ["mnist_train.png", "mnist_train_labels.txt"])
@pytest.mark.parametrize("change", ["truncated", "altered", "empty"])
def test_damaged_file(file: str, change: str, fake: Path) -> None:
    path = images.SUBSETS / file
    content = path.read_bytes()
    damaged = {"truncated": content[:-1], "altered": content[:50] + b"7" + content[51:], "empty": b""}[change]
    assert damaged != content
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{file} is truncated or altered .*git checkout"):
        load_images("mnist", "train", 1, cache=NO_CACHE)


@pytest.mark.parametrize("file", ["mnist_train.png", "mnist_train_labels.txt", "SHA256SUMS"])
def test_missing_file(file: str, fake: Path) -> None:
    (images.SUBSETS / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing: install ngcore again, or in a clone"):
        load_images("mnist", "train", 1, cache=NO_CACHE)


def test_labels_that_do_not_match_the_sheet(fake: Path) -> None:
    """Both files are what they were written as, but they do not belong together."""
    path = images.SUBSETS / "mnist_train_labels.txt"
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text("0" * 199 + "\n")
    checksums = images.SUBSETS / images.CHECKSUMS
    checksums.write_text(checksums.read_text().replace(old, hashlib.sha256(path.read_bytes()).hexdigest()))
    with pytest.raises(ValueError, match=r"mnist_train\.png holds 200 images, but mnist_train_labels\.txt 199"):
        load_images("mnist", "train", 1, cache=NO_CACHE)


def test_lengths_that_differ() -> None:
    with pytest.raises(ValueError, match=r"one label and one index each.*'pixels': 3, 'labels': 2"):
        Images(torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(3))


def test_unknown_names_and_counts() -> None:
    with pytest.raises(ValueError, match="unknown image set 'emnist': choose one of mnist, fashion_mnist, cifar10"):
        load_images("emnist", "train", 1, cache=NO_CACHE)
    with pytest.raises(ValueError, match="unknown split 'val' of cifar10: choose one of train, test"):
        load_images("cifar10", "val", 1, cache=NO_CACHE)
    for count in (0, -1, 50_001):
        with pytest.raises(ValueError, match=r"cifar10 train has 50,000 images; count must be 1 to 50,000"):
            load_images("cifar10", "train", count, cache=NO_CACHE)
