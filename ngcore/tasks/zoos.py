"""The populations of CNNs that tasks share: which, how they are split, and how metanetworks read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ngcore.data.zoos import archives, cifar10_gs, wild_park
from ngcore.data.zoos.cnn import Architecture
from ngcore.data.zoos.populations import Checkpoints, Population, PopulationError
from ngcore.digests import tensor_digest
from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.architectures import cnn
from ngcore.graph.collection import Collection
from ngcore.graph.frame import Frame
from ngcore.graph.pyg import Flatten
from ngcore.models.baselines.stat_nn import statistics
from ngcore.study.execution import Execution, default_workers
from ngcore.study.run import Experiment, Job, Outcome
from ngcore.study.runs import cache_directory
from ngcore.tasks.archives import archive_of, path_of

# Shares of the training runs that metanetworks train on and are selected on; the rest is for testing. Of CIFAR10-GS
# half is, as in the paper; for the Wild Park it does not say.
SHARES = {
    "cifar10_gs": (0.4, 0.1),
    "cifar10_wild_park": (0.6, 0.15),
    "cifar10_wild_park_flattened": (0.6, 0.15),
}

TITLES = {"cifar10_gs": "CIFAR10-GS", "cifar10_wild_park": "CNN Wild Park"}


@dataclass(frozen=True)
class Zoo:
    """A population: training runs 0 to `runs` - 1 of a recipe, or as many of a published archive, see `archives`."""

    runs: int
    recipe: cifar10_gs.Recipe | wild_park.Recipe
    archive: str | None = None

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise ValueError(f"a population has at least one training run, got {self.runs}")

    @property
    def dataset(self) -> str:
        return self.recipe.dataset

    def population(self, *, workers: int | None = None, compiled: bool = False) -> Population:
        """The networks; trained where they are not stored yet.

        Args:
            workers: processes; None for one per core, or one where a GPU trains the networks of CIFAR10-GS.
            compiled: see `cifar10_gs.generate_zoo`.
        """
        if self.archive is not None:
            return read_published(self)
        if isinstance(self.recipe, cifar10_gs.Recipe):
            workers = workers or default_workers()
            return cifar10_gs.generate_zoo(self.recipe, self.runs, cache_directory(), workers, compiled=compiled)
        workers = workers or torch.get_num_threads()
        return wild_park.generate_park(self.recipe, self.runs, cache_directory(), workers)


def read_published(zoo: Zoo) -> Population:
    """The first training runs of a published population.

    Raises:
        FileNotFoundError, PopulationError: it is not there, it is damaged, or it has fewer runs; names the file.
    """
    path = path_of(zoo.archive)
    read = archives.read_small_zoo if isinstance(zoo.recipe, cifar10_gs.Recipe) else archives.read_wild_park
    population = read(path)
    runs = sorted({row["run"] for part in population.parts for row in part.rows})
    if len(runs) < zoo.runs:
        raise PopulationError(f"{path} has {len(runs)} training runs, but {zoo.runs} are asked for")
    wanted = set(runs[: zoo.runs])
    return Population(tuple(_with_runs(part, wanted) for part in population.parts), population.rejected)


def _with_runs(part: Checkpoints, wanted: set[Any]) -> Checkpoints:
    kept = [i for i, row in enumerate(part.rows) if row["run"] in wanted]
    parameters = {name: values[kept] for name, values in part.parameters.items()}
    return Checkpoints(part.architecture, parameters, tuple(part.rows[i] for i in kept))


def wiring_of(architecture: Architecture, flatten: Flatten = "layer") -> Wiring:
    """The wiring of a zoo's CNN."""
    a = architecture
    return cnn(a.channels, a.kernel_size, a.activation, a.residual, a.classes, a.pool, flatten)


@dataclass(frozen=True)
class Networks:
    """The networks of one or several zoos in the forms that metanetworks read, all in the order of the table.

    Attributes:
        table: a row per network, with its `dataset`.
        architectures: of which there is one graph each.
        graphs: each with a single wiring and one batch axis.
        digest: of all parameters and of what the table says.
        frame: that holds all of them.
    """

    table: pd.DataFrame
    architectures: tuple[Architecture, ...]
    graphs: tuple[NeuralGraph, ...]
    digest: str
    frame: Frame

    @cached_property
    def collection(self) -> Collection:
        return Collection(self.graphs, self.frame)

    @cached_property
    def linear_collection(self) -> Collection:
        """The same with linear layers apart from convolutions, see `Frame`."""
        return Collection(self.graphs, replace(self.frame, linear="linear"))

    @cached_property
    def repeated_collection(self) -> Collection:
        """The same with flattened channels' own neurons repeated, see `cnn`."""
        wirings = [wiring_of(architecture, flatten="repeat") for architecture in self.architectures]
        states = [graph.state_dict() for graph in self.graphs]
        return Collection([wiring.graph(state) for wiring, state in zip(wirings, states, strict=True)])

    @cached_property
    def statistics(self) -> Float[Tensor, "networks features"]:
        return statistics(self.graphs, self.frame)

    @cached_property
    def stacked(self) -> NeuralGraph:
        """One graph of all networks, which must have the same shapes; activations are called as the first one's.

        Raises:
            ValueError: the networks have different shapes.
        """
        states = [graph.state_dict() for graph in self.graphs]
        shapes = {tuple((name, tuple(values.shape[1:])) for name, values in state.items()) for state in states}
        if len(shapes) > 1:
            raise ValueError(
                f"networks of {len(shapes)} different shapes can't be stacked: only graph models read them"
            )
        return self.graphs[0].wiring.graph({name: torch.cat([state[name] for state in states]) for name in states[0]})


def with_hidden_activations(architecture: Architecture) -> Architecture:
    """The same with its activations all called "relu"."""
    return replace(architecture, activation=("relu",) * len(architecture.activation))


@cache
def load(zoos: tuple[Zoo, ...], hide_activations: bool) -> Networks:
    """All networks of these zoos, their activations told or not; kept for the process's further runs."""
    tables, architectures, graphs = [], [], []
    for zoo in zoos:
        population = zoo.population()
        tables.append(population.table.assign(dataset=zoo.dataset))
        parts = [part for part in population.parts if len(part)]
        told = [with_hidden_activations(part.architecture) if hide_activations else part.architecture for part in parts]
        architectures += told
        graphs += [wiring_of(a).graph(part.parameters) for a, part in zip(told, parts, strict=True)]
    table = pd.concat(tables, ignore_index=True)
    text = table.to_json(orient="records").encode()
    tensors = [values for graph in graphs for values in graph.state_dict().values()]
    digest = tensor_digest([*tensors, torch.frombuffer(bytearray(text), dtype=torch.uint8)])
    frame = Frame.of({graph.wiring for graph in graphs})
    return Networks(table, tuple(architectures), tuple(graphs), digest, frame)


def split_rows(table: pd.DataFrame, seed: int = 0) -> dict[str, Int[Tensor, " networks"]]:
    """Rows of "train", "validation" and "test", by whole training runs, the same for all seeds of training.

    Args:
        seed: draws which runs are for what. With 0 a published population that says it is split as it says.
    """
    of_row = pd.Series("test", index=table.index)
    for dataset, rows in table.groupby("dataset"):
        if seed == 0 and "split" in rows and rows["split"].notna().all():
            of_row[rows.index] = rows["split"].replace("val", "validation")
            continue
        runs = np.random.default_rng(seed).permutation(np.sort(rows["run"].unique()))
        train, validation = (round(share * len(runs)) for share in SHARES[dataset])
        of_row[rows.index[rows["run"].isin(runs[:train])]] = "train"
        of_row[rows.index[rows["run"].isin(runs[train : train + validation])]] = "validation"
    return {
        split: torch.tensor(np.flatnonzero(of_row == split), dtype=torch.long)
        for split in ("train", "validation", "test")
    }


def zoo_of(parameter: Mapping[str, Any], recipe: type) -> Zoo:
    """The population of a notebook's parameter: `runs`, and the fields of its recipe."""
    fields = dict(parameter)
    return Zoo(fields.pop("runs"), recipe(**fields), archive_of(recipe.dataset))


def prepare(configs: Sequence[Any], execution: Execution) -> None:
    """Train the populations that runs read, by all workers."""
    for zoo in dict.fromkeys(zoo for config in configs for zoo in config.data):
        zoo.population(workers=execution.workers, compiled=execution.compiles(zoo.dataset))


@dataclass(frozen=True)
class PopulationConfig:
    """What figures show of a population."""

    dataset: str
    data: tuple[Zoo, ...]
    method: str = "population"
    seed: int = 0
    task: str = "cnn_zoos"


def population_config(zoo: Zoo) -> PopulationConfig:
    return PopulationConfig(zoo.dataset, (zoo,))


def _load(config: PopulationConfig, device: str) -> tuple[Networks, str]:
    networks = load(config.data, False)
    return networks, networks.digest


def _shown(config: PopulationConfig, networks: Networks, job: Job) -> Outcome:
    """Metrics: every network's accuracy and number of layers, and how many training runs left none."""
    return Outcome(
        {
            "accuracy": networks.table["accuracy"].round(4).tolist(),
            "layers": networks.table["layers"].tolist(),
            "runs_without_networks": sum(zoo.runs for zoo in config.data) - networks.table["run"].nunique(),
        },
        {},
        0.0,
    )


EXPERIMENT = Experiment(PopulationConfig, {}, _load, _shown, prepare)


def sizes_in_words(zoos: Sequence[Zoo]) -> str:
    """How the populations were made, for captions."""
    networks = "{runs:,} networks, {train_images:,} images"
    park = networks + ", {epochs} epochs, {checkpoints} checkpoints each"
    words = {
        "cifar10_gs": f"CIFAR10-GS: {networks}, {{steps:,}} steps of 32",
        "cifar10_wild_park": f"Wild Park: {park}",
        "cifar10_wild_park_flattened": f"Wild Park with flattening: {park}",
    }
    made = [words[zoo.dataset].format(runs=zoo.runs, **asdict(zoo.recipe)) for zoo in zoos]
    published = [f"{words[zoo.dataset].split(':')[0]}: {zoo.runs:,} published runs of {zoo.archive}" for zoo in zoos]
    return "; ".join(
        own if zoo.archive is None else theirs for zoo, own, theirs in zip(zoos, made, published, strict=True)
    )
