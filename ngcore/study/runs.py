"""Runs: a frozen config and a digest of its data, their result stored under a hash of both and found again.

`<cache>/runs/<hash>/` holds `result.json` (config, data, metrics per epoch and final, environment), the best weights
`weights.safetensors`, and while a run is under way its `checkpoint.pt`. Everything is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pooch
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from ngcore.files import REPOSITORY, write_atomically

ROOT = Path(__file__).resolve().parents[2]

Record = dict[str, Any]


class RunError(ValueError):
    """A stored run that is damaged or is not what its name says."""


def cache_directory() -> Path:
    """Where fitted INRs, full image sets and runs are kept: $NGCORE_CACHE, or `cache/` in the repository.

    Where ngcore is installed from a wheel: the user's cache directory, on Linux ~/.cache/ngcore.
    """
    own = REPOSITORY / "cache" if REPOSITORY else pooch.os_cache("ngcore")
    return Path(os.environ.get("NGCORE_CACHE", own))


def results_directory(profile: str) -> Path:
    """Where a profile's records are kept for all to see: `data/results/<profile>/`."""
    return output_directory() / "data" / "results" / profile


def output_directory() -> Path:
    """The tree that `figures/`, `data/results/` and `executed/` are written to: $NGCORE_OUTPUT, or the repository.

    Where ngcore is installed from a wheel: the current directory.
    """
    return Path(os.environ.get("NGCORE_OUTPUT", REPOSITORY or Path.cwd()))


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the tensors' shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_hash(config: Mapping[str, Any], data: str) -> str:
    """The name of a run: a hash of its config's fields and of the digest of its data."""
    text = json.dumps({"config": config, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_record(path: Path) -> Record:
    """A stored result, checked against its own name.

    Raises:
        RunError: the file is unreadable or its config and data do not hash to the run that it is stored as.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, found = record["hash"], run_hash(record["config"], record["data"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not a stored run ({error!r}); delete it and run again") from error
    if found != name or name not in (path.stem, path.parent.name):
        raise RunError(
            f"{path}: config and data hash to {found}, but the run is stored as {name}: the file was altered or "
            "renamed; delete it and run again"
        )
    return record


@dataclass(frozen=True)
class StoredRun:
    """One run's place in the store."""

    directory: Path
    config: Mapping[str, Any]
    data: str

    @staticmethod
    def of(config: Any, data: str, cache: Path) -> StoredRun:
        """The place of a dataclass config on data of this digest."""
        fields = asdict(config)
        return StoredRun(cache / "runs" / run_hash(fields, data), fields, data)

    def result(self) -> Record | None:
        """The stored result, None if the run has not finished."""
        path = self.directory / "result.json"
        return read_record(path) if path.exists() else None

    def weights(self) -> dict[str, Tensor]:
        """The weights with the best validation score."""
        return load_file(self.directory / "weights.safetensors")

    def checkpoint(self) -> dict[str, Any] | None:
        """The state after the last whole epoch, None if there is none.

        Raises:
            RunError: the checkpoint can't be read, or its weights are not finite; the file stays.
        """
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise RunError(f"{path} can't be read ({error}); delete it to start the run again") from error
        for name, weights in [*state["model"].items(), *state["best"].items()]:
            if not torch.isfinite(weights).all():
                raise RunError(f"{path}: {name} holds NaN or infinity; delete the file to start the run again")
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self.directory / "checkpoint.pt", content.getvalue())

    def finish(self, metrics: dict[str, Any], weights: dict[str, Tensor], environment: dict[str, Any]) -> Record:
        """Store the result, weights first: a run with a result is complete."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        write_atomically(self.directory / "weights.safetensors", safetensors.torch.save(tensors))
        record = {
            "hash": self.directory.name,
            "config": dict(self.config),
            "data": self.data,
            "metrics": metrics,
            "environment": environment,
        }
        text = json.dumps(record, indent=1)
        write_atomically(self.directory / "result.json", text)
        (self.directory / "checkpoint.pt").unlink(missing_ok=True)
        return json.loads(text)  # as it will be read again: JSON knows no tuples


def environment(device: str) -> dict[str, Any]:
    """What a number depends on beside its config: versions, machine, commit."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({os.cpu_count()} cores)"
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str:
    """The checkout's commit, "unknown" outside of one."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def publish(records: Sequence[Record], directory: Path) -> None:
    """Keep the small records behind tables and figures as `<hash>.json`, in place of earlier ones.

    Earlier records of the same tasks and data sets go: a table never mixes the runs of two settings.
    """
    for record in records:
        write_atomically(directory / f"{record['hash']}.json", json.dumps(record, indent=1))
    names = {record["hash"] for record in records}
    subjects = {_subject(record) for record in records}
    for path in directory.glob("*.json"):
        if path.stem not in names and _subject(read_record(path)) in subjects:
            path.unlink()


def _subject(record: Record) -> tuple[str, str]:
    return record["config"]["task"], record["config"]["dataset"]


def published(directory: Path, task: str, dataset: str | None = None) -> list[Record]:
    """Every record of a task, or of a task on one data set, that `publish` left in a directory.

    Raises:
        RunError: there is none, or one is damaged.
    """
    found = [
        record
        for record in read_records(directory)
        if record["config"]["task"] == task and dataset in (None, record["config"]["dataset"])
    ]
    if not found:
        raise RunError(f"{directory} holds no stored runs of {task}: run the notebook with train = True first")
    return found


def read_records(directory: Path) -> list[Record]:
    """Every record of a directory.

    Raises:
        RunError: one is damaged.
    """
    return [read_record(path) for path in sorted(directory.glob("*.json"))]
