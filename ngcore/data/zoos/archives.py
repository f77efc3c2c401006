"""Readers of published populations of CNNs: the Small CNN Zoo and the CNN Wild Park, each from its unpacked directory.

A network that can't be used does not lose the others: it is left out, `Population.rejected` names it and says what is
wrong, and one warning says how many there are.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ngcore.data.zoos.cifar10_gs import architecture as small_cnn
from ngcore.data.zoos.cnn import Architecture
from ngcore.data.zoos.populations import LARGEST, Checkpoints, Population, PopulationError
from ngcore.data.zoos.small_zoo import ACTIVATIONS

FINAL_STEP = 86  # epochs that the Small CNN Zoo was trained for
SPLITS = "cnn_park_splits.json"
WILD_PARK_ACCURACY = ("accuracy", "test_acc", "test/acc")

# Columns of the Small CNN Zoo's metrics: those that a population needs, and those worth keeping; their names here.
_NEEDED = {"step": "step", "test_accuracy": "accuracy", "config.activation": "activation"}
_KEPT = {
    "config.optimizer": "optimizer",
    "config.learning_rate": "learning_rate",
    "config.w_init": "w_init",
    "config.init_std": "init_std",
    "config.l2reg": "l2reg",
    "config.dropout": "dropout",
    "config.train_fraction": "train_fraction",
    "train_accuracy": "train_accuracy",
    "train_loss": "train_loss",
    "test_loss": "test_loss",
}


def read_small_zoo(directory: Path) -> Population:
    """The networks of one image set of the Small CNN Zoo (Unterthiner et al. 2020) at the end of their training.

    Files:
        weights.npy: a row of all parameters per checkpoint; kernels are (h, w, in, out), dense ones (in, out).
        metrics.csv.gz: a line per checkpoint with `step`, `test_accuracy` and `config.activation`; those of the columns
            in `_KEPT` that are there come along.
        layout.csv: `varname`, `start_idx`, `end_idx` and `shape` of every parameter in a row of the weights.

    Returns:
        One part per activation. `run` is the checkpoint's row in weights.npy: every network has a run of its own.

    Raises:
        PopulationError: one of the files is missing, damaged or contradicts the others, or no network is left.
    """
    layout = _read_layout(directory / "layout.csv")
    path, annotations = directory / "weights.npy", directory / "metrics.csv.gz"
    metrics = _read_csv(annotations, _NEEDED)
    try:
        weights = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PopulationError(f"{path} can't be read: {error}") from error
    width = max(end for _, end in layout.values())
    if weights.dtype.kind != "f" or weights.shape != (len(metrics), width):
        raise PopulationError(
            f"{path} holds {weights.dtype} of shape {weights.shape}, but metrics.csv.gz and layout.csv speak of "
            f"floating point numbers of shape {(len(metrics), width)}"
        )
    metrics = metrics[[name for name in (*_NEEDED, *_KEPT) if name in metrics]].rename(columns=_NEEDED | _KEPT)
    metrics.insert(0, "run", np.arange(len(metrics)))
    metrics.insert(0, "network", "row" + metrics["run"].astype(str))
    metrics = metrics[metrics["step"] == FINAL_STEP]

    accuracy = pd.to_numeric(metrics["accuracy"], errors="coerce")
    measured = accuracy.between(0, 1)
    known = metrics["activation"].isin(ACTIVATIONS)
    rejected = [
        f"{annotations}: network {row.network}: test_accuracy {row.accuracy} is not within 0 and 1"
        for row in metrics[~measured].itertuples()
    ]
    rejected += [
        f"{annotations}: network {row.network}: unknown activation {row.activation!r}"
        for row in metrics[measured & ~known].itertuples()
    ]
    metrics, parts = metrics.assign(accuracy=accuracy), []
    for activation in ACTIVATIONS:
        rows = metrics[measured & (metrics["activation"] == activation)]
        values = weights[rows["run"].to_numpy()]
        finite = (np.abs(values) <= LARGEST).all(1)
        rejected += [
            f"{path}: network {name}: its weights hold NaN, infinity or numbers beyond {LARGEST:g}"
            for name in rows["network"][~finite]
        ]
        if finite.any():
            parameters = _split(torch.from_numpy(values[finite]).float(), layout)
            parts.append(Checkpoints(small_cnn(activation), parameters, tuple(rows[finite].to_dict("records"))))
    return _population(directory, parts, rejected)


def _read_csv(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    """A table that has these columns."""
    try:
        table = pd.read_csv(path, low_memory=False)  # one type per column, not one per chunk of it
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise PopulationError(f"{path} can't be read: {error}") from error
    missing = [name for name in columns if name not in table]
    if missing:
        raise PopulationError(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table))}")
    return table


def _read_layout(path: Path) -> dict[str, tuple[int, int]]:
    """First and last column + 1 of every parameter. Kernels and biases follow the layers, whatever they are called."""
    table = _read_csv(path, ("varname", "start_idx", "end_idx", "shape"))
    shapes = small_cnn("relu").shapes
    layout: dict[str, tuple[int, int]] = {}
    for kind, suffix in (("kernel:0", ".weight"), ("bias:0", ".bias")):
        variables = table[table["varname"].astype(str).str.endswith(kind)]
        names = [name for name in shapes if name.endswith(suffix)]
        if len(variables) != len(names):
            raise PopulationError(f"{path} has {len(variables)} variables .../{kind}, not one for each of 4 layers")
        for name, row in zip(names, variables.itertuples(), strict=True):
            found = tuple(int(size) for size in re.findall(r"\d+", str(row.shape)))
            if found != _tensorflow(shapes[name]):
                raise PopulationError(f"{path}: {row.varname} has shape {found}, not {_tensorflow(shapes[name])}")
            layout[name] = (row.start_idx, row.end_idx)
    start = 0
    for name, (first, end) in sorted(layout.items(), key=lambda item: item[1]):
        if (first, end) != (start, start + math.prod(shapes[name])):
            raise PopulationError(
                f"{path}: columns {first} to {end} of {name} leave a gap, overlap or don't fit its shape"
            )
        start = end
    return layout


def _tensorflow(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (out, in, *kernel) of a weight as TensorFlow has it, (*kernel, in, out); a bias's is the same."""
    return shape[2:] + shape[1::-1]


def _split(rows: Float[Tensor, "n width"], layout: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Rows of all parameters -> each parameter (n, *its shape), with PyTorch's order of axes."""
    parameters = {}
    for name, shape in small_cnn("relu").shapes.items():
        values = rows[:, slice(*layout[name])].unflatten(1, _tensorflow(shape))
        if len(shape) > 1:
            kernel = range(1, len(shape) - 1)
            values = values.permute(0, -1, -2, *kernel)
        parameters[name] = values.contiguous()
    return parameters


def read_wild_park(directory: Path) -> Population:
    """The CNN Wild Park as published (Zenodo record 12797219): a folder per run, a .pt file per checkpoint.

    A checkpoint holds `model`, the parameters, and `config`: `n_layers`, `channels` (the images' first), `kernel_size`,
    `stride`, `padding`, `residual`, `activation` ("none" for the identity) and perhaps `n_classes`. It may lie in a
    folder of its own, `<run>/checkpoint_<epoch>/checkpoint.pt`.

    Its accuracy stands in `cnn_park_splits.json`, {"train": {"path": [...], "score": [...]}, "val": ..., "test": ...},
    where the directory has this file: then the listed checkpoints are read, with their `split`. Else it stands in the
    checkpoint or in its `last_result`, as `accuracy`, `test_acc` or `test/acc`.

    Returns:
        One part per run, with the run's folder as `run`.

    Raises:
        PopulationError: the listing is damaged, or no network is left.
    """
    files = sorted(directory.rglob("*.pt"))
    listing, listed, rejected = directory / SPLITS, {}, []
    if listing.is_file():
        listed = _read_listing(listing)
        files = [path for path in files if _key(path) in listed]
        missing = sorted(listed.keys() - {_key(path) for path in files})
        rejected = [f"{listing}: {'/'.join(key)} is listed but not there" for key in missing]
    runs: dict[str, list[Checkpoints]] = defaultdict(list)
    for path in tqdm(files, desc=f"Reading {directory.name}", unit="network"):
        try:
            checkpoint = _load(path)
            row = _row(path.relative_to(directory))
            row |= listed[_key(path)] if listed else {"accuracy": _accuracy(checkpoint)}
            parameters = {name: values.float().unsqueeze(0) for name, values in checkpoint["model"].items()}
            network, run = Checkpoints(_architecture(checkpoint), parameters, (row,)), runs[row["run"]]
            if run and run[0].architecture != network.architecture:
                raise ValueError(f"its architecture is not that of {run[0].rows[0]['network']}, of the same run")
            run.append(network)
        except Exception as error:  # a damaged file can hold anything
            rejected.append(f"{path}: {error}")
    parts = [
        Checkpoints(
            run[0].architecture,
            {name: torch.cat([network.parameters[name] for network in run]) for name in run[0].parameters},
            tuple(row for network in run for row in network.rows),
        )
        for run in runs.values()
        if run
    ]
    return _population(directory, parts, rejected)


def _key(path: Path | PurePosixPath) -> tuple[str, ...]:
    """What the path of a checkpoint is here and in the listing: run, checkpoint's folder, file."""
    return path.parts[-3:]


def _read_listing(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Accuracy and split of every listed checkpoint."""
    try:
        splits = json.loads(path.read_bytes())
        return {
            _key(PurePosixPath(file)): {"accuracy": float(score), "split": split}
            for split, table in splits.items()
            for file, score in zip(table["path"], table["score"], strict=True)
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise PopulationError(f"{path} is not a table of splits with their paths and scores: {error!r}") from error


def _row(path: Path) -> dict[str, Any]:
    """What a checkpoint's path within the directory tells: its name, its run, its epoch."""
    folder = path.parent
    epoch = re.fullmatch(r"checkpoint_(\d+)", folder.name)
    run = folder.parent if epoch else folder
    row = {"network": path.with_suffix("").as_posix(), "run": run.as_posix()}
    return row | ({"epoch": int(epoch[1])} if epoch else {})


class _Stored:
    """Stands in for every class of another library that a checkpoint names: keeps what was stored and runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint. The published configs are objects of OmegaConf, which need not be installed to read them."""
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_Stored, name) for name in foreign]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    _require(checkpoint, ("model", "config"), "checkpoint")
    return checkpoint


def _require(values: Any, names: Sequence[str], what: str) -> None:
    if not isinstance(values, dict) or any(name not in values for name in names):
        found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"a {what} needs {', '.join(names)}, but there is {found}")


def _plain(value: Any) -> Any:
    """Dicts, lists and values of a config, with OmegaConf's containers and nodes taken off."""
    if isinstance(value, _Stored):
        return _plain(value.state["_content" if "_content" in value.state else "_val"])
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _architecture(checkpoint: Mapping[str, Any]) -> Architecture:
    """The architecture that a checkpoint's config describes."""
    config = _plain(checkpoint["config"])
    numbers = ("channels", "kernel_size", "stride", "padding", "residual")
    _require(config, ("n_layers", "activation", *numbers), "config")
    architecture = Architecture(
        **{name: config[name] for name in numbers},
        activation=tuple("identity" if name == "none" else name for name in config["activation"]),
        classes=config.get("n_classes", 10),
    )
    if config["n_layers"] != len(architecture.kernel_size):
        raise ValueError(f"n_layers is {config['n_layers']}, but channels are {architecture.channels}")
    return architecture


def _accuracy(checkpoint: Mapping[str, Any]) -> float:
    for place in (checkpoint, checkpoint.get("last_result", {})):
        for name in WILD_PARK_ACCURACY:
            if name in place:
                return float(place[name])
    raise ValueError(f"it has no accuracy ({', '.join(WILD_PARK_ACCURACY)}) among {', '.join(map(str, checkpoint))}")


def _population(directory: Path, parts: list[Checkpoints], rejected: list[str]) -> Population:
    if not parts:
        raise PopulationError(
            f"{directory} holds no network that can be used" + "".join(f"; {r}" for r in rejected[:1])
        )
    if rejected:
        warnings.warn(f"{directory}: {len(rejected)} networks are left out; the first: {rejected[0]}", stacklevel=3)
    return Population(tuple(parts), tuple(rejected))
