"""Fixtures that several test files share."""

import hypothesis
import pytest
import torch
from examples import examples

from ngcore.graph import NeuralGraph, Wiring

hypothesis.settings.register_profile("suite", examples(20))
hypothesis.settings.load_profile("suite")


class TorchRandom:
    """torch's global generator as hypothesis takes it: seeded for every example, so that each can be repeated."""

    seed, getstate, setstate = map(staticmethod, (torch.manual_seed, torch.get_rng_state, torch.set_rng_state))


TORCH_RANDOM = TorchRandom()
hypothesis.register_random(TORCH_RANDOM)


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


@pytest.fixture(scope="session")
def study_cache(tmp_path_factory, worker_id):
    """Where the tests that run the study keep its runs: each is made once, whichever test and worker asks first."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "study_cache"
