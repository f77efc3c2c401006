"""Tasks for optimizers on images, as the paper has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from ngcore.data.images.subsets import load_images
from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.models.optimizers.problem import Task
from ngcore.study.runs import cache_directory


@dataclass(frozen=True)
class ImageTask:
    """Classifying images by a CNN: 3x3 convolutions, the first with stride 2 and without padding, then global average
    pooling and a linear layer (paper, section 4.3).

    Args:
        dataset: "fashion_mnist", "mnist" or "cifar10".
        channels: of the convolutions' outputs.
        train_images: the first of the training images.
        validation_images: as many that follow them.
        test_images: the first of the test images.
    """

    dataset: str
    channels: tuple[int, ...]
    train_images: int
    validation_images: int
    test_images: int
    activation: str = "relu"
    batch: int = 128

    def task(self, held: str = "test", device: str = "cpu") -> Task:
        """The task itself, measured on "validation" or "test" images.

        Raises:
            ValueError: there are not so many images, or `held` is neither.
        """
        return _task(self, held, device)


@cache  # a process trains on one task many times
def _task(images: ImageTask, held: str, device: str) -> Task:
    if held not in ("validation", "test"):
        raise ValueError(f"held images are for 'validation' or 'test', not {held!r}")
    count = images.validation_images if held == "validation" else images.test_images
    if count < 1:
        raise ValueError(f"the task on {images.dataset} has no {held} images")
    tensors = _images(images.dataset, images.train_images, count, held, device)
    build = partial(task_cnn, tensors[0].shape[1], images.channels, images.activation)
    return Task(build, *tensors, batch=images.batch)


def task_cnn(colours: int, channels: Sequence[int], activation: str) -> CNN:
    """The network of an `ImageTask`."""
    layers = len(channels)
    return CNN(
        Architecture(
            channels=(colours, *channels),
            kernel_size=(3,) * layers,
            stride=(2,) + (1,) * (layers - 1),
            padding=(0,) + (1,) * (layers - 1),
            activation=(activation,) * layers,
            residual=(-1,) * layers,
        )
    )


@cache
def _images(dataset: str, count: int, held: int, split: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images to train on, standardized per channel by their own mean and deviation, and their labels; and held ones."""
    every = load_images(dataset, "train", count + (held if split == "validation" else 0), cache=cache_directory())
    other = every if split == "validation" else load_images(dataset, "test", held, cache=cache_directory())
    pixels, others = (images.pixels.float() / 255 for images in (every, other))
    pixels, others = (x.unsqueeze(1) if x.dim() == 3 else x for x in (pixels, others))
    std, mean = torch.std_mean(pixels[:count], dim=(0, 2, 3), keepdim=True)
    found = (pixels[:count], every.labels[:count], others[-held:], other.labels[-held:])
    inputs, labels, held_inputs, held_labels = (x.to(device) for x in found)
    std, mean = std.to(device), mean.to(device)
    return (inputs - mean) / std, labels, (held_inputs - mean) / std, held_labels
