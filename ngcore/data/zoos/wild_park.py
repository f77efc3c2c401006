"""CNN Wild Park: checkpoints of CNNs of many architectures, trained on CIFAR-10 (paper, appendix E.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ngcore.data.images.subsets import load_images
from ngcore.data.zoos.cnn import ACTIVATIONS, CNN, Architecture
from ngcore.data.zoos.populations import Checkpoints, Population, finite_networks, generate

LAYERS = (2, 3, 4, 5)
CHANNELS = (4, 8, 16, 32)
KERNEL_SIZES = (3, 5, 7)
LEARNING_RATES = (3e-4, 1e-2)
BATCH = 64

# What a run draws, each with random numbers of its own: another architecture does not change the learning rate.
_ARCHITECTURE, _LEARNING_RATE, _TRAINING = range(3)


@dataclass(frozen=True)
class Recipe:
    """How every network of a park is trained.

    Args:
        train_images, test_images: the first ones of CIFAR-10's official splits.
        checkpoints: of each run, equally spaced, the last at the end of training.

    Raises:
        ValueError: training has fewer steps than checkpoints, or none.
    """

    dataset: ClassVar[str] = "cifar10_wild_park"
    pool: ClassVar[int] = 1

    train_images: int
    test_images: int
    epochs: int
    checkpoints: int
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train_images, self.test_images, self.epochs) < 1 or self.seed < 0:
            raise ValueError(f"images and epochs are at least 1, a seed at least 0, got {self}")
        steps = self.epochs * self.steps_per_epoch
        if not 1 <= self.checkpoints <= steps:
            raise ValueError(f"{steps} steps have 1 to {steps} checkpoints, got {self.checkpoints}")

    @property
    def name(self) -> str:
        return (
            f"{self.dataset.removeprefix('cifar10_')}_{self.train_images}train_{self.test_images}test_{self.epochs}epochs"
            f"_{self.checkpoints}checkpoints_seed{self.seed}"
        )

    @property
    def steps_per_epoch(self) -> int:
        """The last batch of an epoch may be a short one."""
        return -(-self.train_images // BATCH)

    @property
    def checkpoint_steps(self) -> list[int]:
        """After how many steps the checkpoints are taken."""
        steps = self.epochs * self.steps_per_epoch
        return [(i + 1) * steps // self.checkpoints for i in range(self.checkpoints)]


@dataclass(frozen=True)
class FlattenedRecipe(Recipe):
    """The same networks but for their end: they flatten averages over 2 x 2 parts of the images."""

    dataset: ClassVar[str] = "cifar10_wild_park_flattened"
    pool: ClassVar[int] = 2


def draw_architecture(seed: int, run: int, pool: int = 1) -> Architecture:
    """The architecture of a run, for images of 3 x 32 x 32: layers, channels, kernel sizes, activations, residuals.

    Convolution i adds one of the outputs 0 to i - 2 or none, all with equal chances. The paper does not say strides and
    padding: here the first convolution has stride 4, the others 1, and the padding keeps the size otherwise, so that
    skip connections meet images of one size (8 x 8) and a CPU can train hundreds of networks.
    """
    random = np.random.default_rng((seed, run, _ARCHITECTURE))
    layers = int(random.choice(LAYERS))
    kernel_size = tuple(random.choice(KERNEL_SIZES, layers).tolist())
    return Architecture(
        channels=(3, *random.choice(CHANNELS, layers).tolist()),
        kernel_size=kernel_size,
        stride=(4,) + (1,) * (layers - 1),
        padding=tuple(k // 2 for k in kernel_size),
        activation=tuple(random.choice(list(ACTIVATIONS), layers).tolist()),
        residual=tuple(int(random.integers(-1, max(0, i - 1))) for i in range(layers)),
        pool=pool,
    )


def draw_learning_rate(seed: int, run: int) -> float:
    """The learning rate of a run, log-uniform in LEARNING_RATES; the paper does not say."""
    low, high = np.log(LEARNING_RATES)
    return float(np.exp(np.random.default_rng((seed, run, _LEARNING_RATE)).uniform(low, high)))


def generate_park(recipe: Recipe, runs: int, cache: Path, workers: int) -> Population:
    """The networks of runs 0 to `runs` - 1: read where stored in `<cache>/zoos/<recipe.name>`, trained where not.

    Args:
        workers: processes that train at the same time, each on one core.

    Raises:
        GenerationFailed, PopulationError: as `populations.generate`.
        ValueError, sources.SourceError: as `images.load_images`, before any training.
    """
    directory = cache / "zoos" / recipe.name
    makers = {f"run{run:04d}": partial(train_run, recipe, run, cache) for run in range(runs)}
    if makers.keys() - {path.stem for path in directory.glob("*.safetensors")}:
        # once here, not in every worker at the same time: the full set may have to be downloaded
        load_images("cifar10", "train", recipe.train_images, cache=cache)
        load_images("cifar10", "test", recipe.test_images, cache=cache)
    return generate(directory, makers, workers=workers, title="training the CNN Wild Park")


def train_run(recipe: Recipe, run: int, cache: Path) -> Checkpoints:
    """Train one network with Adam and cross entropy, without augmentation, and keep its checkpoints.

    The same recipe and run give the same bits on the same machine with the same number of threads. Checkpoints with
    numbers that are not finite are left out, which may be all.

    Rows:
        network, run, accuracy (on the test images), and step, epoch (a fraction), learning_rate, train_loss (mean since
        the last checkpoint).
    """
    (images, labels), (test_images, test_labels) = _standardized(recipe.train_images, recipe.test_images, cache)
    architecture = draw_architecture(recipe.seed, run, recipe.pool)
    learning_rate = draw_learning_rate(recipe.seed, run)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(np.random.default_rng((recipe.seed, run, _TRAINING)).integers(2**63)))
        network = CNN(architecture)
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
        checkpoint_steps = set(recipe.checkpoint_steps)
        states: list[dict[str, Tensor]] = []
        rows: list[dict[str, Any]] = []
        step, losses = 0, []
        for _ in range(recipe.epochs):
            for batch in torch.randperm(len(images)).split(BATCH):
                loss = F.cross_entropy(network(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                losses.append(loss.item())
                if step in checkpoint_steps:
                    states.append({name: values.clone() for name, values in network.state_dict().items()})
                    rows.append(
                        {
                            "network": f"run{run:04d}_step{step:06d}",
                            "run": run,
                            "step": step,
                            "epoch": step / recipe.steps_per_epoch,
                            "learning_rate": learning_rate,
                            "accuracy": _accuracy(network, test_images, test_labels),
                            "train_loss": sum(losses) / len(losses),
                        }
                    )
                    losses = []
    return finite_networks(architecture, {name: torch.stack([s[name] for s in states]) for name in states[0]}, rows)


@torch.no_grad()
def _accuracy(network: CNN, images: Float[Tensor, "n 3 32 32"], labels: Int64[Tensor, " n"]) -> float:
    """The share of images that the network classifies correctly."""
    correct = sum(
        (network(some).argmax(1) == theirs).sum().item()
        for some, theirs in zip(images.split(BATCH), labels.split(BATCH), strict=True)
    )
    return correct / len(images)


@lru_cache(maxsize=1)  # a worker trains many runs on the same images
def _standardized(train_images: int, test_images: int, cache: Path) -> tuple[tuple[Tensor, Tensor], ...]:
    """(pixels, labels) of training and of test images; over the training pixels each channel has mean 0 and std 1."""
    train = load_images("cifar10", "train", train_images, cache=cache)
    test = load_images("cifar10", "test", test_images, cache=cache)
    std, mean = torch.std_mean(train.pixels.float(), (0, 2, 3), keepdim=True)
    return tuple(((images.pixels - mean) / std, images.labels) for images in (train, test))
