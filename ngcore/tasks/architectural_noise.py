"""What if the description of a network is wrong? Predicting generalization from graphs that are not quite right.

A trained model of the Wild Park's table reads test networks whose skip connections were removed or lead elsewhere, or
of whose neurons some were left out. The networks' accuracies are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from ngcore.data.zoos.cnn import Architecture
from ngcore.study.execution import Execution
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.tasks import generalization
from ngcore.tasks.zoos import Networks, wiring_of

State = dict[str, Tensor]
Network = tuple[Architecture, State]


def skips_removed(network: Network, share: float, random: np.random.Generator) -> Network:
    """Every skip connection is left out with a probability."""
    architecture, state = network
    kept = tuple(-1 if random.random() < share else earlier for earlier in architecture.residual)
    return replace(architecture, residual=kept), state


def skips_rewired(network: Network, share: float, random: np.random.Generator) -> Network:
    """Every skip connection, with a probability, begins at another of the convolutions that it could begin at."""
    architecture, state = network
    found = []
    for layer, earlier in enumerate(architecture.residual):
        others = [i for i in range(layer - 1) if i != earlier]
        moved = earlier >= 0 and random.random() < share and bool(others)
        found.append(int(random.choice(others)) if moved else earlier)
    return replace(architecture, residual=tuple(found)), state


def neurons_left_out(network: Network, share: float, random: np.random.Generator) -> Network:
    """Every neuron is missing with a probability, with all its weights; at least one of a layer is left.

    The same numbers are missing in every convolution, so that skip connections, which join equal numbers, join what
    they joined.
    """
    architecture, state = network
    state, channels = dict(state), list(architecture.channels)
    layers = len(architecture.residual)
    numbers = random.random(max(channels)) >= share
    numbers[random.integers(min(channels[1:]))] = True
    for i in range(layers):
        count = channels[i + 1]
        kept = torch.tensor(np.flatnonzero(numbers[:count]))
        following = f"layers.{i + 1}.weight" if i + 1 < layers else "fc.weight"
        for name in (f"layers.{i}.weight", f"layers.{i}.bias"):
            state[name] = state[name][kept]
        weight = state[following]
        state[following] = weight.unflatten(1, (count, -1))[:, kept].reshape(len(weight), -1, *weight.shape[2:])
        channels[i + 1] = len(kept)
    return replace(architecture, channels=tuple(channels)), state


NOISES: dict[str, Callable[[Network, float, np.random.Generator], Network]] = {
    "skips removed": skips_removed,
    "skips rewired": skips_rewired,
    "neurons left out": neurons_left_out,
}
SHARES = {"skips removed": (1.0,), "skips rewired": (1.0,), "neurons left out": (0.1, 0.25, 0.5)}  # that are tried


@dataclass(frozen=True)
class Config:
    """The test of a trained model on altered descriptions.

    Args:
        noise: a key of NOISES.
        share: of the skip connections or neurons that are altered.
        of: the model's training; `dataset`, `method` and `seed` are its own.
    """

    noise: str
    share: float
    of: generalization.Config
    dataset: str
    method: str
    seed: int
    task: str = "architectural_noise"

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise ValueError(f"unknown noise {self.noise!r}; there are {', '.join(NOISES)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"a share is between 0 and 1, not {self.share}")

    @classmethod
    def on(cls, of: generalization.Config, noise: str, share: float) -> Config:
        return cls(noise, share, of, of.dataset, of.method, of.seed)


def load(config: Config, device: str) -> tuple[Networks, str]:
    """The networks that the model was trained on, and their digest."""
    return generalization.load(config.of, device)


def produce(config: Config, networks: Networks, job: Job) -> Outcome:
    """Metrics: `changed`, how many test networks are described differently; if there are any, `tau` on them as they are
    described and `tau_as_they_are`. The model is trained if it is not stored yet.
    """
    model = generalization.build_model(config.method, networks, **dict(config.of.options)).eval()
    model.load_state_dict(job.require(config.of).weights())
    rows = generalization.rows_of(networks, config.of.split)[f"test_{config.dataset}"]
    random = np.random.default_rng(config.seed)
    pairs = [(network, NOISES[config.noise](network, config.share, random)) for network in described(networks, rows)]
    differs = [known[0] != altered[0] for known, altered in pairs]
    table = networks.table.iloc[rows[torch.tensor(differs)].numpy()].reset_index(drop=True)
    true = torch.tensor(generalization.targets_of(table, config.of.target))
    metrics: dict[str, Any] = {"changed": len(table)}
    for name, which in (("tau_as_they_are", 0), ("tau", 1)) if len(table) else ():
        shown = alone([pair[which] for pair, own in zip(pairs, differs, strict=True) if own], table, networks)
        metrics[name] = generalization.tau(predictions(model.to(job.device), config.method, shown, job.device), true)
    return Outcome(metrics, {}, 0.0)


def predictions(model: nn.Module, method: str, networks: Networks, device: str) -> Tensor:
    """A model's predictions for all networks."""
    inputs, sizes = generalization.inputs_of(method, networks, device), networks.collection.sizes.to(device)
    rows = torch.arange(len(sizes), device=device)
    return generalization.predict(model, inputs, sizes, rows, generalization.METHODS[method].chunk)


def prepare(configs: Sequence[Config], execution: Execution) -> None:
    """Train the populations that the models read."""
    generalization.EXPERIMENT.prepare([config.of for config in configs], execution)


EXPERIMENT = Experiment(Config, generalization.METHODS, load, produce, prepare)


def alone(some: Sequence[Network], table: pd.DataFrame, of: Networks) -> Networks:
    """These networks, each with a graph of its own, in the frame of others."""
    graphs = tuple(
        wiring_of(architecture).graph({name: values.unsqueeze(0) for name, values in state.items()})
        for architecture, state in some
    )
    return Networks(table, tuple(architecture for architecture, _ in some), graphs, of.digest, of.frame)


def described(networks: Networks, rows: Int[Tensor, " networks"]) -> list[Network]:
    """The networks `rows` as they are."""
    every = [
        (architecture, graph[i].state_dict())
        for architecture, graph in zip(networks.architectures, networks.graphs, strict=True)
        for i in range(graph.num_networks)
    ]
    return [every[row] for row in rows.tolist()]
