"""What NG-GNN's nodes gather from a block of messages: their sum, sum of squares, minimum and maximum.

The backward pass is by hand. Left to autograd and a compiler's fusion, every message would recompute the factors that
all messages of a node share (divisions, roots, counts of ties), which costs more than the messages themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def messages(scale: Tensor, shift: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """FiLM of the pair's linear part by its edge (paper, equation 4), (batch, targets, sources, width); of bfloat16
    numbers in float32."""
    scale, shift, targets, sources = map(at_least_float32, (scale, shift, targets, sources))
    return scale * (targets.unsqueeze(2) + sources.unsqueeze(1)) + shift


def at_least_float32(x: Tensor) -> Tensor:
    """Numbers that sums and variances may be taken of: none with fewer digits than float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Moments(torch.autograd.Function):
    """Sum, sum of squares, minimum and maximum of a block's messages over the sources of every target.

    Ties share the gradient of a minimum or maximum in equal parts, so that it does not depend on the neurons' order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scale: Float[Tensor, "batch targets sources width"],
        shift: Float[Tensor, "batch targets sources width"],
        targets: Float[Tensor, "batch targets width"],
        sources: Float[Tensor, "batch sources width"],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        message = messages(scale, shift, targets, sources)
        low, high = message.amin(2), message.amax(2)
        ctx.save_for_backward(scale, shift, targets, sources, low, high)
        return message.sum(2), message.square().sum(2), low, high

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, shift, targets, sources, low, high = ctx.saved_tensors
        message = messages(scale, shift, targets, sources)
        if message.dtype != scale.dtype:  # a compiler may round the inputs to bfloat16 here and not there: no message
            low, high = message.amin(2), message.amax(2)  # would be the lowest
        lowest = (message == low.unsqueeze(2)).to(message.dtype)
        highest = (message == high.unsqueeze(2)).to(message.dtype)
        factors = message_factors(*gradients, lowest.sum(2), highest.sum(2)).unsqueeze(3)
        d_message = factors[0] + factors[1] * message + factors[2] * lowest + factors[3] * highest
        d_pair = d_message * at_least_float32(scale)
        d_scale = d_message * (at_least_float32(targets).unsqueeze(2) + at_least_float32(sources).unsqueeze(1))
        found = d_scale, d_message, d_pair.sum(2), d_pair.sum(1)
        return tuple(d.to(x.dtype) for d, x in zip(found, ctx.saved_tensors, strict=False))


# An operator of our own, so that a compiler can't fuse it into what runs for every message.
@torch.library.custom_op(
    "ngcore::message_factors",
    mutates_args=(),
    schema="(Tensor d_sum, Tensor d_square, Tensor d_low, Tensor d_high, Tensor lowest, Tensor highest) -> Tensor",
)
def message_factors(
    d_sum: Tensor, d_square: Tensor, d_low: Tensor, d_high: Tensor, lowest: Tensor, highest: Tensor
) -> Tensor:
    """Per node: what a message's gradient takes as it is, per value of the message, if it is lowest, if highest."""
    return torch.stack([d_sum, 2 * d_square, d_low / lowest, d_high / highest])


@message_factors.register_fake
def _(d_sum: Tensor, *_: Tensor) -> Tensor:
    return d_sum.new_empty(4, *d_sum.shape)
