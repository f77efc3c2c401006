"""`python -m ngcore.bench NAME [--json FILE]`: ours against a plain reference, in items per second.

- `inr_fit`: fitting INRs;
- `models`, `models_bfloat16`: training steps of the models that classify INRs; `models --device cuda` on a GPU
  (`ngcore.bench.device`);
- `models_editing`: of those that edit INRs, with rendering what they make;
- `epoch`: what a training epoch costs outside of the model and the optimizer;
- `graph`: tracing (which also says how many seconds a network takes) and binding weights to the wiring; its workloads
  are in `ngcore.bench.graph`;
- `zoo`: training populations of CNNs, and the models that read them (`ngcore.bench.zoo`);
- `l2o`: seconds of a step of learned optimizers and of Adam, beside the network's own pass (`ngcore.bench.l2o`).

What these models and fits compute is compared with the plain form before anything is timed (`ngcore.bench.checks`).

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

from ngcore.bench.checks import check_classifier, check_editor, check_inr_fit
from ngcore.bench.device import measure_device
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
from ngcore.bench.l2o import L2O_NOTE, L2O_ROWS
from ngcore.bench.zoo import ZOO_ROWS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from ngcore.graph import NeuralGraph, Wiring
    from ngcore.graph.frame import Frame

SUMMARY = "Time ours against a plain reference, in items per second."
Precision = Literal["float32", "bfloat16"]

NUM_CLASSES = 10
BATCH = 128
REFERENCE_BATCH = 32  # the plain graph models handle more networks per second at this batch size than at 128
# Networks per pass of our graph models, whose gradients add up: 64 are 4 % faster (NG-GNN), for more memory.
MICRO_BATCH = 16
EDITING_REPETITIONS = 3  # of the graph models: compiling takes most of the row's time
NUM_FITS = 16
FIT_STEPS = 200
SINGLE_FIT_STEPS = 500
FIT_LEARNING_RATE = 1e-3
EPOCH_SIZE = 256
EPOCH_NOTE = "What an epoch does outside of the model and the optimizer; a ratio above 50 is less than 2 % of it."


def our_ng_gnn(precision: Precision) -> Workload:
    from ngcore.models import NGGNN, Scores

    return our_classification(compiled(NGGNN(inr_wiring(), Scores(NUM_CLASSES))), precision, MICRO_BATCH)


def our_ng_t(precision: Precision) -> Workload:
    from ngcore.models import NGT, Scores

    return our_classification(compiled(NGT(inr_wiring(), Scores(NUM_CLASSES))), precision, MICRO_BATCH)


def our_dwsnet() -> Workload:
    from ngcore.models.baselines import DWSNet

    return our_classification(DWSNet(inr_wiring(), NUM_CLASSES), "float32", BATCH)


def our_editing_ng_gnn() -> Workload:
    from ngcore.models import NGGNN, Editor, PerParameter

    return our_editing(compiled(Editor(NGGNN(inr_wiring(), PerParameter(), sigma=None))), MICRO_BATCH)


def our_editing_ng_t() -> Workload:
    from ngcore.models import NGT, Editor, PerParameter

    return our_editing(compiled(Editor(NGT(inr_wiring(), PerParameter(), sigma=3.0, dropout=0.3))), MICRO_BATCH)


def our_editing_dwsnet() -> Workload:
    from ngcore.models import Editor
    from ngcore.models.baselines import EquivariantDWSNet

    return our_editing(Editor(EquivariantDWSNet(inr_wiring())), BATCH)


def our_editing_nfn() -> Workload:
    from ngcore.models import Editor
    from ngcore.models.baselines import EquivariantNFN

    return our_editing(Editor(EquivariantNFN(inr_wiring())), BATCH)


def compiled(model: nn.Module) -> nn.Module:
    model.compile_parts()
    return model


def our_classification(model: nn.Module, precision: Precision, micro_batch: int) -> Workload:
    import torch
    import torch.nn.functional as F

    def loss(graph: NeuralGraph, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return F.cross_entropy(model(graph), labels)

    return our_training(model, loss, random_labels(BATCH), micro_batch)


def our_editing(editor: nn.Module, micro_batch: int) -> Workload:
    import torch.nn.functional as F

    from ngcore.data.inrs.siren import render

    def loss(graph: NeuralGraph, images: Tensor) -> Tensor:
        return F.mse_loss(render(editor(graph).state_dict()).mean(0), images)

    return our_training(editor, loss, random_images(BATCH), micro_batch)


def our_training(
    model: nn.Module, loss: Callable[[NeuralGraph, Tensor], Tensor], targets: Tensor, micro_batch: int
) -> Workload:
    """One training step of one of our models on a fixed batch: forward, backward and update.

    `loss` is the mean over the networks of a part of the batch.
    """
    graph = random_networks(BATCH)
    model.fit_normalization(graph)
    cuts = [slice(i, i + micro_batch) for i in range(0, BATCH, micro_batch)]
    parts = [(graph[cut], targets[cut]) for cut in cuts]
    optimizer = adamw(model)

    def step() -> None:
        optimizer.zero_grad()
        for part, own in parts:
            (loss(part, own) * (len(own) / BATCH)).backward()
        optimizer.step()

    return Workload(step, BATCH)


def plain_ng_gnn() -> Workload:
    """The networks are `Data` objects already, as in a torch_geometric data set; each step collates."""
    from torch_geometric.data import Batch

    from ngcore.models import Scores
    from ngcore.reference.encoder import to_data_list
    from ngcore.reference.ng_gnn import PlainNGGNN

    networks = to_data_list([random_networks(REFERENCE_BATCH)], inr_frame())
    model = PlainNGGNN(inr_frame(), Scores(NUM_CLASSES))
    return plain_classification(model, lambda: Batch.from_data_list(networks), REFERENCE_BATCH)


def plain_ng_t() -> Workload:
    from ngcore.models import Scores
    from ngcore.reference.encoder import to_batch
    from ngcore.reference.ng_t import PlainNGT

    batch = to_batch([random_networks(REFERENCE_BATCH)], inr_frame())
    return plain_classification(PlainNGT(inr_frame(), Scores(NUM_CLASSES)), lambda: [batch], REFERENCE_BATCH)


def plain_dwsnet() -> Workload:
    from ngcore.reference.dws import PlainDWSNet

    graph = random_networks(BATCH)
    return plain_classification(PlainDWSNet(inr_wiring(), NUM_CLASSES), lambda: graph, BATCH)


def plain_editing_ng_gnn() -> Workload:
    from torch_geometric.data import Batch

    from ngcore.models import PerParameter
    from ngcore.reference.encoder import to_data_list
    from ngcore.reference.ng_gnn import PlainNGGNN

    graph = random_networks(REFERENCE_BATCH)
    networks = to_data_list([graph], inr_frame())
    model = PlainNGGNN(inr_frame(), PerParameter(), sigma=None)
    return plain_editing(model, lambda: Batch.from_data_list(networks), graph)


def plain_editing_ng_t() -> Workload:
    from ngcore.models import PerParameter
    from ngcore.reference.encoder import to_batch
    from ngcore.reference.ng_t import PlainNGT

    graph = random_networks(REFERENCE_BATCH)
    batch = to_batch([graph], inr_frame())
    return plain_editing(PlainNGT(inr_frame(), PerParameter(), sigma=3.0, dropout=0.3), lambda: [batch], graph)


def plain_classification(model: nn.Module, next_batch: Callable[[], object], count: int) -> Workload:
    import torch.nn.functional as F

    labels = random_labels(count)
    return plain_training(model, lambda: F.cross_entropy(model(next_batch()), labels), count)


def plain_editing(metanetwork: nn.Module, next_batch: Callable[[], object], graph: NeuralGraph) -> Workload:
    """Every network's parameters are a state dict of their own, as INRs are stored."""
    import torch.nn.functional as F

    from ngcore.reference.editing import PlainEditor

    editor, count = PlainEditor(metanetwork, graph.wiring), graph.num_networks
    images, networks = random_images(count), [graph[n].state_dict() for n in range(count)]
    return plain_training(editor, lambda: F.mse_loss(editor(next_batch(), networks).mean(0), images), count)


def plain_training(model: nn.Module, loss: Callable[[], Tensor], count: int) -> Workload:
    """One training step of a plain model on `count` networks in float32: batch, forward, backward and update."""
    optimizer = adamw(model)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return Workload(step, count)


def inr_wiring() -> Wiring:
    """The input networks of all models: the INRs of the paper's tables 3 to 5."""
    from ngcore.graph import mlp

    return mlp([2, 32, 32, 1], "siren")


def inr_frame() -> Frame:
    from ngcore.graph.frame import Frame

    return Frame.of([inr_wiring()])


def random_networks(count: int) -> NeuralGraph:
    """A batch of random networks; the time of a step does not depend on their values."""
    import torch

    wiring, generator = inr_wiring(), torch.Generator().manual_seed(0)
    return wiring.graph(
        {name: 0.1 * torch.randn(count, *shape, generator=generator) for name, shape in wiring.shapes.items()}
    )


def random_labels(count: int) -> Tensor:
    import torch

    return torch.randint(NUM_CLASSES, (count,), generator=torch.Generator().manual_seed(1))


def random_images(count: int) -> Tensor:
    """Images of noise for editors to make, (count, 28, 28)."""
    import torch

    return torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(1))


def adamw(model: nn.Module) -> Optimizer:
    """The paper's optimizer for INR classification and editing."""
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-4, amsgrad=True)


def our_inr_fit() -> Workload:
    """Many INRs at once; images of noise never reach the PSNR at which a fit stops early."""
    import torch

    from ngcore.data.inrs.siren import fit_sirens, initialize

    images = torch.rand(NUM_FITS, 28, 28)
    initial = initialize(range(NUM_FITS))
    return Workload(
        lambda: fit_sirens(images, initial, steps=FIT_STEPS, learning_rate=FIT_LEARNING_RATE, compiled=True),
        NUM_FITS * FIT_STEPS,
    )


def plain_inr_fit() -> Workload:
    """One INR after the other, so that a single one tells the speed."""
    import torch

    from ngcore.reference.inr import Siren, fit_one

    image, initial = torch.rand(28, 28), Siren().state_dict()
    return Workload(
        lambda: fit_one(image, SINGLE_FIT_STEPS, FIT_LEARNING_RATE, initial),
        SINGLE_FIT_STEPS,
    )


def an_epoch(method: str = "none") -> Workload:
    """A whole training epoch with augmentation; of the model that does nothing what the data costs is left."""
    import torch

    from ngcore.data.inrs.augment import Augmentation
    from ngcore.data.inrs.sets import INRSet
    from ngcore.study.step import Step
    from ngcore.study.training import Schedule, train_epoch
    from ngcore.tasks.inr_classification import METHODS, Classification, build_model

    model = idle_model() if method == "none" else build_model(method)
    schedule, micro_batch = Schedule(epochs=1, batch=16), 0 if method == "none" else METHODS[method].micro_batch
    inrs = INRSet(
        random_networks(EPOCH_SIZE).state_dict(),
        random_labels(EPOCH_SIZE),
        torch.arange(EPOCH_SIZE),
        torch.zeros(EPOCH_SIZE),
    )
    problem, optimizer = Classification(model, {"train": inrs}, Augmentation()), adamw(model)
    step = Step(problem, schedule, optimizer, micro_batch)
    return Workload(lambda: train_epoch(step, 0, 0), EPOCH_SIZE)


def idle_model() -> nn.Module:
    """A classifier that reads nothing."""
    import torch
    from torch import nn

    class Idle(nn.Module):
        wiring = inr_wiring()

        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.zeros(NUM_CLASSES))

        def fit_normalization(self, graph: NeuralGraph) -> None:
            pass

        def forward(self, graph: NeuralGraph) -> Tensor:
            return self.scores.expand(graph.num_networks, -1)

    return Idle()


def graph_model_row(
    model: str,
    precision: Precision,
    ours: Callable[[Precision], Workload],
    reference: Callable[[], Workload],
) -> Benchmark:
    name = f"{model} {precision} (reference float32, batch {REFERENCE_BATCH})"
    check = partial(check_classifier, model, precision)
    return Benchmark(name, "networks/s", partial(ours, precision), reference, check=check)


def editing_row(model: str, ours: Callable[[], Workload], reference: Callable[[], Workload]) -> Benchmark:
    name = f"{model} editing float32 (reference batch {REFERENCE_BATCH})"
    check = partial(check_editor, model)
    return Benchmark(name, "networks/s", ours, reference, repetitions=EDITING_REPETITIONS, check=check)


def data_row(model: str, reference: Callable[[], Workload]) -> Benchmark:
    return Benchmark(f"Epoch but for its model (reference: {model})", "networks/s", an_epoch, reference)


BENCHMARKS: dict[str, list[Benchmark]] = {
    "inr_fit": [Benchmark("INR fitting", "INR-steps/s", our_inr_fit, plain_inr_fit, check=check_inr_fit)],
    "models": [
        graph_model_row("NG-GNN", "float32", our_ng_gnn, plain_ng_gnn),
        graph_model_row("NG-T", "float32", our_ng_t, plain_ng_t),
        Benchmark("DWSNet float32", "networks/s", our_dwsnet, plain_dwsnet, check=partial(check_classifier, "DWSNet")),
    ],
    "models_bfloat16": [  # for CPUs that compute in it: elsewhere it is several times slower than float32
        graph_model_row("NG-GNN", "bfloat16", our_ng_gnn, plain_ng_gnn),
        graph_model_row("NG-T", "bfloat16", our_ng_t, plain_ng_t),
    ],
    "models_editing": [
        editing_row("NG-GNN", our_editing_ng_gnn, plain_editing_ng_gnn),
        editing_row("NG-T", our_editing_ng_t, plain_editing_ng_t),
        Benchmark("DWSNet editing float32", "networks/s", our_editing_dwsnet, None),
        Benchmark("NFN_HNP editing float32", "networks/s", our_editing_nfn, None),
    ],
    "epoch": [data_row("NG-GNN", partial(an_epoch, "NG-GNN")), data_row("DWSNet", partial(an_epoch, "DWSNet"))],
    "graph": GRAPH_ROWS,
    "zoo": ZOO_ROWS,
    "l2o": L2O_ROWS,
}
NOTES = {"epoch": EPOCH_NOTE, "graph": GRAPH_NOTE, "l2o": L2O_NOTE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks of one name, print a line each as they end, and optionally write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m ngcore.bench", description=SUMMARY)
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as a list of objects")
    parser.add_argument("--device", default="cpu", help="with `models`: cuda, for speed as a share of the GPU's peak")
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        if options.name != "models" or options.json is not None:
            parser.error("--device is for `models` alone, and writes no file")
        return 1 if any(row.wrong for row in measure_device(options.device)) else 0
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
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    # workers look the workloads up by module name, and no process but this one knows them as "__main__"
    from ngcore.bench.__main__ import main as importable_main

    sys.exit(importable_main())
