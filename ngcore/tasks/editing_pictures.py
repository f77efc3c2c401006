"""Pictures of single INRs in the records of editing runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def example_rows(labels: Int[Tensor, " n"]) -> Int[Tensor, " k"]:
    """The first row of every class that there is: what pictures show."""
    return torch.stack([torch.nonzero(labels == label)[0, 0] for label in labels.unique()])


def encode(images: Float[Tensor, "k side side"]) -> list[str]:
    """Grey values from 0 to 1 as two hexadecimal digits each: small enough to stand in a stored record."""
    return [bytes(image.tolist()).hex() for image in (images.clamp(0, 1) * 255).round().to(torch.uint8).flatten(1)]


def decode(texts: Sequence[str]) -> Float[Tensor, "k side side"]:
    """The inverse of `encode`."""
    grey = torch.tensor([list(bytes.fromhex(text)) for text in texts])
    side = math.isqrt(grey.shape[1])
    return grey.view(-1, side, side) / 255
