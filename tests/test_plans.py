"""Plans: the runs of every notebook without Jupyter, what is published of them, and time that is over."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ngcore import tasks
from ngcore.study import __main__ as command
from ngcore.study.execution import OutOfTime
from ngcore.study.plans import Plan, carry_out, records_of
from ngcore.study.profiles import declared_parameters, plan_notebooks
from ngcore.study.runs import ROOT, RunError, identity, read_records

NUMBERS = sorted(tasks.PLANS)


def record(name, task="t"):
    environment = {"commit": "abc"}
    return {"hash": name, "config": {"task": task, "dataset": "d"}, "environment": environment}


def two_rounds(parameters):
    first = yield [parameters["start"]]
    second = yield [first[0] + 1, first[0] + 2]
    return [record(str(value)) for value in [*first, *second, *second]]


def test_a_plan_is_sent_the_records_that_it_asks_for():
    asked = []

    def execute_all(configs):
        asked.append(configs)
        return [10 * config for config in configs]

    found = carry_out(two_rounds({"start": 1}), execute_all)
    assert asked == [[1], [11, 12]]
    assert [one["hash"] for one in found] == ["10", "110", "120"]  # each once, in one order


def test_a_notebook_gets_what_was_executed_or_what_is_published(tmp_path, monkeypatch):
    monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path))
    asked = {"profile": "p", "train": False, "start": 1}
    with pytest.raises(RunError, match="holds no stored runs of cnn_zoos: run the notebook with train = True first"):
        records_of(Plan(two_rounds, ("cnn_zoos",)), asked, list)


def as_run(stored: dict) -> dict:
    """A record as that of the run it is of: those of ablations are kept under the question that they answer."""
    own = stored["identity"]
    if own["task"] != "ablations":
        return stored
    config = stored["config"]["of"] | {"seed": stored["config"]["seed"]}
    return stored | {
        "hash": stored["metrics"]["run"],
        "config": config,
        "identity": own["of"] | {"seed": own["seed"]},
    }


def name_of(identity: dict) -> str:
    return json.dumps(identity, sort_keys=True)


class NotStoredError(Exception):
    pass


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_published_of_profile_cpu_is_asked_for_by_its_plan(number, monkeypatch):
    """Every published record is of a run that the plan asks for. What is not made yet may be missing; a plan of which
    nothing is missing returns all that is published."""
    monkeypatch.setattr(tasks.learning_to_optimize, "can_read", lambda method, task: method != "NFN")
    monkeypatch.setattr(tasks.optimization.ImageTask, "task", lambda self: None)
    ((notebook, changes),) = plan_notebooks("cpu", [number], ROOT / "notebooks").items()
    plan, kept = tasks.PLANS[number], read_records(ROOT / "data" / "results" / "cpu")
    stored = {name_of(own["identity"]): own for own in map(as_run, kept)}
    asked = set()

    def execute_all(configs):
        names = [name_of(identity(config)) for config in configs]
        asked.update(names)
        if not all(name in stored for name in names):
            raise NotStoredError
        return [stored[name] for name in names]

    own = [record for record in kept if record["config"]["task"] in plan.tasks]
    try:
        found = carry_out(plan.runs(declared_parameters(notebook) | changes), execute_all)
    except NotStoredError:
        assert {name_of(as_run(record)["identity"]) for record in own} <= asked
    else:
        assert {record["hash"] for record in found} == {record["hash"] for record in own}


def test_ablations_ask_for_the_runs_of_the_tables():
    """In the full models of INRs and of the Wild Park, whose runs are trained once."""
    asked = {}
    for number in NUMBERS:
        ((notebook, changes),) = plan_notebooks("quick", [number], ROOT / "notebooks").items()
        if number in ("01", "03", "05"):
            parameters = declared_parameters(notebook) | changes
            asked[number] = {
                json.dumps(identity(c), sort_keys=True) for c in next(tasks.PLANS[number].runs(parameters))
            }
    for number in ("01", "03"):
        assert asked[number] & asked["05"]


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("papermill", "nbformat", "nbconvert", "nbclient", "jupyter", "IPython", "ipykernel"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from ngcore.study.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def run(tmp_path: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = tmp_path / "blocked.py"
    script.write_text(BLOCKED)
    places = {"NGCORE_CACHE": str(cache), "NGCORE_OUTPUT": str(tmp_path / "output")}
    environment = os.environ | places | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", NUMBERS)
def test_training_needs_no_jupyter(number, tmp_path, study_cache):
    found = run(tmp_path, study_cache, "train", "--profile", "smoke", "--only", number)
    assert found.returncode == 0, found.stderr
    assert f"records of {number}_" in found.stdout
    assert len(list((study_cache / "runs").glob("*/result.json"))) > 3


def test_the_other_commands_do():
    blocked = subprocess.run(
        [sys.executable, "-c", BLOCKED.replace("sys.argv[1:]", "['figures', '--profile', 'smoke']")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "nbconvert is blocked" in blocked.stderr


@pytest.mark.timeout(900)
def test_training_stops_before_its_minutes_are_over_and_goes_on(tmp_path):
    """Ended after a quarter of a minute, then left alone."""
    begun, cache = time.monotonic(), tmp_path / "cache"
    first = run(tmp_path, cache, "train", "--profile", "smoke", "--only", "01", "--minutes", "0.25")
    assert time.monotonic() - begun < 15 + 30  # starting and ending Python is not counted
    assert first.returncode == command.OUT_OF_TIME, first.stderr
    rest = run(tmp_path, cache, "train", "--profile", "smoke", "--only", "01")
    assert rest.returncode == 0, rest.stderr
    assert len(list((cache / "runs").glob("*/result.json"))) == 37


def test_time_that_is_over_is_told(monkeypatch, capsys):
    def late(*arguments, **options):
        raise OutOfTime("3 of 7 runs are stored, 4 wait for more time")

    monkeypatch.setattr(tasks, "train_all", late)
    assert command.main(["train", "--profile", "smoke", "--only", "01", "--minutes", "1"]) == command.OUT_OF_TIME
    assert "Time is over: 3 of 7 runs are stored" in capsys.readouterr().out
