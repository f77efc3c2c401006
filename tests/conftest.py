"""Fixtures that several test files share."""

import pytest
import torch

from ngcore.graph import NeuralGraph, Wiring


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def random_graph(generator):
    """(wiring, count) -> a batch of random networks in float64."""

    def make(wiring: Wiring, count: int = 4) -> NeuralGraph:
        state = {
            name: 0.3 * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
            for name, shape in wiring.shapes.items()
        }
        return wiring.graph(state)

    return make
