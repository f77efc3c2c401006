"""NFN: its layer against the paper's equation term by term, equivariance under both groups, sizes, refusals."""

import re

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from properties import permute, random_permutations
from weight_spaces import ARCHITECTURES, CNN, assert_same_graph, cnn, name_of, partly_biased, random_graph, wiring_of

from ngcore.graph import NeuralGraph, Wiring, mlp
from ngcore.models.baselines import NFN, EquivariantDWSNet, EquivariantNFN
from ngcore.models.baselines.weight_space import EquivariantLayer, WeightSpace
from ngcore.reference.nfn import PlainNFLayer, cut

INR = mlp([2, 32, 32, 1], "siren")
SMALL = {"channels": (3, 4), "dropout": 0.0}
GROUPS = ("HNP", "NP")
each_group = pytest.mark.parametrize("group", GROUPS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
few = examples(4)  # of each group and mode


def end_permutations(wiring: Wiring) -> dict[int, torch.Tensor]:
    """Every input and output neuron moves by one place."""
    return {g: torch.arange(wiring.groups[g].size).roll(1) for g in wiring.with_role("input", "output")}


@each_group
@pytest.mark.parametrize(
    "wiring",
    [mlp([3, 2]), mlp([2, 3, 2]), mlp([2, 4, 3, 1]), mlp([3, 2, 4, 1, 2]), cnn((2, 3, 2), 2, (3, 2))],
    ids=name_of,
)
def test_the_layer_is_the_papers_equation(wiring, group):
    """Outputs and gradients, of the coefficients and of what enters."""
    torch.manual_seed(0)
    space = WeightSpace(wiring, group)
    layer = EquivariantLayer(space, 2, 3, "mean").double()
    torch.nn.init.normal_(layer.maps[0].bias)
    graph, direction = random_graph(wiring, 4, 2), random_graph(wiring, 4, 3)
    inputs = [values.requires_grad_() for values in (*graph.edges, *graph.nodes[1:])]
    coefficients = {term: part.detach().requires_grad_() for term, part in cut(space, layer.state_dict()).items()}
    outputs = space.graph(layer(space.features(graph)), 3)
    expected = PlainNFLayer(wiring, group, coefficients)(graph)
    assert_same_graph(outputs, expected)

    def gradients(result: NeuralGraph, parameters: dict) -> tuple[dict, tuple]:
        """Of the outputs' sum along `direction`: by parameter, and by input."""
        pairs = zip(result.edges + result.nodes, direction.edges + direction.nodes, strict=True)
        found = torch.autograd.grad(sum((x * y).sum() for x, y in pairs), [*parameters.values(), *inputs])
        return dict(zip(parameters, found, strict=False)), found[len(parameters) :]

    merged, by_input = gradients(outputs, dict(layer.named_parameters()))
    by_term, expected_by_input = gradients(expected, coefficients)
    parts = cut(space, merged)
    assert parts.keys() == by_term.keys()
    for term, gradient in by_term.items():
        torch.testing.assert_close(parts[term], gradient, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(by_input, expected_by_input, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@each_group
@each_mode
@few
@given(architecture=ARCHITECTURES, seed=st.integers(0, 2**20))
def test_hidden_neurons_may_be_permuted(group, training, architecture, seed):
    torch.manual_seed(seed)
    wiring = wiring_of(architecture)
    graph, orders = random_graph(wiring, 5), random_permutations(wiring)
    editor = EquivariantNFN(wiring, 2, group=group, **SMALL).double().train(training)
    classifier = NFN(wiring, 4, group=group, head_width=6, **SMALL).double().train(training)
    for model in (editor, classifier):
        model.fit_normalization(graph)
    assert_same_graph(editor(permute(graph, orders)), permute(editor(graph), orders))
    torch.testing.assert_close(classifier(permute(graph, orders)), classifier(graph), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wiring", [mlp([2, 4, 3, 3]), cnn((2, 3, 2), 3, (2, 2))], ids=name_of)
@pytest.mark.parametrize(
    ("group", "io_encoding", "equivariant"), [("NP", False, True), ("NP", True, False), ("HNP", True, False)]
)
def test_ends_may_be_permuted_only_with_np_and_no_encoding(wiring, group, io_encoding, equivariant):
    torch.manual_seed(0)
    graph, orders = random_graph(wiring, 5), end_permutations(wiring)
    settings = {"group": group, "io_encoding": io_encoding, **SMALL}
    editor = EquivariantNFN(wiring, **settings).double().eval()
    classifier = NFN(wiring, 4, head_width=6, **settings).double().eval()
    moved, expected = editor(permute(graph, orders)), permute(editor(graph), orders)
    for g in orders:
        order = {g: orders[g]}  # the encodings of both ends count
        assert torch.allclose(classifier(permute(graph, order)), classifier(graph), atol=1e-9) == equivariant
    for ours, theirs in zip((moved.edges[0], moved.edges[-1]), (expected.edges[0], expected.edges[-1]), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9) == equivariant


@pytest.mark.parametrize("model_class", [EquivariantDWSNet, EquivariantNFN])
def test_the_symmetry_of_a_traced_cnn_moves_outputs_along(model_class):
    """The wiring's own group, found by tracing, acting on state dicts: with changes added both networks agree."""
    torch.manual_seed(0)
    network = CNN((1, 4, 3), 2, (3, 3)).double()
    wiring, images = cnn((1, 4, 3), 2, (3, 3)), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    state = {name: values.detach()[None] for name, values in network.named_parameters()}
    model = model_class(wiring).double().eval()
    orders = wiring.symmetry.random()
    permuted = wiring.symmetry.permute(state, orders)
    changes, moved = (model(wiring.graph(own)).state_dict() for own in (state, permuted))
    for name, values in wiring.symmetry.permute(changes, orders).items():
        torch.testing.assert_close(moved[name], values, rtol=1e-9, atol=1e-9)
    images_of = [
        torch.func.functional_call(network, {name: own[name][0] + change[name][0] for name in own}, images)
        for own, change in ((state, changes), (permuted, moved))
    ]
    torch.testing.assert_close(*images_of, rtol=1e-9, atol=1e-9)
    assert (images_of[0] - network(images)).abs().max() > 1e-3


@each_group
def test_a_network_alone_and_in_a_batch_give_the_same_output(group):
    torch.manual_seed(0)
    wiring = mlp([2, 4, 3, 1])
    graph = random_graph(wiring, 4)
    editor = EquivariantNFN(wiring, group=group, **SMALL).double()  # in training mode too: it has no batch norm
    assert_same_graph(editor(graph)[1:2], editor(graph[1:2]))


@each_group
def test_every_parameter_is_read_and_changed(group):
    torch.manual_seed(0)
    for wiring in (mlp([2, 4, 3, 2]), partly_biased((2, 4, 3, 2), (1,)), cnn((1, 3, 2), 2, (2, 2))):
        state = {n: torch.randn(6, *shape, requires_grad=True) for n, shape in wiring.shapes.items()}
        model = EquivariantNFN(wiring, group=group, **SMALL)
        changes = model(wiring.graph(state))
        assert all(x.abs().max() == 0 for x, own in zip(changes.nodes, wiring.groups, strict=True) if own.bias is None)
        assert {name: values.shape for name, values in changes.state_dict().items()} == {
            name: values.shape for name, values in state.items()
        }
        sum(values.square().sum() for values in changes.state_dict().values()).backward()
        assert all((values.grad.abs().amax(0) > 0).all() for values in state.values())
        assert all((parameter.grad != 0).any() for parameter in model.parameters())


@each_group
def test_fourier_features_enter_per_scalar(group):
    torch.manual_seed(0)
    wiring = mlp([2, 4, 3, 1])
    graph, orders = random_graph(wiring, 5), random_permutations(wiring)
    model = EquivariantNFN(wiring, group=group, frequencies=4, **SMALL).double()
    assert model.layers[0].maps[0].in_features == 8 * sum(model.space.multiplicity)
    assert_same_graph(model(permute(graph, orders)), permute(model(graph), orders))
    again = EquivariantNFN(wiring, group=group, frequencies=4, **SMALL).double()
    again.load_state_dict(model.state_dict())
    assert_same_graph(again(graph), model(graph), tolerance=0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: NFN(INR, 3),
        lambda: NFN(INR, 3, group="NP"),
        lambda: EquivariantNFN(INR),
        lambda: EquivariantNFN(INR, group="NP"),
        lambda: EquivariantDWSNet(INR),
    ],
    ids=["NFN HNP", "NFN NP", "EquivariantNFN HNP", "EquivariantNFN NP", "EquivariantDWSNet"],
)
def test_autocast_gives_about_the_same(build):
    """Relative error of the outputs: 0.3 to 1.5 % in the median over 25 draws of weights and inputs, 6 % at most."""
    torch.manual_seed(0)
    model = build().eval()
    graph = random_graph(INR, 8).map(torch.Tensor.float)
    expected = model(graph)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(graph)
    pairs = [(found, expected)] if isinstance(model, NFN) else zip(found.edges, expected.edges, strict=True)
    for ours, theirs in pairs:
        assert 0 < (ours.float() - theirs).norm() < 0.15 * theirs.norm()


@each_group
def test_outputs_start_at_order_one_tenth(group):
    """No normalization stands between the layers; the initialization alone keeps numbers from vanishing."""
    torch.manual_seed(0)
    graph = random_graph(INR, 16).map(torch.Tensor.float)
    changes = EquivariantNFN(INR, group=group)(graph)
    for x in (*changes.edges, *changes.nodes[1:]):
        assert 0.03 < x.std() < 0.3


def stated_counts(model_class: type) -> list[int]:
    """The numbers in thousands and millions that the docstring states."""
    return [int(number.replace(",", "")) for number in re.findall(r"\b\d+,\d{3}(?:,\d{3})?\b", model_class.__doc__)]


def test_parameter_counts_are_those_stated():
    for model_class, models in (
        (NFN, [NFN(INR, 10, group=g) for g in GROUPS]),
        (EquivariantNFN, [EquivariantNFN(INR, group=g) for g in GROUPS]),
    ):
        assert stated_counts(model_class) == [sum(p.numel() for p in model.parameters()) for model in models]


def test_the_invariant_form_reads_the_small_cnn_zoo():
    zoo = cnn((1, 16, 16, 16), 10, (3, 3), 2)
    graph = random_graph(zoo, 2).map(torch.Tensor.float)
    assert NFN(zoo, 1, channels=(16, 16, 5), head_width=64).eval()(graph).shape == (2, 1)


@pytest.mark.parametrize("model_class", [EquivariantDWSNet, EquivariantNFN])
def test_another_wiring_is_refused(model_class):
    model = model_class(mlp([2, 5, 4, 3]))
    other = random_graph(mlp([2, 5, 5, 3]), 2)
    for read in (model, model.fit_normalization):
        with pytest.raises(ValueError, match=r"\[2, 5, 4, 3\].*\[2, 5, 5, 3\]"):
            read(other)
