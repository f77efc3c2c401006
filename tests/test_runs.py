"""Runs: stored, found again, resumed to the same numbers after a kill, refused when they are not what they say."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ngcore.data.inrs.augment import Augmentation
from ngcore.study import runs, training
from ngcore.study.execution import Execution
from ngcore.study.executor import RunsFailed
from ngcore.study.runs import RunError, StoredRun, identity, read_record, run_hash
from ngcore.study.training import DivergedError, Schedule, learning_rate
from ngcore.tasks import execute, execute_all, inr_sets
from ngcore.tasks import inr_classification as task

DATA = inr_sets.INRData("mnist", train=16, validation=8, test=8, steps=3, learning_rate=1e-3)
SCHEDULE = Schedule(epochs=3, batch=4, warmup=2, decay=True)
PAIRS = Execution(micro_batch=2)
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
    record = execute(CONFIG)
    assert set(path.name for path in stored_run(cache).iterdir()) == {"result.json", "weights.safetensors"}
    assert len(record["metrics"]["train_loss"]) == 3
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    assert execute(CONFIG) == record


def test_the_stored_weights_give_the_stored_numbers(cache):
    record = execute(CONFIG)
    sets, digest = inr_sets.load_data(DATA, "cpu")
    problem = task.Classification(task.build_model("NG-GNN", 2).eval(), sets, None)
    problem.model.load_state_dict(StoredRun.of(CONFIG, digest, cache).weights())
    with torch.no_grad():
        assert problem.test() == {name: record["metrics"][name] for name in problem.test()}


def test_seeds_and_data_make_other_runs(cache):
    first = execute(CONFIG)
    other = execute(replace(CONFIG, seed=1))
    more = execute(replace(CONFIG, data=replace(DATA, train=12)))
    assert len({first["hash"], other["hash"], more["hash"]}) == 3
    assert first["metrics"]["train_loss"] != other["metrics"]["train_loss"]


SCRIPT = """
import os, signal, sys
from ngcore import files
from ngcore.study import runs, training
from tests.test_runs import CONFIG, PAIRS, execute, inr_sets, task

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
execute(CONFIG, PAIRS)
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
    resumed = execute(CONFIG, PAIRS)
    inr_sets.load_data.cache_clear()
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "another"))
    assert numbers(resumed) == numbers(execute(CONFIG, PAIRS))


def test_processes_give_the_same_numbers_as_this_one(cache, tmp_path, monkeypatch):
    configs = [CONFIG, replace(CONFIG, method="MLP", probes=0)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = [numbers(execute(config)) for config in configs]
    torch.set_num_threads(threads)
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "another"))
    assert [numbers(record) for record in execute_all(configs, Execution(workers=2))] == here


def test_one_failing_run_does_not_lose_the_others(cache):
    broken = replace(CONFIG, method="NG-XYZ")
    with pytest.raises(RunsFailed, match=r"1 of 2 runs failed(.|\n)*unknown method 'NG-XYZ'"):
        execute_all([CONFIG, broken], Execution(workers=2))
    assert (stored_run(cache) / "result.json").exists()


def test_no_runs_are_no_work():
    assert execute_all([]) == []


def test_a_diverging_run_is_named_and_keeps_its_checkpoint(cache, monkeypatch):
    losses = []

    def nan_in_the_second_epoch(problem, rows):
        losses.append(original(problem, rows))
        return losses[-1] * (float("nan") if len(losses) > 8 else 1)

    original = task.Classification.loss
    monkeypatch.setattr(task.Classification, "loss", nan_in_the_second_epoch)
    with pytest.raises(DivergedError, match=r"diverged in epoch 1 .*'NG-GNN'"):
        execute(CONFIG, PAIRS)
    assert torch.load(stored_run(cache) / "checkpoint.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("schedule", [replace(SCHEDULE, batch=17), replace(SCHEDULE, epochs=0)])
def test_nothing_to_train_is_an_error(schedule):
    with pytest.raises(ValueError, match=r"nothing to train: . epochs of 16 networks"):
        execute(replace(CONFIG, schedule=schedule))


@pytest.mark.parametrize("change", ["config", "name", "text"])
def test_a_record_that_is_not_what_it_says_is_refused(change, cache):
    execute(CONFIG)
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


# Identity


def test_how_a_run_is_executed_is_no_part_of_it(cache):
    record = execute(CONFIG, Execution(micro_batch=2))
    assert record["environment"]["micro_batch"] == 2
    assert record["environment"]["compiled"] is False
    assert not {"micro_batch", "compiled"} & set(record["config"]["schedule"])
    assert execute(CONFIG, Execution(micro_batch=1, compiled=("NG-GNN",), workers=3)) == record


def test_on_a_cpu_a_method_has_the_micro_batch_that_suits_it(cache):
    assert execute(CONFIG)["environment"]["micro_batch"] == task.METHODS["NG-GNN"].micro_batch > 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    steps: int
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Before:
    seed: int
    recipe: Recipe
    recipes: tuple[Recipe, ...] = ()
    task: str = "t"


def with_field(old: type, **defaults) -> type:
    """The dataclass with new fields that have defaults."""
    new = [(name, type(value), dataclasses.field(default=value)) for name, value in defaults.items()]
    return dataclasses.make_dataclass(old.__name__, new, bases=(old,), frozen=True)


def test_a_new_field_with_a_default_orphans_nothing():
    """In a config, and in what it holds, alone or in a list."""
    old = Before(0, Recipe(3), (Recipe(4, 0.2),))
    after, recipe = with_field(Before, augmented=False), with_field(Recipe, momentum=0.9)
    new = after(0, recipe(3), (recipe(4, 0.2),))
    assert (
        identity(new)
        == identity(old)
        == {
            "task": "t",
            "seed": 0,
            "recipe": {"steps": 3},
            "recipes": [{"steps": 4, "rate": 0.2}],
        }
    )
    assert run_hash(identity(new), "data") == run_hash(identity(old), "data")
    for changed in (replace(new, augmented=True), replace(new, recipe=recipe(3, momentum=0.5)), replace(new, seed=1)):
        assert run_hash(identity(changed), "data") != run_hash(identity(old), "data")
    assert run_hash(identity(old), "other data") != run_hash(identity(old), "data")


def test_a_record_of_a_config_that_has_grown_since_is_still_read(cache):
    record = execute(CONFIG)
    path = stored_run(cache) / "result.json"
    path.write_text(json.dumps(record | {"config": {**record["config"], "new": False}}))
    assert read_record(path)["config"]["new"] is False


# Code, and what is published


def committed(record, commit="abc1234"):
    return record | {"environment": record["environment"] | {"commit": commit}}


def test_published_records_are_checked_and_filtered(tmp_path):
    record = committed(execute(CONFIG))
    runs.publish([record], tmp_path / "results")
    assert runs.published(tmp_path / "results", ["inr_classification"]) == [record]
    another = committed(execute(replace(CONFIG, seed=1)))
    runs.publish([another], tmp_path / "results")  # in place of the first
    assert runs.published(tmp_path / "results", ["inr_classification", "t"]) == [another]
    with pytest.raises(RunError, match="no stored runs of dilation"):
        runs.published(tmp_path / "results", ["dilation"])


def test_records_of_code_that_is_not_committed_are_not_published(tmp_path, capsys):
    first = committed(execute(CONFIG))
    runs.publish([first], tmp_path)
    second = execute(replace(CONFIG, seed=1))
    runs.publish([committed(first), committed(second, "abc1234-dirty")], tmp_path)
    told = capsys.readouterr().out.splitlines()
    assert told == ["not published: inr_classification on mnist: 1 of the runs are of code that is not committed"]
    assert runs.read_records(tmp_path) == [first]


def git(directory, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=directory, check=True, capture_output=True)


def test_only_changes_of_the_package_make_a_commit_dirty(tmp_path):
    package = tmp_path / "ngcore"
    package.mkdir()
    git(tmp_path, "init")
    (package / "a.py").write_text("x = 1\n")
    (tmp_path / "figure.csv").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit, digest = runs.commit.__wrapped__(package), runs.sources_digest.__wrapped__(package)
    assert len(commit) >= 7
    (tmp_path / "figure.csv").write_text("2\n")
    (tmp_path / "new.csv").write_text("2\n")
    assert runs.commit.__wrapped__(package) == commit
    (package / "b.py").write_text("y = 1\n")
    assert runs.commit.__wrapped__(package) == f"{commit}-dirty"
    assert runs.sources_digest.__wrapped__(package) != digest
    (package / "b.py").unlink()
    assert runs.sources_digest.__wrapped__(package) == digest


def test_outside_of_a_checkout_the_commit_is_unknown_and_the_sources_are_not(tmp_path, cache):
    assert runs.commit.__wrapped__(tmp_path) == "unknown"
    assert execute(CONFIG)["environment"]["sources"] == runs.sources_digest()


def test_probes_for_a_method_without_them_are_an_error():
    with pytest.raises(ValueError, match="MLP takes no probe features"):
        task.build_model("MLP", probes=4)


def test_learning_rates():
    schedule = Schedule(epochs=1, learning_rate=2.0, warmup=4)
    assert [learning_rate(schedule, step, 10) for step in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0]
    decayed = [learning_rate(replace(schedule, decay=True), step, 10) for step in range(11)]
    assert max(decayed) == decayed[4] == 2.0
    assert decayed[7] == pytest.approx(1.0)
    assert decayed[10] == pytest.approx(0.0)
