"""Workloads of `python -m ngcore.bench zoo`: training small CNNs, and metanetworks that read those of the Wild Park.

The generator of a zoo runs two processes of one thread each on two cores, each training groups of networks. The
harness's own worker is one of them and starts the other; the memory that it tells is its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ngcore.bench.harness import Benchmark, Workload

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ngcore.graph import NeuralGraph

NUM_IMAGES = 5_000  # as many as the embedded subset of CIFAR-10 has
GROUP = 4  # networks per tensor program
BATCH = 32
STEPS = 256
PLAIN_STEPS = 30  # of one network by each optimizer
PARK_BATCHES = 2  # of 32 networks, each of an architecture of its own


def our_training(activation: str) -> Workload:
    """One group in this process and one in another, at the same time."""
    train = group_training(activation)
    command = [sys.executable, "-m", "ngcore.bench.zoo", activation]
    # it ends with this process, whose end of its standard input closes then
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run() -> None:
        other.stdin.write(b"\n")
        other.stdin.flush()
        train()
        if not other.stdout.readline():
            raise RuntimeError("the other process died; its own error is above")

    return Workload(run, 2 * GROUP * BATCH * STEPS)


def group_training(activation: str) -> Callable[[], object]:
    """Training one group, in a process of one thread from now on."""
    import torch

    from ngcore.data.zoos import small_zoo

    torch.set_num_threads(1)
    images, labels = random_images()
    draws = [small_zoo.draw(0, index) for index in range(GROUP)]
    return partial(
        small_zoo.train, images, labels, draws, activation, range(GROUP), steps=STEPS, batch=BATCH, compiled=True
    )


def serve(activation: str) -> None:
    """The other process: train a group for every line that comes in, and answer with a line."""
    train = group_training(activation)
    for _ in sys.stdin:
        train()
        print(flush=True)


def plain_training(activation: str, threads: int) -> Workload:
    """One network after the other, by each optimizer in turn."""
    import torch

    from ngcore.data.zoos.small_zoo import Draw
    from ngcore.reference.zoo import OPTIMIZERS, SmallCNN, train_one

    torch.set_num_threads(threads)
    images, labels = random_images()
    draws = [Draw(optimizer, 1e-3, "he_normal", 1.0, 1e-4, 0.3, 1.0) for optimizer in OPTIMIZERS]

    def run() -> None:
        for draw in draws:
            batches = (torch.randint(NUM_IMAGES, (BATCH,)) for _ in range(PLAIN_STEPS))
            train_one(SmallCNN(activation, draw.dropout), images, labels, batches, draw)

    return Workload(run, len(draws) * PLAIN_STEPS * BATCH)


def random_images() -> tuple[Tensor, Tensor]:
    """Images of noise, (n, 32, 32), and labels; the time of a step does not depend on them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(NUM_IMAGES, 32, 32, generator=generator)
    return images, torch.randint(10, (NUM_IMAGES,), generator=generator)


def park_graphs() -> list[NeuralGraph]:
    """Graphs of randomly initialized Wild Park CNNs, one of every run's architecture."""
    import torch

    from ngcore.data.zoos.cnn import CNN
    from ngcore.data.zoos.wild_park import draw_architecture
    from ngcore.tasks.zoos import wiring_of

    torch.manual_seed(0)
    architectures = [draw_architecture(0, run) for run in range(PARK_BATCHES * BATCH)]
    return [
        wiring_of(architecture).graph({name: values[None] for name, values in CNN(architecture).state_dict().items()})
        for architecture in architectures
    ]


def our_park(method: str) -> Workload:
    """Training steps on networks of many architectures; putting their batches together is part of them."""
    import torch

    from ngcore.graph.collection import Collection
    from ngcore.models import CNN_WIDTHS, NGGNN, NGT, Scores
    from ngcore.tasks.generalization import METHODS, OPTIONS

    networks = Collection(park_graphs())
    rows = torch.arange(len(networks))
    if method == "NG-T":
        model = NGT(networks, Scores(), widths=CNN_WIDTHS, **OPTIONS)
    else:
        model = NGGNN(networks, Scores(), **OPTIONS)
    model.fit_normalization(networks, rows)
    batches = [own[networks.sizes[own].argsort()] for own in rows.split(BATCH)]
    return park_training(
        model,
        [
            [partial(networks.__getitem__, some) for some in own.split(METHODS[method].chunk or BATCH)]
            for own in batches
        ],
    )


def plain_park(method: str) -> Workload:
    """The same with torch_geometric; its batches are put together beforehand."""
    import torch

    from ngcore.graph.frame import Frame
    from ngcore.models import CNN_WIDTHS, Scores
    from ngcore.reference.encoder import to_batch
    from ngcore.reference.ng_gnn import PlainNGGNN
    from ngcore.reference.ng_t import PlainNGT
    from ngcore.tasks.generalization import OPTIONS

    torch.manual_seed(0)
    graphs = park_graphs()
    frame = Frame.of({graph.wiring for graph in graphs})
    parts = [graphs[first : first + BATCH] for first in range(0, len(graphs), BATCH)]
    if method == "NG-T":  # one network after the other
        batches = [[to_batch([graph], frame) for graph in part] for part in parts]
        model = PlainNGT(frame, Scores(), widths=CNN_WIDTHS, **OPTIONS)
    else:
        batches = [to_batch(part, frame) for part in parts]
        model = PlainNGGNN(frame, Scores(), **OPTIONS)
    return park_training(model, [[lambda batch=batch: batch] for batch in batches])


def park_training(model: nn.Module, batches: list[list[Callable[[], object]]]) -> Workload:
    """A training step per batch, whose parts are read one after the other."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-4, amsgrad=True)

    def run() -> None:
        for parts in batches:
            optimizer.zero_grad()
            for part in parts:
                scores = model(part())
                F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, 0.3), reduction="sum").backward()
            optimizer.step()

    return Workload(run, len(batches) * BATCH)


ZOO_ROWS = [
    Benchmark(
        f"Small CNN Zoo, {activation}, batch {BATCH} (reference on {threads} of 2 cores)",
        "images/s",
        partial(our_training, activation),
        partial(plain_training, activation, threads),
    )
    # at this batch size a second thread helps little, and it waits for long where other work keeps a core busy
    for activation, threads in (("relu", 1), ("tanh", 1), ("relu", 2))
] + [
    Benchmark(f"{method} on Wild Park CNNs", "networks/s", partial(our_park, method), partial(plain_park, method))
    for method in ("NG-GNN", "NG-T")
]

if __name__ == "__main__":
    serve(sys.argv[1])
