"""One run, two processes: one trains, the other waits, or takes over when the first is dead."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from ngcore.study import lock
from ngcore.study.execution import Execution, OutOfTime
from ngcore.study.lock import exclusive

CONTEXT = multiprocessing.get_context("spawn")


def hold(path: Path, log: Path, seconds: float) -> None:
    """In a process of its own: note when it has the lock."""
    with exclusive(path):
        with log.open("a") as file:
            file.write(f"begin {os.getpid()}\n")
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"end {os.getpid()}\n")


def start(path: Path, log: Path, seconds: float) -> multiprocessing.Process:
    process = CONTEXT.Process(target=hold, args=(path, log, seconds))
    process.start()
    return process


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_of_several_processes_one_has_the_lock_at_a_time(tmp_path):
    path, log = tmp_path / "run" / "lock", tmp_path / "log"
    processes = [start(path, log, 0.5) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    told = [line.split() for line in lines(log)]
    assert [word for word, _ in told] == ["begin", "end"] * 3
    assert all(begin[1] == end[1] for begin, end in zip(told[::2], told[1::2], strict=True))
    assert not path.parent.exists()  # nothing was stored in it


def test_a_killed_holder_is_taken_over_from_at_once(tmp_path):
    path, log = tmp_path / "run" / "lock", tmp_path / "log"
    first = start(path, log, 600)
    wait_for(lambda: len(lines(log)) == 1)
    second = start(path, log, 0.0)
    time.sleep(3)
    assert len(lines(log)) == 1
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(lock.STALE / 2)
    assert lines(log)[1:] == [f"begin {second.pid}", f"end {second.pid}"]
    assert not list(tmp_path.glob("run*"))


def write(path: Path, age: float, **about) -> None:
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": "t"} | about))
    os.utime(path, (time.time() - age,) * 2)


def test_a_holder_elsewhere_that_went_silent_is_taken_over_from(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    write(tmp_path / "lock", lock.STALE + 1, host="elsewhere")
    with exclusive(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("about", [{}, {"host": "elsewhere", "pid": 2**22 + 5}])
def test_a_living_holder_is_waited_for(tmp_path, about):
    write(tmp_path / "lock", 0.0, **about)
    looks = []

    def tick():
        looks.append(1)
        if len(looks) == 3:
            raise EnoughError

    with pytest.raises(EnoughError), exclusive(tmp_path / "lock", tick):
        pytest.fail("has the lock")
    assert (tmp_path / "lock").exists()


def test_the_holder_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    with exclusive(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (0, 0))
        wait_for(lambda: time.time() - (tmp_path / "lock").stat().st_mtime < 5, 10)


def test_a_lock_that_was_taken_over_meanwhile_is_given_back(tmp_path, monkeypatch):
    """Two saw the same stale lock; the slower one finds that it renamed the other's new one."""
    path = tmp_path / "lock"
    write(path, 0.0, token="new")
    content, reads = path.read_text(), []
    original = lock._read

    def outdated(seen):
        reads.append(seen)
        return json.dumps({"token": "stale"}) if len(reads) == 1 else original(seen)

    monkeypatch.setattr(lock, "_read", outdated)
    monkeypatch.setattr(lock, "_is_stale", lambda *_: True)
    lock._remove_stale(path)
    assert path.read_text() == content
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


# Runs


def run_once(cache: Path, log: Path) -> None:
    """In a process of its own: execute a run whose training is noted."""
    os.environ["NGCORE_CACHE"] = str(cache)
    from test_execution import DATA

    from ngcore.study import training
    from ngcore.study.training import Schedule
    from ngcore.tasks import execute, inr_classification

    original = training.train_epoch

    def noted(*arguments):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1.0)
        return original(*arguments)

    training.train_epoch = noted
    execute(inr_classification.Config("mnist", "MLP", 0, 0, DATA, Schedule(6, batch=4, warmup=2), None))


def test_two_processes_asked_for_one_run_train_it_once(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    processes = [CONTEXT.Process(target=run_once, args=(cache, log)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(lines(log)) == 6
    assert len(set(lines(log))) == 1


def test_a_killed_run_is_gone_on_with_by_who_waits(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    first = CONTEXT.Process(target=run_once, args=(cache, log))
    first.start()
    wait_for(lambda: len(lines(log)) == 3)  # two epochs are stored
    second = CONTEXT.Process(target=run_once, args=(cache, log))
    second.start()
    time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join()
    assert second.exitcode == 0
    assert lines(log).count(str(second.pid)) in (3, 4)
    (run,) = (cache / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == {"result.json", "weights.safetensors"}


def test_who_waits_leaves_in_time(tmp_path):
    write(tmp_path / "lock", 0.0)
    with pytest.raises(OutOfTime), exclusive(tmp_path / "lock", Execution(deadline=time.time() + 1).leave_in_time):
        pytest.fail("has the lock")
