"""Executing many runs: each is a pure function of its config, so any process can take it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ngcore.files import write_atomically
from ngcore.processes import completed, default_workers, pool, until
from ngcore.study.execution import DEFAULT, Execution, OutOfTime
from ngcore.study.run import Report
from ngcore.study.runs import Record, cache_directory

Run = Callable[[Any, Execution, Report], Record]


class RunsFailed(RuntimeError):
    """Some runs failed; the others are stored.

    Attributes:
        finished: the results of the others, by config.
    """

    def __init__(self, message: str, finished: Mapping[Any, Record] | None = None) -> None:
        super().__init__(message)
        self.finished = dict(finished or {})


def execute_all(
    run: Run, configs: Sequence[Any], execution: Execution = DEFAULT, executor: Executor | None = None
) -> list[Record]:
    """The results of many runs, in the order of `configs`; equal configs are run once.

    Independent runs share a CPU best as one single-threaded process per core (the default); on a GPU they take turns.

    Args:
        run: (config, execution, report) -> record; it and all that it takes and gives can be sent to another process.
        executor: who runs them, such as a cluster's; None for processes on this machine.

    Raises:
        RunsFailed: after all runs have ended; it names every config that failed, and why.
        OutOfTime: the execution's deadline came first; what is finished is stored.
    """
    different = list(dict.fromkeys(configs))
    if not different:
        return []
    if executor is not None:
        records = _collect(run, different, execution, executor)
    else:
        with processes_of(execution, len(different)) as processes:
            records = _collect(run, different, execution, processes)
    by_config = dict(zip(different, records, strict=True))
    return [by_config[config] for config in configs]


@contextmanager
def processes_of(execution: Execution, most: int | None = None) -> Iterator[Executor]:
    """Processes of this machine that execute runs, at most so many, until the deadline. They keep the data that they
    have read for the runs that follow."""
    workers = execution.workers or default_workers()
    workers = workers if most is None else min(workers, most)
    threads = max(1, torch.get_num_threads() // workers)
    with until(execution.deadline), pool(workers, threads) as processes:
        yield processes


def _collect(run: Run, configs: Sequence[Any], execution: Execution, executor: Executor) -> list[Record]:
    records: dict[int, Record] = {}
    failures: dict[int, BaseException] = {}
    with Reports() as reports, tqdm(total=len(configs), desc="runs", unit="run") as bar:
        items = [(run, config, execution, reports.directory / f"{i}.json") for i, config in enumerate(configs)]
        tick = lambda: bar.set_postfix_str(reports.summary())  # noqa: E731
        for i, future in completed(_execute, items, len(configs), executor=executor, tick=tick):
            bar.update()
            if (error := future.exception()) is None:
                records[i] = future.result()
            else:
                failures[i] = error
    late = [i for i, error in failures.items() if _is_late(error, execution)]
    finished = {configs[i]: record for i, record in records.items()}
    if len(failures) > len(late):
        wrong = {i: error for i, error in failures.items() if i not in late}
        reasons = "\n".join(f"{configs[i]}: {error!r}" for i, error in wrong.items())
        message = f"{len(wrong)} of {len(configs)} runs failed:\n{reasons}"
        raise RunsFailed(message, finished) from next(iter(wrong.values()))
    if late:
        raise OutOfTime(f"{len(records)} of {len(configs)} runs are stored, {len(late)} wait for more time", finished)
    return [records[i] for i in range(len(configs))]


def _is_late(error: BaseException, execution: Execution) -> bool:
    """Whether a run did not fail, but was ended by the deadline, at which processes end themselves."""
    ended = execution.deadline is not None and time.time() >= execution.deadline
    return isinstance(error, OutOfTime) or (ended and isinstance(error, BrokenProcessPool))


def _execute(run: Run, config: Any, execution: Execution, told: Path) -> Record:
    """In a worker: a run that tells in a small file how far it is."""
    counter = itertools.count(1)

    def report(epoch: int, scores: Mapping[str, float]) -> None:
        write_atomically(told, json.dumps({"reports": next(counter), "loss": scores["train_loss"]}))

    return run(config, execution, report)


class Reports:
    """The files in which runs that are under way tell how far they are; they are gone at the end."""

    def __enter__(self) -> Reports:
        self.directory = cache_directory() / "progress" / f"{socket.gethostname()}-{os.getpid()}"
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def summary(self) -> str:
        """Such as "12 reports, last loss 0.693": one per epoch, or per outer step of meta-training."""
        files = sorted(self.directory.glob("[0-9]*.json"), key=lambda path: path.stat().st_mtime)
        if not files:
            return ""
        told = [json.loads(path.read_text()) for path in files]
        return f"{sum(one['reports'] for one in told)} reports, last loss {told[-1]['loss']:.3f}"
