"""Timing two implementations of the same work side by side.

Each side runs in a process of its own, under the same allocator settings. Both are warmed up first; then the
parent asks for one repetition at a time, in turn, so that other load on the machine slows both alike.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from ngcore.files import write_atomically

WARM_UPS = 2
REPETITIONS = 5
KEPT_BYTES = str(1 << 32)  # memory up to this size is reused, not handed back to the system after every tensor
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": KEPT_BYTES,
    "MALLOC_TRIM_THRESHOLD_": KEPT_BYTES,
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_NUM_THREADS": "2",
}
COLUMNS = ("name", "unit", "ours", "reference", "ratio", "memory_mb")
SECONDS = "s"  # the unit of rows that say how long one repetition takes, instead of items per second
Memory = Literal["peak", "extra"]


@dataclass(frozen=True)
class Workload:
    """One repetition of the work, ready to run, and the number of items that it handles."""

    run: Callable[[], object]
    items: int


@dataclass(frozen=True)
class Benchmark:
    """Two ways to do the same work, compared in items per second; `unit` names the items, e.g. "networks/s".

    `ours` and `reference` build the workloads, each in its own process: they are functions of a module, or
    `functools.partial`s of such, because they are sent there by name. There may be no reference.

    `check` says what is wrong with what `ours` computes beside the reference, None for nothing; it runs before anything
    is timed, in a process of its own too, and a row that is wrong is not timed.

    `memory` is the "peak" of the whole process, or the "extra" that one repetition takes beside what the process
    held before it, e.g. the parameters.
    """

    name: str
    unit: str
    ours: Callable[[], Workload]
    reference: Callable[[], Workload] | None
    memory: Memory = "peak"
    warm_ups: int = WARM_UPS
    repetitions: int = REPETITIONS
    check: Callable[[], str | None] | None = None


@dataclass(frozen=True)
class Result:
    """Speed (median over the repetitions) and memory in MB (2**20 bytes) of both sides.

    A missing reference is None; `fits` is False where it needs too much memory to run, `reference_memory_mb` then says
    how much. Memory that the system can't tell is None too.
    """

    name: str
    unit: str
    ours: float | None
    reference: float | None
    memory_mb: float | None
    reference_memory_mb: float | None
    fits: bool = True
    wrong: str | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the reference ours is."""
        if self.ours is None or self.reference is None:
            return None
        return self.reference / self.ours if self.unit == SECONDS else self.ours / self.reference

    def as_json(self) -> dict[str, str | float | None]:
        """The values of `COLUMNS`, where the memory is ours."""
        return {column: getattr(self, column) for column in COLUMNS}


class BenchmarkError(RuntimeError):
    """A worker failed; the message holds its traceback."""


class DoesNotFitError(MemoryError):
    """A workload that can't be built because it would need so much memory, in MB."""

    def __init__(self, needed_mb: float) -> None:
        super().__init__(f"needs {needed_mb:,.0f} MB")
        self.needed_mb = needed_mb


def measure(benchmark: Benchmark, repetitions: int | None = None) -> Result:
    """Time both sides of a benchmark in turn, unless what ours computes is found wrong.

    A reference that raises `DoesNotFitError` is left out.

    Raises:
        BenchmarkError: a worker raised (with its traceback) or died (with its exit code).
    """
    if benchmark.check is not None:
        with _worker(f"{benchmark.name}, check", benchmark.check, None) as worker:
            wrong = worker.receive()
        if wrong is not None:
            return Result(benchmark.name, benchmark.unit, None, None, None, None, wrong=wrong)
    sides = {"ours": benchmark.ours}
    if benchmark.reference is not None:
        sides["reference"] = benchmark.reference
    needed_mb = None
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(_worker(f"{benchmark.name}, {side}", factory, benchmark.warm_ups))
            for side, factory in sides.items()
        }
        items = {"ours": workers["ours"].receive()}
        try:
            items.update({side: workers[side].receive() for side in workers if side != "ours"})
        except DoesNotFitError as error:
            needed_mb = error.needed_mb
        seconds: dict[str, list[float]] = {side: [] for side in items}
        for _ in range(repetitions or benchmark.repetitions):
            for side in items:
                seconds[side].append(workers[side].ask("run"))
        speed = {side: _speed(benchmark.unit, items[side], seconds[side]) for side in items}
        memory = {side: workers[side].ask(benchmark.memory) for side in items}
    return Result(
        name=benchmark.name,
        unit=benchmark.unit,
        ours=speed["ours"],
        reference=speed.get("reference"),
        memory_mb=memory["ours"],
        reference_memory_mb=memory.get("reference", needed_mb),
        fits=needed_mb is None,
    )


def _speed(unit: str, items: int, seconds: Sequence[float]) -> float:
    median = statistics.median(seconds)
    return median if unit == SECONDS else items / median


def table_header() -> str:
    """The column titles above `table_row`s."""
    *titles, memory = COLUMNS
    return _table_line(*titles, f"{memory} (reference)")


def table_row(result: Result) -> str:
    """One line of the printed table."""
    if result.wrong is not None:
        return f"{result.name:<54} wrong, not timed: {result.wrong}"
    return _table_line(
        result.name,
        result.unit,
        _number(result.ours),
        _number(result.reference) if result.fits else "does not fit",
        _number(result.ratio),
        f"{_memory(result.memory_mb)} ({_memory(result.reference_memory_mb)})",
    )


def _number(value: float | None) -> str:
    """One decimal, more of them below 1, none above a million; a dash for a missing value."""
    if value is None:
        return "-"
    return f"{value:.2g}" if 0 < value < 1 else f"{value:,.1f}" if value < 1e6 else f"{value:,.0f}"


def _memory(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _table_line(name: str, unit: str, ours: str, reference: str, ratio: str, memory: str) -> str:
    return f"{name:<54} {unit:<12} {ours:>10} {reference:>12} {ratio:>8} {memory:>22}"


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write a list of objects with the keys `COLUMNS`; the file appears whole or not at all."""
    write_atomically(path, json.dumps([result.as_json() for result in results], indent=2) + "\n")


@dataclass(frozen=True)
class _Worker:
    """The parent's end of one side."""

    title: str
    process: BaseProcess
    connection: Connection

    def ask(self, request: str) -> Any:
        self.connection.send(request)
        return self.receive()

    def receive(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            raise BenchmarkError(f"{self.title}: the worker died with exit code {code}") from None
        if kind == "does not fit":
            raise DoesNotFitError(value)
        if kind == "error":
            raise BenchmarkError(f"{self.title}: the worker failed\n{value}")
        return value


@contextmanager
def _worker(title: str, factory: Callable[[], Any], warm_ups: int | None) -> Iterator[_Worker]:
    """A process that builds a workload, warms it up and answers requests; it is ended with the context.

    Where `warm_ups` is None it only answers with what `factory` gives."""
    context = multiprocessing.get_context("spawn")
    parents_end, workers_end = context.Pipe()
    process = context.Process(target=_serve, args=(factory, workers_end, warm_ups), daemon=True)
    with parents_end:
        with workers_end, _environment(WORKER_ENVIRONMENT):  # the allocator reads it when the process starts
            process.start()
        try:
            yield _Worker(title, process, parents_end)
            with suppress(BrokenPipeError):  # it has ended already where its workload does not fit
                parents_end.send(None)
            process.join()
        finally:
            process.terminate()
            process.join()
            process.close()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(factory: Callable[[], Any], connection: Connection, warm_ups: int | None) -> None:
    """The worker: say how many items a repetition has, then answer "run", "peak" and "extra" until None comes."""
    answers = {
        "run": lambda: _seconds(workload.run),
        "peak": _peak_memory_mb,
        "extra": lambda: _extra_memory_mb(workload.run),
    }
    try:
        workload = factory()
        for _ in range(warm_ups or 0):
            workload.run()
        connection.send(("value", workload if warm_ups is None else workload.items))
        for request in iter(connection.recv, None):
            connection.send(("value", answers[request]()))
    except DoesNotFitError as error:
        connection.send(("does not fit", error.needed_mb))
    except Exception:
        connection.send(("error", traceback.format_exc()))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_memory_mb() -> float:
    """Peak resident memory of this process, which on Linux starts from the peak of its parent."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)


def _extra_memory_mb(run: Callable[[], object]) -> float | None:
    """By how much the resident memory grows during one more repetition; only Linux can tell.

    Memory that the allocator keeps for reuse goes back to the system first, or the repetition would take it unseen.
    """
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _status_mb("VmRSS")
    run()
    return max(0.0, _status_mb("VmHWM") - before)


def _status_mb(entry: str) -> float:
    """A line of /proc/self/status, in kB there."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / (1 << 10) for line in lines if line.startswith(f"{entry}:"))
