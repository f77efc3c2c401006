"""Wirings read from PyTorch modules: inverse, places, symmetry, and clear errors."""

import copy
from itertools import pairwise
from math import factorial, prod

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from properties import changes_alone, difference, outputs, randomized, times_placed
from torch import nn

from ngcore.graph import TraceError, rule, trace
from ngcore.graph.tracing.reader import RULES

few = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
ACTIVATIONS = [nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus, nn.Sigmoid]
NORMS = {
    "none": lambda n: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": lambda n: nn.GroupNorm(1, n),
    "group": lambda n: nn.GroupNorm(2, n),
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True),
}


class ImageBlock(nn.Module):
    """A convolution, a norm and an activation; then what `way` says of the input."""

    def __init__(self, width, outer, kind, kernel, norm, activation, way):
        super().__init__()
        outer = width if kind == "depthwise" else outer
        if kind == "transposed":
            self.conv = nn.ConvTranspose2d(width, outer, kernel, padding=kernel // 2, bias=norm == "none")
        else:
            groups = {"depthwise": width, "grouped": 2}.get(kind, 1)
            self.conv = nn.Conv2d(width, outer, kernel, padding=kernel // 2, groups=groups, bias=norm == "none")
        self.norm, self.activation, self.way = NORMS[norm](outer), activation(), way
        self.skip = nn.Conv2d(width, outer, 1) if way == "residual" and width != outer else nn.Identity()
        self.width = outer + width if way == "concatenate" else outer

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.way == "residual":
            y = y + self.skip(x)
        elif self.way == "slice":
            k = min(x.shape[1], y.shape[1])
            y[:, :k] += x[:, :k]
        y = self.activation(y)
        return torch.cat([x, y], 1) if self.way == "concatenate" else y


class ImageNetwork(nn.Module):
    def __init__(self, blocks, stride, head):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=stride, padding=1)
        self.blocks, width = nn.ModuleList(), 4
        for block in blocks:
            self.blocks.append(ImageBlock(width, *block))
            width = self.blocks[-1].width
        self.pool = nn.AdaptiveAvgPool2d(2 if head == "flatten" else 1)
        self.head = nn.Linear(width * (4 if head == "flatten" else 1), 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x).flatten(1))


class SequenceBlock(nn.Module):
    def __init__(self, width, kind, norm, activation):
        super().__init__()
        self.kind, self.activation = kind, activation()
        self.norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm](width)
        if kind == "attention":
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        else:
            self.up, self.down = nn.Linear(width, 5), nn.Linear(5, width)
            self.gate = nn.Linear(width, 5, bias=False) if kind == "gated" else None

    def forward(self, x):
        y = self.norm(x)
        if self.kind == "attention":
            return x + self.attention(y, y, y, need_weights=False)[0]
        if self.kind == "gated":
            return x + self.down(self.activation(self.gate(y)) * self.up(y))
        return x + self.down(self.activation(self.up(y)))


class SequenceNetwork(nn.Module):
    """Two inputs, tokens and features; two outputs, of which one may have the embedding's weight."""

    def __init__(self, width, blocks, tied):
        super().__init__()
        self.embed, self.features = nn.Embedding(7, width), nn.Linear(3, width)
        self.blocks = nn.ModuleList(SequenceBlock(width, *block) for block in blocks)
        self.words, self.classes = nn.Linear(width, 7, bias=False), nn.Linear(width, 2)
        if tied:
            self.words.weight = self.embed.weight

    def forward(self, tokens, features):
        x = self.embed(tokens) + self.features(features)
        for block in self.blocks:
            x = block(x)
        return self.words(x), self.classes(x.mean(1))


activations = st.sampled_from(ACTIVATIONS)
image_blocks = st.tuples(
    st.sampled_from([2, 4, 6]),
    st.sampled_from(["plain", "grouped", "depthwise", "transposed"]),
    st.sampled_from([1, 3]),
    st.sampled_from(list(NORMS)),
    activations,
    st.sampled_from(["plain", "residual", "slice", "concatenate"]),
)
image_networks = st.builds(
    ImageNetwork, st.lists(image_blocks, max_size=3), st.sampled_from([1, 2]), st.sampled_from(["flatten", "pool"])
)
sequence_blocks = st.tuples(
    st.sampled_from(["gated", "plain", "attention"]), st.sampled_from(["layer", "rms"]), activations
)
sequence_networks = st.builds(
    SequenceNetwork, st.sampled_from([4, 6]), st.lists(sequence_blocks, max_size=2), st.booleans()
)
networks = st.one_of(image_networks, sequence_networks)


def mlp(*sizes, activation=nn.Tanh):
    layers = [nn.Linear(n, m) for n, m in pairwise(sizes)]
    return nn.Sequential(*[layer for linear in layers for layer in (linear, activation())][:-1])


def images():
    return torch.randn(2, 2, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def inputs_of(module):
    if isinstance(module, ImageNetwork):
        return (images(),)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(7, (2, 5), generator=generator)
    return tokens, torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)


def traced(module, *inputs):
    module = randomized(module)
    return module, trace(module, *inputs)


@few
@given(networks)
def test_the_inverse_is_exact_also_for_a_batch(module):
    module, wiring = traced(module, *inputs_of(module))
    state = module.state_dict()
    batch = {name: torch.stack([values, values + 1, -values]) for name, values in state.items()}
    for expected in (state, batch):
        back = wiring.graph(expected).state_dict()
        assert set(back) == set(expected)
        assert all(torch.equal(back[name], values) for name, values in expected.items())


@few
@given(networks)
def test_every_element_of_every_parameter_has_one_place(module):
    _, wiring = traced(module, *inputs_of(module))
    assert all((count == 1).all() for count in times_placed(wiring).values())


@few
@given(networks, st.integers(0, 10**6))
def test_symmetries_keep_the_outputs(module, seed):
    inputs = inputs_of(module)
    module, wiring = traced(module, *inputs)
    state, symmetry = copy.deepcopy(module.state_dict()), wiring.symmetry
    moved = symmetry.permute(state, symmetry.random(torch.Generator().manual_seed(seed)))
    assert difference(outputs(module, state, inputs), outputs(module, moved, inputs)) < 1e-9


@few
@given(networks, st.data())
def test_changing_one_number_changes_its_own_entries_alone(module, data):
    module, wiring = traced(module, *inputs_of(module))
    state = module.state_dict()
    before = wiring.graph(state).to_data()
    name = data.draw(st.sampled_from(list(wiring.shapes)))
    place = data.draw(st.integers(0, state[name].numel() - 1))
    changed = state[name].clone()
    changed.view(-1)[place] += 1
    same = {name, *(alias for alias, owner in wiring.aliases if owner == name)}
    after = wiring.graph({**state, **dict.fromkeys(same & set(state), changed)}).to_data()
    entries = (after.x != before.x).sum() + (after.edge_attr != before.edge_attr).sum()
    assert entries == len(same)
    assert torch.equal(after.edge_index, before.edge_index)


@few
@given(networks)
def test_no_parameter_may_be_permuted_alone(module):
    inputs = inputs_of(module)
    module, wiring = traced(module, *inputs)
    assume(wiring.symmetry.order > 1)
    changes = changes_alone(module, wiring, inputs)
    assert changes
    # Biases of keys alone would have no effect, which softmax takes away; the packed ones are not alone.
    assert all(change > 1e-7 for change in changes.values()), changes


def test_the_negative_control_sees_a_parameter_without_effect():
    class Unseen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.softmax(self.first(x), -1) * 0)

    x = torch.randn(5, 3, dtype=torch.float64)
    module, wiring = traced(Unseen(), x)
    assert set(changes_alone(module, wiring, (x,)).values()) == {0.0}


@few
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_the_group_of_an_mlp(sizes):
    _, wiring = traced(mlp(*sizes), torch.randn(3, sizes[0], dtype=torch.float64))
    assert wiring.symmetry.order == prod(map(factorial, sizes[1:-1]))


def test_the_group_of_a_residual_cnn():
    blocks = [(4, "plain", 3, "batch", nn.Tanh, "residual"), (6, "plain", 3, "batch", nn.Tanh, "plain")]
    _, wiring = traced(ImageNetwork(blocks, 1, "flatten"), images())
    assert wiring.symmetry.order == factorial(4) * factorial(6)  # the residual stream, and the channels after it


def test_the_group_of_a_slice_and_of_groups():
    _, wiring = traced(ImageNetwork([(6, "plain", 3, "batch", nn.Tanh, "slice")], 1, "pool"), images())
    assert wiring.symmetry.order == factorial(4) * factorial(2)
    _, wiring = traced(ImageNetwork([(6, "grouped", 3, "none", nn.Tanh, "plain")], 1, "pool"), images())
    assert wiring.symmetry.order == 2 * factorial(2) ** 2 * factorial(3) ** 2


def test_the_group_of_multi_head_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    _, wiring = traced(Attention(), torch.randn(2, 5, 12, dtype=torch.float64))
    assert wiring.symmetry.order == factorial(3) * factorial(4) ** 3 * factorial(4) ** 3


def as_networkx(wiring, state):
    data, graph = wiring.graph(state).to_data(), nx.MultiDiGraph()
    nodes = zip(data.x.tolist(), data.role.tolist(), data.activation.tolist(), data.position.tolist(), strict=True)
    graph.add_nodes_from((i, {"is": (*x, *rest)}) for i, (x, *rest) in enumerate(nodes))
    features = zip(data.edge_index.T.tolist(), data.edge_attr.tolist(), data.edge_kind.tolist(), strict=True)
    graph.add_edges_from((s, t, {"is": (*e, kind)}) for (s, t), e, kind in features)
    return graph


def isomorphic(first, second):
    same_edges = nx.algorithms.isomorphism.categorical_multiedge_match("is", None)
    return nx.is_isomorphic(first, second, lambda a, b: a == b, same_edges)


@pytest.mark.parametrize(
    "module",
    [
        ImageNetwork([(4, "grouped", 3, "batch", nn.Tanh, "residual")], 2, "flatten"),
        SequenceNetwork(4, [("gated", "rms", nn.Tanh)], tied=True),
        SequenceNetwork(4, [("attention", "layer", nn.Tanh)], tied=False),
    ],
    ids=["images", "gated", "attention"],
)
def test_permuted_networks_have_isomorphic_graphs(module, generator):
    module, wiring = traced(module, *inputs_of(module))
    state = module.state_dict()
    moved = wiring.symmetry.permute(state, wiring.symmetry.random(generator))
    original, permuted = as_networkx(wiring, state), as_networkx(wiring, moved)
    assert nx.utils.graphs_equal(original, permuted) is False
    assert isomorphic(original, permuted)
    name = next(iter(wiring.shapes))
    changed = moved[name].clone()
    changed.view(-1)[0] += 1
    moved |= dict.fromkeys([name, *(alias for alias, owner in wiring.aliases if owner == name)], changed)
    assert not isomorphic(original, as_networkx(wiring, moved))


def test_a_module_that_depends_on_its_data_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"torch.export can't read Branching"):
        trace(Branching(), torch.randn(3))


def test_an_example_of_the_wrong_shape_is_refused():
    with pytest.raises(TraceError, match=r"torch.export can't read Sequential"):
        trace(mlp(3, 4, 2), torch.randn(5, 4))


def test_an_unknown_operator_is_named_with_its_module():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x).real

    with pytest.raises(TraceError, match=r"no rule for the operator aten\.\w*fft\w*; .*@ngcore.graph.rule.*module '1'"):
        trace(nn.Sequential(nn.Linear(3, 4), Inner()), torch.randn(5, 3))


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # torch.export's
@pytest.mark.parametrize(("recurrent", "operator"), [(nn.GRU, "gru"), (nn.LSTM, "lstm")])
def test_recurrent_networks_are_refused_by_name(recurrent, operator):
    with pytest.raises(TraceError, match=rf"no rule for the operator aten\.{operator}; .*module '1'"):
        trace(nn.Sequential(nn.Linear(3, 3), recurrent(3, 4, batch_first=True)), torch.randn(2, 5, 3))


class By(nn.Module):
    """A network of one function of itself and its inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.compute = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif part.is_floating_point() and name != "fixed":
                self.register_parameter(name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def checked(module, *inputs):
    """The wiring of a network, for which inverse, places and symmetry hold."""
    module, wiring = traced(module, *inputs)
    state = copy.deepcopy(module.state_dict())
    back = wiring.graph(state).state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], values) for name, values in state.items())
    assert set(wiring.shapes) == dict(module.named_parameters()).keys()
    assert all((count == 1).all() for count in times_placed(wiring).values())
    moved = wiring.symmetry.permute(state, wiring.symmetry.random(torch.Generator().manual_seed(1)))
    assert difference(outputs(module, state, inputs), outputs(module, moved, inputs)) < 1e-9
    return wiring


def ends(wiring, parameter):
    """The neurons, counted over all groups, at the ends of a parameter's edges."""
    blocks = [block for block in wiring.blocks if block.weight == parameter]
    return [sorted(set(torch.cat([wiring.edge_index(b)[i] for b in blocks]).tolist())) for i in (0, 1)]


def test_a_parameter_is_tied_only_where_all_of_it_was_used_before():
    whole = checked(By(lambda net, x: (x @ net.w.T, x @ net.w[1:3].T, x @ net.w), w=normal(4, 4)), normal(5, 4))
    assert [block.tied for block in whole.blocks] == [False, True, True]
    parts = checked(By(lambda net, x: (x @ net.w[:3].T, x @ net.w[3:].T), w=normal(4, 4)), normal(5, 4))
    assert [block.tied for block in parts.blocks] == [False, False]
    biases = checked(By(lambda net, x: net.a(x) + net.a(x + net.b), a=nn.Linear(3, 2), b=normal(3)), normal(5, 3))
    assert [group.tied for group in biases.groups if group.bias == "a.bias"] == [False, True]


@pytest.mark.parametrize(
    ("used", "problem"),
    [
        (lambda net, x: (x @ net.w[:2].T, x @ net.w.T), "w is used in parts that overlap"),
        (lambda net, x: (x @ net.w[:3].T, x @ net.w[2:].T), "w is used in parts that overlap"),
        (lambda net, x: (x @ net.w[:3].T, x @ net.w[2:3].T), r"w of shape \(4, 4\) has 12 places"),
        (lambda net, x: x @ net.w[:1].expand(4, 4).T, "w is repeated before it is used"),
        (lambda net, x: x @ net.w.view(2, 2, 4).transpose(0, 1).reshape(4, 4), "w is rearranged into new memory"),
        (lambda net, x: x @ (net.w.sum(0, keepdim=True) * x).T, "w is reduced before it is used"),
    ],
)
def test_uses_of_a_parameter_that_have_no_places_are_refused(used, problem):
    with pytest.raises(TraceError, match=f"parameter {problem}"):
        traced(By(used, w=normal(4, 4)), normal(5, 4))


def test_parts_of_an_input_have_neurons_of_their_own():
    net = By(lambda net, x: net.a(x[..., :2]) + net.b(x[..., 2:]), a=nn.Linear(2, 4), b=nn.Linear(2, 4))
    split = By(lambda net, x: net.a(x.split(2, -1)[0]) + net.b(x.split(2, -1)[1]), a=nn.Linear(2, 4), b=nn.Linear(2, 4))
    for module in (net, split):
        wiring = checked(module, normal(5, 4))
        assert not set(ends(wiring, "a.weight")[0]) & set(ends(wiring, "b.weight")[0])


def test_an_input_has_the_same_neurons_wherever_it_is_read_along_one_axis():
    net = By(lambda net, x: net.a(x) + net.b(1 * x).T + net.b(x.T.neg().T.neg()).T, a=nn.Linear(3, 5),
             b=nn.Linear(3, 5))  # fmt: skip
    wiring = checked(net, normal(5, 3))
    assert ends(wiring, "a.weight")[0] == ends(wiring, "b.weight")[0] == [0, 1, 2]


def test_an_input_that_is_repeated_is_read_along_its_new_axes():
    """Along the same axis it has other neurons than before: 3 features once, 5 rows the other time."""
    net = By(
        lambda net, x: (net.a(x), net.b(x * net.fixed)), a=nn.Linear(3, 4), b=nn.Conv1d(5, 2, 1), fixed=normal(2, 5, 1)
    )
    wiring = checked(net, normal(5, 3))
    assert [len(ends(wiring, name)[0]) for name in ("a.weight", "b.weight")] == [3, 5]


def test_where_keeps_masked_neurons_in_their_places():
    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(4, 2)}
    features = torch.tensor([True, True, False, False])
    rows = torch.tensor([[True], [False], [True], [True], [False]])
    chosen = By(lambda net, x: net.c(torch.where(net.mask, net.a(x), net.b(x))), mask=features, **parts)
    assert checked(chosen, normal(5, 3)).symmetry.order == 1
    parts.pop("b")
    for mask, order in ((features, 1), (rows, factorial(4))):
        masked = By(lambda net, x: net.c(torch.where(net.mask, net.a(x), 0.0)), mask=mask, **parts)
        assert checked(masked, normal(5, 3)).symmetry.order == order


def test_parameters_meet_constants():
    masked = By(lambda net, x: net.b(nn.functional.linear(x, net.a * net.fixed)), a=normal(4, 3), fixed=normal(4, 3),
                b=nn.Linear(4, 2))  # fmt: skip
    assert checked(masked, normal(5, 3)).symmetry.order == 1
    scaled = By(lambda net, x: net.b(nn.functional.linear(x, net.a * net.fixed)), a=normal(4, 3), fixed=normal(1, 3),
                b=nn.Linear(4, 2))  # fmt: skip
    wiring = checked(scaled, normal(5, 3))
    assert wiring.symmetry.order == factorial(4)
    assert [block.kind for block in wiring.blocks] == ["linear", "linear"]


def test_parameters_meet_statistics_and_zeros():
    """What is no neuron has nodes of its own where a parameter multiplies it."""
    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(6, 2), "w": normal(6), "one": normal(1)}
    mean = By(lambda net, x: net.b(net.a(x).mean(-1, keepdim=True) * net.w) * net.one, **parts)
    assert checked(mean, normal(5, 3)).symmetry.order == factorial(4) * factorial(6)
    padded = By(lambda net, x: net.b(nn.functional.pad(net.a(x), (0, 2)) * net.w) * net.one, **parts)
    checked(padded, normal(5, 3))


def test_a_fixed_matrix_mixes_neurons_or_positions():
    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    neurons = By(lambda net, x: net.b(torch.tanh(net.a(x)) @ net.fixed), fixed=normal(4, 4), **parts)
    wiring = checked(neurons, normal(5, 3))
    assert [block.kind for block in wiring.blocks] == ["linear", "product", "linear"]
    assert len(wiring.edge_index(wiring.blocks[1]).T) == 16
    positions = By(lambda net, x: net.b(net.fixed @ torch.tanh(net.a(x))), fixed=normal(5, 5), **parts)
    assert checked(positions, normal(5, 3)).symmetry.order == factorial(4)


def test_a_norm_over_parts_of_a_layer_gives_all_of_them_its_bias():
    net = By(
        lambda net, x: net.b(net.norm(net.a(x).unflatten(-1, (2, 3))).flatten(-2)),
        a=nn.Linear(2, 6), norm=nn.LayerNorm(3), b=nn.Linear(6, 2),
    )  # fmt: skip
    wiring = checked(net, normal(5, 2))
    assert [(group.size, group.tied) for group in wiring.groups if group.bias == "norm.bias"] == [(3, False), (3, True)]


def test_groups_of_a_convolution_that_lie_across_layers():
    """Three channels of one layer and one of another, in groups of two: the second group has sources in both."""
    net = By(
        lambda net, x: net.both(torch.cat([net.a(x), net.c(net.b(x))], 1)),
        a=nn.Conv1d(2, 3, 1), b=nn.Conv1d(2, 2, 1), c=nn.Conv1d(2, 1, 1), both=nn.Conv1d(4, 4, 1, groups=2),
    )  # fmt: skip
    wiring = checked(net, normal(2, 2, 5))
    (_, a), (_, c) = ends(wiring, "a.weight"), ends(wiring, "c.weight")
    assert ends(wiring, "both.weight")[0] == sorted(a + c)
    assert wiring.symmetry.given_up.keys() == {"a.weight", "a.bias", "both.weight"}


def test_what_the_symmetry_lacks_is_named_with_operator_and_module():
    """Layers of 4 and 2 neurons, joined and viewed as 2 x 3: no product of axes has a border after 4."""
    cut = By(lambda _, x, y: torch.cat([x, y], -1).unflatten(-1, (2, 3)).transpose(-1, -2).flatten(-2))
    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 2), "cut": cut, "c": nn.Linear(6, 2)}
    net = By(lambda net, x: net.c(net.cut(net.a(x), net.b(x))), **parts)
    symmetry = checked(net, normal(5, 3)).symmetry
    assert symmetry.order == 1
    assert symmetry.given_up.keys() == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}
    assert set(symmetry.given_up.values()) == {("aten.view in 'cut'",)}


@torch.library.custom_op("ngtest::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


def test_a_rule_for_an_operator_of_ones_own(monkeypatch):
    class Twice(nn.Module):
        def forward(self, x):
            return twice(x)

    module, x = randomized(nn.Sequential(nn.Linear(3, 4), Twice(), nn.Linear(4, 2))), torch.randn(5, 3).double()
    with pytest.raises(TraceError, match=r"no rule for the operator ngtest.twice.*module '1'"):
        trace(module, x)
    monkeypatch.setitem(RULES, "ngtest.twice", None)  # forgotten after the test

    @rule("ngtest.twice")
    def read(reader, value):
        return reader.activation(value.shape, value.axes, value.ids)

    assert trace(module, x).symmetry.order == factorial(4)


@pytest.fixture
def small():
    return traced(mlp(3, 4, 2), torch.randn(5, 3, dtype=torch.float64))


def test_state_dicts_that_do_not_fit_are_refused(small):
    module, wiring = small
    state = module.state_dict()
    with pytest.raises(ValueError, match=r"missing \['0.bias'\], unknown \[\]"):
        wiring.graph({name: values for name, values in state.items() if name != "0.bias"})
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['9.bias'\]"):
        wiring.graph({**state, "9.bias": state["0.bias"]})
    with pytest.raises(ValueError, match=r"parameter 2.weight has shape \(2, 5\); the wiring needs \(\.\.\., 2, 4\)"):
        wiring.graph({**state, "2.weight": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match=r"parameter 2.bias has batch axes \(7,\)"):
        wiring.graph({**state, "2.bias": torch.zeros(7, 2)})


def test_orders_that_are_no_permutations_are_refused(small):
    module, wiring = small
    with pytest.raises(ValueError, match="factor 0 needs permutations of 4 neurons"):
        wiring.symmetry.permute(module.state_dict(), {0: torch.tensor([0, 0, 1, 2])})


def test_reading_leaves_the_module_in_its_mode(small):
    module, _ = small
    trace(module.train(), torch.randn(5, 3, dtype=torch.float64))
    assert module.training
