"""Fitting many SIRENs at once: one tensor program takes an optimizer step for a whole batch of networks.

The recipe is the one of the published INR data sets (Navon et al. 2023), described in data/README.md: layers 2-32-32-1,
sin(30 (W x + b)) twice, a linear output plus 0.5, Adam on the mean squared error over all pixels, an independent
random initialization per image, stopped where the reconstruction passes 40 dB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

SIZES = (2, 32, 32, 1)
FREQUENCY = 30.0  # ω₀ of the sine layers
OUTPUT_OFFSET = 0.5  # added to the last layer, so that an untrained INR is mid-grey
STOP_PSNR = 40.0  # dB
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's, as in torch.optim

SHAPES = {
    f"layers.{i}.{kind}": (fan_out, fan_in) if kind == "weight" else (fan_out,)
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(SIZES))
    for kind in ("weight", "bias")
}
NUM_PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())


def unflatten(flat: Float[Tensor, "n 1185"]) -> dict[str, Tensor]:
    """Views of flat parameter vectors, by parameter name: (n, out, in) weights and (n, out) biases."""
    parts = flat.split([math.prod(shape) for shape in SHAPES.values()], dim=1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def initialize(seeds: Iterable[int]) -> Float[Tensor, "n 1185"]:
    """Initial parameters, each network's drawn from its own seed below 2³²: an INR does not depend on its batch.

    Sine layers ~ U(±sqrt(6 / fan_in) / 30), the first included, with zero biases; the last layer is PyTorch's default.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(NUM_PARAMETERS, generator=generator).mul_(2).sub_(1))
    flat = torch.stack(rows)
    parameters = unflatten(flat)
    for i, fan_in in enumerate(SIZES[:-2]):
        parameters[f"layers.{i}.weight"].mul_(math.sqrt(6 / fan_in) / FREQUENCY)
        parameters[f"layers.{i}.bias"].zero_()
    last = len(SIZES) - 2
    for kind in ("weight", "bias"):
        parameters[f"layers.{last}.{kind}"].mul_(1 / math.sqrt(SIZES[last]))
    return flat


@cache
def pixel_coordinates(side: int = 28) -> Float[Tensor, "2 pixels"]:
    """Coordinates (x, y) of an image's pixels in row order, each in [-1, 1]."""
    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()])


def render(parameters: dict[str, Tensor], side: int = 28) -> Float[Tensor, "*n side side"]:
    """Grey values of every network's image, unclipped; parameters may have any axes before their own."""
    x = pixel_coordinates(side).to(parameters["layers.0.weight"])
    with torch.autocast(x.device.type, enabled=False):  # a sine's phase needs all of its digits
        for i in range(2):
            weight, bias = parameters[f"layers.{i}.weight"], parameters[f"layers.{i}.bias"]
            x = torch.sin(FREQUENCY * (weight @ x + bias.unsqueeze(-1)))
        x = parameters["layers.2.weight"] @ x + parameters["layers.2.bias"].unsqueeze(-1) + OUTPUT_OFFSET
    return x.unflatten(-1, (side, side)).squeeze(-3)


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images with values in [0, 1]."""
    return -10 * torch.log10(mse)


def _step(
    flat: Tensor, mean: Tensor, square: Tensor, target: Tensor, coordinates: Tensor, rates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Adam step for every network whose image has not passed STOP_PSNR: new (flat, mean, square) and the old mse.

    The backward pass is written out, so that one evaluation of each sine layer serves both passes.
    `rates` holds the learning rate over Adam's first bias correction, and the root of the second correction.
    """
    p = unflatten(flat)
    w1, w2, w3 = (p[f"layers.{i}.weight"] for i in range(3))
    b1, b2, b3 = (p[f"layers.{i}.bias"].unsqueeze(-1) for i in range(3))
    z1 = FREQUENCY * (w1[:, :, :1] * coordinates[0] + w1[:, :, 1:] * coordinates[1] + b1)
    s1, c1 = torch.sin(z1), torch.cos(z1)
    z2 = FREQUENCY * (torch.bmm(w2, s1) + b2)
    s2, c2 = torch.sin(z2), torch.cos(z2)
    residual = torch.bmm(w3, s2) + (b3 + OUTPUT_OFFSET) - target.unsqueeze(1)
    mse = residual.square().mean(dim=(1, 2))

    dy = residual * (2 / target.shape[1])
    dz2 = FREQUENCY * c2 * (w3.transpose(1, 2) * dy)
    dz1 = FREQUENCY * c1 * torch.bmm(w2.transpose(1, 2), dz2)
    gradient = torch.cat(
        [
            (dz1 @ coordinates.T).flatten(1),
            dz1.sum(2),
            torch.bmm(dz2, s1.transpose(1, 2)).flatten(1),
            dz2.sum(2),
            torch.bmm(dy, s2.transpose(1, 2)).flatten(1),
            dy.sum(2),
        ],
        dim=1,
    )
    mean = mean + (gradient - mean) * (1 - BETA1)
    square = square * BETA2 + gradient.square() * (1 - BETA2)
    update = rates[0] * mean / (square.sqrt() / rates[1] + EPSILON)
    running = (psnr(mse) < STOP_PSNR).unsqueeze(1)
    return torch.where(running, flat - update, flat), mean, square, mse


@cache
def _compiled_step() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    return torch.compile(_step, dynamic=False)


@dataclass(frozen=True)
class Fit:
    """Fitted networks: parameters by name, (n, out, in) and (n, out), and the PSNR in dB that each reaches, (n,)."""

    parameters: dict[str, Tensor]
    psnr: Float[Tensor, " n"]


@torch.no_grad()
def fit_sirens(
    images: Float[Tensor, "n side side"],
    initial: Float[Tensor, "n 1185"],
    *,
    steps: int,
    learning_rate: float,
    compiled: bool = False,
) -> Fit:
    """Fit one INR to every image, all in one tensor program.

    Args:
        images: grey values in [0, 1].
        initial: the networks' initial parameters, from `initialize`; their dtype and device are used throughout.
        steps: Adam steps per network; one that passes STOP_PSNR keeps its parameters from then on.
        compiled: compile the step (some ten seconds once per shape and machine).

    Raises:
        FloatingPointError: names the first network whose fit diverged.
    """
    step = _compiled_step() if compiled else _step
    side = images.shape[-1]
    target = images.flatten(1).to(initial)
    coordinates = pixel_coordinates(side).to(initial)
    flat, mean, square = initial, torch.zeros_like(initial), torch.zeros_like(initial)
    for i in range(1, steps + 1):
        rates = initial.new_tensor([learning_rate / (1 - BETA1**i), math.sqrt(1 - BETA2**i)])
        flat, mean, square, _ = step(flat, mean, square, target, coordinates, rates)
    parameters = unflatten(flat)
    reached = psnr((render(parameters, side) - images.to(initial)).square().mean(dim=(1, 2)))
    if not torch.isfinite(reached).all():
        worst = int(torch.nonzero(~torch.isfinite(reached))[0])
        raise FloatingPointError(
            f"the fit of INR {worst} of this batch diverged at learning rate {learning_rate}; lower it"
        )
    return Fit(parameters, reached)
