"""Sharing out work: single-threaded processes, one per core, beat threads; results are collected as they come."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

TICK = 0.5  # seconds between looks at work that is under way
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Let the processes and the work that begin in this context end at a deadline (`time.time()`), None for never."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def is_over() -> bool:
    """Whether the context's deadline has passed."""
    deadline = _deadline.get()
    return deadline is not None and time.time() >= deadline


def pool(workers: int, threads: int = 1) -> ProcessPoolExecutor:
    """Processes of so many threads each; they end where this process is killed, and at the context's deadline."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max(1, workers), context, _start, (threads, _deadline.get()))


def _start(threads: int, deadline: float | None) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if deadline is not None:
        threading.Thread(target=_end_at, args=(deadline,), daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _end_at(deadline: float) -> None:
    while (left := deadline - time.time()) > 0:
        time.sleep(left)
    os._exit(1)


def default_workers() -> int:
    """One per core; one where there is a GPU, which runs take in turns."""
    return 1 if torch.cuda.is_available() else torch.get_num_threads()


def completed(
    work: Callable[..., Any],
    items: Sequence[tuple[Any, ...]],
    workers: int,
    *,
    executor: Executor | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Future]]:
    """Let other processes do `work(*item)` for every item; (item's number, its future) as they end.

    Whoever stops iterating, by an error or the stop button, lets go of the items that wait.

    Args:
        executor: who works; None for a `pool` of so many workers.
        tick: called between looks.
    """
    with nullcontext(executor) if executor is not None else pool(workers) as processes:
        futures = {processes.submit(work, *item): number for number, item in enumerate(items)}
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, TICK, FIRST_COMPLETED)
                tick()
                for future in done:
                    yield futures[future], future
        finally:
            for future in waiting:
                future.cancel()


def in_turn(work: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Future]]:
    """The same as `completed`, one item after the other in this process, each when it is asked for.

    Raises:
        TimeoutError: the context's deadline has passed.
    """
    for number, item in enumerate(items):
        if is_over():
            raise TimeoutError("the deadline has passed")
        future: Future = Future()
        try:
            future.set_result(work(*item))
        except Exception as error:
            future.set_exception(error)
        yield number, future
