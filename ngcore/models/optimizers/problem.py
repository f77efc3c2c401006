"""Tasks for optimizers: data, a network and a loss; and training on one with any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.digests import tensor_digest

EVALUATION_BATCH = 500
# The first seeds of networks that are measured; those that meta-training trains count from 0.
FIRST_SEED = {"validation": 1_000_000, "test": 2_000_000_000}


@dataclass(frozen=True)
class Task:
    """What an optimizer is to solve; bring any network, data and loss.

    Args:
        build: makes a network with new weights.
        inputs, labels: to train on, indexed by their first axis.
        held_inputs, held_labels: to measure on.
        batch: examples per step, drawn with replacement.
        loss: mean loss of the network's outputs on a batch's labels.
    """

    build: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor
    held_inputs: Tensor
    held_labels: Tensor
    batch: int = 128
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    @property
    def example(self) -> Tensor:
        """Inputs that show a network's graph."""
        return self.inputs[:1]

    @cached_property
    def digest(self) -> str:
        """Of all data."""
        return tensor_digest([self.inputs, self.labels, self.held_inputs, self.held_labels])

    def network(self, seed: int) -> nn.Module:
        """A network whose weights this seed draws, on the data's device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().to(self.inputs.device)

    def backward(self, network: nn.Module, generator: torch.Generator) -> Float[Tensor, ""]:
        """Loss of one batch, drawn by a generator of the CPU, whose gradients take the place of the parameters' own."""
        rows = torch.randint(len(self.labels), (self.batch,), generator=generator).to(self.labels.device)
        network.zero_grad()
        loss = self.loss(network(self.inputs[rows]), self.labels[rows])
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, network: nn.Module, count: int | None = None) -> float:
        """Share of the first `count` held examples, or of all, that the network classifies as labelled."""
        was_training = network.training
        network.eval()
        pairs = zip(
            self.held_inputs[:count].split(EVALUATION_BATCH),
            self.held_labels[:count].split(EVALUATION_BATCH),
            strict=True,
        )
        right = sum((network(x).argmax(1) == y).sum().item() for x, y in pairs)
        network.train(was_training)
        return right / len(self.held_labels[:count])


def train_network(
    task: Task,
    optimize: Callable[[nn.Module], torch.optim.Optimizer],
    seed: int,
    steps: int,
    measured: tuple[int, ...],
    curve_images: int | None = None,
) -> dict[str, Any]:
    """Train a network from new weights with any optimizer: a plain loop.

    Args:
        optimize: makes the optimizer of a network.
        seed: of the weights and of the batches, whichever optimizer it is.
        measured: numbers of steps after which the accuracy is measured.
        curve_images: held examples that it is measured on before the last step.

    Returns:
        `train_loss` of every step's batch before the step; `accuracy` at every measured step; `diverged_at`, None or
        the step whose loss or gradient was not finite: from there on the network stays as it is, and the last finite
        loss is repeated.

    Raises:
        FloatingPointError: the very first loss is not finite.
    """
    torch.manual_seed(seed)  # what networks draw themselves, e.g. dropout
    network = task.network(seed).train()
    optimizer = optimize(network)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    accuracy = []
    diverged_at = None
    for step in range(steps + 1):
        if step in measured:
            accuracy.append(task.accuracy(network, None if step == steps else curve_images))
        if step == steps or diverged_at is not None:
            continue
        loss = task.backward(network, generator).item()
        try:
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss}")
            losses.append(loss)
            optimizer.step()
        except FloatingPointError as error:
            if step == 0:
                raise FloatingPointError(f"step 0: {error}") from error
            diverged_at = step
    losses += losses[-1:] * (steps - len(losses))
    return {"train_loss": [round(loss, 5) for loss in losses], "accuracy": accuracy, "diverged_at": diverged_at}
