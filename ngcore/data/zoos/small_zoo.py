"""Training thousands of tiny CNNs at once: one tensor program takes an optimizer step for a group of networks.

The networks are those of the Small CNN Zoo (Unterthiner et al. 2020): three 3x3 convolutions of 16 channels with stride
2 and no padding on grey 32x32 images, an activation after each, global average pooling, dropout and a linear layer.
Every network has hyperparameters of its own: optimizer, learning rate, initialization, weight decay, dropout, data.

Images of a batch lie side by side in memory (the last axis), so that convolutions are products of a network's
(16, 9 channels) weights with long rows, and every other operation runs along the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

SIDE = 32  # of an image
CHANNELS = (1, 16, 16, 16)
NUM_CLASSES = 10
KERNEL, STRIDE = 3, 2  # `_fold` relies on their values
SHAPES = {
    f"layers.{i}.{kind}": (channels_out, channels_in, KERNEL, KERNEL) if kind == "weight" else (channels_out,)
    for i, (channels_in, channels_out) in enumerate(itertools.pairwise(CHANNELS))
    for kind in ("weight", "bias")
} | {"fc.weight": (NUM_CLASSES, CHANNELS[-1]), "fc.bias": (NUM_CLASSES,)}
NUM_PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())

Activation = Literal["relu", "tanh"]
ACTIVATIONS = get_args(Activation)
OPTIMIZERS = ("sgd", "adam", "rmsprop")
INITIALIZATIONS = ("glorot_normal", "he_normal", "orthogonal", "normal", "truncated_normal")
FRACTIONS = (0.1, 0.25, 0.5, 1.0)
EPSILON = 1e-8  # Adam's and RMSprop's, as in torch.optim
# decay per step of the running means of the gradient and of its square; 0 forgets, so that the mean is the gradient
DECAYS = {"sgd": (0.0, 0.0), "adam": (0.9, 0.999), "rmsprop": (0.0, 0.99)}

CHUNK = 16  # steps whose random numbers are drawn at once
EVALUATED = {"cpu": 256, "cuda": 1 << 15}  # networks times images per forward pass of `accuracy`


@dataclass(frozen=True)
class Draw:
    """Hyperparameters of one network.

    Attributes:
        learning_rate: constant over training.
        initialization: of the weights; biases start at zero. Glorot's and He's normal distributions, orthogonal
            matrices with gain 1, or (truncated) normal ones.
        scale: standard deviation of "normal" and, before values beyond two of it are drawn again, of
            "truncated_normal". The other three fix their own scale and ignore this one: as a gain of theirs, 1e-3 would
            shrink signals a billion times over three convolutions.
        l2: the loss holds l2 times the sum of squared weights, biases excluded.
        dropout: probability of zeroing a pooled feature.
        fraction: share of the training images that the network ever sees.

    Raises:
        ValueError: an unknown optimizer or initialization.
    """

    optimizer: str
    learning_rate: float
    initialization: str
    scale: float
    l2: float
    dropout: float
    fraction: float

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        if self.initialization not in INITIALIZATIONS:
            raise ValueError(f"initialization must be one of {INITIALIZATIONS}, got {self.initialization!r}")


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def draw(seed: int, index: int) -> Draw:
    """The hyperparameters of network `index` of the zoo `seed`, both at least 0: a pure function of both."""
    generator = np.random.default_rng((seed, index))
    return Draw(
        optimizer=OPTIMIZERS[generator.integers(len(OPTIMIZERS))],
        learning_rate=_log_uniform(generator, 5e-4, 5e-2),
        initialization=INITIALIZATIONS[generator.integers(len(INITIALIZATIONS))],
        scale=_log_uniform(generator, 1e-3, 1.0),
        l2=_log_uniform(generator, 1e-8, 1e-2),
        dropout=generator.uniform(0, 0.7),
        fraction=FRACTIONS[generator.integers(len(FRACTIONS))],
    )


def unflatten(flat: Float[Tensor, "n 4970"]) -> dict[str, Tensor]:
    """Views of flat parameter vectors, by parameter name: (n, *shape)."""
    parts = flat.split([math.prod(shape) for shape in SHAPES.values()], dim=1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def _initialize(draw: Draw, generator: torch.Generator) -> Float[Tensor, " 4970"]:
    flat = torch.zeros(1, NUM_PARAMETERS)
    for name, (weight,) in unflatten(flat).items():
        if name.endswith("bias"):
            continue
        if draw.initialization == "glorot_normal":
            nn.init.xavier_normal_(weight, generator=generator)
        elif draw.initialization == "he_normal":
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        elif draw.initialization == "orthogonal":
            nn.init.orthogonal_(weight, generator=generator)
        elif draw.initialization == "normal":
            nn.init.normal_(weight, std=draw.scale, generator=generator)
        else:
            limit = 2 * draw.scale
            nn.init.trunc_normal_(weight, std=draw.scale, a=-limit, b=limit, generator=generator)
    return flat[0]


def _columns(x: Float[Tensor, "n c side side b"]) -> Float[Tensor, "n 9*c pixels_b"]:
    """What a convolution sees: for every channel and kernel position, its value at every pixel of the result."""
    windows = x.unfold(2, KERNEL, STRIDE).unfold(3, KERNEL, STRIDE)
    return windows.permute(0, 1, 5, 6, 2, 3, 4).flatten(4).flatten(1, 3)


def _fold(
    columns: Float[Tensor, "n rows {side**2*batch}"], side: int, batch: int
) -> Float[Tensor, "n c {2*side+1} {2*side+1} {batch}"]:
    """The adjoint of `_columns`: every pixel's sum over the windows that hold it, `side` the windows per row.

    Kernel rows 0 and 1 tile rows 0 to 2 side - 1 of the image, two by two. Row 2 is row 0 of the tile below. So the
    image in tiles of 2x2 is a sum of four padded tensors, two choices for rows by two for columns.
    """
    tiles = columns.unflatten(2, (side, side, batch)).unflatten(1, (-1, KERNEL, KERNEL)).permute(0, 1, 4, 2, 5, 3, 6)
    # kernel positions, then the padding of (tiles, positions in a tile), last axis first as F.pad has it
    within, below = (slice(0, 2), (0, 0, 0, 1)), (slice(2, 3), (0, 1, 1, 0))
    image = sum(
        F.pad(tiles[:, :, :, rows, :, columns], (0, 0, *pad_columns, *pad_rows))
        for rows, pad_rows in (within, below)
        for columns, pad_columns in (within, below)
    )
    return image.flatten(4, 5).flatten(2, 3)[:, :, : 2 * side + 1, : 2 * side + 1]


def _activate(x: Tensor, activation: Activation) -> Tensor:
    return x.relu() if activation == "relu" else x.tanh()


def _derivative(activated: Tensor, activation: Activation) -> Tensor:
    """The activation's derivative where its value is `activated`."""
    return (activated > 0).to(activated) if activation == "relu" else 1 - activated.square()


@dataclass(frozen=True)
class _Pass:
    """What the backward pass needs of a forward pass.

    Shapes:
        columns, activated: per convolution, (n, 9 channels, pixels * b) of its input and (n, channels, side, side, b)
        pooled: (n, channels, b)
    """

    columns: list[Tensor]
    activated: list[Tensor]
    pooled: Tensor


def _convolve(p: dict[str, Tensor], images: Float[Tensor, "n side side b"], activation: Activation) -> _Pass:
    x = images.unsqueeze(1)
    columns, activated = [], []
    for i in range(len(CHANNELS) - 1):
        side = (x.shape[2] - KERNEL) // STRIDE + 1
        columns.append(_columns(x))
        x = torch.bmm(p[f"layers.{i}.weight"].flatten(2), columns[-1]) + p[f"layers.{i}.bias"].unsqueeze(-1)
        x = _activate(x, activation).unflatten(2, (side, side, -1))
        activated.append(x)
    return _Pass(columns, activated, x.mean(dim=(2, 3)))


def _logits(p: dict[str, Tensor], features: Float[Tensor, "n 16 b"]) -> Float[Tensor, "n 10 b"]:
    return torch.bmm(p["fc.weight"], features) + p["fc.bias"].unsqueeze(-1)


def _gradient(
    flat: Float[Tensor, "n 4970"],
    images: Float[Tensor, "1024 n_b"],
    labels: Int[Tensor, "n b"],
    kept: Float[Tensor, "n 16 b"],
    activation: Activation,
) -> Float[Tensor, "n 4970"]:
    """The gradient of every network's cross entropy, written out: the columns of the forward pass serve it too.

    `images` holds the networks' batches side by side; `kept` multiplies the pooled features, which is dropout.
    """
    p = unflatten(flat)
    forward = _convolve(p, images.unflatten(1, labels.shape).unflatten(0, (SIDE, SIDE)).permute(2, 0, 1, 3), activation)
    features = forward.pooled * kept
    batch = features.shape[2]
    probabilities = _logits(p, features).softmax(dim=1)
    classes = torch.arange(NUM_CLASSES, device=labels.device).unsqueeze(1)
    dz = (probabilities - (labels.unsqueeze(1) == classes).to(flat)) / batch
    gradients = [dz.sum(2), torch.bmm(dz, features.transpose(1, 2)).flatten(1)]
    side = forward.activated[-1].shape[2]
    dx = (torch.bmm(p["fc.weight"].transpose(1, 2), dz) * kept / side**2).unsqueeze(2).unsqueeze(2)
    for i in reversed(range(len(CHANNELS) - 1)):
        activated = forward.activated[i]
        dz = (dx * _derivative(activated, activation)).flatten(2)
        # few columns by many channels, then transposed: a third faster than the other way round at the first layer
        weight = torch.bmm(forward.columns[i], dz.transpose(1, 2)).transpose(1, 2)
        gradients += [dz.sum(2), weight.flatten(1)]
        if i > 0:
            dx = _fold(torch.bmm(p[f"layers.{i}.weight"].flatten(2).transpose(1, 2), dz), activated.shape[2], batch)
    return torch.cat(gradients[::-1], dim=1)


def _step(
    flat: Tensor,
    mean: Tensor,
    square: Tensor,
    images: Tensor,
    labels: Tensor,
    kept: Tensor,
    rates: Tensor,
    decays: Tensor,
    weight_decay: Tensor,
    adaptive: Tensor,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every network, by its own optimizer: new (flat, mean, square).

    All three optimizers are one formula: the gradient's running mean over the root of the running mean of its square.
    `rates` holds the learning rate over the first bias correction, and the root of the second correction.
    """
    gradient = _gradient(flat, images, labels, kept, activation) + weight_decay * flat
    mean = mean + (gradient - mean) * (1 - decays[0])
    square = square * decays[1] + gradient.square() * (1 - decays[1])
    divisor = torch.where(adaptive, square.sqrt() / rates[1] + EPSILON, 1.0)
    return flat - rates[0] * mean / divisor, mean, square


@cache
def _compiled_step() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_step, dynamic=False)


@dataclass
class Choices:
    """The random choices of one network, in an order that its draw and seed fix, whatever its group and device."""

    draw: Draw
    seed: int
    num_images: int
    batch: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.initial = _initialize(self.draw, self.generator)
        seen = max(1, round(self.draw.fraction * self.num_images))
        self.images = torch.randperm(self.num_images, generator=self.generator)[:seen]

    def chunk(self) -> tuple[Int[Tensor, "steps b"], Bool[Tensor, "steps 16 b"]]:
        """Of the next CHUNK steps: the images, and which pooled features are kept."""
        rows = torch.randint(len(self.images), (CHUNK, self.batch), generator=self.generator)
        noise = torch.rand(CHUNK, CHANNELS[-1], self.batch, generator=self.generator)
        return self.images[rows], noise >= self.draw.dropout


def _check(images: Tensor, labels: Tensor, activation: str) -> None:
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"images must have shape (n, {SIDE}, {SIDE}), got {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need one label each, got labels of shape {tuple(labels.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")


@torch.no_grad()
def train(
    images: Float[Tensor, "images height width"],
    labels: Int[Tensor, " labels"],
    draws: Sequence[Draw],
    activation: str,
    seeds: Sequence[int],
    *,
    steps: int,
    batch: int,
    compiled: bool = False,
) -> dict[str, Tensor]:
    """Train one network per draw, all in one tensor program; parameters by name, (networks, *shape).

    A network is a function of its draw, its seed, the activation and the images: what is drawn at random is the same
    in any group and on any device, and only rounding differs. More steps go on from where fewer end. A network that
    diverges holds values that are not finite, and leaves the others alone.

    Args:
        images: (n, 32, 32); their dtype and device are used throughout.
        labels: (n,) class, 0 to 9.
        seeds: one per network, of its initialization, its share of the images, its batches and its dropout.
        steps: per network; each sees `batch` images, drawn with replacement.
        compiled: compile the step (half a minute once per shape, activation and machine).

    Raises:
        ValueError: an unknown activation, images or labels of another shape, no draw, not one seed per draw, steps or
            batch below 1.
    """
    _check(images, labels, activation)
    _check_work(draws, seeds, steps, batch)
    step = _compiled_step() if compiled else _step
    choices = [Choices(draw, seed, len(images), batch) for draw, seed in zip(draws, seeds, strict=True)]
    learning_rate, decays, corrected, keep, constants = _hyperparameters(draws, images)
    flat = torch.stack([each.initial for each in choices]).to(images)
    mean, square = torch.zeros_like(flat), torch.zeros_like(flat)
    pixels, t = images.flatten(1), torch.arange(1, CHUNK + 1)[:, None, None]
    for first in range(0, steps, CHUNK):
        rows, kept = (torch.stack(parts, dim=1) for parts in zip(*(each.chunk() for each in choices), strict=True))
        corrections = 1 - corrected * decays.unsqueeze(1) ** (first + t)
        rates = torch.stack([learning_rate / corrections[0], corrections[1].sqrt()], dim=1).to(images)
        rows, kept = rows.to(images.device), (kept / keep.unsqueeze(2)).to(images)
        for k in range(min(CHUNK, steps - first)):
            seen = pixels.index_select(0, rows[k].flatten()).T.contiguous(), labels[rows[k]], kept[k]
            flat, mean, square = step(flat, mean, square, *seen, rates[k], *constants, activation)
    return unflatten(flat)


def _check_work(draws: Sequence[Draw], seeds: Sequence[int], steps: int, batch: int) -> None:
    if not draws or len(draws) != len(seeds):
        raise ValueError(f"every network needs a draw and a seed, got {len(draws)} draws and {len(seeds)} seeds")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps and batch must be at least 1, got {steps} and {batch}")


def _hyperparameters(draws: Sequence[Draw], images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Of every network, (networks, 1): learning rate; decays of both means, whether they are corrected for starting at
    zero; the share that dropout keeps; and what every step takes: decays, weight decay, and which do not use SGD."""

    def per_network(values: Sequence[float]) -> Float[Tensor, "n 1"]:
        return torch.tensor(values, dtype=torch.float64).unsqueeze(1)

    learning_rate = per_network([draw.learning_rate for draw in draws])
    decays = torch.stack([per_network([DECAYS[draw.optimizer][k] for draw in draws]) for k in range(2)])
    corrected = per_network([float(draw.optimizer == "adam") for draw in draws])
    keep = 1 - per_network([draw.dropout for draw in draws])
    is_weight = torch.cat([torch.full((math.prod(shape),), float(len(shape) > 1)) for shape in SHAPES.values()])
    constants = [
        decays.to(images),
        (per_network([2 * draw.l2 for draw in draws]) * is_weight).to(images),
        torch.tensor([[draw.optimizer != "sgd"] for draw in draws], device=images.device),
    ]
    return learning_rate, decays, corrected, keep, constants


@torch.no_grad()
def accuracy(
    parameters: dict[str, Tensor],
    images: Float[Tensor, "images height width"],
    labels: Int[Tensor, " labels"],
    activation: str,
) -> Float[Tensor, " networks"]:
    """The share of images that each network puts in their class, without dropout; nothing is raised for NaN.

    Args:
        parameters: by name, (networks, *shape), as `train` returns them.
        images, labels: (n, 32, 32) and (n,), on the parameters' device.

    Raises:
        ValueError: an unknown activation, images or labels of another shape.
    """
    _check(images, labels, activation)
    networks, size = len(parameters["fc.bias"]), EVALUATED[images.device.type]
    right = labels.new_zeros(networks)
    for some in torch.arange(networks).split(size):
        p = {name: values[some].to(images) for name, values in parameters.items()}
        for rows in torch.arange(len(images)).split(max(1, size // len(some))):
            x = images[rows].permute(1, 2, 0).expand(len(some), -1, -1, -1)
            predicted = _logits(p, _convolve(p, x, activation).pooled).argmax(dim=1)
            right[some] += (predicted == labels[rows]).sum(dim=1)
    return right / len(images)
