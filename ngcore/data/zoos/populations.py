"""Populations of trained networks: made part by part, stored, found again.

A part is one safetensors file of networks of one architecture: their parameters, stacked, and in the header the
architecture and a row of the table for each. It is written whole or not at all, so that a killed generator goes on with
the parts that are missing and loses no finished network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ngcore.data.zoos.cnn import Architecture
from ngcore.files import write_atomically
from ngcore.processes import completed

REQUIRED = ("network", "run", "accuracy")
LARGEST = 1e6  # a parameter beyond it is one that diverged, and would spoil the statistics of all networks


class PopulationError(ValueError):
    """A stored part or a network that is damaged or contradicts itself; names the file and the network."""


@dataclass(frozen=True)
class Checkpoints:
    """Networks of one architecture.

    Shapes:
        parameters: `Architecture.shapes` behind an axis of the networks.
        rows: one per network: "network" (its name), "run" (checkpoints of one training run share it), "accuracy" (on
            test images, 0 to 1), and whatever else is known of it.

    Raises:
        PopulationError: a tensor is missing, unknown, of another shape, or holds NaN, infinity or a number
            beyond LARGEST, or an accuracy is none; the error names the network.
    """

    architecture: Architecture
    parameters: dict[str, Tensor]
    rows: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            missing = [name for name in REQUIRED if name not in row]
            if missing:
                raise PopulationError(f"network {row.get('network', '?')}: its row has no {', '.join(missing)}")
            if not 0 <= row["accuracy"] <= 1:
                raise PopulationError(f"network {row['network']}: accuracy {row['accuracy']} is not within 0 and 1")
        names = ", ".join(str(row["network"]) for row in self.rows[:3])
        shapes = self.architecture.shapes
        if set(self.parameters) != set(shapes):
            missing, unknown = sorted(set(shapes) - set(self.parameters)), sorted(set(self.parameters) - set(shapes))
            raise PopulationError(f"networks {names}: parameters missing {missing}, unknown {unknown}")
        for name, values in self.parameters.items():
            if tuple(values.shape) != (len(self.rows), *shapes[name]):
                raise PopulationError(
                    f"networks {names}: {name} has shape {tuple(values.shape)}, but {len(self.rows)} networks of this "
                    f"architecture need {(len(self.rows), *shapes[name])}"
                )
            bounded = _bounded(values)
            if not bounded.all():
                bad = self.rows[int(torch.nonzero(~bounded)[0, 0])]["network"]
                raise PopulationError(f"network {bad}: {name} holds NaN, infinity or a number beyond {LARGEST:g}")

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Checkpoints: {len(self):,} networks of {self.architecture}"


def _bounded(values: Tensor) -> Tensor:
    """Which networks' numbers, (networks, ...), are all finite and within LARGEST."""
    return (values.flatten(1).abs() <= LARGEST).all(1)


def finite_networks(
    architecture: Architecture, parameters: Mapping[str, Tensor], rows: Sequence[dict[str, Any]]
) -> Checkpoints:
    """The networks without NaN, infinity or numbers beyond LARGEST: those that diverged are left out."""
    finite = torch.stack([_bounded(values) for values in parameters.values()]).all(0)
    return Checkpoints(
        architecture,
        {name: values[finite] for name, values in parameters.items()},
        tuple(row for row, keep in zip(rows, finite.tolist(), strict=True) if keep),
    )


@dataclass(frozen=True)
class Population:
    """Networks of one or many architectures; `rejected` says why others are not among them."""

    parts: tuple[Checkpoints, ...]
    rejected: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __repr__(self) -> str:
        architectures = len({part.architecture for part in self.parts})
        accuracies = [row["accuracy"] for part in self.parts for row in part.rows]
        reached = f"accuracies {min(accuracies):.1%} to {max(accuracies):.1%}, " if accuracies else ""
        return (
            f"Population: {len(self):,} networks of {architectures:,} architectures in {len(self.parts):,} parts\n"
            f"  {reached}{len(self.rejected):,} rejected"
        )

    @property
    def table(self) -> pd.DataFrame:
        """A row per network, in the order of the parts: its own and what its architecture is."""
        rows = []
        for number, part in enumerate(self.parts):
            shape = {"layers": len(part.architecture.kernel_size), "channels": part.architecture.channels[1:]}
            rows += [{"part": number} | shape | row for row in part.rows]
        return pd.DataFrame(rows)


def write_part(path: Path, checkpoints: Checkpoints) -> None:
    """Store networks of one architecture in one file, whole or not at all."""
    header = {"architecture": json.dumps(checkpoints.architecture.as_json()), "rows": json.dumps(checkpoints.rows)}
    parameters = {name: values.contiguous().cpu() for name, values in checkpoints.parameters.items()}
    write_atomically(path, safetensors.torch.save(parameters, header))


def read_part(path: Path) -> Checkpoints:
    """What `write_part` stored.

    Raises:
        PopulationError: the file is damaged or contradicts itself; the error names it.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            parameters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        architecture = Architecture.from_json(json.loads(header["architecture"]))
        return Checkpoints(architecture, parameters, tuple(json.loads(header["rows"])))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise PopulationError(f"{path} is no part of a population ({error}); delete it and generate again") from error


class GenerationFailed(RuntimeError):
    """Some parts could not be made; the others are stored."""


def generate(
    directory: Path, makers: Mapping[str, Callable[[], Checkpoints]], *, workers: int, title: str
) -> Population:
    """Make the parts that are not stored yet, and read all of them; the table goes to `table.csv`.

    Args:
        makers: part's name -> what makes it, which can be sent to another process.
        workers: single-threaded processes, each of which makes one part at a time.

    Raises:
        GenerationFailed: after all parts have ended; names every part that failed, and why.
        PopulationError: a stored part is damaged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.safetensors" for name in makers}
    missing = {name: path for name, path in paths.items() if not path.exists()}
    if missing:
        failures = _make_all({path: makers[name] for name, path in missing.items()}, workers, title)
        if failures:
            reasons = "\n".join(f"{path}: {error!r}" for path, error in failures.items())
            first = next(iter(failures.values()))
            raise GenerationFailed(f"{len(failures)} of {len(makers)} parts failed:\n{reasons}") from first
    population = Population(tuple(read_part(path) for path in paths.values()))
    table = directory / "table.csv"
    if missing or not table.exists():  # it may be all that a killed generator has left to do
        write_atomically(table, population.table.to_csv(index=False))
    return population


def _make_all(makers: Mapping[Path, Callable[[], Checkpoints]], workers: int, title: str) -> dict[Path, BaseException]:
    """Make and store parts in other processes; those that failed, and why."""
    failures: dict[Path, BaseException] = {}
    accuracies: list[float] = []
    work = [(maker, path) for path, maker in makers.items()]
    with tqdm(total=len(work), desc=title, unit="part") as bar:
        for number, future in completed(_make, work, workers):
            bar.update()
            if future.exception() is not None:
                failures[work[number][1]] = future.exception()
                continue
            accuracies += future.result()
            mean = sum(accuracies) / max(1, len(accuracies))
            bar.set_postfix_str(f"{len(accuracies)} networks, mean accuracy {mean:.3f}")
    return failures


def _make(maker: Callable[[], Checkpoints], path: Path) -> list[float]:
    """A worker's task: make and store a part; the accuracies of its networks."""
    checkpoints = maker()
    write_part(path, checkpoints)
    return [row["accuracy"] for row in checkpoints.rows]
