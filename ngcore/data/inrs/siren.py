"""Fitting many SIRENs at once: one tensor program takes an optimizer step for a whole batch of networks.

`INR` and its recipe are the ones of the published INR data sets (Navon et al. 2023), described in data/README.md:
layers 2-32-32-1, sin(30 (W x + b)) twice, a linear output plus 0.5, Adam on the mean squared error over all pixels, an
independent random initialization per image, stopped where the reconstruction passes 40 dB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ngcore.precision import exact

OUTPUT_OFFSET = 0.5  # added to the last layer, so that an untrained INR is mid-grey
STOP_PSNR = 40.0  # dB
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's, as in torch.optim

State = tuple[Tensor, Tensor, Tensor]


@cache
def pixel_coordinates(side: int = 28, axes: int = 2) -> Float[Tensor, "axes points"]:
    """Coordinates (x, y, ...) of an image's pixels or a volume's voxels in the order of their memory, in [-1, 1]."""
    axis = torch.linspace(-1, 1, side)
    slowest_first = torch.meshgrid(*[axis] * axes, indexing="ij")
    return torch.stack([coordinate.flatten() for coordinate in reversed(slowest_first)])


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images with values in [0, 1]."""
    return -10 * torch.log10(mse)


@dataclass(frozen=True)
class Fit:
    """Fitted networks: parameters by name, (n, out, in) and (n, out), and the PSNR in dB that each reaches, (n,)."""

    parameters: dict[str, Tensor]
    psnr: Float[Tensor, " n"]


@dataclass(frozen=True)
class Siren:
    """An architecture of sinusoidal networks, from coordinates to the values of an image or a volume.

    Attributes:
        sizes: of its layers: the coordinates, one or more sine layers, the values of a point.
        omega: ω₀, which all sine layers multiply their sums with.

    Raises:
        ValueError: it has no sine layer.
    """

    sizes: tuple[int, ...]
    omega: float

    def __post_init__(self) -> None:
        if len(self.sizes) < 3:
            raise ValueError(f"a SIREN has at least one sine layer between its ends, got sizes {self.sizes}")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        return {
            f"layers.{i}.{kind}": (fan_out, fan_in) if kind == "weight" else (fan_out,)
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise(self.sizes))
            for kind in ("weight", "bias")
        }

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def unflatten(self, flat: Float[Tensor, "n parameters"]) -> dict[str, Tensor]:
        """Views of flat parameter vectors, by parameter name: (n, out, in) weights and (n, out) biases."""
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def initialize(self, seeds: Iterable[int]) -> Float[Tensor, "n parameters"]:
        """Initial parameters, each network's drawn from its own seed below 2³²: an INR does not depend on its batch.

        Sine layers ~ U(±sqrt(6 / fan_in) / ω₀), the first included, with zero biases; the last layer is PyTorch's
        default.
        """
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            rows.append(torch.rand(self.num_parameters, generator=generator).mul_(2).sub_(1))
        flat = torch.stack(rows)
        *sine_layers, (last_weight, last_bias) = self._layers(flat)
        for fan_in, (weight, bias) in zip(self.sizes, sine_layers, strict=False):
            weight.mul_(math.sqrt(6 / fan_in) / self.omega)
            bias.zero_()
        for values in (last_weight, last_bias):
            values.mul_(1 / math.sqrt(self.sizes[-2]))
        return flat

    def render(self, parameters: dict[str, Tensor], side: int = 28) -> Float[Tensor, "*n side"]:
        """Values of every network's image or volume, unclipped; parameters may have any axes before their own.

        Shapes:
            output: (*n, side, side) for two coordinates and one value of a point, (*n, 3, side, side) for three values
        """
        axes, first = self.sizes[0], parameters["layers.0.weight"]
        x = _coordinates_like(first.dtype, first.device, side, axes)
        with exact(x.device.type):  # a sine's phase needs all of its digits
            for i in range(len(self.sizes) - 1):
                x = torch.sin(self.omega * x) if i else x
                x = parameters[f"layers.{i}.weight"] @ x + parameters[f"layers.{i}.bias"].unsqueeze(-1)
            x = x + OUTPUT_OFFSET
        return x.unflatten(-1, (side,) * axes).squeeze(-1 - axes)

    def step(self, state: State, target: Tensor, coordinates: Tensor, rates: Tensor) -> State:
        """One Adam step for every network that has not passed STOP_PSNR: flat parameters and both moments.

        The backward pass is written out, so that one evaluation of each sine layer serves both passes.
        `rates` holds the learning rate over Adam's first bias correction, and the root of the second correction.

        Shapes:
            target: (n, values of a point, points)
            coordinates: (axes, points)
        """
        flat, mean, square = state
        gradient, mse = self._gradient(flat, target, coordinates)
        mean = mean + (gradient - mean) * (1 - BETA1)
        square = square * BETA2 + gradient.square() * (1 - BETA2)
        update = rates[0] * mean / (square.sqrt() / rates[1] + EPSILON)
        running = (psnr(mse) < STOP_PSNR).unsqueeze(1)
        return torch.where(running, flat - update, flat), mean, square

    def _gradient(self, flat: Tensor, target: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Of every network's mean squared error, (n, parameters), and that error, (n,)."""
        layers = self._layers(flat)
        inputs, slopes = [coordinates], []
        for i, (weight, bias) in enumerate(layers[:-1]):
            sums = torch.bmm(weight, inputs[-1]) if i else _outer_sum(weight, coordinates)
            phases = self.omega * (sums + bias.unsqueeze(-1))
            inputs.append(torch.sin(phases))
            slopes.append(torch.cos(phases))
        weight, bias = layers[-1]
        residual = torch.bmm(weight, inputs[-1]) + (bias.unsqueeze(-1) + OUTPUT_OFFSET) - target
        delta = residual * (2 / target[0].numel())
        parts = []
        for i in reversed(range(len(layers))):
            parts += [delta.sum(2), (delta @ inputs[i].transpose(-2, -1)).flatten(1)]
            if i:
                weight = layers[i][0].transpose(1, 2)
                back = weight * delta if weight.shape[2] == 1 else torch.bmm(weight, delta)
                delta = self.omega * slopes[i - 1] * back
        return torch.cat(parts[::-1], dim=1), residual.square().mean(dim=(1, 2))

    def _layers(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every layer, as views of flat parameters."""
        parts = list(self.unflatten(flat).values())
        return list(zip(parts[::2], parts[1::2], strict=True))

    @torch.no_grad()
    def fit(
        self,
        images: Float[Tensor, "n *image side"],
        initial: Float[Tensor, "n parameters"],
        *,
        steps: int,
        learning_rate: float,
        compiled: bool = False,
    ) -> Fit:
        """Fit one INR to every image, all in one tensor program.

        Args:
            images: values in [0, 1], of the shape that `render` gives.
            initial: the networks' initial parameters, from `initialize`; their dtype and device are used throughout.
            steps: Adam steps per network; one that passes STOP_PSNR keeps its parameters from then on.
            compiled: compile the step (some ten seconds once per shape and machine).

        Raises:
            FloatingPointError: names the first network whose fit diverged.
        """
        step = _compiled_step(self) if compiled else self.step
        side = images.shape[-1]
        target = images.reshape(len(images), self.sizes[-1], -1).to(initial)
        coordinates = _coordinates_like(initial.dtype, initial.device, side, self.sizes[0])
        rates = [(learning_rate / (1 - BETA1**i), math.sqrt(1 - BETA2**i)) for i in range(1, steps + 1)]
        state = initial, torch.zeros_like(initial), torch.zeros_like(initial)
        with exact(initial.device.type):
            for own in initial.new_tensor(rates):  # on the device beforehand: no step waits for one
                state = step(state, target, coordinates, own)
        parameters = self.unflatten(state[0])
        reached = psnr((self.render(parameters, side) - images.to(initial)).square().flatten(1).mean(1))
        if not torch.isfinite(reached).all():
            worst = int(torch.nonzero(~torch.isfinite(reached))[0])
            raise FloatingPointError(
                f"the fit of INR {worst} of this batch diverged at learning rate {learning_rate}; lower it"
            )
        return Fit(parameters, reached)


@cache
def _coordinates_like(dtype: torch.dtype, device: torch.device, side: int, axes: int) -> Float[Tensor, "axes points"]:
    """`pixel_coordinates`, brought to a device once."""
    return pixel_coordinates(side, axes).to(device, dtype)


def _outer_sum(weight: Tensor, coordinates: Tensor) -> Tensor:
    """weight @ coordinates, (n, out, points), for the few coordinates of a point: faster than a product of matrices."""
    total = weight[:, :, :1] * coordinates[0]
    for axis in range(1, len(coordinates)):
        total = total + weight[:, :, axis : axis + 1] * coordinates[axis]
    return total


@cache
def _compiled_step(siren: Siren) -> Callable[..., State]:
    return torch.compile(siren.step, dynamic=False)


# The study's
INR = Siren((2, 32, 32, 1), 30.0)
SIZES, SHAPES = INR.sizes, INR.shapes
unflatten, initialize, render, fit_sirens = INR.unflatten, INR.initialize, INR.render, INR.fit
