"""Neural graphs of MLPs: inverse, distinctness, symmetry, simulation."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ngcore.graph import mlp
from ngcore.graph.draw import draw
from ngcore.graph.forward import activations

matplotlib.use("Agg")
sizes = st.lists(st.integers(1, 6), min_size=2, max_size=5)


def random_state(wiring, *batch):
    return {name: torch.randn(*batch, *shape, dtype=torch.float64) for name, shape in wiring.shapes.items()}


@settings(max_examples=30, deadline=None)
@given(sizes, st.lists(st.integers(1, 3), max_size=2))
def test_the_inverse_is_exact_and_shares_memory(sizes, batch):
    state = random_state(mlp(sizes), *batch)
    back = mlp(sizes).graph(state).state_dict()
    assert list(back) == list(state)
    for name, values in state.items():
        assert torch.equal(back[name], values)
        assert back[name].data_ptr() == values.data_ptr()


def test_every_parameter_has_its_own_place():
    wiring = mlp([2, 3, 2])
    state = random_state(wiring)
    data = wiring.graph(state).to_data()
    for name, values in state.items():
        for i in range(values.numel()):
            changed = {key: value.clone() for key, value in state.items()}
            changed[name].view(-1)[i] += 1
            other = wiring.graph(changed).to_data()
            places = (other.x != data.x).sum() + (other.edge_attr != data.edge_attr).sum()
            assert places == 1
            assert torch.equal(other.edge_index, data.edge_index)


def test_data_agrees_with_equation_1():
    wiring = mlp([2, 3, 1])
    state = random_state(wiring)
    data = wiring.graph(state).to_data()
    dense = torch.zeros(6, 6, dtype=torch.float64)  # rows are sources, as in the paper
    dense[data.edge_index[0], data.edge_index[1]] = data.edge_attr.squeeze(1)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    expected[0:2, 2:5] = state["layers.0.weight"].T
    expected[2:5, 5:6] = state["layers.1.weight"].T
    assert torch.equal(dense, expected)
    biases = torch.cat([torch.zeros(2, dtype=torch.float64), state["layers.0.bias"], state["layers.1.bias"]])
    assert torch.equal(data.x.squeeze(1), biases)
    assert data.layer.tolist() == [0, 0, 1, 1, 1, 2]
    assert data.role.tolist() == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("activation", ["relu", "siren", "tanh", "sigmoid", "identity"])
def test_activations_agree_with_a_loop_over_neurons(activation, random_graph):
    functions = {
        "relu": lambda x: max(x, 0.0),
        "siren": lambda x: torch.sin(torch.tensor(30.0 * x, dtype=torch.float64)).item(),
        "tanh": lambda x: torch.tanh(torch.tensor(x, dtype=torch.float64)).item(),
        "sigmoid": lambda x: torch.sigmoid(torch.tensor(x, dtype=torch.float64)).item(),
        "identity": lambda x: x,
    }
    graph = random_graph(mlp([2, 3, 2], activation), 2)
    points = torch.randn(4, 2, dtype=torch.float64)
    found = activations(graph, points)
    state = graph.state_dict()
    for n in range(2):
        for p, point in enumerate(points.tolist()):
            values = point
            for layer in range(2):
                weight, bias = state[f"layers.{layer}.weight"][n], state[f"layers.{layer}.bias"][n]
                sums = [
                    bias[i].item() + sum(weight[i, j].item() * values[j] for j in range(len(values)))
                    for i in range(len(bias))
                ]
                values = [functions[activation](x) for x in sums] if layer == 0 else sums
                assert found[layer + 1][n, :, p].tolist() == pytest.approx(values, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_permutations_keep_the_function(sizes):
    wiring = mlp(sizes, "tanh")
    graph = wiring.graph(random_state(wiring, 2))
    element = wiring.symmetry.random()
    twins = wiring.graph(wiring.symmetry.permute(graph.state_dict(), element))
    hidden = [g for g in wiring.with_role("hidden") if sizes[g] > 1]
    orders = dict(zip(hidden, element.values(), strict=True))
    points = torch.randn(3, sizes[0], dtype=torch.float64)
    for g, (before, after) in enumerate(zip(activations(graph, points), activations(twins, points), strict=True)):
        order = orders.get(g, torch.arange(sizes[g]))
        torch.testing.assert_close(after, before[:, order], rtol=0, atol=1e-12)


def test_permuting_one_matrix_alone_changes_the_function(random_graph):
    """The control: the test above can fail."""
    wiring = mlp([2, 4, 1], "tanh")
    graph = random_graph(wiring)
    state = graph.state_dict()
    broken = wiring.graph(state | {"layers.0.weight": state["layers.0.weight"].flip(1)})
    points = torch.randn(3, 2, dtype=torch.float64)
    assert (activations(graph, points)[-1] - activations(broken, points)[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.1.bias"), r"missing \['layers.1.bias'\]"),
        (lambda s: s.update(extra=torch.zeros(1)), r"unknown \['extra'\]"),
        (lambda s: s.update({"layers.0.weight": torch.zeros(5, 2)}), r"layers.0.weight has shape \(5, 2\)"),
        (lambda s: s.update({"layers.0.bias": torch.zeros(7, 3)}), r"layers.0.bias has batch axes \(7,\)"),
    ],
)
def test_parameters_that_do_not_fit_are_named(change, message):
    wiring = mlp([2, 3, 1])
    state = random_state(wiring)
    change(state)
    with pytest.raises(ValueError, match=message):
        wiring.graph(state)


def test_other_errors(random_graph):
    wiring = mlp([2, 3, 1])
    graph = random_graph(wiring, 2)
    with pytest.raises(ValueError, match="at least an input and an output"):
        mlp([3])
    with pytest.raises(ValueError, match="one network"):
        graph.to_data()
    with pytest.raises(ValueError, match="one network"):
        draw(graph, plt.figure().add_subplot())
    with pytest.raises(ValueError, match=r"activation 'swish' is not in the table, which has: .*sine"):
        activations(mlp([2, 3, 1], "swish").graph(graph.state_dict()), torch.randn(4, 2, dtype=torch.float64))
