"""Edits of images: what an edited INR has to render."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ngcore.data.inrs.augment import rotation

ANGLE = 15.0  # degrees, of the edit "rotation"

Images = Float[Tensor, "n side side"]


def dilate(images: Images) -> Images:
    """The largest value in every pixel's 3 x 3 neighbourhood; outside of the image there is nothing."""
    return F.max_pool2d(images.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)


def erode(images: Images) -> Images:
    """The smallest value in every pixel's 3 x 3 neighbourhood."""
    return -dilate(-images)


def rotate(images: Images) -> Images:
    """Turned counter-clockwise by ANGLE about the centre, interpolated bilinearly, black where nothing was."""
    turn = rotation(torch.tensor([math.radians(ANGLE)])).to(images)
    matrix = torch.cat([turn, turn.new_zeros(1, 2, 1)], dim=2).expand(len(images), 2, 3)
    side = images.shape[-1]
    grid = F.affine_grid(matrix, [len(images), 1, side, side], align_corners=True)
    return F.grid_sample(images.unsqueeze(1), grid, align_corners=True).squeeze(1)


EDITS: dict[str, Callable[[Images], Images]] = {"dilation": dilate, "erosion": erode, "rotation": rotate}
