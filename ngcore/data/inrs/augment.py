"""Augmentation of INRs of images in weight space: what moves the image moves the first layer's parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes, each drawn anew for every network (Navon et al. 2023).

    Args:
        translate: largest shift along either axis, in coordinates of [-1, 1].
        rotate: largest angle in degrees.
        zoom: largest relative change of scale.
        weight_dropout: probability that a weight is set to zero.
        permute: give the hidden neurons of every layer a random order, which keeps the image as it is.
    """

    translate: float = 0.25
    rotate: float = 45.0
    zoom: float = 0.2
    weight_dropout: float = 1e-2
    permute: bool = False

    def __call__(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Changed copies of a batch of parameters, (batch, out, in) weights and (batch, out) biases."""
        weight, bias = parameters["layers.0.weight"], parameters["layers.0.bias"]
        count = len(weight)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, device=weight.device, dtype=weight.dtype) * 2 - 1

        matrix = (1 + self.zoom * uniform(1, 1)) * rotation(math.radians(self.rotate) * uniform())
        changed = dict(parameters)
        changed["layers.0.weight"] = weight @ matrix
        changed["layers.0.bias"] = bias + (weight @ (self.translate * uniform(2, 1))).squeeze(-1)
        for name, values in changed.items():
            if name.endswith("weight"):
                changed[name] = values * (torch.rand_like(values) >= self.weight_dropout)
        return permuted(changed) if self.permute else changed


def permuted(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of MLPs whose hidden neurons have a random order, drawn for every network and layer."""
    changed = dict(parameters)
    names = [name for name in parameters if name.endswith("weight")]
    for here, following in pairwise(names):
        weight, bias = changed[here], here.replace("weight", "bias")
        order = torch.rand(weight.shape[:2], device=weight.device).argsort(dim=1)
        changed[here] = weight.gather(1, order.unsqueeze(2).expand_as(weight))
        changed[bias] = changed[bias].gather(1, order)
        changed[following] = changed[following].gather(2, order.unsqueeze(1).expand_as(changed[following]))
    return changed


def rotation(angle: Tensor) -> Tensor:
    """Matrices (batch, 2, 2) that rotate by angles (batch,) in radians."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
