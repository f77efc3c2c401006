"""Carrying runs from one machine to another in a few small files: records, best weights, checkpoints.

A pack is zip archives `pack_<i>_of_<n>.zip` whose entries are `runs/<hash>/<file>`, as the cache has them, and
`results/<profile>/<hash>.json`, the published records. It holds no INRs and no populations: these are made again.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ngcore.files import write_atomically
from ngcore.study.runs import (
    UNCOMMITTED,
    Record,
    cache_directory,
    commit,
    output_directory,
    record_from,
    results_directory,
    sources_digest,
)

FILES, BYTES = 8, 16 * 1000 * 1000  # at most so many files, of at most so many bytes
RESULT, WEIGHTS, CHECKPOINT = "result.json", "weights.safetensors", "checkpoint.pt"
ENTRY = re.compile(rf"runs/[0-9a-f]{{16}}/({RESULT}|{WEIGHTS}|{CHECKPOINT})|results/[\w-]+/[0-9a-f]{{16}}\.json", re.A)
PART = re.compile(r"pack_(\d+)_of_(\d+)\.zip", re.A)


class PackError(ValueError):
    """A pack that is damaged, incomplete or no pack; or one that does not fit."""


def pack(directory: Path, profile: str, checkpoints: bool = True) -> list[Path]:
    """Write all stored runs, and the records that a profile published, into a directory.

    Args:
        checkpoints: of runs that are not finished too, as many as fit; one line says how many are left out.

    Raises:
        PackError: the directory holds a pack; records and weights do not fit into so few files.
    """
    if any(PART.fullmatch(path.name) for path in directory.glob("*.zip")):
        raise PackError(f"{directory} holds a pack already: choose another directory")
    finished, unfinished = _stored(profile)
    parts: list[dict[str, bytes]] = []
    for name, content in finished.items():
        if not _put(parts, name, content):
            size = sum(map(len, finished.values())) / 1e6
            raise PackError(f"{len(finished)} files of {size:.0f} MB do not fit into {FILES} of {BYTES / 1e6:.0f} MB")
    left_out = [name for name, content in unfinished.items() if not (checkpoints and _put(parts, name, content))]
    if left_out:
        print(f"left out: {len(left_out)} of {len(unfinished)} checkpoints", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"pack_{i}_of_{len(parts)}.zip" for i in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        write_atomically(path, _zipped(part))
    return paths


def _stored(profile: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What there is to carry: of what is finished, the small files first, and checkpoints; entry -> content."""
    records, weights, checkpoints = {}, {}, {}
    for run in sorted((cache_directory() / "runs").glob("[0-9a-f]*")):
        if (run / RESULT).is_file():
            records[f"runs/{run.name}/{RESULT}"] = (run / RESULT).read_bytes()
            weights[f"runs/{run.name}/{WEIGHTS}"] = (run / WEIGHTS).read_bytes()
        elif (run / CHECKPOINT).is_file():
            checkpoints[f"runs/{run.name}/{CHECKPOINT}"] = (run / CHECKPOINT).read_bytes()
    published = sorted(results_directory(profile).glob("*.json"))
    records |= {f"results/{profile}/{path.name}": path.read_bytes() for path in published}
    return records | weights, checkpoints


OVERHEAD = 300  # bytes of an archive around an entry, at most: its name twice and what is known of it


def _put(parts: list[dict[str, bytes]], name: str, content: bytes) -> bool:
    """Put an entry into the first part that has room for it; whether there is one."""
    for part in parts:
        if sum(len(own) + OVERHEAD for own in part.values()) + len(content) + OVERHEAD <= BYTES:
            part[name] = content
            return True
    if len(parts) == FILES or len(content) + OVERHEAD > BYTES:
        return False
    parts.append({name: content})
    return True


def _zipped(entries: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, own in entries.items():
            archive.writestr(name, own)
    return content.getvalue()


@dataclass(frozen=True)
class Unpacked:
    """How many runs, published records and checkpoints came with a pack and were not there."""

    runs: int
    records: int
    checkpoints: int


def unpack(directory: Path) -> Unpacked:
    """Take the runs of a pack into the cache, and its published records to those that are there.

    All of it is read and checked before anything is written. A run that is finished here stays as it is, and so does a
    checkpoint that is as far. A record whose commit was unknown where it was made gets the one of this checkout, where
    that is the code that made it.

    Raises:
        PackError: no pack, a part is missing or truncated, an entry is not what its name says; names the file.
    """
    entries = dict(_entries(directory))
    records = {name: _checked(name, content) for name, content in entries.items() if name.endswith(".json")}
    for name, content in entries.items():
        if name.endswith(WEIGHTS):
            _check_weights(name, content)
    states = {name: _checkpoint(name, content) for name, content in entries.items() if name.endswith(CHECKPOINT)}
    runs = [name for name in records if name.startswith("runs/") and not (cache_directory() / name).exists()]
    for name in runs:
        weights = str(PurePosixPath(name).with_name(WEIGHTS))
        if weights not in entries:
            raise PackError(f"{directory}: {name} comes without its weights")
        write_atomically(cache_directory() / weights, entries[weights])
        write_atomically(cache_directory() / name, json.dumps(_attributed(records[name]), indent=1))
        (cache_directory() / name).with_name(CHECKPOINT).unlink(missing_ok=True)
    published = [name for name in records if name.startswith("results/")]
    published = [name for name in published if not (output_directory() / "data" / name).exists()]
    for name in published:
        write_atomically(output_directory() / "data" / name, json.dumps(_attributed(records[name]), indent=1))
    further = [name for name, state in states.items() if _is_further(cache_directory() / name, state)]
    for name in further:
        write_atomically(cache_directory() / name, entries[name])
    return Unpacked(len(runs), len(published), len(further))


def _entries(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Every entry of all parts, once it is clear that none is missing."""
    found = {path: PART.fullmatch(path.name) for path in sorted(directory.glob("*.zip"))}
    parts = {int(match[1]): path for path, match in found.items() if match}
    counts = {int(match[2]) for match in found.values() if match}
    if len(counts) != 1:
        raise PackError(f"{directory} holds {'parts of several packs' if counts else 'no pack'}")
    missing = sorted(set(range(1, max(counts) + 1)) - parts.keys())
    if missing:
        raise PackError(f"{directory}: part {', '.join(map(str, missing))} of {max(counts)} is missing")
    for path in parts.values():
        try:
            with zipfile.ZipFile(path) as archive:
                for item in archive.infolist():
                    if not ENTRY.fullmatch(item.filename):
                        raise PackError(f"{path} holds {item.filename!r}, which is no file of a run")
                    if item.file_size > BYTES:
                        raise PackError(f"{path}: {item.filename} is larger than a pack's entries are")
                    yield item.filename, archive.read(item)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            raise PackError(f"{path} is truncated or damaged ({error}): copy it again") from error


def _checked(name: str, content: bytes) -> Record:
    try:
        return record_from(content.decode(), PurePosixPath(name))
    except ValueError as error:
        raise PackError(f"the pack's {name} is damaged: {error}") from error


def _check_weights(name: str, content: bytes) -> None:
    try:
        safetensors.torch.load(content)
    except SafetensorError as error:
        raise PackError(f"the pack's {name} is damaged: {error}") from error


def _checkpoint(name: str, content: bytes) -> dict[str, Any]:
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # of many kinds: it may be no archive, or hold something else than tensors
        raise PackError(f"the pack's {name} is damaged: {error}") from error


def _is_further(path: Path, state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a run that is not finished here, and further than the one that is here."""
    if path.with_name(RESULT).exists():
        return False
    return not path.exists() or _progress(state) > _progress(_checkpoint(path.name, path.read_bytes()))


def _progress(state: Mapping[str, Any]) -> int:
    """Epochs, or outer steps of meta-training."""
    return state["epoch"] if "epoch" in state else state["step"]


def _attributed(record: Record) -> Record:
    """The record with this checkout's commit, where it was made outside of any by the very sources of it."""
    own = record["environment"]
    here = commit()
    if own["commit"] != "unknown" or own["sources"] != sources_digest() or here.endswith(UNCOMMITTED):
        return record
    return record | {"environment": own | {"commit": here}}
