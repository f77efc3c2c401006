"""The bench harness on tiny workloads of plain Python."""

import json
import multiprocessing
import os
import re
import runpy
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from workloads import (
    checking_environment,
    dying,
    failing_after_warm_up,
    failing_to_build,
    filling,
    finding,
    logging,
    not_fitting,
    sleeping,
)

from ngcore.bench import __main__ as command
from ngcore.bench import checks, device, l2o, zoo
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


def test_a_row_that_computes_something_else_is_not_timed(tmp_path):
    """Nothing of it is even built; one that agrees is timed as any other."""
    log = tmp_path / "log"
    row = Benchmark("fake", "naps/s", partial(logging, log, "ours"), None, check=partial(finding, "gradients differ"))
    result = measure(row)
    assert not log.exists()
    assert table_row(result).split(maxsplit=1) == ["fake", "wrong, not timed: gradients differ"]
    assert result.as_json()["ours"] is result.as_json()["ratio"] is None
    result = measure(replace(row, check=partial(finding, None)), repetitions=1)
    assert result.ours > 0
    assert result.wrong is None


def test_a_check_that_fails_ends_the_bench():
    with pytest.raises(BenchmarkError, match=r"fake, check: the worker(.|\n)*no such data set"):
        measure(Benchmark("fake", "naps/s", nap, None, check=failing_to_build))


def test_command_fails_where_a_row_is_wrong(monkeypatch, capsys):
    row = Benchmark("fake", "naps/s", nap, None, check=partial(finding, "outputs differ"))
    monkeypatch.setitem(command.BENCHMARKS, "fake", [row])
    assert command.main(["fake"]) == 1
    assert "wrong, not timed: outputs differ" in capsys.readouterr().out


CHECKED = [row for name in ("models", "models_editing") for row in command.BENCHMARKS[name] if row.reference]


@pytest.fixture
def few_networks(monkeypatch):
    """And no compiled parts: type checks are on."""
    monkeypatch.setattr(command, "MICRO_BATCH", 4)
    monkeypatch.setattr(command, "compiled", lambda model: model)


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.name)
def test_ours_computes_what_the_plain_form_does(row, few_networks):
    assert row.check() is None


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.name)
def test_a_check_finds_gradients_that_are_slightly_wrong(row, few_networks, monkeypatch):
    """Of the first parameter alone, by a thousandth of the whole gradient."""
    run = checks.run

    def spoiled(model, loss):
        output, gradients = run(model, loss)
        if not type(model).__name__.startswith("Plain"):
            size = sum(g.square().sum() for g in gradients.values()).sqrt()
            first = gradients[next(iter(gradients))].view(-1)
            first[0] += 1e-3 * size
        return output, gradients

    monkeypatch.setattr(checks, "run", spoiled)
    assert re.fullmatch(r"gradients differ by 0.001\d* of their norm .*", row.check())


def test_what_does_not_compile_is_one_line(few_networks, monkeypatch):
    def fail(self, graph):
        raise RuntimeError("C++ compile error\nkernel.cpp: error: conflicting declaration\n" * 1000)

    monkeypatch.setattr(command, "compiled", lambda model: setattr(model, "forward", partial(fail, model)) or model)
    assert checks.check_classifier("NG-T") == "RuntimeError: kernel.cpp: error: conflicting declaration"


def test_fits_are_compared_with_the_plain_form(monkeypatch):
    monkeypatch.setattr(siren, "_compiled_step", lambda architecture: architecture.step)
    assert checks.check_inr_fit() is None
    fit = siren.fit_sirens
    monkeypatch.setattr(siren, "fit_sirens", lambda *a, learning_rate, **k: fit(*a, learning_rate=1.02e-3, **k))
    assert "changes of parameters differ" in checks.check_inr_fit()


def test_operations_of_a_step_are_those_of_its_products():
    """Of a Linear: forward once, backward for weights and inputs, two operations per multiplication."""
    linear, x = torch.nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    assert device.count(lambda: linear(x).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_ours_takes_fewer_operations_than_the_plain_form(few_networks):
    cpu = torch.device("cpu")
    for name in ("NG-GNN", "NG-T"):
        ours, plain = (device.count(device.training_step(name, side, "float32", cpu, 2)) for side in (True, False))
        assert 0 < ours < plain


def test_models_on_a_device_are_a_share_of_its_peak(few_networks, monkeypatch, capsys):
    monkeypatch.setattr(device, "MODELS", ("DWSNet",))
    monkeypatch.setattr(device, "PRECISIONS", ("float32",))
    (row,) = device.measure_device("cpu", batch=2, product=64)
    *_, line = capsys.readouterr().out.splitlines()
    assert line == str(row)
    assert line.startswith("DWSNet float32")
    assert line.count("%") == 2
    row = device.Row("NG-T float32", 1e12, device.Speed(5000.0, 2.5e11), device.Speed(1000.0, 1e11))
    assert str(row).split() == ["NG-T", "float32", "5,000", "25.0%", "1,000", "10.0%", "5.0"]
    monkeypatch.setattr(checks, "check_classifier", lambda *_: "outputs differ")
    assert str(device.measure_model("NG-T", "float32", torch.device("cpu"), 2, 1.0)).endswith("timed: outputs differ")


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
