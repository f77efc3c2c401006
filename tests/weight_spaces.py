"""Small networks for the tests of models that read chains of layers."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring, mlp, trace


class CNN(nn.Module):
    """Convolutions with ReLU, global average pooling, a linear layer: the form of the Small CNN Zoo."""

    def __init__(self, channels: Sequence[int], classes: int, kernel: tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(*pair, kernel, stride) for pair in pairwise(channels))
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        for conv in self.convs:
            images = torch.relu(conv(images))
        return self.head(images.mean((2, 3)))


@cache
def cnn(channels: tuple[int, ...], classes: int, kernel: tuple[int, int], stride: int = 1) -> Wiring:
    return trace(CNN(channels, classes, kernel, stride), torch.randn(2, channels[0], 31, 31))


@cache
def partly_biased(sizes: tuple[int, ...], biased: tuple[int, ...]) -> Wiring:
    """An MLP of which only these layers have biases."""
    layers = [nn.Linear(*pair, bias=i in biased) for i, pair in enumerate(pairwise(sizes))]
    return trace(nn.Sequential(*layers), torch.randn(3, sizes[0]))


def name_of(wiring: Wiring) -> str:
    """Layer sizes with kernels, "u" after layers without bias: what test cases are called."""
    names = [str(wiring.groups[0].size)]
    for block in wiring.blocks:
        target = wiring.groups[block.target]
        kernel = "k" + "x".join(map(str, block.kernel)) if block.kernel else ""
        names.append(f"{kernel}-{target.size}{'' if target.bias else 'u'}")
    return "".join(names)


CNNS = [((1, 3, 2), 2, (3, 3)), ((2, 3), 2, (2, 1)), ((1, 2, 3, 2), 3, (2, 2))]
ARCHITECTURES = st.lists(st.integers(1, 4), min_size=2, max_size=5) | st.sampled_from(CNNS)


def wiring_of(architecture: list[int] | tuple) -> Wiring:
    """Of one of ARCHITECTURES: layer sizes of an MLP, or the arguments of `cnn`."""
    return mlp(architecture) if isinstance(architecture, list) else cnn(*architecture)


def random_graph(wiring: Wiring, count: int, width: int = 1) -> NeuralGraph:
    """Random networks in float64 with `width` channels per scalar; neurons without bias have zeros."""
    graph = wiring.graph({name: torch.zeros(count, *shape).double() for name, shape in wiring.shapes.items()})
    graph = graph.map(lambda x: torch.randn(*x.shape[:-1], width * x.shape[-1], dtype=torch.float64))
    biased = (group.bias is not None for group in wiring.groups)
    return NeuralGraph(wiring, tuple(x * own for x, own in zip(graph.nodes, biased, strict=True)), graph.edges)


def assert_same_graph(found: NeuralGraph, expected: NeuralGraph, tolerance: float = 1e-9) -> None:
    assert found.wiring == expected.wiring
    for ours, theirs in zip(found.nodes + found.edges, expected.nodes + expected.edges, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
