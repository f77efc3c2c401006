"""Timing two implementations of the same work side by side.

Each side runs in a process of its own, under the same allocator settings. Both are warmed up first; then the
parent asks for one repetition at a time, in turn, so that a busy spell of the machine slows both alike.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Workload:
    """One repetition of the work, ready to run, and the number of items that it handles."""

    run: Callable[[], object]
    items: int


@dataclass(frozen=True)
class Benchmark:
    """Two ways to do the same work, compared in items per second; `unit` names the items, e.g. "networks/s".

    `ours` and `reference` build the workloads, each in its own process: they are functions of a module, or
    `functools.partial`s of such, because they are sent there by name.
    """

    name: str
    unit: str
    ours: Callable[[], Workload]
    reference: Callable[[], Workload]


@dataclass(frozen=True)
class Result:
    """Items per second (median over the repetitions) and peak memory in MB (2**20 bytes) of both sides."""

    name: str
    unit: str
    ours: float
    reference: float
    memory_mb: float
    reference_memory_mb: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the reference ours is."""
        return self.ours / self.reference

    def as_json(self) -> dict[str, str | float]:
        """The values of `COLUMNS`, where the memory is ours."""
        return {column: getattr(self, column) for column in COLUMNS}


class BenchmarkError(RuntimeError):
    """A worker failed; the message holds its traceback."""


def measure(benchmark: Benchmark, repetitions: int = REPETITIONS) -> Result:
    """Time both sides of a benchmark in turn.

    Raises:
        BenchmarkError: a worker raised (with its traceback) or died (with its exit code).
    """
    with (
        _worker(f"{benchmark.name}, ours", benchmark.ours) as ours,
        _worker(f"{benchmark.name}, reference", benchmark.reference) as reference,
    ):
        ours_items, reference_items = ours.receive(), reference.receive()
        seconds = [(ours.ask("run"), reference.ask("run")) for _ in range(repetitions)]
        ours_seconds, reference_seconds = zip(*seconds, strict=True)
        return Result(
            name=benchmark.name,
            unit=benchmark.unit,
            ours=ours_items / statistics.median(ours_seconds),
            reference=reference_items / statistics.median(reference_seconds),
            memory_mb=ours.ask("memory"),
            reference_memory_mb=reference.ask("memory"),
        )


def table_header() -> str:
    """The column titles above `table_row`s."""
    *titles, memory = COLUMNS
    return _table_line(*titles, f"{memory} (reference)")


def table_row(result: Result) -> str:
    """One line of the printed table."""
    return _table_line(
        result.name,
        result.unit,
        f"{result.ours:,.1f}",
        f"{result.reference:,.1f}",
        f"{result.ratio:.1f}",
        f"{result.memory_mb:,.0f} ({result.reference_memory_mb:,.0f})",
    )


def _table_line(name: str, unit: str, ours: str, reference: str, ratio: str, memory: str) -> str:
    return f"{name:<44} {unit:<12} {ours:>10} {reference:>10} {ratio:>6} {memory:>22}"


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write a list of objects with the keys `COLUMNS`; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps([result.as_json() for result in results], indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        if kind == "error":
            raise BenchmarkError(f"{self.title}: the worker failed\n{value}")
        return value


@contextmanager
def _worker(title: str, factory: Callable[[], Workload]) -> Iterator[_Worker]:
    """A process that builds a workload, warms it up and answers requests; it is ended with the context."""
    context = multiprocessing.get_context("spawn")
    parents_end, workers_end = context.Pipe()
    process = context.Process(target=_serve, args=(factory, workers_end), daemon=True)
    with parents_end:
        with workers_end, _environment(WORKER_ENVIRONMENT):  # the allocator reads it when the process starts
            process.start()
        try:
            yield _Worker(title, process, parents_end)
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


def _serve(factory: Callable[[], Workload], connection: Connection) -> None:
    """The worker: say how many items a repetition has, then answer "run" and "memory" until None comes."""
    answers = {"run": lambda: _seconds(workload.run), "memory": _peak_memory_mb}
    try:
        workload = factory()
        for _ in range(WARM_UPS):
            workload.run()
        connection.send(("value", workload.items))
        for request in iter(connection.recv, None):
            connection.send(("value", answers[request]()))
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
