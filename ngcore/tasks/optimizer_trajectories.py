"""Where an optimizer leads a network: how far, how straight, and out of what range of inputs, step by step.

Interventions change one thing past the horizon. What then mends or does not mend the training tells a cause from what
merely goes along with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.models.optimizers import BoundOptimizer
from ngcore.models.optimizers.problem import FIRST_SEED, Task
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.tasks import learning_to_optimize

# Past the horizon: "shrink" multiplies changes by horizon / step; "level" takes their running mean off; "clamp" holds
# what the rule reads within the range of the steps before; "restart" lets the momenta start anew at every horizon.
INTERVENTIONS = ("none", "shrink", "level", "clamp", "restart")
MEMORY = 0.98  # of the running mean that "level" takes off: of about 50 steps


@dataclass(frozen=True)
class Config(learning_to_optimize.Config):
    """A run of learning to optimize whose changes are measured over windows of `curve_every` steps.

    Args:
        horizon: steps that count as seen: features of later steps are compared with their range.
        intervention: one of INTERVENTIONS; all but "none" are for learned optimizers.
    """

    horizon: int = 100
    intervention: str = "none"
    task: str = "optimizer_trajectories"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intervention not in INTERVENTIONS:
            raise ValueError(f"unknown intervention {self.intervention!r}; there are {', '.join(INTERVENTIONS)}")
        if self.intervention != "none" and self.method not in learning_to_optimize.LEARNED:
            raise ValueError(f"interventions are in what a learned optimizer reads and says, and {self.method} is none")
        if self.steps % self.curve_every or self.horizon < 1:
            raise ValueError(
                f"windows of {self.curve_every} steps must fill the {self.steps} steps, and the horizon, "
                f"{self.horizon}, must be at least 1"
            )

    @classmethod
    def of(cls, config: learning_to_optimize.Config, horizon: int, intervention: str = "none") -> Config:
        """The same training."""
        own = {f.name: getattr(config, f.name) for f in fields(learning_to_optimize.Config) if f.name != "task"}
        return cls(**own, horizon=horizon, intervention=intervention)


class Interference:
    """A learned optimizer's steps, with an intervention past the horizon, and what it reads compared with before.

    Args:
        horizon, intervention: see `Config`.
    """

    def __init__(self, optimizer: BoundOptimizer, horizon: int, intervention: str) -> None:
        self.optimizer, self.horizon, self.intervention = optimizer, horizon, intervention
        self.low = self.high = self.mean = None
        self.steps = 0

    def step(self) -> None:
        """One step of the optimizer, whose gradients are there."""
        late = self.steps >= self.horizon
        if self.intervention == "restart" and self.steps % self.horizon == 0:
            self.optimizer.state.clear()
        _, features = self.optimizer.observe()
        if not late:
            self._extend(features)
        self.outside = self._outside(features)
        read = features.clamp(self.low, self.high) if late and self.intervention == "clamp" else features
        with torch.no_grad():
            change = self.optimizer.rule(read.unsqueeze(0), self.optimizer.layout).squeeze(0)
        self.steps += 1
        self.optimizer.move(self._altered(change, late))

    def _altered(self, change: Float[Tensor, " scalars"], late: bool) -> Float[Tensor, " scalars"]:
        if self.intervention == "shrink" and late:
            return change * (self.horizon / self.steps)
        if self.intervention == "level":
            self.mean = (1 - MEMORY) * change + MEMORY * (torch.zeros_like(change) if self.mean is None else self.mean)
            return change - self.mean / (1 - MEMORY**self.steps) if late else change
        return change

    def _extend(self, features: Float[Tensor, "scalars 14"]) -> None:
        low, high = features.amin(0), features.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def _outside(self, features: Float[Tensor, "scalars 14"]) -> dict[str, float]:
        """Share of scalars whose weight, or whose gradient or any momentum, leaves the range of what was read before
        the horizon."""
        is_out = (features < self.low) | (features > self.high)
        found = {"weights": is_out[:, :2], "gradients": is_out[:, 2:]}
        return {name: own.any(1).float().mean().item() for name, own in found.items()}


def follow(
    task: Task, network: nn.Module, optimizer: torch.optim.Optimizer | Interference, generator: torch.Generator
) -> tuple[float, Float[Tensor, " scalars"]]:
    """One step: the batch's loss before it, and all scalars' change."""
    before = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    loss = task.backward(network, generator).item()
    optimizer.step()
    return loss, nn.utils.parameters_to_vector(network.parameters()).detach() - before


def summary(
    start: Float[Tensor, " scalars"], changes: Sequence[Float[Tensor, " scalars"]], losses: Sequence[float]
) -> dict[str, float]:
    """Of a window of steps.

    Args:
        start: the weights at its beginning.

    Returns:
        `loss`, the batches' mean; `weight_norm` at the end; `change_norm`, the mean length of a step; `straightness`,
        the way from end to end over the sum of the steps' lengths: 1 on a line, 1/sqrt(steps) at random; `outward`, the
        cosine between the way and the weights at the beginning: 1 where all weights grow alike.
    """
    way, path = sum(changes), sum(change.norm() for change in changes)
    found = {
        "weight_norm": (start + way).norm(),
        "change_norm": path / len(changes),
        "straightness": way.norm() / path,
        "outward": torch.cosine_similarity(way, start, dim=0),
    }
    return {"loss": sum(losses) / len(losses)} | {name: value.item() for name, value in found.items()}


def produce(config: Config, training: learning_to_optimize.Training, job: Job) -> Outcome:
    """Train one network, and measure.

    Metrics: `measured`, the last steps of the windows; for each `accuracy` on the held images, what `summary` returns,
    and for learned optimizers `outside_weights` and `outside_gradients`, shares of scalars at the last step that leave
    the range of what was read before the horizon; `final_accuracy`; `horizon` of the optimizer's meta-training.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    started = time.monotonic()
    seed = FIRST_SEED[config.held] + config.seed
    torch.manual_seed(seed)
    network, generator = training.task.network(seed).train(), torch.Generator().manual_seed(seed)
    optimizer = training.optimize(network)
    if isinstance(optimizer, BoundOptimizer):
        optimizer = Interference(optimizer, config.horizon, config.intervention)
    rows: list[Mapping[str, Any]] = []
    for _ in range(config.steps // config.curve_every):
        start = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
        window = [follow(training.task, network, optimizer, generator) for _ in range(config.curve_every)]
        losses, changes = zip(*window, strict=True)
        outside = optimizer.outside if isinstance(optimizer, Interference) else {}
        row = summary(start, changes, losses) | {f"outside_{name}": share for name, share in outside.items()}
        rows.append(row | {"accuracy": training.task.accuracy(network, config.curve_images)})
    metrics = {name: [round(row[name], 5) for row in rows] for name in rows[0]}
    measured = list(range(config.curve_every, config.steps + 1, config.curve_every))
    final = training.task.accuracy(network)
    job.report(config.steps, {"train_loss": rows[-1]["loss"]})
    about = {"measured": measured, "final_accuracy": final} | training.about
    return Outcome(metrics | about, {}, time.monotonic() - started)


EXPERIMENT = Experiment(Config, learning_to_optimize.METHODS, learning_to_optimize.load, produce)
