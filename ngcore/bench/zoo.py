"""Workloads of `python -m ngcore.bench zoo`: training the CNNs of the Small CNN Zoo.

Ours is what the generator of a zoo does on two cores: two processes of one thread each, each training groups of
networks. The harness's own worker is one of them and starts the other; the memory that it tells is its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ngcore.bench.harness import Benchmark, Workload

if TYPE_CHECKING:
    from torch import Tensor

NUM_IMAGES = 5_000  # as many as the embedded subset of CIFAR-10 has
GROUP = 4  # networks per tensor program
BATCH = 32
STEPS = 256
PLAIN_STEPS = 30  # of one network by each optimizer


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

    from ngcore.data import small_zoo

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

    from ngcore.bench.plain_zoo import OPTIMIZERS, SmallCNN, train_one
    from ngcore.data.small_zoo import Draw

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


ZOO_ROWS = [
    Benchmark(
        f"Small CNN Zoo, {activation}, batch {BATCH} (reference on {threads} of 2 cores)",
        "images/s",
        partial(our_training, activation),
        partial(plain_training, activation, threads),
    )
    # at this batch size a second thread helps little, and it waits for long where other work keeps a core busy
    for activation, threads in (("relu", 1), ("tanh", 1), ("relu", 2))
]

if __name__ == "__main__":
    serve(sys.argv[1])
