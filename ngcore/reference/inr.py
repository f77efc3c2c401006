"""Fitting implicit neural representations the plain way: one image, one module, one optimizer at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIZES = (2, 32, 32, 1)
FREQUENCY = 30.0
IMAGE_SIDE = 28
TARGET_PSNR = 40.0


class Siren(nn.Module):
    """A 2-32-32-1 network with two sine layers; parameters `layers.<i>.weight` and `layers.<i>.bias`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(SIZES))
        for layer in self.layers[:-1]:
            bound = math.sqrt(6 / layer.in_features) / FREQUENCY
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "pixels 2"]) -> Float[Tensor, "pixels 1"]:
        """Grey values in about [0, 1] at coordinates in [-1, 1]."""
        for layer in self.layers[:-1]:
            x = torch.sin(FREQUENCY * layer(x))
        return self.layers[-1](x) + 0.5


def pixel_coordinates() -> Float[Tensor, "pixels 2"]:
    """(x, y) of every pixel of an image, row by row, from -1 to 1."""
    axis = torch.linspace(-1, 1, IMAGE_SIDE)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def fit_one(
    image: Float[Tensor, "28 28"], steps: int, learning_rate: float, initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Fit a SIREN to one image of grey values in [0, 1] with Adam on the mean squared error over all pixels.

    It takes `steps` steps, or fewer: the first parameters whose reconstruction reaches 40 dB PSNR are kept.
    `initial` holds `layers.<i>.weight` and `layers.<i>.bias` and is not changed.
    """
    siren = Siren().to(image.dtype)
    siren.load_state_dict(initial)
    optimizer = torch.optim.Adam(siren.parameters(), lr=learning_rate)
    coordinates, target = pixel_coordinates().to(image.dtype), image.reshape(-1, 1)
    for _ in range(steps):
        loss = F.mse_loss(siren(coordinates), target)
        if loss <= 10 ** (-TARGET_PSNR / 10):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in siren.state_dict().items()}
