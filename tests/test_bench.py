"""The bench harness on tiny workloads of plain Python."""

import json
import multiprocessing
import os
import re
import runpy
import sys
from functools import partial

import pytest
from workloads import (
    checking_environment,
    dying,
    failing_after_warm_up,
    failing_to_build,
    filling,
    logging,
    not_fitting,
    sleeping,
)

from ngcore.bench import __main__ as command
from ngcore.bench import l2o, zoo
from ngcore.bench.harness import (
    REPETITIONS,
    SECONDS,
    WARM_UPS,
    Benchmark,
    BenchmarkError,
    Result,
    measure,
    table_row,
    write_json,
)
from ngcore.data.inrs import siren
from ngcore.tasks import learning_to_optimize

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


def test_rows_in_seconds_count_the_seconds_of_a_repetition():
    row = Benchmark("fake", SECONDS, partial(sleeping, 0.005, 1), partial(sleeping, 0.02, 1), repetitions=2)
    result = measure(row)
    assert result.ours >= 0.005
    assert result.reference >= 0.02
    assert result.ratio == result.reference / result.ours


def test_a_missing_reference_is_a_dash():
    result = measure(Benchmark("fake", "naps/s", nap, None))
    assert result.ours > 0
    assert result.as_json()["reference"] is result.as_json()["ratio"] is None
    assert table_row(result).split()[3:5] == ["-", "-"]
    assert table_row(result).endswith("(-)")


def test_a_reference_that_does_not_fit_says_what_it_needs():
    result = measure(benchmark(reference=not_fitting))
    assert result.ours > 0
    assert result.reference is None
    assert re.search(r"does not fit +- .*\(3,000,000\)$", table_row(result))
    assert multiprocessing.active_children() == []


def test_repetitions_and_warm_ups_are_the_rows_own(tmp_path):
    log = tmp_path / "log"
    measure(Benchmark("fake", "naps/s", partial(logging, log, "ours"), None, warm_ups=1, repetitions=3))
    assert log.read_text().splitlines() == ["ours start", "ours end"] * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_extra_memory_is_what_one_repetition_takes():
    row = Benchmark("fake", "fills/s", partial(filling, 64, times=3), partial(filling, 256), memory="extra")
    result = measure(row)
    assert 60 < result.memory_mb < 80
    assert 250 < result.reference_memory_mb < 280


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


MODELS = [row for name in ("models", "models_editing") for row in command.BENCHMARKS[name]]


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_rows_of_models_train(row, monkeypatch):
    """On a few networks, and here without compiled parts: type checks are on."""
    monkeypatch.setattr(command, "BATCH", 4)
    monkeypatch.setattr(command, "REFERENCE_BATCH", 2)
    monkeypatch.setattr(command, "compiled", lambda model: model)
    counts = {row.ours: 4, row.reference: 4 if row.name == "DWSNet float32" else 2}
    for factory in filter(None, counts):
        workload = factory()
        workload.run()
        assert workload.items == counts[factory]


@pytest.mark.parametrize("row", command.BENCHMARKS["epoch"], ids=lambda row: row.name)
def test_rows_of_epochs_train(row, monkeypatch):
    monkeypatch.setattr(command, "EPOCH_SIZE", 16)
    for factory in (row.ours, row.reference):
        workload = factory()
        workload.run()
        assert workload.items == 16


def test_both_sides_fit_inrs(monkeypatch):
    monkeypatch.setattr(command, "FIT_STEPS", 3)
    monkeypatch.setattr(command, "SINGLE_FIT_STEPS", 2)
    monkeypatch.setattr(siren, "_compiled_step", lambda architecture: architecture.step)
    for factory, count in ((command.our_inr_fit, 3 * command.NUM_FITS), (command.plain_inr_fit, 2)):
        workload = factory()
        workload.run()
        assert workload.items == count


@pytest.mark.parametrize("method", ["NG-GNN", "NG-T"])
def test_park_rows_train_the_same_model_on_the_same_networks(method, monkeypatch):
    monkeypatch.setattr(zoo, "PARK_BATCHES", 1)
    monkeypatch.setattr(zoo, "BATCH", 4)
    for factory in (zoo.our_park, zoo.plain_park):
        workload = factory(method)
        workload.run()
        assert workload.items == 4


@pytest.mark.parametrize("method", l2o.METHODS)
def test_optimizer_rows_step_and_pass(method, monkeypatch):
    assert tuple(learning_to_optimize.METHODS) == l2o.METHODS
    monkeypatch.setattr(l2o, "BATCH", 2)
    for task in l2o.TASKS:
        for factory in (partial(l2o.step, task, method), partial(l2o.passes, task)):
            workload = factory()
            workload.run()
            assert workload.items == 1


def test_run_as_a_script_workers_find_their_workloads(monkeypatch, capsys):
    name = "ngcore.bench.__main__"
    factories = [f for rows in command.BENCHMARKS.values() for row in rows for f in (row.ours, row.reference) if f]
    modules = {getattr(factory, "func", factory).__module__ for factory in factories}
    assert modules == {name, "ngcore.bench.graph", "ngcore.bench.zoo", "ngcore.bench.l2o"}
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
