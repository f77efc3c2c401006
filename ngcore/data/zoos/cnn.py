"""CNNs of the zoos: convolutions with skip connections between any of them, average pooling, a linear layer."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ngcore.activations import function_of

ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid", "leaky_relu", "identity")


@dataclass(frozen=True)
class Architecture:
    """What a CNN is without its weights. Hashable, so that networks can be sorted by it.

    Args:
        channels: of the images and of every convolution's output.
        kernel_size, stride, padding, activation: of every convolution; kernels are square.
        residual: for every convolution -1, or an earlier one with at least one between them, whose output is added to
            what enters this one's activation, on the channels that both have (paper, appendix E.1); their images must
            have the same size.
        classes: outputs of the linear layer.
        pool: the last images are averaged over pool x pool equal parts, which are flattened (channel by channel); with
            1, global average pooling, nothing is left to flatten.

    Raises:
        ValueError: names what is wrong.
    """

    channels: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    activation: tuple[str, ...]
    residual: tuple[int, ...]
    classes: int = 10
    pool: int = 1

    def __post_init__(self) -> None:
        layers = len(self.channels) - 1
        if layers < 1:
            raise ValueError(f"channels of the images and of at least one convolution are needed, got {self.channels}")
        for name in ("kernel_size", "stride", "padding", "activation", "residual"):
            if len(getattr(self, name)) != layers:
                raise ValueError(f"{name} = {getattr(self, name)} is not of {layers} convolutions")
        for name, least in (("channels", 1), ("kernel_size", 1), ("stride", 1), ("padding", 0)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if min(self.classes, self.pool) < 1:
            raise ValueError(f"classes and pool are at least 1, got {self.classes} and {self.pool}")
        for activation in self.activation:
            if activation not in ACTIVATIONS:
                raise ValueError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
        for layer, earlier in enumerate(self.residual):
            self._check_residual(layer, earlier)

    def _check_residual(self, layer: int, earlier: int) -> None:
        where = f"residual = {self.residual}: convolution {layer}"
        if not (earlier == -1 or 0 <= earlier <= layer - 2):
            raise ValueError(f"{where} can add -1 (nothing), or one from 0 on with at least one between, not {earlier}")
        for i in range(earlier + 1, layer + 1 if earlier >= 0 else 0):
            if self.stride[i] != 1 or 2 * self.padding[i] != self.kernel_size[i] - 1:
                raise ValueError(
                    f"{where} adds convolution {earlier}, but convolution {i} changes the size of images: there the "
                    "stride must be 1 and the padding half of the kernel"
                )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name, in the order of the layers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, ((before, after), k) in enumerate(zip(itertools.pairwise(self.channels), self.kernel_size, strict=True)):
            shapes |= {f"layers.{i}.weight": (after, before, k, k), f"layers.{i}.bias": (after,)}
        return shapes | {"fc.weight": (self.classes, self.channels[-1] * self.pool**2), "fc.bias": (self.classes,)}

    def as_json(self) -> dict[str, Any]:
        """For a file; `from_json` takes it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Architecture:
        """The inverse of `as_json`.

        Raises:
            ValueError: values are missing or unknown, or do not make a network.
        """
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        except TypeError as error:
            raise ValueError(f"not an architecture: {error}") from error


class CNN(nn.Module):
    """A network of an architecture, with PyTorch's default initialization."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        shapes = zip(a.channels, a.channels[1:], a.kernel_size, a.stride, a.padding, strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(*shape) for shape in shapes)
        self.fc = nn.Linear(a.channels[-1] * a.pool**2, a.classes)
        self.architecture = a

    def forward(self, images: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        x, outputs = images, []
        for layer, earlier, activation in zip(
            self.layers, self.architecture.residual, self.architecture.activation, strict=True
        ):
            x = layer(x)
            if earlier >= 0:
                added = outputs[earlier][:, : x.shape[1]]
                x = x + F.pad(added, (0, 0, 0, 0, 0, x.shape[1] - added.shape[1]))
            x = function_of(activation)(x)
            outputs.append(x)
        pool = self.architecture.pool
        return self.fc(x.mean(dim=(2, 3)) if pool == 1 else F.adaptive_avg_pool2d(x, pool).flatten(1))
