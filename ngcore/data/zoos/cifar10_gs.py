"""CIFAR10-GS of the Small CNN Zoo: one architecture, thousands of hyperparameters, trained on grey CIFAR-10.

Unterthiner et al. (2020) vary optimizer, learning rate, initialization, weight decay, dropout, share of the training
images and activation; the paper's section 4.2 predicts test accuracy from the parameters. Here networks are trained in
groups by `small_zoo.train`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ngcore.data.images.subsets import load_images
from ngcore.data.zoos.cnn import Architecture
from ngcore.data.zoos.populations import Checkpoints, Population, finite_networks, generate
from ngcore.data.zoos.small_zoo import ACTIVATIONS, CHANNELS, KERNEL, STRIDE, accuracy, draw, train

BATCH = 32
PART = 16  # networks per file
GROUP = {"cpu": 4, "cuda": PART}  # networks per tensor program: on a CPU the working set stays in its cache
MAX_NETWORKS = 1_000_000  # of one seed
GREY = (0.299, 0.587, 0.114)  # luma of red, green and blue (ITU-R BT.601)

Labelled = tuple[Float[Tensor, "_ 32 32"], Int[Tensor, " _"]]


@dataclass(frozen=True)
class Recipe:
    """How every network of a zoo is trained.

    Args:
        train_images, test_images: the first ones of CIFAR-10's official splits.
        steps: of 32 images each.

    Raises:
        ValueError: a number is below 1, or the seed below 0.
    """

    dataset: ClassVar[str] = "cifar10_gs"

    train_images: int
    test_images: int
    steps: int
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train_images, self.test_images, self.steps) < 1 or self.seed < 0:
            raise ValueError(f"images and steps are at least 1, a seed at least 0, got {self}")

    @property
    def name(self) -> str:
        return f"cifar10_gs_{self.train_images}train_{self.test_images}test_{self.steps}steps_seed{self.seed}"


def architecture(activation: str) -> Architecture:
    layers = len(CHANNELS) - 1
    return Architecture(
        channels=CHANNELS,
        kernel_size=(KERNEL,) * layers,
        stride=(STRIDE,) * layers,
        padding=(0,) * layers,
        activation=(activation,) * layers,
        residual=(-1,) * layers,
    )


def generate_zoo(recipe: Recipe, networks: int, cache: Path, workers: int, *, compiled: bool = False) -> Population:
    """Networks 0 to `networks` - 1: read where stored in `<cache>/zoos/<recipe.name>`, trained where not.

    Args:
        workers: processes that train at the same time, each on one core.
        compiled: compile the optimizer step: several times as fast, after half a minute.

    Raises:
        GenerationFailed, PopulationError: as `populations.generate`.
        ValueError, sources.SourceError: as `images.load_images`, before any training.
    """
    directory = cache / "zoos" / recipe.name
    parts = [range(first, min(first + PART, networks)) for first in range(0, networks, PART)]
    makers = {
        f"{part[0]:06d}_{part[-1]:06d}": partial(train_part, recipe, part, cache, compiled=compiled) for part in parts
    }
    if makers.keys() - {path.stem for path in directory.glob("*.safetensors")}:
        _grey_images(recipe.train_images, recipe.test_images, cache)  # downloads what is missing once, not per worker
    return generate(directory, makers, workers=workers, title="training the Small CNN Zoo")


def train_part(recipe: Recipe, part: range, cache: Path, *, compiled: bool) -> Checkpoints:
    """Train the networks of one file; every other file is of tanh networks. Those that diverge are left out.

    Rows:
        network, run, accuracy (on the test images), activation, and the fields of `small_zoo.Draw`.
    """
    activation = ACTIVATIONS[part[0] // PART % len(ACTIVATIONS)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (images, labels), (test_images, test_labels) = (
        (pixels.to(device), classes.to(device))
        for pixels, classes in _grey_images(recipe.train_images, recipe.test_images, cache)
    )
    draws = [draw(recipe.seed, index) for index in part]
    seeds = [recipe.seed * MAX_NETWORKS + index for index in part]
    groups = [slice(first, first + GROUP[device]) for first in range(0, len(part), GROUP[device])]
    trained = [
        train(images, labels, draws[g], activation, seeds[g], steps=recipe.steps, batch=BATCH, compiled=compiled)
        for g in groups
    ]
    parameters = {name: torch.cat([group[name] for group in trained]) for name in trained[0]}
    reached = accuracy(parameters, test_images, test_labels, activation).tolist()
    rows = [
        {"network": f"network{index:06d}", "run": index, "accuracy": share, "activation": activation} | asdict(own)
        for index, share, own in zip(part, reached, draws, strict=True)
    ]
    parameters = {name: values.cpu() for name, values in parameters.items()}
    return finite_networks(architecture(activation), parameters, rows)


@lru_cache(maxsize=1)  # a worker trains many parts on the same images
def _grey_images(train_images: int, test_images: int, cache: Path) -> tuple[Labelled, Labelled]:
    """Training and test images and labels; the training pixels have mean 0 and standard deviation 1."""
    train_set = load_images("cifar10", "train", train_images, cache=cache)
    test_set = load_images("cifar10", "test", test_images, cache=cache)
    weights = torch.tensor(GREY).view(3, 1, 1)
    grey = [(images.pixels.float() * weights).sum(1) for images in (train_set, test_set)]
    std, mean = torch.std_mean(grey[0])
    return (((grey[0] - mean) / std, train_set.labels), ((grey[1] - mean) / std, test_set.labels))
