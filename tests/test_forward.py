"""Many networks run at once, on many points: equal to each module by itself, neuron by neuron."""

from contextlib import contextmanager

import pytest
import torch
from cnns import architectures
from hypothesis import HealthCheck, given, settings
from properties import randomized
from test_simulate import Attention, Branches, ClassToken, FixedMatrix, InPlace, Residual, ResNetBlock
from torch import nn
from torch.func import functional_call

from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.graph import cnn, mlp, trace
from ngcore.graph.forward import activations, outputs

few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
close = {"rtol": 1e-12, "atol": 1e-12}


@contextmanager
def no_loops():
    """vmap may not run an operator network by network."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def batch_of(module, example, count=3):
    """A graph of several random networks of an architecture, and their state dicts."""
    wiring = trace(randomized(module), example)
    states = [{k: v.clone() for k, v in randomized(module, seed).state_dict().items()} for seed in range(count)]
    return wiring.graph({name: torch.stack([state[name] for state in states]) for name in states[0]}), states


def run_by_itself(module, states, points):
    return torch.stack([functional_call(module, state, (points,)) for state in states])


class Sine(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return torch.sin(self.factor * x)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3), nn.Sequential(ResNetBlock(), ResNetBlock())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def inr(between, inputs=2):
    return nn.Sequential(nn.Linear(inputs, 4), between, nn.Linear(4, 3), between, nn.Linear(3, 1))


NETWORKS = {
    "MLP": (inr(nn.GELU()), (5, 2), (7, 2)),
    "MLP, one point": (inr(nn.ReLU()), (2,), (4, 2)),
    "SIREN": (inr(Sine(30)), (5, 2), (12, 2)),
    "SIREN of factor 7": (inr(Sine(7.0)), (5, 2), (3, 2)),
    "INR on a grid": (inr(Sine(30)), (3, 5, 2), (16, 2)),
    "flattened images": (nn.Sequential(nn.Flatten(), inr(nn.Tanh(), 12)), (2, 3, 2, 2), (5, 3, 2, 2)),
    "ResNet": (ResNet(), (2, 3, 15, 15), (5, 3, 15, 15)),
    "in place": (InPlace(), (2, 3, 7, 7), (3, 3, 7, 7)),
    "branches": (Branches(), (2, 3, 7, 9), (3, 3, 7, 9)),
    "fixed matrix": (FixedMatrix(), (5, 3), (6, 3)),
    "residual": (Residual(4, 2, nn.BatchNorm1d, joined=True), (4, 3), (7, 3)),
    "attention": (Attention(8, 2), (3, 5, 8), (4, 5, 8)),
    "transformer": (nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (3, 5, 8), (4, 5, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_is_every_module_by_itself(name):
    torch.manual_seed(0)
    module, example, shape = NETWORKS[name]
    graph, states = batch_of(module, normal(*example))
    points = normal(*shape)
    with no_loops():
        found, neurons = outputs(graph, points), activations(graph, points)
    torch.testing.assert_close(found, run_by_itself(module, states, points), **close)
    groups = graph.wiring.groups
    assert [x.shape for x in neurons] == [(3, group.size, len(points)) for group in groups]
    last = torch.cat([x for x, group in zip(neurons, groups, strict=True) if group.role == "output"], 1)
    averaged = found if found.dim() == 3 else found.mean(2)  # over a sequence's positions
    torch.testing.assert_close(last.mT, averaged, **close)


@few
@given(architectures())
def test_cnns_of_many_architectures(architecture):
    module = CNN(Architecture(**architecture))
    graph, states = batch_of(module, normal(2, 3, 33, 33), 2)
    points = normal(3, 3, 33, 33)
    with no_loops():
        torch.testing.assert_close(outputs(graph, points), run_by_itself(module, states, points), **close)


@pytest.mark.parametrize("pool", [1, 2])
def test_neurons_of_a_cnn_hold_what_its_layers_pass_on(pool):
    """Against the layers' own values: each convolution's after its activation, averaged, and the flattened pixels."""
    a = Architecture((1, 4, 2, 5), (3, 1, 3), (1, 1, 1), (1, 0, 1), ("relu", "tanh", "gelu"), (-1, -1, 0), 3, pool)
    module = CNN(a)
    graph, states = batch_of(module, normal(2, 1, 6, 6))
    points = normal(5, 1, 6, 6)
    found = activations(graph, points)
    for n, state in enumerate(states):
        module.load_state_dict(state)
        x, layers = points, []
        for layer, earlier, function in zip(module.layers, a.residual, ("relu", "tanh", "gelu"), strict=True):
            x = layer(x)
            if earlier == 0:
                x = torch.cat([x[:, :4] + layers[0], x[:, 4:]], 1)
            x = getattr(torch if function != "gelu" else nn.functional, function)(x)
            layers.append(x)
        pooled = nn.functional.adaptive_avg_pool2d(x, pool).flatten(1)
        expected = [points.mean((2, 3)), *(x.mean((2, 3)) for x in layers)]
        expected += ([pooled] if pool > 1 else []) + [module.fc(pooled)]
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own[n].T, other, **close)


def test_copies_hold_functions_of_sums_and_originals_the_sums():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 3), nn.Linear(6, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(torch.cat([torch.sin(x), x * torch.sigmoid(x)], -1))

    module = Fourier()
    graph, states = batch_of(module, normal(4, 2))
    points = normal(6, 2)
    found = activations(graph, points)
    assert [group.activation for group in graph.wiring.groups[1:4]] == ["identity", "sine", "silu"]
    for n, state in enumerate(states):
        sums = nn.functional.linear(points, state["first.weight"], state["first.bias"])
        for own, other in zip(found[1:4], (sums, sums.sin(), nn.functional.silu(sums)), strict=True):
            torch.testing.assert_close(own[n].T, other, **close)


def test_by_names_and_by_steps_are_the_same():
    traced, states = batch_of(inr(Sine(30)), normal(4, 2))
    names = {"0": "layers.0", "2": "layers.1", "4": "layers.2"}
    renamed = {f"{names[k[0]]}{k[1:]}": torch.stack([state[k] for state in states]) for k in states[0]}
    points = normal(9, 2)
    written = mlp([2, 4, 3, 1], "siren").graph(renamed)
    for one, other in zip(activations(traced, points), activations(written, points), strict=True):
        torch.testing.assert_close(one, other, **close)
    torch.testing.assert_close(outputs(traced, points), outputs(written, points), **close)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_batch_axes(batch):
    module = ResNet()
    graph, states = batch_of(module, normal(2, 3, 11, 11), 6)
    points = normal(3, 3, 11, 11)
    expected = run_by_itself(module, states, points)
    state = {name: values.unflatten(0, batch) if batch else values[0] for name, values in graph.state_dict().items()}
    found = outputs(graph.wiring.graph(state), points)
    torch.testing.assert_close(found, expected.unflatten(0, batch) if batch else expected[0], **close)


@pytest.mark.parametrize("name", ["SIREN", "ResNet"])
def test_gradients_reach_inputs_and_weights(name):
    module, example, shape = NETWORKS[name]
    graph, _ = batch_of(module, normal(*example))
    state = {k: v.requires_grad_(k in graph.wiring.shapes) for k, v in graph.state_dict().items()}
    points, weights = normal(*shape).requires_grad_(), list(dict(module.named_parameters()))
    neurons = activations(graph.wiring.graph(state), points)
    target = outputs(graph.wiring.graph(state), points).square().sum() + neurons[-1].sum()
    found = torch.autograd.grad(target, [points, *(state[w] for w in weights)])
    own = {k: v.detach().requires_grad_(k in graph.wiring.shapes) for k, v in graph.state_dict().items()}
    expected = torch.stack([functional_call(module, {k: v[n] for k, v in own.items()}, (points,)) for n in range(3)])
    wanted = torch.autograd.grad(expected.square().sum() + expected.sum(), [points, *(own[w] for w in weights)])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_network_of_several_outputs_returns_all():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.one(x), self.two(x)

    graph, states = batch_of(Two(), normal(4, 3))
    points = normal(5, 3)
    for found, name in zip(outputs(graph, points), ("one", "two"), strict=True):
        for n, state in enumerate(states):
            expected = nn.functional.linear(points, state[f"{name}.weight"], state[f"{name}.bias"])
            torch.testing.assert_close(found[n], expected, **close)


def test_what_can_not_be_run_is_named(random_graph):
    with pytest.raises(ValueError, match=r"layers.0.weight is a convolution block: read the wiring with `trace"):
        activations(random_graph(cnn((3, 4), (3,), ("relu",), (-1,), 2)), normal(2, 3))
    graph, _ = batch_of(inr(nn.Tanh()), normal(4, 2))
    with pytest.raises(ValueError, match=r"inputs have shape \(5, 3\); the wiring needs \(points, 2\)"):
        outputs(graph, normal(5, 3))
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    tokens = trace(module, torch.randint(5, (2, 4))).graph({k: v[None] for k, v in module.state_dict().items()})
    with pytest.raises(ValueError, match=r"steps do not run on points of numbers: .*indices"):
        outputs(tokens, normal(2, 4))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, y):
            return self.layer(x + y)

    module = Two().double()
    two = trace(module, normal(4, 3), normal(4, 3)).graph({k: v[None] for k, v in module.state_dict().items()})
    with pytest.raises(ValueError, match="networks of one input are run on many points, this one has 2"):
        activations(two, normal(4, 3))


def test_what_has_no_activations_is_named():
    graph, states = batch_of(ClassToken(), normal(2, 4, 3))
    points = normal(3, 4, 3)
    torch.testing.assert_close(outputs(graph, points), run_by_itself(ClassToken().double(), states, points), **close)
    with pytest.raises(ValueError, match=r"hidden neurons of 'end' .* have no value of their own"):
        activations(graph, points)


def test_running_statistics_have_to_be_bound():
    graph, _ = batch_of(ResNet(), normal(2, 3, 11, 11))
    without = {name: values for name, values in graph.state_dict().items() if "running_var" not in name}
    with pytest.raises(ValueError, match=r"the graph lacks blocks.0.norms.0.running_var"):
        outputs(graph.wiring.graph(without), normal(2, 3, 11, 11))
