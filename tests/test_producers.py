"""The wirings that are written down without tracing are those that tracing finds, field by field."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from cnns import architectures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ngcore.activations import ACTIVATIONS, function_of
from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.graph import cnn, mlp, trace

few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


class MLP(nn.Module):
    """Linear layers with a function of the table between them."""

    def __init__(self, sizes, activation):
        super().__init__()
        self.layers, self.function = (
            nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes)),
            function_of(activation),
        )

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.function(layer(x))
        return self.layers[-1](x)


def check_equal(written, traced):
    for kind in ("groups", "blocks"):
        own, other = getattr(written, kind), getattr(traced, kind)
        assert len(own) == len(other)
        for i, (one, two) in enumerate(zip(own, other, strict=True)):
            for field in fields(one):
                assert getattr(one, field.name) == getattr(two, field.name), (kind, i, field.name)
    assert written == traced
    assert sorted(written.symmetry.factors, key=str) == sorted(traced.symmetry.factors, key=str)


@few
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
    st.sampled_from([name for name in ACTIVATIONS if name != "celu"]),
)
def test_mlps(sizes, activation):
    check_equal(mlp(sizes, activation), trace(MLP(sizes, activation), torch.randn(3, sizes[0])))


@few
@given(architectures(), st.integers(1, 3))
def test_cnns(architecture, pool):
    a = Architecture(**architecture, pool=pool)
    written = cnn(a.channels, a.kernel_size, a.activation, a.residual, a.classes, a.pool)
    check_equal(written, trace(CNN(a), torch.randn(2, 3, 33, 33)))


@pytest.mark.parametrize("channels", [(4, 2, 4), (4, 2, 6), (6, 2, 4), (1, 2, 4), (4, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("pool", [1, 2])
def test_skips_between_unequal_channels(channels, pool):
    a = Architecture((3, *channels), (3, 1, 3), (1, 1, 1), (1, 0, 1), ("relu", "tanh", "gelu"), (-1, -1, 0), 2, pool)
    written = cnn(a.channels, a.kernel_size, a.activation, a.residual, a.classes, a.pool)
    check_equal(written, trace(CNN(a), torch.randn(2, 3, 9, 9)))
