"""The input networks of the graph benchmark, with random weights and an example input each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

Network = tuple[nn.Module, Tensor]


class INR(nn.Module):
    """A 2-32-32-1 MLP with sine units, as in the paper's INR classification."""

    def __init__(self, sizes: Sequence[int] = (2, 32, 32, 1)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, points: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            points = torch.sin(30.0 * layer(points))
        return self.layers[-1](points)


class WildParkCNN(nn.Module):
    """A CNN of the Wild Park: convolutions, global average pooling and a linear layer.

    `residual[i] >= 0` adds the output of that earlier layer to what layer i passes to its activation, on the channels
    that both have; the two have images of the same size.
    """

    def __init__(
        self,
        channels: Sequence[int] = (3, 16, 32, 24, 32),
        kernel_size: Sequence[int] = (5, 3, 3, 3),
        stride: Sequence[int] = (2, 1, 1, 1),
        padding: Sequence[int] = (2, 1, 1, 1),
        residual: Sequence[int] = (-1, -1, 0, 1),
        classes: int = 10,
    ) -> None:
        super().__init__()
        shapes = zip(channels, channels[1:], kernel_size, stride, padding, strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(*shape) for shape in shapes)
        self.fc = nn.Linear(channels[-1], classes)
        self.residual = tuple(residual)

    def forward(self, images: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for layer, earlier in zip(self.layers, self.residual, strict=True):
            images = layer(images)
            if earlier >= 0:
                added = outputs[earlier][:, : images.shape[1]]
                images = images + pad(added, (0, 0, 0, 0, 0, images.shape[1] - added.shape[1]))
            images = torch.relu(images)
            outputs.append(images)
        return self.fc(images.mean(dim=(2, 3)))


def inr() -> Network:
    return INR(), torch.zeros(5, 2)


def wild_park() -> Network:
    return WildParkCNN(), torch.zeros(1, 3, 33, 33)


def resnet18() -> Network:
    transformers = _transformers()
    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=1000,
    )
    return transformers.ResNetForImageClassification(config), torch.zeros(1, 3, 65, 65)


def vit() -> Network:
    """ViT-B/16 for images of 224 x 224."""
    transformers = _transformers()
    config = transformers.ViTConfig(num_labels=1000)
    return transformers.ViTForImageClassification(config), torch.zeros(1, 3, 224, 224)


def gpt2() -> Network:
    """GPT-2 with 124 million parameters."""
    transformers = _transformers()
    config = transformers.GPT2Config(use_cache=False)
    return transformers.GPT2LMHeadModel(config), torch.arange(5).unsqueeze(0)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            "ResNet-18, ViT-B/16 and GPT-2 need the package transformers, one of the development dependencies: "
            "pip install -e '.[dev]' -c constraints.txt"
        ) from error
    return transformers
