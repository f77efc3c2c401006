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

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from ngcore.models.optimizers import BoundOptimizer, Layout, LearnedOptimizer
from ngcore.study.methods import Method
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.study.runs import Record, RunError, cache_directory, read_record
from ngcore.study.training import DivergedError
from ngcore.tasks.optimization import FIRST_SEED, ImageTask, Task, train_network

# `chunk`: steps that pass back through the optimizer together, as many as a CPU's cache likes; on a GPU GPU_CHUNK.
METHODS = {
    "FF": Method(colour=2, chunk=4),
    "LSTM": Method(colour=9, chunk=4),
    "NFN": Method(colour=4, chunk=4),
    "NG-GNN": Method(colour=0, chunk=5),
    "NG-T": Method(colour=3, chunk=2),
}
GPU_CHUNK = 25
CHECKPOINT_EVERY = 10  # outer steps


@dataclass(frozen=True)
class Config:
    """A meta-training run.

    Args:
        method: a key of `ngcore.models.optimizers.METHODS`.
        trained_on: the task; its validation images select the weights.
        outer_steps: steps of Adam on the optimizer's own weights.
        inner_steps: steps of the network between them, through which gradients pass.
        horizon: steps after which a new network takes a network's place.
        networks: that are under way, at ages spread over the horizon; outer steps train them on in turns.
        learning_rate: of the outer Adam.
        clip: largest norm of the outer gradient.
        validate_every: outer steps between validations.
        validation_steps: of the network that a validation trains; its accuracy after them is the score.
        options: further arguments of `LearnedOptimizer`, as pairs.
    """

    dataset: str
    method: str
    seed: int
    trained_on: ImageTask
    outer_steps: int
    inner_steps: int = 100
    horizon: int = 100
    networks: int = 1
    learning_rate: float = 1e-3
    clip: float = 1.0
    validate_every: int = 50
    validation_steps: int = 1000
    options: tuple[tuple[str, Any], ...] = ()
    task: str = "meta_training"

    def __post_init__(self) -> None:
        if min(self.outer_steps, self.networks) < 1 or self.inner_steps < 2:
            raise ValueError(
                "meta-training needs at least one outer step, one network and two inner steps, got "
                f"{self.outer_steps}, {self.networks} and {self.inner_steps}"
            )
        if self.horizon < self.inner_steps or self.horizon % self.inner_steps:
            raise ValueError(f"the horizon, {self.horizon} steps, is no multiple of {self.inner_steps} inner steps")
        if self.dataset != self.trained_on.dataset:
            raise ValueError(f"dataset {self.dataset!r}, but the task is on {self.trained_on.dataset!r}")


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
    """The state of a run between outer steps."""

    def __init__(self, config: Config, task: Task) -> None:
        self.config, self.task = config, task
        torch.manual_seed(config.seed)
        self.rule = LearnedOptimizer(config.method, **dict(config.options)).to(task.inputs.device)
        self.layout = Layout.of(task.network(0), *([task.example] if self.rule.context.reads_graph else []))
        self.rule.fit_normalization(self.layout)
        self.outer = torch.optim.Adam(self.rule.parameters(), lr=config.learning_rate)
        self.chunk = METHODS[config.method].chunk if task.inputs.device.type == "cpu" else GPU_CHUNK
        self.started = 0
        self.learners = [self.new_learner() for _ in range(config.networks)]
        for i, learner in enumerate(self.learners):  # so that they are not all given up at once
            learner.age = i * config.horizon // config.networks // config.inner_steps * config.inner_steps

    def new_learner(self) -> Learner:
        network = self.task.network(self.config.seed * 1_000_003 + self.started).train()
        self.started += 1
        return Learner(network, self.bind(network), 0)

    def bind(self, network: nn.Module) -> BoundOptimizer:
        """`rule.bind`, but the layout, which all networks of the task share, is not read again."""
        return BoundOptimizer(self.rule, dict(network.named_parameters()), self.layout)

    def outer_step(self, step: int) -> float:
        """One step of Adam; the mean loss of the unroll.

        Raises:
            DivergedError: a gradient, of a network or of the optimizer, is not finite.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        torch.manual_seed(config.seed * 1_000_003 + step)  # what networks draw themselves, e.g. dropout
        turn = step % config.networks
        if self.learners[turn].age >= config.horizon:
            self.learners[turn] = self.new_learner()
        try:
            features, gradients, losses = unroll(self.task, self.learners[turn], config.inner_steps, generator)
        except FloatingPointError as error:
            raise DivergedError(f"outer step {step} of {config.method}: {error}") from error
        self.outer.zero_grad()
        meta_backward(self.rule, self.layout, features, gradients, self.chunk)
        norm = nn.utils.clip_grad_norm_(self.rule.parameters(), config.clip)
        if not torch.isfinite(norm):
            raise DivergedError(f"outer step {step} of {config.method}: the gradient of its own weights is not finite")
        self.outer.step()
        return losses.mean().item()

    def validate(self) -> float:
        """Accuracy on validation images of a network that the optimizer trains; 0 where that diverges."""
        steps = self.config.validation_steps
        found = train_network(self.task, self.bind, FIRST_SEED["validation"], steps, measured=(steps,))
        return 0.0 if found["diverged_at"] is not None else found["accuracy"][-1]

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


def load(config: Config, device: str) -> tuple[Task, str]:
    """The task on its validation images, and a digest of its data."""
    task = config.trained_on.task("validation", device)
    return task, task.digest


def produce(config: Config, task: Task, job: Job) -> Outcome:
    """Meta-train, or go on from the last checkpoint.

    Metrics: `meta_loss` of every outer step; `val_score`, the validations' accuracies, after `validated` outer steps;
    `best_step`, after which the stored weights were the best.
    """
    training = MetaTraining(config, task)
    state = _resume(training, job)
    started = time.monotonic()
    while state["step"] < config.outer_steps:
        job.execution.leave_in_time()
        loss = training.outer_step(state["step"])
        state["step"] += 1
        state["meta_loss"].append(round(loss, 5))
        scores = {"train_loss": loss}
        if state["step"] % config.validate_every == 0 or state["step"] == config.outer_steps:
            scores["val_score"] = _validate(training, state)
        if state["step"] % CHECKPOINT_EVERY == 0 or "val_score" in scores:
            state["seconds"] += time.monotonic() - started
            started = time.monotonic()
            job.stored.save_checkpoint(state | training.state())
        job.report(state["step"] - 1, scores)
    metrics = {name: state[name] for name in ("meta_loss", "validated", "val_score", "best_step")}
    return Outcome(metrics, state["best"], state["seconds"])


def _resume(training: MetaTraining, job: Job) -> dict[str, Any]:
    """Where a run stands: at its beginning, or at its last checkpoint."""
    state = job.stored.checkpoint()
    if state is not None:
        training.load(state)
        return state
    return {"step": 0, "meta_loss": [], "validated": [], "val_score": [], "best": {}, "best_step": 0, "seconds": 0.0}


def _validate(training: MetaTraining, state: dict[str, Any]) -> float:
    """Enter a validation into a run's state, and the weights where they are the best so far; its score."""
    score = training.validate()
    if score > max(state["val_score"], default=-1.0):
        state["best_step"] = state["step"]
        state["best"] = {name: tensor.clone() for name, tensor in training.rule.state_dict().items()}
    state["validated"].append(state["step"])
    state["val_score"].append(score)
    return score


EXPERIMENT = Experiment(Config, METHODS, load, produce)


def trained(name: str) -> tuple[LearnedOptimizer, Record]:
    """The optimizer that a stored run, named by its hash, ended with, and the run's record.

    Raises:
        RunError: there is no such meta-training run, or its weights are gone.
    """
    directory = cache_directory() / "runs" / name
    if not all((directory / file).is_file() for file in ("result.json", "weights.safetensors")):
        raise RunError(f"{directory} holds no finished meta-training: run the meta-training first")
    record = read_record(directory / "result.json")
    config = record["config"]
    if config["task"] != Config.task:
        raise RunError(f"{directory} is a run of {config['task']}, not of meta-training")
    rule = LearnedOptimizer(config["method"], **dict(config["options"]))
    rule.load_state_dict(load_file(directory / "weights.safetensors"))
    return rule.eval(), record
