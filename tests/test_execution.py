"""Many runs at a time: any executor, progress, the deadline, and what a killed parent leaves behind."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ngcore.study import executor
from ngcore.study.execution import Execution, OutOfTime
from ngcore.study.executor import Reports, RunsFailed, execute_all
from ngcore.study.training import Schedule
from ngcore.tasks import execute, inr_classification, inr_sets
from ngcore.tasks import execute_all as execute_everything

ROOT = Path(__file__).resolve().parents[1]
DATA = inr_sets.INRData("mnist", train=16, validation=8, test=8, steps=3)
LONG = inr_classification.Config("mnist", "MLP", 0, 0, DATA, Schedule(100_000, batch=4, warmup=2), None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "cache"))
    inr_sets.load_data.cache_clear()
    return tmp_path / "cache"


def double(config, execution, report):
    if config < 0:
        raise ValueError("negative")
    report(0, {"train_loss": float(config)})
    return {"doubled": 2 * config}


def test_any_executor_runs_them_in_order_and_equal_ones_once():
    ran = []

    def run(config, execution, report):
        ran.append(config)
        return double(config, execution, report)

    with ThreadPoolExecutor(2) as threads:
        found = execute_all(run, [3, 1, 3], executor=threads)
        assert [record["doubled"] for record in found] == [6, 2, 6]
        assert sorted(ran) == [1, 3]
        with pytest.raises(RunsFailed, match=r"1 of 2 runs failed:\n-1: ValueError\('negative'\)"):
            execute_all(run, [3, -1], executor=threads)


def test_progress_comes_from_files_that_are_gone_at_the_end(cache, monkeypatch):
    seen = []
    monkeypatch.setattr(Reports, "__exit__", lambda self, *error: seen.append(self.summary()))
    with ThreadPoolExecutor(1) as threads:
        execute_all(double, [3, 1], executor=threads)
        assert seen == ["2 reports, last loss 1.000"]
        monkeypatch.undo()
        monkeypatch.setenv("NGCORE_CACHE", str(cache))
        execute_all(double, [3, 1], executor=threads)
    assert not list((cache / "progress").iterdir())


def test_a_run_stops_at_an_epoch_boundary_in_time_and_goes_on(cache):
    deadline = time.time() + 3
    with pytest.raises(OutOfTime):
        execute(LONG, Execution(deadline=deadline))
    assert time.time() < deadline + 1
    (run,) = (cache / "runs").iterdir()
    assert [path.name for path in run.iterdir()] == ["checkpoint.pt"]
    before = torch.load(run / "checkpoint.pt", weights_only=True)["epoch"]
    assert before > 0
    with pytest.raises(OutOfTime):
        execute(LONG, Execution(deadline=time.time() + 2))
    assert torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] > before


def test_an_epoch_that_would_not_fit_is_not_begun():
    execution = Execution(deadline=time.time() + 100)
    execution.leave_in_time(50.0)
    with pytest.raises(OutOfTime):
        execution.leave_in_time(150.0)
    Execution().leave_in_time(1e9)


def sleep(config, execution, report):
    time.sleep(config)
    return {"slept": config}


def test_stragglers_are_ended_at_the_deadline():
    """They are in the middle of something that takes long; what was finished before is not lost."""
    deadline = time.time() + 25  # enough to start processes on a busy machine
    with pytest.raises(OutOfTime, match="1 of 2 runs are stored, 1 wait for more time"):
        execute_all(sleep, [0, 600], Execution(workers=2, deadline=deadline))
    assert deadline <= time.time() < deadline + 5


def test_a_failure_is_told_before_lateness():
    with ThreadPoolExecutor(1) as threads, pytest.raises(RunsFailed, match="negative"):
        execute_all(double, [-1], Execution(deadline=time.time() - 1), threads)


def test_data_that_runs_share_are_not_begun_after_the_deadline(cache):
    with pytest.raises(OutOfTime):
        execute_everything([LONG], Execution(deadline=time.time() - 1))
    assert not (cache / "inrs").exists()


ENDLESS = """
import sys, time, os
from pathlib import Path
from ngcore.study.execution import Execution
from ngcore.study.executor import execute_all

def run(path, execution, report):
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    execute_all(run, sys.argv[1:], Execution(workers=2))
"""


def children(process: int) -> set[int]:
    """All that a process has started, and what these have."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    parents = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = {pid for pid, parent in parents if parent == process}
    return found | {pid for child in found for pid in children(child)}


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    told = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, str(tmp_path / "endless.py"), *map(str, told)]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        wait_for(lambda: all(path.exists() and path.read_text() for path in told))
        started = children(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    assert {int(path.read_text()) for path in told} <= started
    wait_for(lambda: not any(map(is_alive, started)), 20)


def test_summaries_name_the_run_that_spoke_last(cache):
    with Reports() as reports:
        assert reports.summary() == ""
        executor._execute(double, 4, Execution(), reports.directory / "0.json")
        assert reports.summary() == "1 reports, last loss 4.000"
