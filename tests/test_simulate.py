"""Forward passes on the neural graph agree with the network's own."""

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from properties import randomized
from torch import nn

from ngcore.graph import mlp, trace
from ngcore.graph.forward import activations
from ngcore.graph.message_passing import ForwardPass
from ngcore.graph.simulate import SimulationError, simulate

ACTIVATIONS = [
    nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.ELU(0.7), nn.Softplus(),
    nn.LeakyReLU(0.2), nn.Hardtanh(), nn.Mish(), nn.SELU(), nn.Hardswish(), nn.ReLU6(), nn.Identity(),
]  # fmt: skip
NO_SHRINKING = (Phase.explicit, Phase.generate)  # reading a network takes seconds
seeds = st.integers(0, 2**31)


def agree(module, *inputs):
    """The graph is read from one set of weights and run with another."""
    first, second = torch.randint(2**31, (2,)).tolist()
    wiring = trace(randomized(module, first), *inputs)
    randomized(module, second)
    fresh = tuple(torch.randn_like(x) for x in inputs)
    with torch.no_grad():
        expected, found = module(*fresh), simulate(wiring.graph(module.state_dict()), *fresh)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, found)), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9)
    return wiring


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@settings(max_examples=8, deadline=None, phases=NO_SHRINKING)
@given(st.data(), seeds)
def test_mlps(data, seed):
    torch.manual_seed(seed)
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    layers = []
    for inner, outer in itertools.pairwise(sizes):
        layers += [nn.Linear(inner, outer, bias=data.draw(st.booleans())), data.draw(st.sampled_from(ACTIVATIONS))]
    agree(nn.Sequential(*layers), doubles(3, sizes[0]))


@settings(max_examples=8, deadline=None, phases=NO_SHRINKING)
@given(st.data(), seeds)
def test_cnns(data, seed):
    torch.manual_seed(seed)

    def one_of(*choices):
        return data.draw(st.sampled_from(choices))

    channels, layers = one_of(2, 4), []
    first = channels
    for _ in range(one_of(1, 2, 3)):
        groups, wider = one_of(1, 2), one_of(2, 4, 6)
        layers.append(
            nn.Conv2d(
                channels,
                wider,
                (one_of(1, 2, 3), one_of(1, 3)),
                stride=one_of(1, 2),
                padding=one_of(1, 2, (2, 1)),
                dilation=one_of(1, 2),
                groups=groups,
                bias=one_of(True, False),
            )
        )
        channels = wider
        plain = nn.BatchNorm2d(wider, affine=False)
        layers.append(one_of(nn.BatchNorm2d(wider), nn.GroupNorm(2, wider), plain, nn.Identity()))
        pool = one_of(nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.MaxPool2d(2, 1, 1), nn.Identity())
        layers += [one_of(*ACTIVATIONS), pool]
    image = doubles(2, first, 13, 15)
    with torch.no_grad():
        shape = nn.Sequential(*layers).double().eval()(image).shape
    if one_of(True, False):
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    else:
        layers += [nn.Flatten(), nn.Linear(shape[1:].numel(), 3)]
    agree(nn.Sequential(*layers), image)


class Residual(nn.Module):
    """Blocks with projections, plain shortcuts, shortcuts on the first channels, and concatenation."""

    def __init__(self, width, k, norm, joined):
        super().__init__()
        self.start = nn.Linear(3, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.shrink = nn.Linear(width, width)
        self.norm = norm(width)
        self.project = nn.Linear(width, width, bias=False)
        self.end = nn.Linear(2 * width if joined else width, 2)
        self.k, self.joined = k, joined

    def forward(self, x):
        x = torch.relu(self.start(x))
        x = x + self.second(torch.tanh(self.first(self.norm(x))))
        y = torch.relu(self.project(x) + self.shrink(x))
        y = torch.cat([y[:, : self.k] + x[:, : self.k], y[:, self.k :]], 1)  # Wild-Park
        return self.end(torch.cat([torch.relu(y), x], 1) if self.joined else torch.relu(y))


@settings(max_examples=6, deadline=None, phases=NO_SHRINKING)
@given(st.integers(2, 6), st.data(), st.sampled_from([nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm]), st.booleans(), seeds)
def test_residuals_norms_and_concatenation(width, data, norm, joined, seed):
    torch.manual_seed(seed)
    agree(Residual(width, data.draw(st.integers(1, width - 1)), norm, joined), doubles(4, 3))


class InPlace(nn.Module):
    """A shortcut that is written into the first channels (Wild Park's residuals)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding="same")
        self.end = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        y = self.second(x)
        y[:, :4] += x
        return self.end(torch.relu(y).mean((2, 3)))


class ResNetBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.shortcut = nn.Conv2d(4, 4, 1, 2)

    def forward(self, x):
        y = self.norms[1](self.two(torch.relu(self.norms[0](self.one(x)))))
        return torch.relu(y + self.norms[2](self.shortcut(x)))


class Branches(nn.Module):
    """One convolution read pooled and unpooled, then joined."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 3, padding=1)
        self.end = nn.Linear(9, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        pooled = nn.functional.max_pool2d(x, 3, 1, 1)
        return self.end(torch.cat([self.one(pooled), self.two(x), x], 1).amax((2, 3)))


class Attention(nn.Module):
    """Attention by hand, on products of matrices."""

    def __init__(self, width, heads):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.heads = heads

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        return self.norm(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


class FixedMatrix(nn.Module):
    """A product with numbers that are no parameters, among neurons."""

    def __init__(self):
        super().__init__()
        self.start, self.end = nn.Linear(3, 4), nn.Linear(2, 2)
        self.register_buffer("fixed", torch.randn(4, 2, dtype=torch.float64))

    def forward(self, x):
        return self.end(torch.relu(self.start(x)) @ self.fixed)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (InPlace(), (2, 3, 7, 7)),
        (ResNetBlock(), (2, 4, 9, 9)),
        (Branches(), (2, 3, 7, 9)),
        (Attention(8, 2), (2, 5, 8)),
        (
            nn.Sequential(
                nn.Conv1d(3, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.ConvTranspose1d(4, 6, 3, 2, groups=2)
            ),
            (2, 3, 9),
        ),
        (nn.Sequential(nn.Conv3d(2, 3, 3), nn.AvgPool3d(2), nn.GELU()), (2, 2, 7, 7, 7)),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.InstanceNorm2d(4, affine=True)), (2, 3, 5, 5)),
        (FixedMatrix(), (5, 3)),
    ],
)
def test_single_networks(module, shape):
    torch.manual_seed(0)
    agree(module, doubles(*shape))


@settings(max_examples=6, deadline=None, phases=NO_SHRINKING)
@given(st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.sampled_from(["relu", "gelu"]), seeds)
def test_a_transformer_block(heads, batch_first, norm_first, activation, seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(
        8, heads, 12, batch_first=batch_first, norm_first=norm_first, activation=activation
    )
    agree(layer, doubles(3, 5, 8))


def test_two_blocks_and_a_head():
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(4, 2, 6, batch_first=True) for _ in range(2)]
    agree(nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2)), doubles(2, 5, 3))


def test_the_numbers_come_from_edges_and_nodes():
    """The control for the tests above: whatever changes on an edge or a neuron changes the result."""
    torch.manual_seed(0)
    module = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)))
    image = doubles(2, 2, 5, 5)
    graph = trace(module, image).graph(module.state_dict())
    before = simulate(graph, image)
    for b in [b for b, block in enumerate(graph.wiring.blocks) if block.weight is not None]:
        edges = tuple(x + 0.1 * (i == b) for i, x in enumerate(graph.edges))
        assert (simulate(replace(graph, edges=edges), image) - before).abs().max() > 1e-3
    for g in [g for g, group in enumerate(graph.wiring.groups) if group.bias is not None]:
        nodes = tuple(x + 0.1 * (i == g) for i, x in enumerate(graph.nodes))
        assert (simulate(replace(graph, nodes=nodes), image) - before).abs().max() > 1e-3


@settings(max_examples=6, deadline=None, phases=NO_SHRINKING)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5), st.sampled_from(["relu", "tanh", "sigmoid", "siren"]), seeds
)
def test_message_passing_runs_an_mlp(sizes, activation, seed):
    """Appendix B, against a chain of matrix products."""
    torch.manual_seed(seed)
    state = {name: doubles(*shape) for name, shape in mlp(sizes).shapes.items()}
    x = points = doubles(4, sizes[0])
    function = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "siren": lambda x: torch.sin(30 * x)}
    for i in range(len(sizes) - 1):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        x = function[activation](x) if i < len(sizes) - 2 else x
    graph = mlp(sizes, activation).graph(state)
    torch.testing.assert_close(ForwardPass(activation)(graph.to_data(), points), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(simulate(graph, points), x, rtol=0, atol=1e-9)


def test_activations_take_batches(random_graph):
    graph, points = random_graph(mlp([2, 3, 2], "tanh"), 4), doubles(5, 2)
    found = activations(graph, points)[-1]
    for n in range(4):
        torch.testing.assert_close(simulate(graph[n], points), found[n].T, rtol=0, atol=1e-12)


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.end = nn.Parameter(torch.zeros(1, 1, 3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.end(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.randint(5, (2, 4))),
        (ClassToken(), doubles(2, 4, 3)),
        (nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)), doubles(2, 3)),
    ],
)
def test_what_the_graph_does_not_express_is_named(module, example):
    wiring = trace(randomized(module), example)
    with pytest.raises(SimulationError, match=r"operator aten\.\w+"):
        simulate(wiring.graph(module.state_dict()), example)


def test_wrong_inputs(random_graph):
    module = randomized(nn.Linear(3, 2))
    graph = trace(module, doubles(4, 3)).graph(module.state_dict())
    with pytest.raises(ValueError, match=r"inputs have shapes \[\(5, 3\)\]; the wiring was read on \[\(4, 3\)\]"):
        simulate(graph, doubles(5, 3))
    with pytest.raises(ValueError, match="one network"):
        simulate(random_graph(mlp([2, 3])), doubles(5, 2))


def test_a_wiring_with_steps_can_be_pickled():
    torch.manual_seed(0)
    module, x = randomized(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), doubles(2, 3)
    wiring = pickle.loads(pickle.dumps(trace(module, x)))
    assert wiring == trace(module, x)
    assert hash(wiring) == hash(trace(module, x))
    torch.testing.assert_close(simulate(wiring.graph(module.state_dict()), x), module(x), rtol=0, atol=1e-12)
