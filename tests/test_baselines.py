"""The baselines: what they are invariant to, what they normalize, how large they are."""

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from properties import permute, random_permutations

from ngcore.graph import NeuralGraph, Wiring, mlp
from ngcore.models.baselines import MLP, DWSNet, SetNN

INR = mlp([2, 32, 32, 1], "siren")
SMALL = mlp([2, 5, 4, 3])
TINY = {
    MLP: {"width": 16, "depth": 2},
    SetNN: {"element_width": 8, "head_width": 16},
    DWSNet: {"width": 3, "depth": 2, "head_width": 16},
}
each_model = pytest.mark.parametrize("model_class", TINY, ids=lambda model_class: model_class.__name__)
sizes = st.lists(st.integers(1, 5), min_size=2, max_size=5)


def random_graph(wiring: Wiring, count: int) -> NeuralGraph:
    """Networks whose layers differ in scale and mean."""
    return wiring.graph(
        {
            name: scale * (torch.randn(count, *shape, dtype=torch.float64) + 1)
            for scale, (name, shape) in enumerate(wiring.shapes.items(), start=1)
        }
    )


def tiny(model_class, wiring: Wiring, **options):
    """A small float64 model without dropout, whose every parameter is drawn at random."""
    model = model_class(wiring, 4, **TINY[model_class], dropout=0.0, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.fit_normalization(random_graph(wiring, 7))
    return model


@pytest.mark.parametrize("model_class", [SetNN, DWSNet])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@examples(8)
@given(sizes=sizes, seed=st.integers(0, 2**20))
def test_hidden_neurons_may_be_permuted(model_class, training, sizes, seed):
    torch.manual_seed(seed)
    wiring = mlp(sizes)
    graph = random_graph(wiring, 6)
    model = tiny(model_class, wiring).train(training)
    permuted = permute(graph, random_permutations(wiring))
    torch.testing.assert_close(model(permuted), model(graph), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_mlp_is_not_invariant(training):
    """Negative control: what the test above checks is a property of the other two models, not of the data."""
    torch.manual_seed(0)
    graph, model = random_graph(SMALL, 6), tiny(MLP, SMALL).train(training)
    permuted = permute(graph, {1: torch.tensor([1, 0, 2, 3, 4])})
    assert ((model(permuted) - model(graph)).abs().amax(dim=1) > 1e-6).all()


@each_model
@examples(8)
@given(sizes=sizes, seed=st.integers(0, 2**20))
def test_a_network_alone_and_in_a_batch_give_the_same_output(model_class, sizes, seed):
    torch.manual_seed(seed)
    wiring = mlp(sizes)
    graph = random_graph(wiring, 5)
    model = tiny(model_class, wiring).eval()
    alone = torch.cat([model(graph[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(model(graph), alone, rtol=1e-9, atol=1e-9)


def test_set_nn_sees_the_multiset_of_all_entries():
    """Any permutation of entries, across layers too, where the normalization is the identity."""
    torch.manual_seed(0)
    model = SetNN(SMALL, 4, **TINY[SetNN], dropout=0.0).double().eval()
    state = random_graph(SMALL, 3).state_dict()
    entries = torch.cat([values.flatten(1) for values in state.values()], dim=1)
    shuffled = entries[:, torch.randperm(entries.shape[1])].split(
        [values[0].numel() for values in state.values()], dim=1
    )
    other = SMALL.graph({name: part.reshape(state[name].shape) for name, part in zip(state, shuffled, strict=True)})
    torch.testing.assert_close(model(SMALL.graph(state)), model(other), rtol=1e-9, atol=1e-9)


def test_set_nn_distinguishes_multisets():
    torch.manual_seed(0)
    model = SetNN(SMALL, 4, **TINY[SetNN], dropout=0.0).double().eval()
    graph = random_graph(SMALL, 1)
    changed = {name: values.clone() for name, values in graph.state_dict().items()}
    changed["layers.1.weight"][0, 0, 0] += 1
    assert (model(graph) - model(SMALL.graph(changed))).abs().max() > 1e-6


@each_model
def test_every_parameter_of_the_input_network_is_read(model_class):
    torch.manual_seed(0)
    state = {name: values.requires_grad_() for name, values in random_graph(SMALL, 6).state_dict().items()}
    model = tiny(model_class, SMALL, **({"reduction": "mean"} if model_class is DWSNet else {}))
    model(SMALL.graph(state)).square().sum().backward()
    for name, values in state.items():
        assert (values.grad.abs().amax(0) > 0).all(), name


@each_model
def test_normalization_is_the_identity_until_fitted_and_per_layer_after(model_class):
    torch.manual_seed(0)
    model = model_class(SMALL, 4, **TINY[model_class]).double()
    graph = random_graph(SMALL, 400)
    for name, values in model.standardized(graph).items():
        torch.testing.assert_close(values, graph.state_dict()[name], rtol=0, atol=0)
    model.fit_normalization(graph)
    for values in model.standardized(graph).values():
        assert values.mean().abs() < 1e-9
        assert abs(values.std() - 1) < 1e-3


@each_model
def test_rescaled_layers_are_the_same_after_fitting(model_class):
    """A fitted model reads layers whose units changed, statistics included, as before."""
    torch.manual_seed(0)
    model, graph = tiny(model_class, SMALL).eval(), random_graph(SMALL, 30)
    rescaled = SMALL.graph({name: 3 * values + 0.5 for name, values in graph.state_dict().items()})
    model.fit_normalization(graph)
    expected = model(graph)
    model.fit_normalization(rescaled)
    torch.testing.assert_close(model(rescaled), expected, rtol=1e-9, atol=1e-9)


@each_model
def test_a_parameter_that_never_varies_stays_finite(model_class):
    torch.manual_seed(0)
    state = random_graph(SMALL, 6).state_dict()
    state["layers.1.bias"] = torch.full_like(state["layers.1.bias"], 0.1)
    model, graph = tiny(model_class, SMALL), SMALL.graph(state)
    model.fit_normalization(graph)
    assert model(graph).isfinite().all()


@each_model
def test_broken_networks_are_refused_by_name(model_class):
    state = random_graph(SMALL, 6).state_dict()
    state["layers.2.weight"][4, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.weight of network 4"):
        model_class(SMALL, 4, **TINY[model_class]).fit_normalization(SMALL.graph(state))


@each_model
def test_another_wiring_is_refused(model_class):
    model, other = tiny(model_class, SMALL), random_graph(mlp([2, 5, 5, 3]), 2)
    for read in (model, model.fit_normalization):
        with pytest.raises(ValueError, match=r"\[2, 5, 4, 3\].*\[2, 5, 5, 3\]"):
            read(other)


@each_model
def test_forward_changes_no_input(model_class):
    graph = random_graph(SMALL, 6)
    before = graph.map(torch.clone)
    tiny(model_class, SMALL)(graph).sum().backward()
    assert all(map(torch.equal, graph.nodes + graph.edges, before.nodes + before.edges))


@each_model
def test_a_state_dict_carries_the_normalization(model_class):
    torch.manual_seed(0)
    model, graph = tiny(model_class, SMALL).eval(), random_graph(SMALL, 3)
    other = model_class(SMALL, 4, **TINY[model_class]).double().eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(graph), model(graph), rtol=0, atol=0)


@pytest.mark.parametrize(("model_class", "count"), [(MLP, 439_306), (SetNN, 352_650), (DWSNet, 552_586)])
def test_parameter_counts_are_those_stated(model_class, count):
    assert sum(parameter.numel() for parameter in model_class(INR, 10).parameters()) == count
    assert f"{count:,}" in model_class.__doc__


def test_dws_layers_hold_the_stated_part_of_the_parameters():
    count = sum(parameter.numel() for parameter in DWSNet(INR, 10).layers.parameters())
    assert f"{count:,} of them in the DWS layers" in DWSNet.__doc__
