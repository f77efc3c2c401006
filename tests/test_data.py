"""Graphs as torch_geometric data: the neural graph's options, and the parameter graph."""

from collections import Counter

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from torch_geometric.data import Batch

from ngcore.graph import mlp, trace
from ngcore.graph.dialects import EDGE_TYPES, NODE_TYPES, to_parameter_graph
from ngcore.graph.pyg import ACTIVATIONS, EDGE_KINDS, kernel_places

INPUT, HIDDEN, OUTPUT = 0, 1, 2
KIND = {name: i for i, name in enumerate(EDGE_KINDS)}


class SmallCNN(nn.Module):
    """A residual block and a flattening: 1 channel, 3 channels, 2x2 locations, 2 outputs."""

    def __init__(self, norm=False, last=3):
        super().__init__()
        self.first = nn.Conv2d(1, 3, (3, 5), padding=(1, 2))
        self.second = nn.Conv2d(3, 3, last, padding=last // 2)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.head = nn.Linear(12, 2)

    def forward(self, image):
        x = torch.relu(self.first(image))
        x = torch.tanh(self.norm(self.second(x)) + x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class SmallTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens)))


def traced(module, *inputs):
    """The graph of a module, with its parameters set to the numbers 1, 2, 3, …: each occurs once."""
    numbers = iter(range(1, 10**6))
    for parameter in module.parameters():
        parameter.data = torch.tensor([next(numbers) for _ in range(parameter.numel())], dtype=torch.float64).view(
            parameter.shape
        )
    return trace(module.to(torch.float64), *inputs).graph(module.state_dict())


def small_cnn(**options):
    return traced(SmallCNN(**options), torch.randn(2, 1, 9, 7, dtype=torch.float64))


def small_transformer():
    return traced(SmallTransformer(), torch.randint(5, (2, 7)))


def rows(data):
    """Edges as a multiset of (source, target, features…, kind)."""
    index, kinds = data.edge_index.T.tolist(), data.edge_kind.tolist()
    return Counter(
        (s, t, *e, EDGE_KINDS[k]) for (s, t), e, k in zip(index, data.edge_attr.tolist(), kinds, strict=True)
    )


def brute_force(state, height, width, centre, flatten):
    """Edges of `SmallCNN`, one at a time, written from the paper's text alone."""

    def padded(kernel):
        window = torch.zeros(height, width, dtype=kernel.dtype)
        top, left = (height - kernel.shape[0]) // 2, (width - kernel.shape[1]) // 2
        window[top : top + kernel.shape[0], left : left + kernel.shape[1]] = kernel
        return window.flatten().tolist()

    def scalar(value):
        features = [0.0] * (height * width)
        features[(height // 2) * width + width // 2 if centre else 0] = float(value)
        return features

    edges = Counter()
    last = {c: [4 + c] if flatten == "layer" else [4 + 4 * c + i for i in range(4)] for c in range(3)}
    flat = {(c, i): (7 if flatten == "layer" else 4) + 4 * c + i for c in range(3) for i in range(4)}
    outputs = [19, 20] if flatten == "layer" else [16, 17]
    for i in range(3):
        edges[(0, 1 + i, *padded(state["first.weight"][i, 0]), "convolution")] += 1
        for target in last[i]:
            edges[(1 + i, target, *scalar(1), "residual")] += 1
            for j in range(3):
                edges[(1 + j, target, *padded(state["second.weight"][i, j]), "convolution")] += 1
    for (c, i), node in flat.items():
        if flatten == "layer":
            edges[(4 + c, node, *scalar(1), "flatten")] += 1
        for o, output in enumerate(outputs):
            edges[(node, output, *scalar(state["head.weight"][o, 4 * c + i]), "linear")] += 1
    return edges


@pytest.mark.parametrize("flatten", ["layer", "repeat"])
@pytest.mark.parametrize("linear", ["linear", "convolution"])
@pytest.mark.parametrize("window", [None, (5, 5), (3, 7)])
def test_edges_agree_with_a_loop_over_the_network(window, linear, flatten):
    graph = small_cnn()
    data = graph.to_data(window=window, linear=linear, flatten=flatten)
    height, width = window or (3, 5)
    assert rows(data) == brute_force(graph.state_dict(), height, width, linear == "convolution", flatten)
    assert data.edge_attr.shape[1] == height * width
    assert not data.edge_reversed.any()


def test_nodes_of_a_flattening():
    graph = small_cnn()
    state = graph.state_dict()
    layered, repeated = graph.to_data(), graph.to_data(flatten="repeat")
    bias = [0.0, *state["first.bias"].tolist()]
    second, head = state["second.bias"], state["head.bias"].tolist()
    assert layered.x.flatten().tolist() == [*bias, *second.tolist(), *[0.0] * 12, *head]
    assert repeated.x.flatten().tolist() == [*bias, *second.repeat_interleave(4).tolist(), *head]
    assert layered.layer.tolist() == [0, *[1] * 3, *[2] * 3, *[3] * 12, 4, 4]
    assert repeated.layer.tolist() == [0, *[1] * 3, *[2] * 12, 3, 3]
    assert layered.position.tolist() == [0] * 7 + [0, 1, 2, 3] * 3 + [0, 1]
    assert repeated.position.tolist() == [0] * 4 + [0, 1, 2, 3] * 3 + [0, 1]
    names = [ACTIVATIONS[i] for i in repeated.activation]
    assert names == ["identity", *["relu"] * 3, *["tanh"] * 12, *["identity"] * 2]


def test_a_channel_that_is_read_elsewhere_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.flat, self.pooled = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(6, 1), nn.Linear(2, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.flat(x.flatten(1)), self.pooled(x.mean(-1))

    data = traced(Twice(), torch.randn(2, 1, 3, dtype=torch.float64)).to_data(flatten="repeat")
    assert len(data.x) == 1 + 2 + 6 + 2
    kinds = Counter(EDGE_KINDS[k] for k in data.edge_kind)
    assert kinds == {"convolution": 2 + 6, "linear": 6 + 2}
    assert data.layer.tolist() == [0, 1, 1, *[1] * 6, 2, 2]


def test_directions_agree_with_transposed_matrices():
    wiring = mlp([2, 3, 1])
    state = {name: torch.randn(shape, dtype=torch.float64) for name, shape in wiring.shapes.items()}
    graph = wiring.graph(state)

    def dense(direction):
        data = graph.to_data(direction=direction)
        matrix = torch.zeros(6, 6, data.edge_attr.shape[1], dtype=torch.float64)
        matrix[data.edge_index[0], data.edge_index[1]] = data.edge_attr
        return matrix

    e = dense("forward")
    assert torch.equal(dense("reversed"), e.transpose(0, 1))
    assert torch.equal(dense("sum"), e + e.transpose(0, 1))
    assert torch.equal(dense("both"), torch.cat([e, e.transpose(0, 1), e + e.transpose(0, 1)], dim=2))
    both = graph.to_data(direction="both")
    assert both.edge_reversed.tolist() == [False] * 9 + [True] * 9
    assert torch.equal(both.edge_kind[:9], both.edge_kind[9:])


def test_kernels_lie_at_the_centre_of_the_window():
    assert kernel_places((3, 3), (5, 5)).tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert kernel_places((2,), (3, 5)).tolist() == [6, 7]  # along the last axis; one more zero behind
    assert kernel_places((1, 1), (4, 4)).tolist() == [5]
    assert kernel_places((), ()).tolist() == [0]
    with pytest.raises(ValueError, match=r"size \(3, 3\) does not fit into the window \(5,\)"):
        kernel_places((3, 3), (5,))


def test_different_architectures_batch():
    graphs = [small_cnn(norm=True, last=5), small_cnn(), small_transformer()]
    data = [graph.to_data(window=(5, 5), direction="both") for graph in graphs]
    batch = Batch.from_data_list(data)
    assert batch.edge_attr.shape == (sum(d.num_edges for d in data), 75)
    for one, back in zip(data, batch.to_data_list(), strict=True):
        for name in one.keys():  # noqa: SIM118  # a Data is no mapping
            assert torch.equal(one[name], back[name])


def test_gradients_reach_the_parameters():
    wiring = mlp([2, 3, 1])
    state = {name: torch.randn(shape, requires_grad=True) for name, shape in wiring.shapes.items()}
    data = wiring.graph(state).to_data(window=(3, 3), linear="convolution", direction="both")
    (data.x.sum() + data.edge_attr.sum()).backward()
    assert torch.equal(state["layers.0.weight"].grad, torch.full((3, 2), 4.0))
    assert torch.equal(state["layers.1.bias"].grad, torch.ones(1))


def test_numbers_of_activations_stay_as_they_are():
    """Stored models index into them."""
    assert ACTIVATIONS[:6] == ("identity", "relu", "sine", "tanh", "sigmoid", "gelu")
    assert len(ACTIVATIONS) == len(set(ACTIVATIONS)) == 22
    assert ACTIVATIONS[-1] == "other"


def test_errors_of_data():
    graph = small_cnn()
    with pytest.raises(ValueError, match=r"kernel of size \(3, 5\) does not fit into the window \(3, 3\)"):
        graph.to_data(window=(3, 3))
    with pytest.raises((ValueError, TypeCheckError), match="'pool'"):  # the type checker of the tests is first
        graph.to_data(flatten="pool")
    for bad in ("nan", "inf"):
        state = graph.state_dict() | {"second.bias": torch.tensor([0.0, float(bad), 0.0], dtype=torch.float64)}
        with pytest.raises(ValueError, match=r"second.bias holds NaN or infinity"):
            graph.wiring.graph(state).to_data()


# The parameter graph


def typed(data):
    """Parameter edges by type: {type: multiset of (source, target, weight)}."""
    found = {}
    for (s, t), w, kind in zip(data.edge_index.T.tolist(), data.edge_attr, data.edge_type, strict=True):
        found.setdefault(EDGE_TYPES[kind], []).append((s, t, w.item()))
    return found


@pytest.mark.parametrize("make", [small_cnn, lambda: small_cnn(norm=True, last=5), small_transformer])
def test_one_edge_for_every_parameter(make):
    graph = make()
    parameters = torch.cat([graph.state_dict()[name].flatten() for name in graph.wiring.shapes])
    data = to_parameter_graph(graph)
    assert torch.equal(data.edge_attr[data.edge_weighted].sort(0).values.flatten(), parameters.sort().values)
    assert (data.edge_attr[~data.edge_weighted] == 1).all()
    assert not data.edge_tied.any()
    assert data.edge_index.max() < data.num_nodes
    assert set(data.layer.tolist()) == set(range(int(data.layer.max()) + 1))
    assert torch.equal(data.edge_layer, data.layer[data.edge_index[1]])
    data.validate()


def test_a_norm_has_nodes_but_no_neurons():
    graph = small_cnn(norm=True)
    state, data = graph.state_dict(), to_parameter_graph(graph)
    edges = typed(data)
    types = [NODE_TYPES[i] for i in data.node_type]
    assert Counter(types) == {"input": 1, "hidden": 3 + 3 + 12, "output": 2, "bias": 3, "gamma": 1, "beta": 1}
    normalized = [4, 5, 6]
    for kind, name in (("gamma", "norm.weight"), ("beta", "norm.bias")):
        values = zip(normalized, state[name].tolist(), strict=True)
        assert edges[kind] == [(types.index(kind), n, w) for n, w in values]
    assert edges["residual"] == [(1, 4, 1.0), (2, 5, 1.0), (3, 6, 1.0)]
    assert edges["flatten"] == [(4 + i // 4, 7 + i, 1.0) for i in range(12)]
    biases = {(t, w) for _, t, w in edges["bias"]}
    expected = [(1, "first.bias"), (4, "second.bias"), (19, "head.bias")]
    assert biases == {(start + i, w) for start, name in expected for i, w in enumerate(state[name].tolist())}
    assert len({s for s, _, _ in edges["bias"]}) == 3


def test_kernels_are_parallel_edges_with_positions():
    graph = small_cnn()
    state, data = graph.state_dict(), to_parameter_graph(graph)
    for (s, t), w, kind, (z, y, x) in zip(
        data.edge_index.T.tolist(), data.edge_attr, data.edge_type, data.edge_position.tolist(), strict=True
    ):
        if EDGE_TYPES[kind] == "convolution" and t < 4:
            assert (z, w) == (0, state["first.weight"][t - 1, s, y + 1, x + 2])
        elif EDGE_TYPES[kind] == "convolution":
            assert (z, w) == (0, state["second.weight"][t - 4, s - 1, y + 1, x + 1])
        else:
            assert (x, y, z) == (0, 0, 0)


def test_norms_that_can_not_merge_keep_their_neurons():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
            self.left, self.right = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            x = self.inner(x)
            return self.outer(torch.relu(self.left(x))) + self.outer(torch.tanh(self.right(x)))

    data = to_parameter_graph(traced(Parallel(), torch.randn(5, 3, dtype=torch.float64)))
    types = Counter(NODE_TYPES[i] for i in data.node_type)
    assert "gamma" not in types
    gamma = typed(data)["gamma"]
    assert len({t for _, t, _ in gamma}) == 8
    assert {w for _, _, w in gamma} == set(map(float, range(27, 31))) | set(map(float, range(35, 39)))
    assert data.edge_tied.sum() == 2 * 4 + 2  # the outer layer is used twice


def test_an_output_that_is_normalized():
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    data = to_parameter_graph(traced(module, torch.randn(5, 2, dtype=torch.float64)))
    types = [NODE_TYPES[i] for i in data.node_type]
    assert types == ["input"] * 2 + ["output"] * 3 + ["gamma", "bias", "beta"]
    assert data.position.tolist() == [0, 1, 0, 1, 2, 0, 0, 0]
    assert data.layer.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def test_parameter_graphs_batch():
    data = [to_parameter_graph(graph) for graph in (small_cnn(norm=True), small_transformer())]
    batch = Batch.from_data_list(data)
    assert batch.num_nodes == sum(d.num_nodes for d in data)
    assert torch.equal(batch.to_data_list()[1].edge_index, data[1].edge_index)


def test_errors_of_parameter_graphs(random_graph):
    graph = random_graph(mlp([2, 3, 1]))
    with pytest.raises(ValueError, match="one network"):
        to_parameter_graph(graph)
    graph.nodes[1][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers.0.bias holds NaN or infinity"):
        to_parameter_graph(graph[0])
