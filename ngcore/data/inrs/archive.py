"""Reader of published INR archives in the format of the DWS project (Navon et al. 2023).

An archive is a zip or an unpacked directory with one PyTorch state dict per image: `seq.<i>.weight` (out, in)
and `seq.<i>.bias` (out,). There are two layouts of files:

- MNIST: `mnist_png_<training|testing>_<label>_<id>/checkpoints/*.pth`: the folder tells split and label;
- FashionMNIST: `<train|test>/*.pth`: the state dict holds the label too, under `label`.

A `splits.json` in the archive, {"train": [path, ...], "val": [...], "test": [...]}, overrides the splits of
the names. Its paths may be those of another machine: only the parts that name the image count.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

SPLITS = "splits.json"
_LAYOUTS = (
    re.compile(r"(^|/)(?P<name>\w*mnist_png_(?P<split>train|test)(ing)?_(?P<label>\d+)_\d+)/checkpoints/[^/]+\.pth$"),
    re.compile(r"(^|/)(?P<name>(?P<split>train|test)/[^/]+)\.pth$"),
)
_PARAMETER = re.compile(r"seq\.(\d+)\.(weight|bias)")

Readers = Mapping[str, Callable[[], bytes]]


@dataclass(frozen=True)
class DwsArchive:
    """All INRs of an archive, ordered by file name.

    Attributes:
        parameters: float32, `layers.<i>.weight` (n, out, in) and `layers.<i>.bias` (n, out).
        labels: class of each INR's image, 0 to 9.
        splits: "train", "val" or "test" of each INR.
        names: the name of each INR's image in the archive.
    """

    parameters: dict[str, Tensor]
    labels: Int64[Tensor, " n"]
    splits: list[str]
    names: list[str]


def read_archive(path: Path) -> DwsArchive:
    """Read every INR of an archive, a zip or an unpacked directory.

    Where the archive has a splits.json, the INRs that it does not list are left out.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: names the file that is truncated or unreadable, lies outside the archive's directory, has
            an unfit name or label, other layer sizes than the first INR, or NaN or infinite values.
    """
    with _open(path) as readers:
        files = {file: _match(file, path) for file in sorted(readers) if file.endswith(".pth")}
        splits = _read_splits(readers, files, path)
        files = {file: match for file, match in files.items() if match["name"] in splits}
        if not files:
            raise ValueError(f"{path} holds no INRs: no .pth file, or none that its {SPLITS} lists")
        states, labels = [], []
        for file, match in tqdm(files.items(), desc=f"Reading {path.name}", unit="INR"):
            state, label = _read_inr(readers[file], match, f"{path}: {file}")
            if states:
                _check_sizes(state, states[0], f"{path}: {file}")
            states.append(state)
            labels.append(label)
    names = [match["name"] for match in files.values()]
    return DwsArchive(
        parameters={name: torch.stack([state[name] for state in states]) for name in states[0]},
        labels=torch.tensor(labels),
        splits=[splits[name] for name in names],
        names=names,
    )


@contextmanager
def _open(path: Path) -> Iterator[Readers]:
    """Every file of a zip or of a directory: a function that reads it, by its path within."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            if not file.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"{path}: {file.relative_to(path)} links to a file outside this directory")
        yield {file.relative_to(path).as_posix(): file.read_bytes for file in files}
        return
    if not path.exists():
        raise FileNotFoundError(f"there is no INR archive at {path}")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or not a zip: {error}. Download it again") from error
    with archive:
        # .pth files are zips themselves: a truncated archive may end in one and is opened as that one
        if min((member.header_offset for member in archive.infolist()), default=0) > 0:
            raise ValueError(f"{path} is truncated or not a zip: its first members are missing. Download it again")
        names = [name for name in archive.namelist() if not name.endswith("/")]
        for name in names:
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
                raise ValueError(f"{path}: member {name!r} lies outside the archive's directory")
        yield {name: partial(archive.read, name) for name in names}


def _match(file: str, path: Path) -> re.Match[str]:
    """Split, image name and, in the MNIST layout, label that a file's name tells."""
    for layout in _LAYOUTS:
        if match := layout.search(file):
            return match
    raise ValueError(
        f"{path}: {file} is not named as INRs are: "
        "mnist_png_<training|testing>_<label>_<id>/checkpoints/<file>.pth or <train|test>/<file>.pth"
    )


def _read_splits(readers: Readers, files: Mapping[str, re.Match[str]], path: Path) -> dict[str, str]:
    """Split of each INR by its image's name: from splits.json where there is one, else from the name."""
    own: dict[str, str] = {}
    for file, match in files.items():
        if match["name"] in own:
            raise ValueError(f"{path}: {file} is a second INR of the image {match['name']}")
        own[match["name"]] = match["split"]
    listing = next((file for file in readers if PurePosixPath(file).name == SPLITS), None)
    if listing is None:
        return own
    try:
        listed = {
            _match(entry, path)["name"]: split
            for split, entries in json.loads(readers[listing]()).items()
            for entry in entries
        }
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: {listing} is not a table of splits and their files: {error}") from error
    missing = sorted(set(listed) - set(own))
    if missing:
        raise ValueError(f"{path}: {listing} lists {len(missing)} INRs that are not there, e.g. {missing[0]}")
    return listed


def _read_inr(read: Callable[[], bytes], match: re.Match[str], where: str) -> tuple[dict[str, Tensor], int]:
    """Parameters, renamed to `layers.<i>.*`, and label of one INR."""
    try:
        state = dict(torch.load(io.BytesIO(read()), map_location="cpu", weights_only=True))
    except Exception as error:  # damaged bytes can raise almost anything
        raise ValueError(f"{where} can't be read: {error}") from error
    label = match.groupdict().get("label") or state.pop("label", None)
    if label is None:
        raise ValueError(f"{where} has no label, neither in its name nor under the key 'label'")
    label = int(label)
    if not 0 <= label <= 9:
        raise ValueError(f"{where} has label {label}; classes are 0 to 9")
    parameters = {}
    for key, value in state.items():
        parameter = _PARAMETER.fullmatch(key)
        if parameter is None or not isinstance(value, Tensor):
            raise ValueError(f"{where} holds {key!r}; an INR has tensors seq.<i>.weight and seq.<i>.bias alone")
        if not torch.isfinite(value).all():
            raise ValueError(f"{where}: {key} holds NaN or infinite values")
        parameters[f"layers.{parameter[1]}.{parameter[2]}"] = value.float()
    if not parameters:
        raise ValueError(f"{where} holds no parameters")
    return parameters, label


def _check_sizes(state: Mapping[str, Tensor], first: Mapping[str, Tensor], where: str) -> None:
    """All INRs of an archive have the same layers as its first."""
    found = {name: tuple(value.shape) for name, value in state.items()}
    expected = {name: tuple(value.shape) for name, value in first.items()}
    if found != expected:
        raise ValueError(f"{where} has other layer sizes than the first INR: {found}, not {expected}")
