"""Runs: stored, found again, resumed to the same numbers after a kill, refused when they are not what they say."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ngcore.data.inrs.augment import Augmentation
from ngcore.study import runs
from ngcore.study.executor import RunsFailed, execute_all
from ngcore.study.runs import RunError, StoredRun, read_record
from ngcore.study.training import DivergedError, Schedule, learning_rate
from ngcore.tasks import inr_classification as task
from ngcore.tasks import inr_sets

DATA = inr_sets.INRData("mnist", train=16, validation=8, test=8, steps=3, learning_rate=1e-3)
SCHEDULE = Schedule(epochs=3, batch=4, warmup=2, decay=True, micro_batch=2)
CONFIG = task.Config("mnist", "NG-GNN", 2, 0, DATA, SCHEDULE, Augmentation())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored_run(cache: Path) -> Path:
    (path,) = (cache / "runs").iterdir()
    return path


def numbers(record):
    return record["config"], record["data"], record["metrics"]


def test_a_run_is_stored_and_found_again(cache, monkeypatch):
    record = task.run(CONFIG)
    assert set(path.name for path in stored_run(cache).iterdir()) == {"result.json", "weights.safetensors"}
    assert len(record["metrics"]["train_loss"]) == 3
    monkeypatch.setattr(task, "train", lambda *_: pytest.fail("trained again"))
    assert task.run(CONFIG) == record


def test_the_stored_weights_give_the_stored_numbers(cache):
    record = task.run(CONFIG)
    sets, digest = inr_sets.load_data(DATA, "cpu")
    problem = task.Classification(task.build_model("NG-GNN", 2).eval(), sets, None)
    problem.model.load_state_dict(StoredRun.of(CONFIG, digest, cache).weights())
    with torch.no_grad():
        assert problem.test() == {name: record["metrics"][name] for name in problem.test()}


def test_seeds_and_data_make_other_runs(cache):
    first = task.run(CONFIG)
    other = task.run(replace(CONFIG, seed=1))
    more = task.run(replace(CONFIG, data=replace(DATA, train=12)))
    assert len({first["hash"], other["hash"], more["hash"]}) == 3
    assert first["metrics"]["train_loss"] != other["metrics"]["train_loss"]


SCRIPT = """
import os, signal, sys
from ngcore import files
from ngcore.study import runs, training
from tests.test_runs import CONFIG, inr_sets, task

target, count = sys.argv[1], [0]

def kill_at(owner, name, when):
    original = getattr(owner, name)
    def wrapped(*arguments, **options):
        count[0] += 1
        if count[0] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(owner, name, wrapped)

if target == "step":       # in the middle of the second epoch
    kill_at(task.Classification, "loss", 8 + 3)
elif target == "write":    # the second checkpoint is written but not yet in place
    inr_sets.load_data(CONFIG.data, "cpu")
    kill_at(files.os, "replace", 2)
elif target == "result":   # the weights are stored, the result is not
    inr_sets.load_data(CONFIG.data, "cpu")
    kill_at(files.os, "replace", 5)
task.run(CONFIG)
"""


@pytest.mark.parametrize("moment", ["step", "write", "result"])
def test_a_killed_run_goes_on_to_the_same_numbers(moment, cache, tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, moment], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (stored_run(cache) / "result.json").exists()
    assert (stored_run(cache) / "checkpoint.pt").exists()
    resumed = task.run(CONFIG)
    inr_sets.load_data.cache_clear()
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "another"))
    assert numbers(resumed) == numbers(task.run(CONFIG))


def test_processes_give_the_same_numbers_as_this_one(cache, tmp_path, monkeypatch):
    configs = [CONFIG, replace(CONFIG, method="MLP", probes=0)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = [numbers(task.run(config)) for config in configs]
    torch.set_num_threads(threads)
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "another"))
    assert [numbers(record) for record in execute_all(task.run, configs, workers=2)] == here


def test_one_failing_run_does_not_lose_the_others(cache):
    broken = replace(CONFIG, method="NG-XYZ")
    with pytest.raises(RunsFailed, match=r"1 of 2 runs failed(.|\n)*unknown method 'NG-XYZ'"):
        execute_all(task.run, [CONFIG, broken], workers=2)
    assert (stored_run(cache) / "result.json").exists()


def test_no_runs_are_no_work():
    assert execute_all(task.run, []) == []


def test_a_diverging_run_is_named_and_keeps_its_checkpoint(cache, monkeypatch):
    losses = []

    def nan_in_the_second_epoch(problem, rows):
        losses.append(original(problem, rows))
        return losses[-1] * (float("nan") if len(losses) > 8 else 1)

    original = task.Classification.loss
    monkeypatch.setattr(task.Classification, "loss", nan_in_the_second_epoch)
    with pytest.raises(DivergedError, match=r"diverged in epoch 1 .*'NG-GNN'"):
        task.run(CONFIG)
    assert torch.load(stored_run(cache) / "checkpoint.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("schedule", [replace(SCHEDULE, batch=17), replace(SCHEDULE, epochs=0)])
def test_nothing_to_train_is_an_error(schedule):
    with pytest.raises(ValueError, match=r"nothing to train: . epochs of 16 networks"):
        task.run(replace(CONFIG, schedule=schedule))


@pytest.mark.parametrize("change", ["config", "name", "text"])
def test_a_record_that_is_not_what_it_says_is_refused(change, cache):
    task.run(CONFIG)
    path = stored_run(cache) / "result.json"
    record = json.loads(path.read_text())
    if change == "config":
        record["config"]["seed"] = 7
        path.write_text(json.dumps(record))
    elif change == "name":
        path.parent.rename(path.parent.with_name("0" * 16))
        path = path.parent.with_name("0" * 16) / "result.json"
    else:
        path.write_text(path.read_text()[:-20])
    with pytest.raises(RunError, match=r"result\.json"):
        read_record(path)


def test_a_damaged_checkpoint_is_named(cache):
    stored = StoredRun.of(CONFIG, "data", cache)
    state = {"epoch": 1, "model": {}, "best": {}}
    stored.save_checkpoint(state)
    assert stored.checkpoint() == state
    path = stored.directory / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunError, match=r"checkpoint\.pt"):
        stored.checkpoint()


def test_published_records_are_checked_and_filtered(tmp_path):
    record = task.run(CONFIG)
    runs.publish([record], tmp_path / "results")
    assert runs.published(tmp_path / "results", "inr_classification") == [record]
    another = task.run(replace(CONFIG, seed=1))
    runs.publish([another], tmp_path / "results")  # in place of the first
    assert runs.published(tmp_path / "results", "inr_classification") == [another]
    with pytest.raises(RunError, match="no stored runs of dilation"):
        runs.published(tmp_path / "results", "dilation")


def test_probes_for_a_method_without_them_are_an_error():
    with pytest.raises(ValueError, match="MLP takes no probe features"):
        task.build_model("MLP", probes=4)


def test_the_table_has_the_papers_rows():
    configs = task.table_configs(
        DATA,
        SCHEDULE,
        seeds={0: 2, 4: 1, 16: 1, 64: 2},
        micro_batch={"NG-T": 4},
        compiled=["NG-GNN"],
        dropout=0.1,
        augmentation=None,
    )
    assert len({(c.method, c.probes) for c in configs}) == 11
    assert len(configs) == 3 * 2 + 2 * (2 + 1 + 1 + 2)
    assert {c.schedule.micro_batch for c in configs if c.method == "NG-T"} == {4}
    assert {c.schedule.compiled for c in configs if c.method == "NG-GNN"} == {True}
    variants = task.recipe_configs(configs, "smooth", [("NG-GNN", 0, 2), ("NG-T", 64, 1)])
    rows = [(v.method, v.probes, v.seed, v.recipe) for v in variants]
    assert rows == [("NG-GNN", 0, 0, "smooth"), ("NG-GNN", 0, 1, "smooth"), ("NG-T", 64, 0, "smooth")]
    assert dict(variants[0].options) == {"dropout": 0.1, "sigma": 0.3}


@pytest.mark.parametrize("recipe", task.RECIPES)
def test_every_recipe_differs_from_the_tables_in_what_it_names_alone(recipe):
    settings = {"micro_batch": {}, "compiled": [], "dropout": 0.1}
    (plain,) = task.row_configs(DATA, replace(SCHEDULE, decay=True), "NG-GNN", 0, 1, **settings)
    (config,) = task.recipe_configs([plain], recipe, [("NG-GNN", 0, 1)])
    fields = dataclasses.asdict(config) | dataclasses.asdict(config.schedule) | dict(config.options)
    before = dataclasses.asdict(plain) | dataclasses.asdict(plain.schedule) | dict(plain.options)
    differs = {name for name in fields if fields[name] != before.get(name)} - {"schedule", "options", "recipe"}
    assert differs == set(task.RECIPES[recipe])
    assert config.recipe == recipe


def test_recipes_and_rows_that_are_not_there_are_errors():
    (config,) = task.row_configs(DATA, SCHEDULE, "NG-GNN", 16, 1, micro_batch={}, compiled=[], dropout=0.1)
    with pytest.raises(ValueError, match="unknown recipe 'salt'; there are smooth, canonical signs"):
        task.recipe_configs([config], "salt", [])
    with pytest.raises(ValueError, match="'smooth' asks for 2 seeds of NG-GNN with 16 probe features, the table has 1"):
        task.recipe_configs([config], "smooth", [("NG-GNN", 16, 2)])
    with pytest.raises(ValueError, match="1 seeds of NG-T with 16 probe features, the table has 0"):
        task.recipe_configs([config], "smooth", [("NG-T", 16, 1)])


def test_learning_rates():
    schedule = Schedule(epochs=1, learning_rate=2.0, warmup=4)
    assert [learning_rate(schedule, step, 10) for step in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0]
    decayed = [learning_rate(replace(schedule, decay=True), step, 10) for step in range(11)]
    assert max(decayed) == decayed[4] == 2.0
    assert decayed[7] == pytest.approx(1.0)
    assert decayed[10] == pytest.approx(0.0)


ENDLESS = """
import os, sys, time
from pathlib import Path
from ngcore.study.executor import execute_all

def run(path, on_epoch):
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    execute_all(run, [sys.argv[1]], workers=1)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    told = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, str(tmp_path / "endless.py"), str(told)], stderr=subprocess.DEVNULL)

    def wait_for(condition):
        for _ in range(300):
            if condition():
                return True
            time.sleep(0.1)
        return False

    assert wait_for(lambda: told.exists() and told.read_text())
    parent.kill()
    parent.wait()
    state = ["ps", "-o", "state=", "-p", told.read_text()]  # nothing, or a zombie that nobody has asked for
    ended = wait_for(lambda: subprocess.run(state, capture_output=True, text=True).stdout.strip() in ("", "Z"))
    assert ended
