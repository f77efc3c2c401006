"""Published archives that a user has are read by the notebooks' runs, with their labels and splits."""

import json

import pytest
import torch
from test_dws_archive import inr, write

from ngcore.data.inrs.siren import SHAPES
from ngcore.data.zoos import cifar10_gs, wild_park
from ngcore.study import __main__ as command
from ngcore.study.plans import carry_out
from ngcore.study.profiles import declared_parameters, plan_notebooks
from ngcore.study.runs import ROOT
from ngcore.tasks import PLANS, archives, inr_sets, zoos

SIZES = {"train_size": 3, "validation_size": 2, "test_size": 2}
FITS = {"inr_steps": 5, "inr_learning_rate": 1e-3}


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Seven INRs of MNIST, whose listing makes other splits of them than their names."""
    monkeypatch.setenv("NGCORE_DATA", str(tmp_path))
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "cache"))
    files = [f"mnist_png_training_{i}_{i}/checkpoints/model_final.pth" for i in range(7)]
    for i, file in enumerate(files):
        write(tmp_path / "mnist-inrs", file, inr(i, hidden=32))
    splits = {"train": files[:3], "val": files[3:5], "test": files[5:]}
    (tmp_path / "mnist-inrs" / "splits.json").write_text(json.dumps(splits))
    inr_sets.load_data.cache_clear()
    return tmp_path


def test_published_inrs_take_the_place_of_fitted_ones(directory):
    data = inr_sets.data_of(SIZES | FITS, "mnist")
    assert data == inr_sets.INRData("mnist", 3, 2, 2, archive="mnist-inrs")
    assert inr_sets.data_of(SIZES | FITS, "fashion_mnist").archive is None
    sets, _ = inr_sets.load_data(data, "cpu")
    assert {split: inrs.labels.tolist() for split, inrs in sets.items()} == {
        "train": [0, 1, 2],
        "validation": [3, 4],
        "test": [5, 6],
    }
    assert torch.equal(sets["test"].parameters["layers.1.weight"][0], inr(5, hidden=32)["seq.1.weight"])
    assert inr_sets.images_of(data)["validation"].shape == (2, 28, 28)


def test_captions_name_the_archive():
    def record(archive):
        data = {"train": 3, "steps": 1450} | ({"archive": archive} if archive else {})
        config = {"data": data, "schedule": {"epochs": 1, "batch": 2, "warmup": 3}, "seed": 0}
        return {"config": config, "environment": {"device": "cpu"}}

    told = inr_sets.describe([record("mnist-inrs.zip")], "cpu")
    assert told.endswith("device cpu. Published INRs of mnist-inrs.zip.")
    assert "fitting" not in told
    assert "1,450 fitting steps each" in inr_sets.describe([record(None)], "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": 9}, r"mnist-inrs has 2 INRs for test, but 9 are asked for"),
        ({"archive": "other.zip"}, r"other\.zip is not in the data directory"),
    ],
)
def test_what_an_archive_has_not_is_named(directory, change, message):
    data = inr_sets.INRData(
        **{"dataset": "mnist", "train": 3, "validation": 2, "test": 2, "archive": "mnist-inrs"} | change
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        inr_sets.fit_inrs(data)


def test_inrs_of_other_layers_are_named(directory):
    for file in (directory / "mnist-inrs").rglob("*.pth"):
        torch.save(inr(0, hidden=4), file)
    with pytest.raises(ValueError, match=r"mnist-inrs holds INRs of layers"):
        archives.read_inrs("mnist-inrs", {"train": 1, "validation": 1, "test": 1})
    assert SHAPES["layers.1.weight"] == (32, 32)


def test_the_plan_reads_what_there_is(directory):
    """Of MNIST the archive, of FashionMNIST fits."""
    ((notebook, changes),) = plan_notebooks("smoke", ["01"], ROOT / "notebooks").items()
    asked = []
    carry_out(PLANS["01"].runs(declared_parameters(notebook) | changes), lambda configs: asked.extend(configs) or [])
    assert {(config.dataset, config.data.archive) for config in asked} == {
        ("mnist", "mnist-inrs"),
        ("fashion_mnist", None),
    }


def test_zoos_are_looked_for_too(directory):
    (directory / "cnn_wild_park").mkdir()
    parameter = {"runs": 3, "train_images": 1, "test_images": 1, "epochs": 1, "checkpoints": 1}
    park = zoos.zoo_of(parameter, wild_park.Recipe)
    assert park.archive == "cnn_wild_park"
    assert "3 published runs of cnn_wild_park" in zoos.sizes_in_words([park])
    assert zoos.zoo_of({"runs": 3, "train_images": 1, "test_images": 1, "steps": 1}, cifar10_gs.Recipe).archive is None
    with pytest.raises(ValueError, match=r"cnn_wild_park holds no network that can be used"):
        park.population()


def test_a_data_directory_that_is_none_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NGCORE_DATA", raising=False)
    assert command.main(["train", "--profile", "smoke", "--data-dir", str(tmp_path / "none")]) == command.WRONG
    assert "none is no directory" in capsys.readouterr().err
