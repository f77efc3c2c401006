"""Single-threaded processes that share out work: one per core beats threads."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def pool(workers: int) -> ProcessPoolExecutor:
    """As many processes of one thread each; where this process is killed they end with it."""
    return ProcessPoolExecutor(max(1, workers), multiprocessing.get_context("spawn"), _start)


def _start() -> None:
    torch.set_num_threads(1)
    end_with_parent()


def end_with_parent() -> None:
    """End this worker when its parent does: where that one is killed, its workers would go on unseen."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
