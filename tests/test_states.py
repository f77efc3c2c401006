"""State dicts as users have them: lists, wrapped modules, half precision; and what can't be bound is named."""

import warnings

import pytest
import torch
from torch import nn

from ngcore.graph import mlp, trace

WIRING = mlp([2, 3, 1])


def random_state(dtype=torch.float32):
    return {name: torch.randn(shape).to(dtype) for name, shape in WIRING.shapes.items()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
        assert found[name].dtype == values.dtype, name


def test_a_list_of_networks_gets_a_first_axis():
    states = [random_state() for _ in range(3)]
    graph = WIRING.graph(states)
    assert graph.num_networks == 3
    for i, state in enumerate(states):
        assert_same(graph[i].state_dict(), state)


def test_a_list_of_stacks_gets_a_first_axis_too():
    stacks = [{name: torch.randn(4, *shape) for name, shape in WIRING.shapes.items()} for _ in range(2)]
    assert_same(WIRING.graph(stacks)[1].state_dict(), stacks[1])


def test_running_statistics_of_a_list_are_stacked():
    modules = [nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval() for _ in range(2)]
    graph = trace(modules[0], torch.randn(4, 2)).graph([module.state_dict() for module in modules])
    assert graph.others["1.running_mean"].shape == (2, 3)
    assert_same(graph[1].state_dict(), dict(modules[1].state_dict()))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_left_out_with_a_warning(prefix):
    state = random_state()
    with pytest.warns(UserWarning, match=f"without their prefix '{prefix}'"):
        graph = WIRING.graph({prefix + name: values for name, values in state.items()})
    assert_same(graph.state_dict(), state)


def test_wrapped_modules_are_bound_as_they_were():
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    wiring = trace(network, torch.randn(4, 2))
    for wrapped in (nn.DataParallel(network), torch.compile(network)):
        with pytest.warns(UserWarning, match="without their prefix"):
            assert_same(wiring.graph(wrapped.state_dict()).state_dict(), dict(network.state_dict()))


def test_a_network_with_a_part_of_that_name_keeps_it():
    network = nn.ModuleDict({"module": nn.Linear(2, 1)})
    network.forward = lambda x: network["module"](x)
    wiring = trace(network, torch.randn(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(wiring.graph(network.state_dict()).state_dict()) == {"module.weight", "module.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_stays(dtype):
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Flatten(), nn.Linear(3, 1))
    wiring = trace(network, torch.randn(4, 2))
    state = network.to(dtype).state_dict()
    for given in (state, [state, state]):
        graph = wiring.graph(given)
        assert {values.dtype for values in (*graph.nodes, *graph.edges, *graph.state_dict().values())} == {dtype}


def test_numbers_that_are_no_weights_are_named():
    with pytest.raises(ValueError, match=r"layers\.0\.weight is of torch\.int64; convert it"):
        WIRING.graph(random_state() | {"layers.0.weight": torch.zeros(3, 2, dtype=torch.int64)})


def test_nothing_can_not_be_bound():
    with pytest.raises(ValueError, match=r"the state dict is empty; the wiring needs \['layers\.0\.weight', "):
        WIRING.graph({})
    with pytest.raises(ValueError, match="the list of state dicts is empty"):
        WIRING.graph([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.weight": torch.zeros(1, 4)}, r"network 2: parameter layers\.1\.weight has shape \(1, 4\)"),
        ({"layers.0.bias": torch.zeros(3).half()}, r"network 2: layers\.0\.bias has shape \(3,\) and torch\.float16"),
        ({"extra": torch.zeros(1)}, r"network 2: parameters do not fit .*unknown \['extra'\]"),
        ({name: torch.zeros(5, *shape) for name, shape in WIRING.shapes.items()}, r"network 2 has batch axes \(5,\)"),
    ],
)
def test_the_network_of_a_list_that_differs_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        WIRING.graph([random_state(), random_state(), random_state() | change])


def test_statistics_that_one_network_of_a_list_lacks_are_named():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    state = dict(module.state_dict())
    without = {name: values for name, values in state.items() if name != "1.running_var"}
    with pytest.raises(ValueError, match=r"networks 0 and 1 do not both have \['1\.running_var'\]"):
        trace(module, torch.randn(4, 2)).graph([state, without])


def test_two_names_of_one_parameter_must_agree():
    network = Tied()
    wiring = trace(network, torch.randn(4, 3))
    state = dict(network.state_dict())
    copies = {name: values.clone() for name, values in state.items()}
    assert_same(wiring.graph(copies).state_dict(), state)
    copies["second.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"second\.weight and first\.weight are one parameter .* different values"):
        wiring.graph(copies)
