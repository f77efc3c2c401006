"""`python -m ngcore.bench models --device cuda`: training steps of ours and of the plain form in networks per second,
and as a share of what the device can do.

A step's floating-point operations are counted as it runs (`torch.utils.flop_counter`: matrix products, which are nearly
all), each side's own: ours does fewer of them for the same result. The device's peak is that of a large matrix product
in the same precision, measured beside them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MODELS = ("NG-GNN", "NG-T", "DWSNet")
PRECISIONS = ("float32", "bfloat16")
BATCH = 128
PRODUCT = 8192  # rows and columns of the matrices whose product tells the peak
WARM_UPS, REPETITIONS = 3, 10


@dataclass(frozen=True)
class Speed:
    """Networks per second of a training step, and floating-point operations per second of its products."""

    networks: float
    operations: float


@dataclass(frozen=True)
class Row:
    """A model in one precision; `peak` in operations per second. `wrong` where it was not timed, and why."""

    name: str
    peak: float
    ours: Speed | None
    plain: Speed | None
    wrong: str | None = None

    def __str__(self) -> str:
        if self.wrong is not None:
            return f"{self.name:<18} wrong, not timed: {self.wrong}"
        sides = (f"{s.networks:>12,.0f} {s.operations / self.peak:>7.1%}" for s in (self.ours, self.plain))
        return f"{self.name:<18} {' '.join(sides)} {self.ours.networks / self.plain.networks:>7.1f}"


HEADER = f"{'name':<18} {'ours/s':>12} {'of peak':>7} {'plain/s':>12} {'of peak':>7} {'ratio':>7}"


def measure_device(device: str, batch: int = BATCH, product: int = PRODUCT) -> list[Row]:
    """All models in float32 and in bfloat16, each compared with its plain form first; rows are printed as they end."""
    import torch

    target = torch.device(device)
    print(f"training steps of {batch} networks on {device}; of peak: of a product of {product} x {product} matrices")
    print(HEADER, flush=True)
    rows = []
    for precision in PRECISIONS:
        peak = 2 * product**3 / seconds(matrix_product(target, precision, product), target)
        for model in MODELS:
            rows.append(measure_model(model, precision, target, batch, peak))
            print(rows[-1], flush=True)
    return rows


def measure_model(name: str, precision: str, device: torch.device, batch: int, peak: float) -> Row:
    from ngcore.bench.checks import check_classifier

    title = f"{name} {precision}"
    wrong = check_classifier(name, precision, str(device))
    if wrong is not None:
        return Row(title, peak, None, None, wrong)
    ours, plain = (speed(training_step(name, side, precision, device, batch), batch, device) for side in (True, False))
    return Row(title, peak, ours, plain)


def matrix_product(device: torch.device, precision: str, size: int) -> Callable[[], object]:
    import torch

    a, b = torch.rand(2, size, size, device=device, dtype=getattr(torch, precision))
    return lambda: a @ b


def training_step(name: str, is_ours: bool, precision: str, device: torch.device, batch: int) -> Callable[[], object]:
    """Forward, backward and update on a batch that stays on the device; ours is compiled."""
    import torch
    import torch.nn.functional as F

    from ngcore.bench import __main__ as bench
    from ngcore.bench.checks import classifiers

    torch.manual_seed(0)
    graph = bench.random_networks(batch).map(lambda x: x.to(device))
    ours, plain, inputs = classifiers(name, graph, device, dropout=0.2)
    model, x = (ours, graph) if is_ours else (plain, inputs)
    optimizer, labels = bench.adamw(model), bench.random_labels(batch).to(device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()

    return step


def speed(step: Callable[[], object], batch: int, device: torch.device) -> Speed:
    operations, took = count(step), seconds(step, device)
    return Speed(batch / took, operations / took)


def count(step: Callable[[], object]) -> int:
    """Floating-point operations of a step, which is run once, not compiled."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Median over some repetitions, each until the device has done it."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(WARM_UPS):
        timed()
    return statistics.median(timed() for _ in range(REPETITIONS))
