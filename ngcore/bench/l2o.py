"""What a step of every optimizer costs, beside the network's own forward and backward pass; see
`ngcore.bench.__main__`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ngcore.bench.harness import SECONDS, Benchmark, Workload

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 128
REPETITIONS = 15
METHODS = ("Adam", "FF", "LSTM", "NFN", "NG-GNN", "NG-T")
TASKS = {"FashionMNIST": ((1, 28, 28), (16, 32, 32)), "CIFAR-10": ((3, 32, 32), (32, 64, 64))}  # image, channels

L2O_NOTE = (
    "Seconds of a step. ours: the optimizer's; reference: the network's forward and backward pass, batch 128. "
    "Ratio 1: the optimizer costs as much as the network itself; the aim is 0.5 or more for NG-GNN on CIFAR-10."
)


def network_and_batch(task: str) -> tuple[nn.Module, Tensor, Tensor]:
    import torch

    from ngcore.tasks.optimization import task_cnn

    image, channels = TASKS[task]
    torch.manual_seed(0)
    network = task_cnn(image[0], channels, "relu")
    return network, torch.randn(BATCH, *image), torch.randint(10, (BATCH,))


def backward(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    import torch.nn.functional as F

    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()


def step(task: str, method: str) -> Workload:
    import torch

    from ngcore.models.optimizers import LearnedOptimizer

    network, images, labels = network_and_batch(task)
    backward(network, images, labels)
    optimizer = (
        torch.optim.Adam(network.parameters())
        if method == "Adam"
        else LearnedOptimizer(method).bind(network, images[:1])
    )
    return Workload(optimizer.step, 1)


def passes(task: str) -> Workload:
    network, images, labels = network_and_batch(task)
    return Workload(partial(backward, network, images, labels), 1)


L2O_ROWS = [
    Benchmark(
        f"{method}, {task} network",
        SECONDS,
        partial(step, task, method),
        partial(passes, task),
        repetitions=REPETITIONS,
    )
    for task in TASKS
    for method in METHODS
]
