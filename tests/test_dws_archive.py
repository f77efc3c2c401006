"""The reader of published INR archives, on tiny archives of the same format."""

import json
import zipfile
from pathlib import Path

import pytest
import torch

from ngcore.data.inrs.archive import read_archive

MNIST = {
    "mnist_png_testing_7_3": "test",
    "mnist_png_training_2_23089": "train",
    "mnist_png_training_0_5": "train",
}
FASHION = {"train/model_0": 4, "train/model_1": 9, "test/model_0": 0}


def inr(seed: int, hidden: int = 4) -> dict[str, torch.Tensor]:
    """A state dict of a 2-hidden-hidden-1 network."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (2, hidden, hidden, 1)
    state = {}
    for i in range(3):
        state[f"seq.{i}.weight"] = torch.randn(sizes[i + 1], sizes[i], generator=generator)
        state[f"seq.{i}.bias"] = torch.randn(sizes[i + 1], generator=generator)
    return state


def write(root: Path, file: str, state: object) -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def pack(folder: Path) -> Path:
    """The folder as a zip, with the folder itself as its first level, as the published archives have it."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, file.relative_to(folder.parent))
    return archive


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist-inrs"
    for seed, name in enumerate(MNIST):
        write(folder, f"{name}/checkpoints/model_final.pth", inr(seed))
    return folder


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    folder = tmp_path / "fmnist_inrs"
    for seed, (name, label) in enumerate(FASHION.items()):
        write(folder, f"{name}.pth", inr(seed) | {"label": label})
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_layout(mnist: Path, packed: bool) -> None:
    archive = read_archive(pack(mnist) if packed else mnist)
    assert archive.names == sorted(MNIST)
    assert archive.splits == [MNIST[name] for name in archive.names]
    assert archive.labels.tolist() == [int(name.split("_")[3]) for name in archive.names]
    assert set(archive.parameters) == {f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    for n, name in enumerate(archive.names):
        state = inr(list(MNIST).index(name))
        for i in range(3):
            for kind in ("weight", "bias"):
                assert torch.equal(archive.parameters[f"layers.{i}.{kind}"][n], state[f"seq.{i}.{kind}"])


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_layout_takes_labels_from_the_files(fashion: Path, packed: bool) -> None:
    archive = read_archive(pack(fashion) if packed else fashion)
    assert dict(zip(archive.names, archive.labels.tolist(), strict=True)) == FASHION
    assert archive.splits == [name.split("/")[0] for name in archive.names]


@pytest.mark.parametrize("packed", [False, True])
def test_splits_file_overrides_the_names(fashion: Path, packed: bool) -> None:
    """Listed paths are those of the authors' machine; an INR that is not listed is left out."""
    splits = {
        "val": ["/home/authors/train/fmnist/train/model_1.pth"],
        "test": ["/home/authors/test/model_0.pth"],
    }
    (fashion / "splits.json").write_text(json.dumps(splits))
    archive = read_archive(pack(fashion) if packed else fashion)
    assert dict(zip(archive.names, archive.splits, strict=True)) == {
        "train/model_1": "val",
        "test/model_0": "test",
    }
    weight = inr(list(FASHION).index("train/model_1"))["seq.1.weight"]
    assert torch.equal(archive.parameters["layers.1.weight"][archive.names.index("train/model_1")], weight)


def test_splits_file_for_the_mnist_layout(mnist: Path) -> None:
    splits = {"val": [f"x/{name}/checkpoints/model_final.pth" for name in MNIST]}
    (mnist / "splits.json").write_text(json.dumps(splits))
    assert read_archive(mnist).splits == ["val"] * 3


def test_splits_file_that_lists_what_is_not_there(fashion: Path) -> None:
    (fashion / "splits.json").write_text(json.dumps({"train": ["a/train/model_8.pth"]}))
    with pytest.raises(ValueError, match=r"lists 1 INRs that are not there, e.g. train/model_8"):
        read_archive(fashion)


@pytest.mark.parametrize("content", ["{", "[]", '{"train": 3}'])
def test_splits_file_that_is_no_table(fashion: Path, content: str) -> None:
    (fashion / "splits.json").write_text(content)
    with pytest.raises(ValueError, match=r"splits\.json is not a table of splits"):
        read_archive(fashion)


def test_splits_file_that_lists_nothing(fashion: Path) -> None:
    (fashion / "splits.json").write_text('{"train": []}')
    with pytest.raises(ValueError, match="holds no INRs"):
        read_archive(fashion)


BAD = "mnist_png_training_3_99/checkpoints/model_final.pth"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("file", "state", "message"),
    [
        (BAD, inr(0, hidden=5), "other layer sizes"),
        (BAD, {key: value for key, value in inr(0).items() if key != "seq.2.bias"}, "other layer sizes"),
        (BAD, inr(0) | {"seq.1.bias": torch.tensor([0, 0, float("nan"), 0])}, r"seq\.1\.bias holds NaN"),
        (
            BAD,
            inr(0) | {"seq.1.bias": torch.tensor([0, 0, float("inf"), 0])},
            r"seq\.1\.bias holds NaN or inf",
        ),
        (BAD, inr(0) | {"net.0.weight": torch.zeros(1)}, r"'net\.0\.weight'"),
        (BAD, inr(0) | {"seq.0.weight": 3.0}, r"'seq\.0\.weight'"),
        (BAD, {}, "no parameters"),
        (BAD, [1, 2], "can't be read"),
        (BAD, inr(0) | {"seq.0.weight": Path("x")}, "can't be read"),  # no arbitrary pickled objects
        ("mnist_png_training_12_99/checkpoints/model_final.pth", inr(0), "label 12; classes are 0 to 9"),
        ("mnist_png_valid_1_99/checkpoints/model_final.pth", inr(0), "not named as INRs are"),
        ("statistics.pth", inr(0), "not named as INRs are"),
        (
            "mnist_png_training_0_5/checkpoints/other.pth",
            inr(0),
            "second INR of the image mnist_png_training_0_5",
        ),
        ("train/model_5.pth", inr(0), "no label"),
        ("train/model_5.pth", inr(0) | {"label": -1}, "label -1"),
    ],
)
def test_bad_file_is_named(mnist: Path, file: str, state: object, message: str, packed: bool) -> None:
    write(mnist, file, state)
    with pytest.raises(ValueError, match=message) as caught:
        read_archive(pack(mnist) if packed else mnist)
    folder = file.split("/")[0]
    assert folder in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_truncated_file(mnist: Path, keep: int) -> None:
    path = mnist / "mnist_png_testing_7_3/checkpoints/model_final.pth"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"mnist_png_testing_7_3/checkpoints/model_final\.pth can't be read"):
        read_archive(mnist)


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_truncated_zip(mnist: Path, keep: int) -> None:
    archive = pack(mnist)
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"mnist-inrs\.zip is truncated or not a zip"):
        read_archive(archive)


def test_altered_byte_in_zip(mnist: Path) -> None:
    archive = pack(mnist)
    content = bytearray(archive.read_bytes())
    content[content.index(inr(0)["seq.1.weight"].numpy().tobytes()) + 5] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"model_final\.pth can't be read: Bad CRC"):
        read_archive(archive)


@pytest.mark.parametrize("member", ["../evil.pth", "/evil.pth", "a/../../evil.pth", "..\\evil.pth", "\\evil.pth"])
def test_member_outside_its_directory(mnist: Path, member: str) -> None:
    archive = pack(mnist)
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(member, b"")
    with pytest.raises(ValueError, match=r"evil\.pth' lies outside the archive's directory"):
        read_archive(archive)


def test_link_outside_its_directory(mnist: Path, tmp_path: Path) -> None:
    outside = write(tmp_path, "elsewhere/model_final.pth", inr(0))
    link = mnist / BAD
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(ValueError, match=r"mnist_png_training_3_99.* links to a file outside"):
        read_archive(mnist)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no INR archive at"):
        read_archive(tmp_path / "mnist-inrs.zip")
    with pytest.raises(ValueError, match="holds no INRs"):
        read_archive(tmp_path)
