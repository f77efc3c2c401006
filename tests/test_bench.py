"""The bench harness on tiny workloads of plain Python."""

import json
import multiprocessing
import os
import re
import runpy
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from ngcore.bench import __main__ as command
from ngcore.bench.harness import (
    REPETITIONS,
    WARM_UPS,
    WORKER_ENVIRONMENT,
    Benchmark,
    BenchmarkError,
    Result,
    Workload,
    measure,
    write_json,
)


def sleeping(seconds: float, items: int) -> Workload:
    return Workload(lambda: time.sleep(seconds), items)


def logging(path: Path, side: str) -> Workload:
    """Every repetition writes when it starts and when it ends."""

    def run() -> None:
        for event in ("start", "end"):
            with path.open("a") as file:
                file.write(f"{side} {event}\n")
            time.sleep(0.002)

    return Workload(run, 1)


def checking_environment() -> Workload:
    found = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    if found != WORKER_ENVIRONMENT:
        raise RuntimeError(f"worker runs under {found}")
    return sleeping(0.0, 1)


def failing_to_build() -> Workload:
    raise ValueError("no such data set")


def failing_after_warm_up() -> Workload:
    runs = iter(range(WARM_UPS))
    return Workload(lambda: next(runs), 1)


def dying() -> Workload:
    return Workload(lambda: os._exit(3), 1)


nap = partial(sleeping, 0.001, 1)


def benchmark(ours=nap, reference=nap) -> Benchmark:
    return Benchmark("fake", "naps/s", ours, reference)


def test_speed_is_items_per_second():
    result = measure(benchmark(partial(sleeping, 0.005, 10), partial(sleeping, 0.05, 20)), repetitions=3)
    # a sleep is never shorter than asked for
    assert 0 < result.ours <= 10 / 0.005
    assert 0 < result.reference <= 20 / 0.05
    assert result.ratio == result.ours / result.reference > 1
    assert result.memory_mb > 1
    assert result.reference_memory_mb > 1


def test_repetitions_alternate_and_never_overlap(tmp_path):
    log = tmp_path / "log"
    measure(benchmark(partial(logging, log, "ours"), partial(logging, log, "reference")))
    lines = log.read_text().splitlines()
    warm_ups, timed = lines[: 4 * WARM_UPS], lines[4 * WARM_UPS :]
    assert warm_ups.count("ours end") == warm_ups.count("reference end") == WARM_UPS
    assert timed == ["ours start", "ours end", "reference start", "reference end"] * REPETITIONS


def test_workers_share_their_environment():
    before = dict(os.environ)
    measure(benchmark(checking_environment, checking_environment), repetitions=1)
    assert dict(os.environ) == before


@pytest.mark.parametrize("side", ["ours", "reference"])
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (failing_to_build, "ValueError: no such data set"),
        (failing_after_warm_up, "StopIteration"),
        (dying, "died with exit code 3"),
    ],
)
def test_a_failed_worker_ends_the_bench(side, factory, message):
    with pytest.raises(BenchmarkError, match=f"fake, {side}: the worker(.|\n)*{message}"):
        measure(benchmark(**{side: factory}))
    assert multiprocessing.active_children() == []


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text("old")
    write_json([Result("fit", "steps/s", 30.0, 2.0, 100.0, 400.0)], path)
    assert json.loads(path.read_text()) == [
        {"name": "fit", "unit": "steps/s", "ours": 30.0, "reference": 2.0, "ratio": 15.0, "memory_mb": 100.0}
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_command_prints_a_table_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(command.BENCHMARKS, "fake", [benchmark(), benchmark()])
    path = tmp_path / "bench.json"
    assert command.main(["fake", "--json", str(path)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "unit", "ours", "reference", "ratio", "memory_mb", "(reference)"]
    assert [row.split()[:2] for row in rows] == [["fake", "naps/s"]] * 2
    results = json.loads(path.read_text())
    assert [set(result) for result in results] == [{"name", "unit", "ours", "reference", "ratio", "memory_mb"}] * 2


def test_run_as_a_script_workers_find_their_workloads(monkeypatch, capsys):
    name = "ngcore.bench.__main__"
    factories = [f for rows in command.BENCHMARKS.values() for row in rows for f in (row.ours, row.reference)]
    assert {getattr(factory, "func", factory).__module__ for factory in factories} == {name}
    monkeypatch.setitem(command.BENCHMARKS, "fake", [benchmark()])
    monkeypatch.setattr(sys, "argv", [name, "fake"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(command.__file__, run_name="__main__")
    assert "fake" in capsys.readouterr().out


def test_command_reports_a_failed_worker(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(command.BENCHMARKS, "fake", [benchmark(), benchmark(ours=failing_to_build)])
    path = tmp_path / "bench.json"
    assert command.main(["fake", "--json", str(path)]) == 1
    assert "ValueError: no such data set" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "inr_fit.*models"),
        (["models", "--json", "nowhere/bench.json"], "make the directory nowhere"),
    ],
)
def test_command_refuses_bad_arguments(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert re.search(message, capsys.readouterr().err)
