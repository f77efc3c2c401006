"""Workloads of plain Python for the bench's workers, apart from its tests: a worker that finds them here imports no
torch, and is there at once."""

import os
import time
from pathlib import Path

from ngcore.bench.harness import WARM_UPS, WORKER_ENVIRONMENT, DoesNotFitError, Workload


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


def not_fitting() -> Workload:
    raise DoesNotFitError(3e6)


def filling(megabytes: int, times: int = 1) -> Workload:
    """Holds as much itself, and takes it again in every repetition."""
    held = b"x" * (megabytes << 20)

    def run() -> None:
        for _ in range(times):
            assert len(b"x" + held) > len(held)

    return Workload(run, 1)


def finding(what):
    """A check's answer."""
    return what
