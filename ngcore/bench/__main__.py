"""`python -m ngcore.bench NAME [--json FILE]`: ours against a plain reference, in items per second.

`graph` also says how many seconds it takes to trace a network; its workloads are in `ngcore.bench.graph`.

Workloads import what they run only when they are built, in processes of their own: the one that starts them
stays small, because a process's peak memory counts from its parent's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ngcore.bench.graph import GRAPH_NOTE, GRAPH_ROWS
from ngcore.bench.harness import (
    Benchmark,
    BenchmarkError,
    Workload,
    measure,
    table_header,
    table_row,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from ngcore.graph import NeuralGraph, Wiring

SUMMARY = "Time ours against a plain reference, in items per second."
Precision = Literal["float32", "bfloat16"]

NUM_CLASSES = 10
BATCH = 128
REFERENCE_BATCH = 32  # the plain graph models handle more networks per second at this batch size than at 128
# networks per pass of our graph models, whose gradients add up: it keeps the work in the cache
NG_GNN_MICRO_BATCH = 16
NG_T_MICRO_BATCH = 4
NUM_FITS = 16
FIT_STEPS = 200
SINGLE_FIT_STEPS = 500
FIT_LEARNING_RATE = 1e-3


def our_ng_gnn(precision: Precision) -> Workload:
    from ngcore.models import NGGNN

    wiring = inr_wiring()
    return our_training(compiled(NGGNN(wiring, NUM_CLASSES)), wiring, precision, NG_GNN_MICRO_BATCH)


def our_ng_t(precision: Precision) -> Workload:
    from ngcore.models import NGT

    wiring = inr_wiring()
    return our_training(compiled(NGT(wiring, NUM_CLASSES)), wiring, precision, NG_T_MICRO_BATCH)


def our_dwsnet() -> Workload:
    from ngcore.models.baselines import DWSNet

    wiring = inr_wiring()
    return our_training(DWSNet(wiring, NUM_CLASSES), wiring, "float32", BATCH)


def compiled(model: nn.Module) -> nn.Module:
    model.compile_parts()
    return model


def our_training(model: nn.Module, wiring: Wiring, precision: Precision, micro_batch: int) -> Workload:
    """One training step of one of our models on a fixed batch: forward, backward and update, as the study trains."""
    import torch
    import torch.nn.functional as F

    graph, labels = random_networks(wiring, BATCH)
    cuts = [slice(i, i + micro_batch) for i in range(0, BATCH, micro_batch)]
    parts = [(graph[cut], labels[cut]) for cut in cuts]
    optimizer = adamw(model)

    def step() -> None:
        optimizer.zero_grad()
        for part, own in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = F.cross_entropy(model(part), own, reduction="sum") / BATCH
            loss.backward()
        optimizer.step()

    return Workload(step, BATCH)


def plain_ng_gnn() -> Workload:
    """The networks are `Data` objects already, as in a torch_geometric data set; each step collates."""
    from torch_geometric.data import Batch

    from ngcore.bench.plain_ng_gnn import PlainNGGNN, to_data_list

    wiring = inr_wiring()
    graph, labels = random_networks(wiring, REFERENCE_BATCH)
    networks = to_data_list(graph)
    return plain_training(PlainNGGNN(wiring, NUM_CLASSES), lambda: Batch.from_data_list(networks), labels)


def plain_ng_t() -> Workload:
    from ngcore.bench.plain_ng_t import PlainNGT

    wiring = inr_wiring()
    graph, labels = random_networks(wiring, REFERENCE_BATCH)
    return plain_training(PlainNGT(wiring, NUM_CLASSES), lambda: graph, labels)


def plain_dwsnet() -> Workload:
    from ngcore.bench.plain_dws import PlainDWSNet

    wiring = inr_wiring()
    graph, labels = random_networks(wiring, BATCH)
    return plain_training(PlainDWSNet(wiring, NUM_CLASSES), lambda: graph, labels)


def plain_training(model: nn.Module, next_batch: Callable[[], object], labels: Tensor) -> Workload:
    """One training step of a plain model in float32: batch, forward, backward and update."""
    import torch.nn.functional as F

    optimizer = adamw(model)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(next_batch()), labels).backward()
        optimizer.step()

    return Workload(step, len(labels))


def inr_wiring() -> Wiring:
    """The input networks of all models: the INRs of the paper's tables 3 and 4."""
    from ngcore.graph import mlp

    return mlp([2, 32, 32, 1], "sine")


def random_networks(wiring: Wiring, count: int) -> tuple[NeuralGraph, Tensor]:
    """A batch of random networks with random labels; the time of a step does not depend on their values."""
    import torch

    generator = torch.Generator().manual_seed(0)
    state_dict = {name: 0.1 * torch.randn(count, *shape, generator=generator) for name, shape in wiring.shapes.items()}
    return wiring.graph(state_dict), torch.randint(NUM_CLASSES, (count,), generator=generator)


def adamw(model: nn.Module) -> Optimizer:
    """The paper's optimizer for INR classification."""
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-4, amsgrad=True)


def our_inr_fit() -> Workload:
    """Many INRs at once; images of noise never reach the PSNR at which a fit stops early."""
    import torch

    from ngcore.data.siren import fit_sirens, initialize

    images = torch.rand(NUM_FITS, 28, 28)
    initial = initialize(range(NUM_FITS))
    return Workload(
        lambda: fit_sirens(images, initial, steps=FIT_STEPS, learning_rate=FIT_LEARNING_RATE, compiled=True),
        NUM_FITS * FIT_STEPS,
    )


def plain_inr_fit() -> Workload:
    """One INR after the other, so that a single one tells the speed."""
    import torch

    from ngcore.bench.plain_inr import Siren, fit_one

    image, initial = torch.rand(28, 28), Siren().state_dict()
    return Workload(
        lambda: fit_one(image, SINGLE_FIT_STEPS, FIT_LEARNING_RATE, initial),
        SINGLE_FIT_STEPS,
    )


def graph_model_row(
    model: str,
    precision: Precision,
    ours: Callable[[Precision], Workload],
    reference: Callable[[], Workload],
) -> Benchmark:
    name = f"{model} {precision} (reference float32, batch {REFERENCE_BATCH})"
    return Benchmark(name, "networks/s", partial(ours, precision), reference)


BENCHMARKS: dict[str, list[Benchmark]] = {
    "inr_fit": [Benchmark("INR fitting", "INR-steps/s", our_inr_fit, plain_inr_fit)],
    "models": [
        graph_model_row("NG-GNN", "float32", our_ng_gnn, plain_ng_gnn),
        graph_model_row("NG-T", "float32", our_ng_t, plain_ng_t),
        Benchmark("DWSNet float32", "networks/s", our_dwsnet, plain_dwsnet),
    ],
    "models_bfloat16": [  # for CPUs that compute in it: elsewhere it is several times slower than float32
        graph_model_row("NG-GNN", "bfloat16", our_ng_gnn, plain_ng_gnn),
        graph_model_row("NG-T", "bfloat16", our_ng_t, plain_ng_t),
    ],
    "graph": GRAPH_ROWS,
}
NOTES = {"graph": GRAPH_NOTE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks of one name, print a line each as they end, and optionally write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m ngcore.bench", description=SUMMARY)
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as a list of objects")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: make the directory {options.json.parent} first")

    results = []
    if options.name in NOTES:
        print(NOTES[options.name], end="\n\n")
    print(table_header(), flush=True)
    try:
        for benchmark in BENCHMARKS[options.name]:
            results.append(measure(benchmark))
            print(table_row(results[-1]), flush=True)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json is not None:
        write_json(results, options.json)
    return 0


if __name__ == "__main__":
    # workers look the workloads up by module name, and no process but this one knows them as "__main__"
    from ngcore.bench.__main__ import main as importable_main

    sys.exit(importable_main())
