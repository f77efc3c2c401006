"""Runs: what a config and a digest of its data give, stored under a hash of both and found again.

`<cache>/runs/<hash>/` holds `result.json` (a record: config, identity, data, metrics, environment), the best weights
`weights.safetensors`, and while a run is under way its `checkpoint.pt` and its `lock`. Everything is written whole or
not at all.

A run's *identity* is its task and those fields of its config that differ from their defaults: a field that is new, with
a default that means what was there before, leaves the names of all stored runs as they are. So a default never changes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import pooch
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from ngcore.files import REPOSITORY, write_atomically

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = REPOSITORY or Path.cwd()  # where notebooks lie
UNCOMMITTED = "-dirty"  # ends the commit of a record that was made by code that was not yet committed

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


# Names


def identity(config: Any) -> dict[str, Any]:
    """What a config is: its task and what differs from the defaults, as JSON has it."""
    return json.loads(json.dumps({"task": config.task} | _distinct(config)))


def _distinct(value: Any) -> Any:
    """A value in which of every dataclass only the fields stand that differ from their default."""
    if isinstance(value, tuple | list):
        return [_distinct(item) for item in value]
    if not is_dataclass(value):
        return value
    own = {field.name: (getattr(value, field.name), field) for field in fields(value)}
    return {name: _distinct(item) for name, (item, field) in own.items() if not _is_default(item, field)}


def _is_default(value: Any, field: Any) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default is not MISSING and value == default


def run_hash(identity: Mapping[str, Any], data: str) -> str:
    """The name of a run: a hash of its identity and of the digest of its data."""
    text = json.dumps({"identity": identity, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Records


def make_record(
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    data: str,
    metrics: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Record:
    """What is kept of a run, under the name that its identity and data give it; as it will be read again from JSON."""
    record = {
        "hash": run_hash(identity, data),
        "config": config,
        "identity": identity,
        "data": data,
        "metrics": metrics,
        "environment": environment,
    }
    return json.loads(json.dumps(record))  # JSON knows no tuples


def write_record(record: Record, path: Path) -> None:
    write_atomically(path, json.dumps(record, indent=1))


def read_record(path: Path) -> Record:
    """A stored result, checked against its own name.

    Raises:
        RunError: the file is unreadable or its identity and data do not hash to the run that it is stored as.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not a stored run ({error!r}); delete it and run again") from error
    return record_from(text, path)


def record_from(text: str, path: PurePath) -> Record:
    """The record of a file with this text, checked as by `read_record`."""
    try:
        record = json.loads(text)
        name, found = record["hash"], run_hash(record["identity"], record["data"])
        consistent = _is_part(record["identity"], record["config"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not a stored run ({error!r}); delete it and run again") from error
    if found != name or name not in (path.stem, path.parent.name) or not consistent:
        raise RunError(
            f"{path}: its config, identity and data are not those of the run {name} (they hash to {found}): the file "
            "was altered or renamed; delete it and run again"
        )
    return record


def _is_part(identity: Any, config: Any) -> bool:
    """Whether every field of an identity stands in the config."""
    if isinstance(identity, dict):
        return isinstance(config, dict) and all(k in config and _is_part(v, config[k]) for k, v in identity.items())
    if isinstance(identity, list):
        return len(identity) == len(config) and all(map(_is_part, identity, config))
    return identity == config


def read_records(directory: Path) -> list[Record]:
    """Every record of a directory.

    Raises:
        RunError: one is damaged.
    """
    return [read_record(path) for path in sorted(directory.glob("*.json"))]


def having(records: Sequence[Record], **fields: Any) -> list[Record]:
    """Those whose configs have all of these fields."""
    return [r for r in records if all(r["config"].get(name) == value for name, value in fields.items())]


# The store


@dataclass(frozen=True)
class StoredRun:
    """One run's place in the store."""

    directory: Path
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    data: str

    @staticmethod
    def of(config: Any, data: str, cache: Path) -> StoredRun:
        """The place of a dataclass config on data of this digest."""
        own = identity(config)
        return StoredRun(cache / "runs" / run_hash(own, data), asdict(config), own, data)

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
        record = make_record(self.config, self.identity, self.data, metrics, environment)
        write_record(record, self.directory / "result.json")
        (self.directory / "checkpoint.pt").unlink(missing_ok=True)
        return record


# What made a record


def environment(device: str) -> dict[str, Any]:
    """What a number depends on beside its config: versions, machine, code."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({os.cpu_count()} cores)"
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "sources": sources_digest(),
    }


@cache  # a process runs the code that it has imported, whatever is committed later
def commit(package: Path = PACKAGE) -> str:
    """The checkout's commit, followed by "-dirty" where the package itself was changed since; "unknown" outside."""
    if shutil.which("git") is None or (package == PACKAGE and REPOSITORY is None):
        return "unknown"  # a wheel may lie in the checkout of something else
    name = _git(package, "rev-parse", "--short", "HEAD")
    if not name:
        return "unknown"
    return name + (UNCOMMITTED if _git(package, "status", "--porcelain", "--", ".") else "")


def _git(directory: Path, *arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    return found.stdout.strip()


@cache
def sources_digest(package: Path = PACKAGE) -> str:
    """A hash of the package's Python files and of where they are in it."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# Records for all to see


def publish(records: Sequence[Record], directory: Path) -> None:
    """Keep the small records behind tables and figures as `<hash>.json`, in place of earlier ones.

    Earlier records of the same tasks and data sets go: a table never mixes the runs of two settings. Where some records
    of a task and data set come from code that was not committed, which nobody could find again, none is kept and the
    earlier ones stay; one line says so.
    """
    uncommitted = [record for record in records if record["environment"]["commit"].endswith(UNCOMMITTED)]
    if uncommitted:
        left_out = sorted({" on ".join(_subject(record)) for record in uncommitted})
        print(f"not published: {', '.join(left_out)}: {len(uncommitted)} of the runs are of code that is not committed")
    skipped = {_subject(record) for record in uncommitted}
    kept = [record for record in records if _subject(record) not in skipped]
    for record in kept:
        write_record(record, directory / f"{record['hash']}.json")
    names, subjects = {record["hash"] for record in kept}, {_subject(record) for record in kept}
    for path in directory.glob("*.json"):
        if path.stem not in names and _subject(read_record(path)) in subjects:
            path.unlink()


def add_published(records: Sequence[Record], directory: Path) -> None:
    """Keep records beside those that are there, but for those of code that was not committed."""
    for record in records:
        if not record["environment"]["commit"].endswith(UNCOMMITTED):
            write_record(record, directory / f"{record['hash']}.json")


def _subject(record: Record) -> tuple[str, str]:
    return record["config"]["task"], record["config"]["dataset"]


def published(directory: Path, tasks: Collection[str]) -> list[Record]:
    """Every record of some tasks that `publish` left in a directory.

    Raises:
        RunError: there is none, or one is damaged.
    """
    found = [record for record in read_records(directory) if record["config"]["task"] in tasks]
    if not found:
        raise RunError(
            f"{directory} holds no stored runs of {', '.join(tasks)}: run the notebook with train = True first"
        )
    return found
