"""Editors of every method: symmetry of what they make, scales, gradients, one network at a time, kernels."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metanetworks import PLAIN, plain_inputs, random_batch
from torch import nn

from ngcore.data.inrs.siren import render
from ngcore.graph import mlp, trace
from ngcore.models import NGGNN, NGT, Editor, PerParameter
from ngcore.models.baselines import ConstantEdit, EquivariantDWSNet, EquivariantNFN
from ngcore.models.editing import outputs_first
from ngcore.reference.editing import PlainEditor

INR = mlp([2, 32, 32, 1], "siren")
SMALL = mlp([2, 5, 4, 1], "siren")  # drawn as an INR is


def equivariant(model, **options):
    """(wiring, numbers) -> a model with so many numbers per parameter."""
    return lambda wiring, numbers=1: model(wiring, PerParameter(numbers), dropout=0.0, **options)


BASELINES = {
    "DWSNet": EquivariantDWSNet,
    "DWSNet, mean": partial(EquivariantDWSNet, reduction="mean"),
    "NFN, HNP": EquivariantNFN,
    "NFN, NP": partial(EquivariantNFN, group="NP"),
}
METHODS = {
    "NG-GNN": equivariant(NGGNN),
    "NG-GNN, probes": equivariant(NGGNN, probes=3),
    "NG-T": equivariant(NGT),
    "NG-T, probes": equivariant(NGT, probes=3),
    **BASELINES,
}
baselines = pytest.mark.parametrize("method", BASELINES.values(), ids=BASELINES)  # the others: see `test_contract`
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def permuted(graph):
    """The same functions, and how their neurons were reordered."""
    symmetry = graph.wiring.symmetry
    permutations = symmetry.random()
    return graph.wiring.graph(symmetry.permute(graph.state_dict(), permutations)), permutations


def numbers(model, graph):
    """What a model says of every parameter, (outputs, batch, *its shape)."""
    return outputs_first(model(graph), graph).state_dict()


def editor_of(method, wiring, outputs, graph):
    """An editor in float64 whose changes can be seen, each layer's of another size."""
    torch.manual_seed(0)
    editor = Editor(method(wiring, outputs)).double()
    editor.fit_normalization(graph)
    with torch.no_grad():
        for scale in (editor.node_scale, editor.edge_scale):
            scale.uniform_(0.02, 0.1)
    return editor


def with_networks_apart(model):
    """A model in training mode; with running statistics where batch norm would read the whole batch."""
    return model.train(not any(isinstance(part, torch.nn.BatchNorm1d) for part in model.modules()))


@pytest.mark.parametrize(("method", "count"), [(EquivariantDWSNet, 315_367), (EquivariantNFN, 353_815)])
def test_parameter_counts(method, count):
    model = method(INR)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in Editor(model).parameters()) == count + 4 + 3


@baselines
@pytest.mark.parametrize("training", [True, False])
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=3, max_size=5), st.sampled_from([1, 2]))
def test_numbers_permute_with_the_neurons(method, training, sizes, outputs):
    torch.manual_seed(0)
    graph = random_batch(mlp(sizes, "siren"))
    model = method(graph.wiring, outputs).double().train(training)
    model.fit_normalization(graph)
    twins, permutations = permuted(graph)
    found = numbers(model, twins)
    expected = graph.wiring.symmetry.permute(numbers(model, graph), permutations)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-9)
        assert (values[:, 0] - values[:, 1]).abs().max() > 1e-4, name  # it does see the weights
    hidden = expected["layers.0.weight"]
    assert (hidden[:, :, 0] - hidden[:, :, 1]).abs().max() > 1e-4  # and tells neurons apart


@methods
def test_an_edited_image_does_not_depend_on_the_neurons_order(method):
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    editor = editor_of(method, SMALL, 2, graph)
    images = render(editor(graph).state_dict())
    assert images.shape == (2, 3, 28, 28)
    twins, _ = permuted(graph)
    torch.testing.assert_close(render(editor(twins).state_dict()), images, rtol=0, atol=1e-9)
    assert (images - render(graph.state_dict())).abs().amax((2, 3)).min() > 1e-3  # each was edited
    assert (images[0] - images[1]).abs().max() > 1e-3  # by each output in its own way


def test_the_constant_edit_does_not_know_the_neurons_order():
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    editor = ConstantEdit(SMALL).double()
    for parameter in editor.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    twins, permutations = permuted(graph)
    found = editor(twins).state_dict()
    for name, values in SMALL.symmetry.permute(editor(graph).state_dict(), permutations).items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0)


@baselines
def test_a_network_does_not_depend_on_its_batch(method):
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    model = with_networks_apart(method(SMALL, 2).double())
    model.fit_normalization(graph)
    together = numbers(model, graph)
    alone = [numbers(model, graph[i : i + 1]) for i in range(3)]
    for name, values in together.items():
        torch.testing.assert_close(torch.cat([one[name] for one in alone], dim=1), values, rtol=0, atol=1e-9)


@methods
def test_changes_are_scaled_by_layer_and_kind(method):
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    editor = editor_of(method, SMALL, 2, graph)
    said, edited = numbers(editor.metanetwork, graph), editor(graph).state_dict()
    for i in range(3):
        for kind, scale in (("weight", editor.edge_scale[i]), ("bias", editor.node_scale[i + 1])):
            name = f"layers.{i}.{kind}"
            expected = graph.state_dict()[name] + scale * said[name]
            torch.testing.assert_close(edited[name], expected, rtol=0, atol=1e-12)
    assert not editor(graph).nodes[0].any()  # input neurons have no bias to change


@methods
def test_every_parameter_gets_a_gradient(method):
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    editor = with_networks_apart(editor_of(method, SMALL, 2, graph))
    render(editor(graph).state_dict()).square().mean().backward()
    for name, parameter in editor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name
        if name.endswith(".positions"):
            assert parameter.grad.any(1).all(), name
    assert editor.edge_scale.grad.all()
    assert editor.node_scale.grad.nonzero().flatten().tolist() == [1, 2, 3]  # the input has no biases to scale


@pytest.mark.parametrize(
    "method", [EquivariantNFN, equivariant(NGGNN), equivariant(NGT)], ids=["NFN", "NG-GNN", "NG-T"]
)
def test_kernels_are_edited_by_position(method):
    """Of a convolution an edge holds several numbers, and the metanetwork says k of each."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, (1, 3))).double()
    wiring = trace(network, torch.zeros(1, 2, 7, 7, dtype=torch.float64))
    state = {name: torch.randn(4, *shape, dtype=torch.float64) for name, shape in wiring.shapes.items()}
    graph = wiring.graph(state)
    editor = editor_of(method, wiring, 2, graph)
    edited = editor(graph).state_dict()
    said = editor.metanetwork(graph).edges[1]
    for k in range(2):
        change = said[..., k::2].unflatten(-1, (1, 3))  # the two numbers of a position stand side by side
        torch.testing.assert_close(edited["2.weight"][k], state["2.weight"] + editor.edge_scale[1] * change)
    permutations = wiring.symmetry.random()
    twins = editor(wiring.graph(wiring.symmetry.permute(state, permutations))).state_dict()
    for name, values in wiring.symmetry.permute(edited, permutations).items():
        torch.testing.assert_close(twins[name], values, rtol=0, atol=1e-9)


@baselines
def test_forward_leaves_its_input_alone(method):
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    Editor(method(SMALL)).double()(graph)
    assert all(torch.equal(before[name], value) for name, value in graph.state_dict().items())


@pytest.mark.parametrize("model", [NGGNN, NGT])
def test_editor_agrees_with_one_network_at_a_time(model):
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    fast = editor_of(equivariant(model, probes=3), SMALL, 2, graph)
    frame = fast.metanetwork.frame
    plain = PlainEditor(PLAIN[model](frame, PerParameter(2), dropout=0.0, probes=3), SMALL).double()
    plain.load_state_dict(fast.state_dict())
    networks = [graph[n].state_dict() for n in range(3)]
    inputs = plain_inputs(plain.metanetwork, [graph], frame)
    images, expected = render(fast(graph).state_dict()), plain(inputs, networks)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-9)
    images.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-8)
