"""What a task gives the training loop, and how long and in what steps it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Args:
        epochs: passes over the training set; an incomplete last batch is left for the next epoch's shuffle.
        batch: networks per optimizer step.
        warmup: steps over which the learning rate rises linearly.
        decay: lower the learning rate along a cosine to zero after the warm-up (the papers keep it constant).
        clip: largest norm of the gradient.
        precision: "float32", or "bfloat16" for autocast.
    """

    epochs: int
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    warmup: int = 1000
    decay: bool = False
    clip: float = 10.0
    precision: str = "float32"


@runtime_checkable
class Problem(Protocol):
    """What a task gives the loop."""

    model: nn.Module
    train_size: int

    def loss(self, rows: Tensor) -> Tensor:
        """Summed loss of these rows of the training set, augmented at random."""

    def validate(self) -> dict[str, float]:
        """Metrics on the validation set; the weights with the highest `val_score` are kept."""

    def test(self) -> dict[str, Any]:
        """Metrics on the test set, with the best weights loaded."""
