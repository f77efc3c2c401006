"""A session on another machine, in small: pieces of training there, a pack, and tables drawn from it here."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ngcore.study import __main__ as command
from ngcore.study import notebooks
from ngcore.study.runs import ROOT, read_records


def there(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The study's command with a cache and an output directory of its own, and without git."""
    places = {"NGCORE_CACHE": str(tmp_path / "there"), "NGCORE_OUTPUT": str(tmp_path / "there")}
    environment = os.environ | places | {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path / "empty")}
    study = [sys.executable, "-m", "ngcore.study", *arguments]
    return subprocess.run(study, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.timeout(900)
def test_a_session(tmp_path, monkeypatch):
    train = ("train", "--profile", "smoke", "--only", "01,02")
    piece = there(tmp_path, *train, "--minutes", "0.5")
    assert piece.returncode in (0, command.OUT_OF_TIME), piece.stderr
    rest = there(tmp_path, *train)
    assert rest.returncode == 0, rest.stderr
    assert "records of 01_inr_classification are stored" in rest.stdout
    packed = there(tmp_path, "pack", str(tmp_path / "pack"), "--profile", "smoke")
    assert packed.returncode == 0, packed.stderr
    made = read_records(tmp_path / "there" / "data" / "results" / "smoke")
    assert {record["environment"]["commit"] for record in made} == {"unknown"}

    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path / "here"))
    assert command.main(["unpack", str(tmp_path / "pack")]) == 0
    found = read_records(tmp_path / "here" / "data" / "results" / "smoke")
    assert [record["metrics"] for record in found] == [record["metrics"] for record in made]
    notebooks.execute("smoke", ["01", "02"], train=False)
    for table in ("table_3", "table_4", "table_5"):
        assert len(pd.read_csv(tmp_path / "here" / "figures" / "smoke" / f"{table}.csv")) > 5
