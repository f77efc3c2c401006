"""Runs of meta-training (paper, section 4.3): `ngcore.models.optimizers.meta` on images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from safetensors.torch import load_file

from ngcore.models.optimizers import LearnedOptimizer
from ngcore.models.optimizers.meta import MetaTraining, Settings
from ngcore.models.optimizers.problem import Task
from ngcore.study.methods import Method
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.study.runs import Record, RunError, cache_directory, read_record
from ngcore.study.training import DivergedError
from ngcore.tasks.optimization import ImageTask

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
        decay_steps: outer steps over which it falls to 0 along half a cosine; 0 leaves it as it is.
        clip: largest norm of the outer gradient.
        validate_every: outer steps between validations.
        validation_steps: of the networks that a validation trains; their accuracy after them is the score.
        validation_networks: whose mean is the score.
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
    validation_networks: int = 1
    decay_steps: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    task: str = "meta_training"

    def __post_init__(self) -> None:
        if self.outer_steps < 1:
            raise ValueError(f"meta-training needs at least one outer step, got {self.outer_steps}")
        if self.dataset != self.trained_on.dataset:
            raise ValueError(f"dataset {self.dataset!r}, but the task is on {self.trained_on.dataset!r}")
        _ = self.settings  # whether they make sense

    @property
    def settings(self) -> Settings:
        """What is no matter of where the run is stored and how long it is."""
        return settings_of(vars(self))


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Of a config, or of what JSON keeps of one: without tuples, and without fields that are newer than it is."""
    own = {field.name: config[field.name] for field in fields(Settings) if field.name in config}
    return Settings(**own | {"options": tuple(map(tuple, config["options"]))})


def describe(config: Mapping[str, Any], best_step: int) -> dict[str, int]:
    """Of weights after so many outer steps of a meta-training, as records of their use keep it: `meta_seed`, `horizon`,
    `outer_steps`, and the `networks_seen` until then."""
    seen = settings_of(config).networks_seen(best_step)
    own = {"meta_seed": config["seed"], "horizon": config["horizon"]}
    return own | {"outer_steps": best_step, "networks_seen": seen}


def load(config: Config, device: str) -> tuple[Task, str]:
    """The task on its validation images, and a digest of its data."""
    task = config.trained_on.task("validation", device)
    return task, task.digest


def produce(config: Config, task: Task, job: Job) -> Outcome:
    """Meta-train, or go on from the last checkpoint.

    Metrics: `meta_loss` of every outer step; `val_score`, the validations' accuracies, after `validated` outer steps;
    `best_step`, after which the stored weights were the best.
    """
    chunk = METHODS[config.method].chunk if job.device == "cpu" else GPU_CHUNK
    training = MetaTraining(config.settings, task, chunk)
    state = _resume(training, job)
    started = time.monotonic()
    while state["step"] < config.outer_steps:
        job.execution.leave_in_time()
        try:
            loss = training.outer_step(state["step"])
        except FloatingPointError as error:
            raise DivergedError(f"run {job.stored.directory.name}: {error}") from error
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


def best_runs(records: Sequence[Record]) -> list[Record]:
    """Of every method the run with the best validation among those of most validation networks, whose scores are the
    surest; in the order of the methods."""
    best: dict[str, Record] = {}
    for record in records:
        own = best.setdefault(record["config"]["method"], record)
        if _merit(record) > _merit(own):
            best[record["config"]["method"]] = record
    return [best[method] for method in METHODS if method in best]


def _merit(record: Record) -> tuple[int, float]:
    return record["config"].get("validation_networks", 1), max(record["metrics"]["val_score"])


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
