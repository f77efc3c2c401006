"""Small networks of many architectures, and random ones that tests draw."""

import torch
from hypothesis import strategies as st
from torch import nn

from ngcore.data.zoos.cnn import ACTIVATIONS
from ngcore.graph.architectures import cnn

INPUTS = 3
RESIDUAL = cnn((3, 4, 2, 5), (3, 1, 5), ("relu", "tanh", "gelu"), (-1, -1, 0), 2)
SHALLOW = cnn((3, 2), (1,), ("sigmoid",), (-1,), 2)


@st.composite
def architectures(draw, classes=2):
    """Arguments of an architecture for images of 33 x 33, which no convolution makes smaller than 3 x 3.

    Its own construction is checked at run time by code that draws random numbers.
    """
    layers = draw(st.integers(1, 4))

    def several(values):
        return tuple(draw(st.lists(values, min_size=layers, max_size=layers)))

    stride, kernel_size = several(st.sampled_from([1, 2])), several(st.sampled_from([1, 3, 5, 7]))
    residual = []
    for i in range(layers):  # only images of one size can be added
        same_size = [earlier for earlier in range(i - 1) if set(stride[earlier + 1 : i + 1]) == {1}]
        residual.append(draw(st.sampled_from([-1, *same_size])))
    return dict(
        channels=(INPUTS, *several(st.integers(1, 5))),
        kernel_size=kernel_size,
        stride=stride,
        padding=tuple(k // 2 for k in kernel_size),
        activation=several(st.sampled_from(list(ACTIVATIONS))),
        residual=tuple(residual),
        classes=classes,
    )


def wiring_of(architecture):
    return cnn(
        **{name: architecture[name] for name in ("channels", "kernel_size", "activation", "residual", "classes")}
    )


def random_graphs(wirings, counts, seed=0):
    """For every wiring a batch of random networks in float64, no number of which is 0."""
    generator = torch.Generator().manual_seed(seed)
    return [
        wiring.graph(
            {
                name: 0.2 + 0.3 * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
                for name, shape in wiring.shapes.items()
            }
        )
        for wiring, count in zip(wirings, counts, strict=True)
    ]


class GroupedCNN(nn.Module):
    """Two groups of channels, a normalization, a residual connection to the same neurons."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, (3, 1), groups=2, padding=(1, 0), bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        x = torch.relu(self.norm(self.first(images)))
        return self.head((x + self.second(x)).mean((2, 3)))


class TwoHeads(nn.Module):
    """An MLP with two outputs, whose neurons are not consecutive on the graph."""

    def __init__(self):
        super().__init__()
        self.one, self.body, self.other = nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.one(x), self.other(torch.tanh(self.body(x)))
