"""Packs: what comes out on another machine is what was stored, and nothing else is written."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ngcore.study import __main__ as command
from ngcore.study import packing
from ngcore.study.packing import PackError, Unpacked, pack, unpack
from ngcore.study.runs import StoredRun, publish, read_records, sources_digest


@dataclass(frozen=True)
class Config:
    seed: int
    dataset: str = "d"
    method: str = "m"
    task: str = "t"


WEIGHTS = 2000  # numbers of each run


def weights(seed):
    return {"w": torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(seed))}


def finish(seed, commit="abc", sources="s"):
    run = StoredRun.of(Config(seed), "digest", packing.cache_directory())
    return run.finish({"test_accuracy": seed / 10}, weights(seed), {"commit": commit, "sources": sources})


def begin(seed, epoch):
    run = StoredRun.of(Config(seed), "digest", packing.cache_directory())
    run.save_checkpoint({"epoch": epoch, "model": weights(epoch), "best": weights(epoch)})
    return run


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Changes to a machine by its name: a cache and an output directory of its own."""

    def use(name):
        monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / name / "cache"))
        monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path / name / "output"))
        return tmp_path / name

    return use


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_runs_arrive_as_they_were(machine, tmp_path):
    there = machine("there")
    records = [finish(seed) for seed in range(3)]
    publish(records[:2], there / "output" / "data" / "results" / "p")
    begin(7, epoch=4)
    pack(tmp_path / "pack", "p")
    here = machine("here")
    assert unpack(tmp_path / "pack") == Unpacked(runs=3, records=2, checkpoints=1)
    assert files(here) == files(there)
    assert unpack(tmp_path / "pack") == Unpacked(0, 0, 0)
    assert read_records(here / "output" / "data" / "results" / "p") == sorted(records[:2], key=lambda r: r["hash"])


def test_what_is_finished_here_stays_and_the_further_checkpoint_wins(machine, tmp_path):
    machine("there")
    finish(0, commit="theirs")
    for seed, epoch in ((1, 5), (2, 5), (3, 5)):
        begin(seed, epoch)
    pack(tmp_path / "pack", "p")
    machine("here")
    own = finish(0, commit="ours")
    finish(3)
    begin(1, 4)
    begin(2, 6)
    assert unpack(tmp_path / "pack") == Unpacked(runs=0, records=0, checkpoints=1)
    runs = [StoredRun.of(Config(seed), "digest", packing.cache_directory()) for seed in range(4)]
    assert runs[0].result() == own
    assert [run.checkpoint() and run.checkpoint()["epoch"] for run in runs] == [None, 5, 6, None]


def test_a_run_that_was_under_way_here_and_is_finished_there_is_finished(machine, tmp_path):
    machine("there")
    finish(0)
    pack(tmp_path / "pack", "p")
    machine("here")
    run = begin(0, 1)
    assert unpack(tmp_path / "pack").runs == 1
    assert sorted(path.name for path in run.directory.iterdir()) == ["result.json", "weights.safetensors"]


def test_a_pack_keeps_to_its_limits(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "BYTES", 30_000)
    machine("there")
    for seed in range(5):
        finish(seed)
    for seed in range(5, 12):
        begin(seed, 1)
    paths = pack(tmp_path / "pack", "p")
    assert len(paths) <= packing.FILES
    assert all(path.stat().st_size <= 30_000 for path in paths)
    left_out = int(capsys.readouterr().out.split("left out: ")[1].split()[0])
    machine("here")
    assert unpack(tmp_path / "pack") == Unpacked(runs=5, records=0, checkpoints=7 - left_out)
    assert left_out > 0
    machine("there")
    monkeypatch.setattr(packing, "FILES", 1)
    with pytest.raises(PackError, match=r"10 files of 0 MB do not fit into 1 of 0 MB"):
        pack(tmp_path / "other", "p")
    assert not (tmp_path / "other").exists()


def test_a_directory_has_one_pack(machine, tmp_path):
    machine("there")
    finish(0)
    pack(tmp_path / "pack", "p")
    with pytest.raises(PackError, match="holds a pack already"):
        pack(tmp_path / "pack", "p")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_part_is_named_and_nothing_is_written(machine, tmp_path, share):
    machine("there")
    finish(0)
    (path,) = pack(tmp_path / "pack", "p")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    here = machine("here")
    with pytest.raises(PackError, match=r"pack_1_of_1\.zip is truncated or damaged"):
        unpack(tmp_path / "pack")
    assert not here.exists()


def test_a_missing_part_is_named(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BYTES", 12_000)
    machine("there")
    for seed in range(3):
        finish(seed)
    paths = pack(tmp_path / "pack", "p")
    assert len(paths) > 2
    paths[1].unlink()
    here = machine("here")
    with pytest.raises(PackError, match=f"part 2 of {len(paths)} is missing"):
        unpack(tmp_path / "pack")
    assert not here.exists()
    with pytest.raises(PackError, match="holds no pack"):
        unpack(tmp_path / "nothing")


NAMES = [
    "../evil.json",
    "/tmp/evil.json",
    "runs/../../evil/result.json",
    "runs/0123456789abcdef/../../../evil.json",
    "runs/0123456789abcdef/lock",
    "results/../0123456789abcdef.json",
    "results/p/0123456789abcdef.json\n",
    "runs\\0123456789abcdef\\result.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_entry_leads_anywhere_else(machine, tmp_path, name):
    (tmp_path / "pack").mkdir()
    with zipfile.ZipFile(tmp_path / "pack" / "pack_1_of_1.zip", "w") as archive:
        archive.writestr(name, "{}")
    machine("here")
    before = files(tmp_path)
    with pytest.raises(PackError, match="which is no file of a run"):
        unpack(tmp_path / "pack")
    assert files(tmp_path) == before


def repacked(path: Path, change) -> None:
    """The archive with its entries' contents changed by (name, content)."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("of", "content"),
    [
        ("result.json", lambda content: content.replace(b'"seed": 0', b'"seed": 1')),
        ("result.json", lambda content: content[:-20]),
        ("weights.safetensors", lambda content: content[:-20]),
        ("checkpoint.pt", lambda content: content[:-20]),
    ],
)
def test_damaged_entries_are_named_and_nothing_is_written(machine, tmp_path, of, content):
    machine("there")
    finish(0)
    begin(1, 1)
    (path,) = pack(tmp_path / "pack", "p")
    repacked(path, lambda name, own: content(own) if name.endswith(of) else own)
    here = machine("here")
    with pytest.raises(PackError, match=rf"the pack's runs/[0-9a-f]+/{of} is damaged"):
        unpack(tmp_path / "pack")
    assert not here.exists()


@pytest.mark.parametrize(("sources", "commit"), [(sources_digest(), "fedcba9"), ("others", "unknown")])
def test_the_commit_is_the_one_of_the_very_sources(machine, tmp_path, monkeypatch, sources, commit):
    monkeypatch.setattr(packing, "commit", lambda: "fedcba9")
    there = machine("there")
    publish([finish(0, "unknown", sources)], there / "output" / "data" / "results" / "p")
    pack(tmp_path / "pack", "p")
    here = machine("here")
    unpack(tmp_path / "pack")
    found = [json.loads(path.read_text()) for path in here.rglob("*.json")]
    assert [record["environment"]["commit"] for record in found] == [commit] * 2


def test_the_commands(machine, tmp_path, capsys):
    machine("there")
    finish(0)
    begin(1, 1)
    target = str(tmp_path / "pack")
    assert command.main(["pack", target, "--profile", "p", "--no-checkpoints"]) == 0
    assert "pack_1_of_1.zip: 0.0 MB" in capsys.readouterr().out
    machine("here")
    assert command.main(["unpack", target]) == 0
    assert "new: 1 runs, 0 published records, 0 checkpoints" in capsys.readouterr().out
    assert command.main(["unpack", str(tmp_path / "none")]) == command.FAILED
    assert "holds no pack" in capsys.readouterr().err
