"""Meta-training of learned optimizers (paper, section 4.3): each outer step trains a network for 100 inner steps.

The optimizer's inputs are held fixed: gradients and momenta, as in Andrychowicz et al. (2016), and weights too, which
is ours. What is differentiated is how a change, once made, adds to all later weights. With changes u_t(φ), gradients
g_t of the losses L_t and θ_t = θ_0 + Σ_{s<t} u_s,

    d/dφ Σ_t L_t(θ_t) = Σ_s (Σ_{t>s} g_t) · du_s/dφ.

So the way forward keeps features and gradients alone, and needs one backward pass of the network per step, which
training needs anyway; on the way back all steps are independent and go through the optimizer as a batch. Memory does
not grow with the optimizer's own states.

Weights held fixed, a change does not act on later ones through their features. Tried once, with an NG-GNN after 70
outer steps on a network of 8, 12 and 12 channels: the gradients with and without this path had like norms and cosines
of 0.87 to 0.99, for unrolls of 10, 30 and 100 steps, two networks each.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.models.optimizers.layout import Layout
from ngcore.models.optimizers.learned import BoundOptimizer, LearnedOptimizer
from ngcore.models.optimizers.problem import FIRST_SEED, Task, train_network


@dataclass(frozen=True)
class Settings:
    """How an optimizer is meta-trained.

    Args:
        method: a key of `ngcore.models.optimizers.METHODS`.
        inner_steps: steps of a network between outer steps, through which gradients pass.
        horizon: steps after which a new network takes a network's place.
        networks: that are under way, at ages spread over the horizon; outer steps train them on in turns.
        learning_rate: of the outer Adam.
        decay_steps: outer steps over which it falls to 0 along half a cosine; 0 leaves it as it is.
        clip: largest norm of the outer gradient.
        validation_steps: of the networks that a validation trains; their accuracy after them is the score.
        validation_networks: whose mean is the score.
        options: further arguments of `LearnedOptimizer`, as pairs.

    Raises:
        ValueError: they make no sense.
    """

    method: str
    seed: int = 0
    inner_steps: int = 100
    horizon: int = 100
    networks: int = 1
    learning_rate: float = 1e-3
    clip: float = 1.0
    validation_steps: int = 1000
    validation_networks: int = 1
    decay_steps: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.networks < 1 or self.inner_steps < 2:
            raise ValueError(
                "meta-training needs at least one network and two inner steps, got "
                f"{self.networks} and {self.inner_steps}"
            )
        if self.validation_networks < 1:
            raise ValueError(f"a validation needs at least one network, got {self.validation_networks}")
        if self.horizon < self.inner_steps or self.horizon % self.inner_steps:
            raise ValueError(f"the horizon, {self.horizon} steps, is no multiple of {self.inner_steps} inner steps")

    def rate(self, step: int) -> float:
        """The learning rate of an outer step, counted from 0."""
        if self.decay_steps == 0:
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * min(1.0, step / self.decay_steps))) / 2

    def networks_seen(self, outer_steps: int) -> int:
        """Networks that so many outer steps train, each for at least one of them."""
        turns_of_life = self.horizon // self.inner_steps
        seen = 0
        for learner in range(self.networks):
            turns = len(range(learner, outer_steps, self.networks))
            first = turns_of_life - self.first_age(learner) // self.inner_steps
            seen += min(turns, 1) + -(-max(0, turns - first) // turns_of_life)
        return seen

    def first_age(self, learner: int) -> int:
        """The age in steps that a learner is said to have at the beginning, so that not all are replaced at once."""
        return learner * self.horizon // self.networks // self.inner_steps * self.inner_steps


@dataclass
class Learner:
    """A network under way: with its optimizer, and its age in steps."""

    network: nn.Module
    optimizer: BoundOptimizer
    age: int


def unroll(
    task: Task, learner: Learner, steps: int, generator: torch.Generator
) -> tuple[Float[Tensor, "steps scalars 14"], Float[Tensor, "steps scalars"], Float[Tensor, " steps"]]:
    """Train a network on; the optimizer's inputs, the gradients and the losses of every step."""
    features, gradients, losses = [], [], []
    optimizer = learner.optimizer
    for _ in range(steps):
        losses.append(task.backward(learner.network, generator))
        gradient, seen = optimizer.observe()
        gradients.append(gradient)
        features.append(seen)
        with torch.no_grad():
            optimizer.move(optimizer.rule(seen.unsqueeze(0), optimizer.layout).squeeze(0))
    learner.age += steps
    return torch.stack(features), torch.stack(gradients), torch.stack(losses)


def meta_backward(
    rule: nn.Module,
    layout: Layout,
    features: Float[Tensor, "steps scalars 14"],
    gradients: Float[Tensor, "steps scalars"],
    chunk: int,
) -> None:
    """Add the gradient of the unroll's mean loss to the gradients of the rule; the module's equation."""
    later = gradients.flip(0).cumsum(0).flip(0)[1:] / len(gradients)  # of the steps after each but the last
    for some, credit in zip(features[:-1].split(chunk), later.split(chunk), strict=True):
        (rule(some, layout) * credit.to(some.dtype)).sum().backward()


class MetaTraining:
    """The state of a meta-training between outer steps; `rule` is the optimizer that it teaches.

    Args:
        settings: see `Settings`.
        task: that networks are trained on.
        chunk: steps that pass back through the optimizer together: as many as memory allows, or a CPU's cache likes.

    Example:
        >>> training = MetaTraining(Settings("NG-GNN"), task)
        >>> losses = [training.outer_step(step) for step in range(200)]
    """

    def __init__(self, settings: Settings, task: Task, chunk: int = 4) -> None:
        self.settings, self.task, self.chunk = settings, task, chunk
        torch.manual_seed(settings.seed)
        self.rule = LearnedOptimizer(settings.method, **dict(settings.options)).to(task.inputs.device)
        self.layout = Layout.of(task.network(0), *([task.example] if self.rule.context.reads_graph else []))
        self.rule.fit_normalization(self.layout)
        self.outer = torch.optim.Adam(self.rule.parameters(), lr=settings.learning_rate)
        self.started = 0
        self.learners = [self.new_learner() for _ in range(settings.networks)]
        for i, learner in enumerate(self.learners):
            learner.age = settings.first_age(i)

    def new_learner(self) -> Learner:
        network = self.task.network(self.settings.seed * 1_000_003 + self.started).train()
        self.started += 1
        return Learner(network, self.bind(network), 0)

    def bind(self, network: nn.Module) -> BoundOptimizer:
        """`rule.bind`, but the layout, which all networks of the task share, is not read again."""
        return BoundOptimizer(self.rule, dict(network.named_parameters()), self.layout)

    def outer_step(self, step: int) -> float:
        """One step of Adam; the mean loss of the unroll.

        Raises:
            FloatingPointError: a gradient, of a network or of the optimizer, is not finite.
        """
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        torch.manual_seed(settings.seed * 1_000_003 + step)  # what networks draw themselves, e.g. dropout
        turn = step % settings.networks
        if self.learners[turn].age >= settings.horizon:
            self.learners[turn] = self.new_learner()
        try:
            features, gradients, losses = unroll(self.task, self.learners[turn], settings.inner_steps, generator)
        except FloatingPointError as error:
            raise FloatingPointError(f"outer step {step} of {settings.method}: {error}") from error
        self.outer.zero_grad()
        meta_backward(self.rule, self.layout, features, gradients, self.chunk)
        norm = nn.utils.clip_grad_norm_(self.rule.parameters(), settings.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"outer step {step} of {settings.method}: the gradient of its own weights is not finite"
            )
        for group in self.outer.param_groups:
            group["lr"] = settings.rate(step)
        self.outer.step()
        return losses.mean().item()

    def validate(self) -> float:
        """Accuracy on validation images of networks that the optimizer trains, their mean; 0 for one that diverges."""
        steps, first = self.settings.validation_steps, FIRST_SEED["validation"]
        found = [
            train_network(self.task, self.bind, first + i, steps, measured=(steps,))
            for i in range(self.settings.validation_networks)
        ]
        return statistics.mean(0.0 if own["diverged_at"] is not None else own["accuracy"][-1] for own in found)

    def state(self) -> dict[str, Any]:
        """All that the next outer step depends on."""
        return {
            "model": self.rule.state_dict(),
            "outer": self.outer.state_dict(),
            "started": self.started,
            "learners": [
                {"age": own.age, "network": own.network.state_dict(), "optimizer": own.optimizer.state_dict()}
                for own in self.learners
            ],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state["model"])
        self.outer.load_state_dict(state["outer"])
        for learner, stored in zip(self.learners, state["learners"], strict=True):
            learner.age = stored["age"]
            learner.network.load_state_dict(stored["network"])
            learner.optimizer.load_state_dict(stored["optimizer"])
        self.started = state["started"]
