"""Activations are known by what they do: the functions through which a traced network's neurons are read."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ngcore.activations import ACTIVATIONS, NAMES
from ngcore.graph import mlp, rule, trace
from ngcore.graph.simulate import simulate
from ngcore.graph.tracing.reader import RULES
from ngcore.graph.tracing.rules import pointwise


class Between(nn.Module):
    """A function of the sums of one Linear, before another."""

    def __init__(self, function, width=4, **buffers):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 4), nn.Linear(width, 2), function
        for name, values in buffers.items():
            self.register_buffer(name, values)

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def example():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def traced(function, width=4, **buffers):
    """The wiring of such a network, on which its forward pass is the network's own."""
    module = Between(function, width, **buffers).double()
    wiring = trace(module, example())
    torch.testing.assert_close(simulate(wiring.graph(module.state_dict()), example()), module(example()))
    return wiring


def activation(function, **buffers):
    wiring = traced(function, **buffers)
    assert len(wiring.groups) == 3
    return wiring.groups[1].activation


def hidden(wiring):
    return [(group.size, group.activation) for group in wiring.groups if group.role == "hidden"]


UNNAMED = {
    "cos(x)": lambda net, x: x.cos(),
    "abs(x)": lambda net, x: x.abs(),
    "exp(x)": lambda net, x: x.exp(),
    "square(x)": lambda net, x: x.square(),
    "exp(neg(pow(x, 2)))": lambda net, x: torch.exp(-(x**2)),
    "special_bessel_j0(x)": lambda net, x: torch.special.bessel_j0(x),
    "sin(mul(x, 5))": lambda net, x: torch.sin(5 * x),
    "leaky_relu(x, 0.2)": lambda net, x: F.leaky_relu(x, 0.2),
    "elu(x, 0.7)": lambda net, x: F.elu(x, 0.7),
    "mul(x, sigmoid(mul(x, 1.702)))": lambda net, x: x * torch.sigmoid(1.702 * x),
    "add(x, relu(x))": lambda net, x: x + torch.relu(x),
    "sub(x, mul(tanh(x), 2), alpha=3)": lambda net, x: torch.sub(x, 2 * torch.tanh(x), alpha=3),
}


@pytest.mark.parametrize("text", UNNAMED)
def test_a_function_without_a_name_is_written_out(text, monkeypatch):
    monkeypatch.setitem(RULES, "aten.special_bessel_j0", None)  # forgotten after the test
    rule("special_bessel_j0")(pointwise)
    assert activation(UNNAMED[text]) == text
    wiring = traced(UNNAMED[text])
    data = wiring.graph(Between(UNNAMED[text]).double().state_dict()).to_data()
    assert {NAMES[i] for i in data.activation[3:7]} == {"other"}


NAMED = {
    "identity": [lambda x: 1.0 * x, lambda x: x + 0, lambda x: x.neg().neg(), lambda x: x.clamp(-1e5, 1e5)],
    "relu": [F.relu, torch.relu_, lambda x: x.clamp(min=0), lambda x: x * (x > 0), lambda x: F.relu(x.neg().neg())],
    "sine": [torch.sin],
    "siren": [lambda x: torch.sin(30 * x), lambda x: torch.sin(x * 30.0)],
    "gelu": [F.gelu, lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
             lambda x: x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))],
    "silu": [F.silu, lambda x: x * torch.sigmoid(x), lambda x: x / (1 + torch.exp(-x))],
    "leaky_relu": [F.leaky_relu, lambda x: torch.where(x > 0, x, 0.01 * x), lambda x: torch.maximum(x, x / 100)],
    "softsign": [F.softsign], "mish": [F.mish, lambda x: x * torch.tanh(F.softplus(x))], "selu": [F.selu],
    "relu6": [F.relu6, lambda x: x.clamp(0, 6)], "hardtanh": [F.hardtanh], "softplus": [F.softplus], "erf": [torch.erf],
    "log_sigmoid": [F.logsigmoid], "elu": [F.elu, F.celu], "hardswish": [F.hardswish], "hardsigmoid": [F.hardsigmoid],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_function_has_one_name_however_it_is_written(name):
    for function in NAMED[name]:
        assert activation(lambda net, x, function=function: function(x)) == name


def test_no_two_names_are_of_one_function():
    x = torch.linspace(-9, 9, 500, dtype=torch.float64)
    values = {name: known.function(x) for name, known in ACTIVATIONS.items()}
    same = {pair for pair in itertools.combinations(values, 2) if torch.allclose(*map(values.get, pair))}
    assert same == {("elu", "celu")}  # with their default arguments


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_odd_functions_are_those_that_change_sign_with_their_argument(name):
    x = torch.linspace(0.1, 9, 500, dtype=torch.float64)
    function, odd, _ = ACTIVATIONS[name]
    assert torch.allclose(function(-x), -function(x)) == odd


def test_a_number_of_the_state_dict_is_written_by_its_name():
    scale = torch.tensor(30.0, dtype=torch.float64)
    assert activation(lambda net, x: torch.sin(net.scale * x), scale=scale) == "sin(mul(scale, x))"
    derived = activation(lambda net, x: torch.sin(x / net.scale.view(1).exp()), scale=scale)
    assert derived == "sin(div(x, exp(view(scale, (1,)))))"
    assert activation(lambda net, x: torch.sin(torch.tensor(30.0).double() * x)) == "siren"


def test_several_functions_of_one_sum_have_neurons_of_their_own():
    fourier = traced(lambda net, x: torch.cat([x.sin(), x.cos()], -1), width=8)
    assert hidden(fourier) == [(4, "identity"), (4, "sine"), (4, "cos(x)")]
    kinds = [(block.source, block.target, block.kind) for block in fourier.blocks]
    assert kinds == [(0, 1, "linear"), (1, 2, "residual"), (1, 3, "residual"), (2, 4, "linear"), (3, 4, "linear")]
    bare = traced(lambda net, x: torch.cat([x, x.relu()], -1), width=8)
    assert hidden(bare) == [(4, "identity"), (4, "relu")]
    once = traced(lambda net, x: torch.cat([x.relu(), x.clamp(min=0), 2 * x], -1), width=12)
    assert hidden(once)[:3] == [(4, "identity"), (4, "relu"), (4, "mul(x, 2)")]


def test_a_gate_is_a_copy_of_half_of_the_neurons():
    gated = traced(lambda net, x: x[:, :2] * torch.sigmoid(x[:, 2:]), width=2)
    assert hidden(gated) == [(4, "identity"), (2, "sigmoid"), (2, "identity")]
    copy = gated.blocks[1]
    assert (copy.kind, copy.groups, copy.source_nodes, copy.target_nodes) == ("residual", 2, range(2, 4), None)


def test_a_function_that_is_read_twice_is_one():
    twice = traced(lambda net, x: net.last(torch.relu(x)) @ net.last.weight + x.clamp(min=0))
    assert hidden(twice)[0] == (4, "relu")


def test_what_only_a_statistic_reads_makes_no_neurons():
    def norm(net, x):
        return torch.tanh(x) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    assert activation(norm) == "tanh"
    assert activation(lambda net, x: torch.relu(F.layer_norm(x, (4,)))) == "relu"
    assert activation(lambda net, x: torch.softmax(x, -1)) == "identity"
    assert activation(lambda net, x: torch.relu(x) * net.mask, mask=torch.tensor([0.0, 1, 1, 0])) == "relu"


def test_functions_of_inputs_are_on_the_input_neurons():
    class Inputs(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.last, self.read = nn.Linear(3, 2), read

        def forward(self, x):
            return self.read(self.last, x)

    once = trace(Inputs(lambda last, x: last(torch.sin(30 * x))).double(), example())
    assert [(group.role, group.activation) for group in once.groups] == [("input", "siren"), ("output", "identity")]
    twice = trace(Inputs(lambda last, x: last(x) + last((x - 0.5) / 0.25)).double(), example())
    assert (twice.groups[0].role, twice.groups[0].activation) == ("input", "identity")
    assert hidden(twice)[0] == (3, "div(sub(x, 0.5), 0.25)")


def test_outputs_have_functions_too():
    probabilities = trace(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()).double(), example())
    assert [(group.role, group.activation) for group in probabilities.groups][1:] == [("output", "sigmoid")]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            x = self.last(x)
            return x, torch.sigmoid(x)

    both = trace(Both().double(), example())
    assert [(group.role, group.activation) for group in both.groups][1:] == [
        ("output", "identity"),
        ("output", "sigmoid"),
    ]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["relu", "cos", "abs", "scale", "skip", "view"]), max_size=5), st.booleans())
def test_any_chain_runs_on_its_graph(chain, both):
    """Whatever is done to sums and however it is read, the simulation is the network."""

    def function(net, x):
        first = x
        for step in chain:
            if step == "scale":
                x = 0.7 * x
            elif step == "skip":
                x = x + first
            elif step == "view":
                x = x.unsqueeze(1).transpose(1, 2).reshape(5, 4)
            else:
                x = getattr(torch, step)(x)
        return torch.cat([x, first], -1) if both else x

    wiring = traced(function, width=8 if both else 4)
    assert len(wiring.groups) >= 3


def test_names_decide_functions_of_wirings_made_by_hand(random_graph):
    points = torch.randn(4, 2, dtype=torch.float64)
    for name, known in ACTIVATIONS.items():
        graph = random_graph(mlp([2, 3, 1], name), 1)[0]
        state = graph.state_dict()
        hidden = known.function(F.linear(points, state["layers.0.weight"], state["layers.0.bias"]))
        expected = F.linear(hidden, state["layers.1.weight"], state["layers.1.bias"])
        torch.testing.assert_close(simulate(graph, points), expected)
