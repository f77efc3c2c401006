"""Train a metanetwork on networks and labels of one's own, by the loop that the study's runs go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from ngcore.graph import NeuralGraph
from ngcore.graph.collection import Collection
from ngcore.study.step import Step
from ngcore.study.training import Schedule, new_state, optimizer_of, tested
from ngcore.study.training import epochs as _epochs

EVALUATION_BATCH = 64
Networks = NeuralGraph | Collection


@dataclass(frozen=True)
class Fit:
    """A trained metanetwork: `model` with the weights of the best epoch, in evaluation mode.

    Attributes:
        history: a row per epoch: train_loss, val_loss, val_score.
        validation, test: the networks that were not trained on.
        score: on the test networks: accuracy for labels, the negative squared error for numbers.
    """

    model: nn.Module
    history: pd.DataFrame
    validation: Int[Tensor, " some"]
    test: Int[Tensor, " others"]
    score: float


class OwnNetworks:
    """The problem that the training loop solves (`ngcore.study.training.Problem`): labels, or numbers, of networks."""

    def __init__(self, model: nn.Module, networks: Networks, targets: Tensor, rows: dict[str, Tensor]) -> None:
        self.model, self.networks, self.targets, self.rows = model, networks, targets, rows
        self.train_size = len(rows["train"])
        self.is_class = not targets.is_floating_point()
        model.fit_normalization(networks, rows["train"])

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed."""
        if self.is_class:
            return F.cross_entropy(outputs, targets, reduction="sum")
        return F.mse_loss(outputs.view(targets.shape), targets, reduction="sum")

    def loss(self, rows: Tensor) -> Tensor:
        own = self.rows["train"][rows]
        return self.losses(self.model(self.networks[own]), self.targets[own])

    def measure(self, split: str) -> tuple[float, float]:
        """Mean loss and score."""
        rows = self.rows[split]
        outputs, targets = predict(self.model, self.networks, rows), self.targets[rows]
        loss = self.losses(outputs, targets).item() / len(rows)
        return loss, (outputs.argmax(1) == targets).float().mean().item() if self.is_class else -loss

    def validate(self) -> dict[str, float]:
        loss, score = self.measure("validation")
        return {"val_loss": loss, "val_score": score}

    def test(self) -> dict[str, Any]:
        return {"test_score": self.measure("test")[1]}


@torch.no_grad()
def predict(model: nn.Module, networks: Networks, rows: Int[Tensor, " networks"] | None = None) -> Tensor:
    """What a model says of the networks `rows`, or of all, a batch at a time."""
    count = len(networks) if isinstance(networks, Collection) else networks.num_networks
    rows = torch.arange(count) if rows is None else rows
    return torch.cat([model(networks[some]) for some in rows.split(EVALUATION_BATCH)])


def fit(
    model: nn.Module,
    networks: Networks,
    targets: Tensor,
    *,
    epochs: int = 20,
    batch: int = 32,
    learning_rate: float = 1e-3,
    held_out: float = 0.2,
    seed: int = 0,
) -> Fit:
    """Train a metanetwork, such as `NGGNN(wiring, Scores(classes))`, on networks and what is to be told of them.

    Of the networks a share is `held_out`: half of it chooses the epoch whose weights are kept, half is for testing.
    Numbers that are far from 0 and 1 are better standardized first.

    Shapes:
        targets: (networks,) integers for classes, or (networks, ...) floating-point numbers

    Raises:
        ValueError: the targets do not fit the networks, or too few networks are left to train on.
    """
    count = len(networks) if isinstance(networks, Collection) else networks.num_networks
    if len(targets) != count:
        raise ValueError(f"{count} networks have {len(targets)} targets: give one for each, in the same order")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(2, round(held_out * count))
    validation, test, train = order[: held // 2], order[held // 2 : held], order[held:]
    if len(train) < 1:
        raise ValueError(f"{count} networks are too few: none is left to train on")
    rows = {"train": train, "validation": validation, "test": test}
    problem = OwnNetworks(model, networks, targets, rows)
    schedule = Schedule(epochs, min(batch, len(train)), learning_rate, warmup=10, decay=True)
    state, optimizer = new_state(), optimizer_of(model, schedule)
    with tqdm(total=epochs, unit="epoch") as bar:
        for _, scores in _epochs(Step(problem, schedule, optimizer), seed, state):
            bar.update()
            bar.set_postfix(loss=f"{scores['train_loss']:.3f}", score=f"{scores['val_score']:.3f}")
    score = tested(problem, schedule, state)["test_score"]
    return Fit(model.eval(), pd.DataFrame(state["history"]), validation, test, score)
