"""Executing many runs: each is a pure function of its config, so any process can take it."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from ngcore.processes import end_with_parent
from ngcore.study.runs import Record

Run = Callable[..., Record]  # (config, on_epoch) -> record

_messages: Any = None  # a worker's way to its parent


class RunsFailed(RuntimeError):
    """Some runs failed; the others are stored."""


def _start_worker(messages: Any, threads: int) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(threads)
    end_with_parent()


def _execute(run: Run, config: Any) -> Record:
    return run(config, lambda epoch, scores: _messages.put(scores))


def execute_all(run: Run, configs: Sequence[Any], *, workers: int | None = None) -> list[Record]:
    """The results of many runs, in the order of `configs`.

    Independent runs share a CPU best as one single-threaded process per core (the default); on a GPU they take turns.

    Raises:
        RunsFailed: after all runs have ended; it names every config that failed, and why.
    """
    if not configs:
        return []
    gpu = torch.cuda.is_available()
    workers = min(len(configs), workers or (1 if gpu else torch.get_num_threads()))
    threads = max(1, torch.get_num_threads() // max(1, workers))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        messages = manager.Queue()
        with ProcessPoolExecutor(workers, context, _start_worker, (messages, threads)) as pool:
            futures = {pool.submit(_execute, run, config): i for i, config in enumerate(configs)}
            try:
                return _collect(futures, configs, messages)
            except BaseException:  # the stop button: let go of the runs that wait
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _collect(futures: dict[Future, int], configs: Sequence[Any], messages: Any) -> list[Record]:
    records: dict[int, Record] = {}
    failures = []
    reports = 0  # one per epoch, or per outer step of meta-training
    with tqdm(total=len(configs), desc="runs", unit="run") as bar:
        waiting = set(futures)
        while waiting:
            try:
                scores = messages.get(timeout=1)
                reports += 1
                bar.set_postfix_str(f"{reports} reports, last loss {scores['train_loss']:.3f}")
            except queue.Empty:
                pass
            for future in [future for future in waiting if future.done()]:
                waiting.remove(future)
                bar.update()
                i = futures[future]
                if future.exception() is None:
                    records[i] = future.result()
                else:
                    failures.append((configs[i], future.exception()))
    if failures:
        reasons = "\n".join(f"{config}: {error!r}" for config, error in failures)
        raise RunsFailed(f"{len(failures)} of {len(configs)} runs failed:\n{reasons}") from failures[0][1]
    return [records[i] for i in range(len(configs))]
