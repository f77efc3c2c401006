"""Signs of neurons: the canonical form is the same function, and the same for all signs that a network may have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ngcore.graph import mlp, trace
from ngcore.graph.forward import activations
from ngcore.models.signs import canonical_signs
from ngcore.tasks.inr_classification import build_model
from ngcore.tasks.inr_sets import WIRING

sizes = st.lists(st.integers(1, 6), min_size=3, max_size=5)


def random_state(wiring, seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(count, *shape, dtype=torch.float64, generator=generator)
        for name, shape in wiring.shapes.items()
    }


def negated(state, seed):
    """The same functions: some hidden neurons with their biases, incoming and outgoing weights negated, one by one."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: values.clone() for name, values in state.items()}
    for layer in range(len(state) // 2 - 1):
        for network, row in enumerate(torch.rand(state[f"layers.{layer}.bias"].shape, generator=generator) < 0.5):
            for neuron in row.nonzero().flatten().tolist():
                state[f"layers.{layer}.weight"][network, neuron] *= -1
                state[f"layers.{layer}.bias"][network, neuron] *= -1
                state[f"layers.{layer + 1}.weight"][network, :, neuron] *= -1
    return state


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from(["siren", "tanh"]), st.integers(0, 2**31))
def test_the_canonical_form_is_the_same_function_whatever_the_signs(sizes, activation, seed):
    wiring = mlp(tuple(sizes), activation)
    state = random_state(wiring, seed)
    graph, twin = wiring.graph(state), wiring.graph(negated(state, seed + 1))
    canonical, of_twin = canonical_signs(graph), canonical_signs(twin)
    assert all((canonical.nodes[g] >= 0).all() for g in wiring.with_role("hidden"))
    for one, other in zip((*canonical.nodes, *canonical.edges), (*of_twin.nodes, *of_twin.edges), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    points = torch.linspace(-1, 1, 5 * sizes[0], dtype=torch.float64).view(5, sizes[0])
    outputs = [activations(g, points)[-1] for g in (graph, twin, canonical)]
    for found in outputs[1:]:
        torch.testing.assert_close(found, outputs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "probes"), [("MLP", 0), ("DWSNet", 0), ("NG-GNN", 4), ("NG-T", 0)])
def test_a_model_of_canonical_signs_does_not_see_them_and_the_others_do(method, probes):
    state = random_state(WIRING, 0)
    graph, twin = WIRING.graph(state), WIRING.graph(negated(state, 1))
    for signs, same in (("canonical", True), ("fitted", False)):
        torch.manual_seed(0)
        model = build_model(method, probes, signs=signs).double().eval()
        model.fit_normalization(graph)
        with torch.no_grad():
            assert torch.allclose(model(graph), model(twin), rtol=0, atol=1e-9) == same


def test_what_has_no_canonical_sign_is_an_error():
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    traced = trace(network, torch.randn(5, 2))
    with pytest.raises(ValueError, match="canonical signs are of MLPs"):
        canonical_signs(traced.graph(random_state(traced, 0)))
    wiring = mlp((2, 3, 1), "relu")
    with pytest.raises(ValueError, match="activation relu"):
        canonical_signs(wiring.graph(random_state(wiring, 0)))
    with pytest.raises(ValueError, match="signs is one of fitted, canonical, not 'positive'"):
        build_model("NG-GNN", signs="positive")
