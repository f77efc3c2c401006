"""Signs of neurons: the canonical form is the same function, and the same for all signs that a network may have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import randomized
from torch import nn

from ngcore.graph import mlp, trace
from ngcore.graph.forward import activations, outputs
from ngcore.models.signs import canonical_signs, negated
from ngcore.tasks.inr_classification import build_model
from ngcore.tasks.inr_sets import WIRING

sizes = st.lists(st.integers(1, 6), min_size=3, max_size=5)


def random_state(wiring, seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(count, *shape, dtype=torch.float64, generator=generator)
        for name, shape in wiring.shapes.items()
    }


def with_signs(state, seed):
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
    graph, twin = wiring.graph(state), wiring.graph(with_signs(state, seed + 1))
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
    graph, twin = WIRING.graph(state), WIRING.graph(with_signs(state, 1))
    for signs, same in (("canonical", True), ("fitted", False)):
        torch.manual_seed(0)
        model = build_model(method, probes, signs=signs).double().eval()
        model.fit_normalization(graph)
        with torch.no_grad():
            assert torch.allclose(model(graph), model(twin), rtol=0, atol=1e-9) == same


class Layers(nn.Module):
    """A function of a few layers."""

    def __init__(self, compute, **layers):
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.compute(self, x)


def layers(compute):
    return Layers(compute, a=nn.Linear(2, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 1))


def convolutions(compute):
    parts = {"a": nn.Conv2d(2, 4, 3), "b": nn.Conv2d(4, 6, 3, groups=2, padding=1), "norm": nn.BatchNorm2d(4)}
    return Layers(compute, **parts, c=nn.Linear(24, 5), d=nn.Linear(5, 3))


def cnn(net, x):
    x = nn.functional.avg_pool2d(torch.sin(7 * net.a(x)), 2)
    x = nn.functional.adaptive_avg_pool2d(torch.tanh(net.b(x)), 2)
    return net.d(nn.functional.softsign(net.c(x.flatten(1))))


PASS = {
    "MLP": (layers(lambda net, x: net.c(torch.erf(net.b(torch.tanh(net.a(x)))))), (5, 2)),
    "SIREN of factor 5": (layers(lambda net, x: net.c(torch.sin(5 * net.a(x)))), (5, 2)),
    "two layers as one": (layers(lambda net, x: net.c(torch.cat([(y := net.a(x))[:, :2], net.b(y).sin()[:, 2:]], 1))),
                          (5, 2)),
    "CNN": (convolutions(cnn), (2, 2, 10, 10)),
}  # fmt: skip
LOST = {
    "aten.relu": (layers(lambda net, x: net.c(torch.relu(net.a(x)))), (5, 2)),
    "aten.cos": (layers(lambda net, x: net.c(torch.cos(net.a(x)))), (5, 2)),
    "aten.add": (layers(lambda net, x: net.c(torch.tanh(net.b(y := net.a(x).tanh()) + y))), (5, 2)),
    "aten.softmax": (layers(lambda net, x: net.c(torch.softmax(net.a(x), -1))), (5, 2)),
    "aten.max_pool2d": (convolutions(lambda net, x: net.b(nn.functional.max_pool2d(net.a(x), 2))), (2, 2, 10, 10)),
    "in 'norm'": (convolutions(lambda net, x: net.b(torch.tanh(net.norm(net.a(x))))), (2, 2, 10, 10)),
}


@pytest.mark.parametrize("name", PASS)
def test_canonical_signs_keep_the_outputs_of_traced_networks(name):
    module, shape = PASS[name]
    wiring = trace(randomized(module), torch.randn(shape, dtype=torch.float64))
    state = random_state(wiring, 0)
    graph = wiring.graph(state)
    canonical, points = canonical_signs(graph), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(outputs(canonical, points), outputs(graph, points), rtol=1e-9, atol=1e-9)
    biased = [g for g in wiring.with_role("hidden") if wiring.groups[g].bias]
    assert all((canonical.nodes[g] >= 0).all() and (graph.nodes[g] < 0).any() for g in biased)
    signs = {g: torch.randn(3, group.size, 1).sign().double() for g, group in enumerate(wiring.groups)}
    again = canonical_signs(negated(graph, signs))
    assert any(not torch.equal(a, b) for a, b in zip(negated(graph, signs).edges, graph.edges, strict=True))
    for one, other in zip((*canonical.nodes, *canonical.edges), (*again.nodes, *again.edges), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOST)
def test_where_signs_are_lost_is_named(name):
    module, shape = LOST[name]
    wiring = trace(randomized(module), torch.randn(shape, dtype=torch.float64))
    graph = wiring.graph({key: values[None] for key, values in module.state_dict().items()})
    with pytest.raises(ValueError, match=name):
        canonical_signs(graph)


def test_what_has_no_canonical_sign_is_an_error():
    wiring = mlp((2, 3, 1), "relu")
    with pytest.raises(ValueError, match="activation relu"):
        canonical_signs(wiring.graph(random_state(wiring, 0)))
    with pytest.raises(ValueError, match="signs is one of fitted, canonical, not 'positive'"):
        build_model("NG-GNN", signs="positive")
