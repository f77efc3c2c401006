"""A wheel, installed where there is no clone: what comes with ngcore is in it and found."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ngcore", "data")

USE = """
from pathlib import Path
import pooch
import ngcore.files
from ngcore.data.images.subsets import load_images
from ngcore.models.optimizers.files import shipped
from ngcore.study import runs
from ngcore.study.tables import load_reported

installed = Path(ngcore.files.__file__).parents[1]
assert ngcore.files.REPOSITORY is None
assert ngcore.files.SHIPPED.is_relative_to(installed)
assert len(load_images("mnist", "test", 7, cache=Path("nowhere"))) == 7
assert shipped("NG-GNN").method == "NG-GNN"
assert load_reported()
assert runs.cache_directory() == Path(pooch.os_cache("ngcore"))
assert runs.output_directory() == Path.cwd() != installed
print(installed)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the clone stays as it is."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the wheel, is not installed")
    clone, built = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, clone)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("*.whl")
    return path


def test_a_wheel_holds_every_module_and_the_data_that_ngcore_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "ngcore").rglob("*.py")} <= names
    data = [ROOT / "data" / name for name in ("README.md", "reported.yaml")]
    data += [path for name in ("images", "optimizers") for path in (ROOT / "data" / name).iterdir()]
    shipped = {f"ngcore/shipped/{path.relative_to(ROOT / 'data').as_posix()}" for path in data}
    assert shipped == {name for name in names if name.startswith("ngcore/shipped/")}


def test_an_installed_wheel_finds_images_optimizers_and_published_numbers(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NGCORE_")}
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=elsewhere,
        env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(installed.resolve())
    assert not list(elsewhere.iterdir())
