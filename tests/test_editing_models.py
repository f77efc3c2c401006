"""Models with numbers for every parameter, and the editor: symmetry, plain statements of the same, rendering."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ngcore.data.inrs.siren import render
from ngcore.graph import NeuralGraph, mlp, trace
from ngcore.models import Editor, EquivariantNGGNN, EquivariantNGT
from ngcore.models.baselines import EquivariantDWSNet, EquivariantNFN
from ngcore.models.editing import outputs_first
from ngcore.reference.editing import PlainEditor
from ngcore.reference.ng_gnn import PlainEquivariantNGGNN, to_batch
from ngcore.reference.ng_t import PlainEquivariantNGT

INR = mlp([2, 32, 32, 1], "siren")
SMALL = mlp([2, 5, 4, 1], "siren")  # drawn as an INR is
MODELS = [EquivariantNGGNN, EquivariantNGT]
PLAIN = {
    EquivariantNGGNN: (PlainEquivariantNGGNN, to_batch),
    EquivariantNGT: (PlainEquivariantNGT, lambda graph: graph),
}
METHODS = {
    "NG-GNN": partial(EquivariantNGGNN, dropout=0.0),
    "NG-GNN, probes": partial(EquivariantNGGNN, dropout=0.0, probes=3),
    "NG-T": partial(EquivariantNGT, dropout=0.0),
    "NG-T, probes": partial(EquivariantNGT, dropout=0.0, probes=3),
    "DWSNet": EquivariantDWSNet,
    "DWSNet, mean": partial(EquivariantDWSNet, reduction="mean"),
    "NFN, HNP": EquivariantNFN,
    "NFN, NP": partial(EquivariantNFN, group="NP"),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def random_batch(wiring, count=3, dtype=torch.float64):
    return wiring.graph({n: 0.3 * torch.randn(count, *s, dtype=dtype) for n, s in wiring.shapes.items()})


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


def plain_name(name):
    """The plain models keep one flat list of modules per layer."""
    return name.replace("standardize.", "").replace(".attention.", ".")


def pair(model, wiring, outputs, graph, **options):
    """A fast model and its plain version with the same weights."""
    fast = model(wiring, outputs, dropout=0.0, **options).to(graph.edges[0])
    fast.fit_normalization(graph)
    plain = PLAIN[model][0](wiring, outputs, dropout=0.0, **options).to(graph.edges[0])
    plain.load_state_dict({plain_name(name): value for name, value in fast.state_dict().items()})
    return fast, plain


def plain_numbers(model, plain, graph):
    return {name: values.movedim(-1, 0) for name, values in plain(PLAIN[model][1](graph)).items()}


def backward(found):
    sum(values.square().sum() for values in found.values()).backward()


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (EquivariantNGGNN(INR), 306_882),
        (EquivariantNGGNN(INR, probes=64), 324_162),
        (EquivariantNGT(INR), 385_890),
        (EquivariantNGT(INR, probes=64), 403_170),
        (EquivariantDWSNet(INR), 315_367),
        (EquivariantNFN(INR), 353_815),
    ],
    ids=["NG-GNN", "NG-GNN, probes", "NG-T", "NG-T, probes", "DWSNet", "NFN"],
)
def test_parameter_counts(model, count):
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in Editor(model).parameters()) == count + 4 + 3


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=3, max_size=4),
    st.sampled_from([0, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 3.0]),
    st.booleans(),
)
def test_agrees_with_the_plain_form_in_float64(model, sizes, probes, outputs, sigma, positions):
    torch.manual_seed(0)
    graph = random_batch(mlp(sizes, "siren"))
    fast, plain = pair(model, graph.wiring, outputs, graph, probes=probes, sigma=sigma, positions=positions)
    ours, theirs = numbers(fast, graph), plain_numbers(model, plain, graph)
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], rtol=0, atol=1e-9)
    backward(ours)
    backward(theirs)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[plain_name(name)], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_agrees_with_the_plain_form_in_float32_at_full_size(model):
    torch.manual_seed(1)
    graph = random_batch(INR, 2, torch.float32)
    fast, plain = pair(model, INR, 2, graph, probes=4)
    ours, theirs = numbers(fast, graph), plain_numbers(model, plain, graph)
    for name, values in ours.items():
        assert (values - theirs[name]).abs().max() < 1e-5 * theirs[name].abs().max(), name
    backward(ours)
    backward(theirs)
    wanted = dict(plain.named_parameters())
    found = torch.cat([p.grad.flatten() for p in fast.parameters()])
    reference = torch.cat([wanted[plain_name(name)].grad.flatten() for name, _ in fast.named_parameters()])
    assert (found - reference).norm() < 1e-4 * reference.norm()


@methods
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


@methods
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


@pytest.mark.parametrize("model", MODELS)
def test_positions_tell_input_neurons_apart(model):
    torch.manual_seed(0)
    wiring = mlp([3, 4, 2], "tanh")
    graph = random_batch(wiring)
    flipped = NeuralGraph(wiring, graph.nodes, (graph.edges[0].flip(2), graph.edges[1]))
    for positions in (True, False):
        metanetwork = model(wiring, positions=positions).double().eval()
        found, expected = numbers(metanetwork, flipped), numbers(metanetwork, graph)
        found["layers.0.weight"] = found["layers.0.weight"].flip(-1)
        difference = max((found[name] - values).abs().max() for name, values in expected.items())
        assert difference > 1e-5 if positions else difference < 1e-9


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


def test_kernels_are_edited_by_position():
    """Of a convolution an edge holds several numbers, and the metanetwork says k of each."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, (1, 3))).double()
    wiring = trace(network, torch.zeros(1, 2, 7, 7, dtype=torch.float64))
    state = {name: torch.randn(4, *shape, dtype=torch.float64) for name, shape in wiring.shapes.items()}
    graph = wiring.graph(state)
    editor = editor_of(EquivariantNFN, wiring, 2, graph)
    edited = editor(graph).state_dict()
    said = editor.metanetwork(graph).edges[1]
    for k in range(2):
        change = said[..., k::2].unflatten(-1, (1, 3))  # the two numbers of a position stand side by side
        torch.testing.assert_close(edited["2.weight"][k], state["2.weight"] + editor.edge_scale[1] * change)
    permutations = wiring.symmetry.random()
    twins = editor(wiring.graph(wiring.symmetry.permute(state, permutations))).state_dict()
    for name, values in wiring.symmetry.permute(edited, permutations).items():
        torch.testing.assert_close(twins[name], values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_graphs_of_another_wiring_are_refused(model):
    graph = random_batch(SMALL, dtype=torch.float32)
    for other in (mlp([2, 5, 3, 1], "siren"), mlp([2, 5, 4, 1], "tanh")):
        metanetwork = model(other)
        for read in (metanetwork, metanetwork.fit_normalization):
            with pytest.raises(ValueError, match=r"was built for .*, the graph is of .*\[2, 5, 4, 1\] neurons \(siren"):
                read(graph)


@methods
def test_forward_leaves_its_input_alone(method):
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    Editor(method(SMALL)).double()(graph)
    assert all(torch.equal(before[name], value) for name, value in graph.state_dict().items())


@pytest.mark.parametrize("model", MODELS)
def test_editor_agrees_with_one_network_at_a_time(model):
    torch.manual_seed(0)
    graph = random_batch(SMALL)
    fast = editor_of(partial(model, dropout=0.0, probes=3), SMALL, 2, graph)
    plain = PlainEditor(PLAIN[model][0](SMALL, 2, dropout=0.0, probes=3)).double()
    plain.load_state_dict({plain_name(name): value for name, value in fast.state_dict().items()})
    networks = [graph[n].state_dict() for n in range(3)]
    images, expected = render(fast(graph).state_dict()), plain(PLAIN[model][1](graph), networks)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-9)
    images.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[plain_name(name)], rtol=1e-8, atol=1e-8)
