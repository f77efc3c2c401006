"""NG-GNN and NG-T: symmetry, independence of the batch, and agreement with the plain statements of the same models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import permute, random_permutations
from torch import nn

from ngcore.graph import NeuralGraph, mlp, trace
from ngcore.graph.simulate import activations
from ngcore.models import NGGNN, NGT
from ngcore.models.encoder import ProbeFeatures, Standardize
from ngcore.reference.ng_gnn import PlainNGGNN, to_batch
from ngcore.reference.ng_t import PlainNGT

INR = mlp([2, 32, 32, 1], "siren")
MODELS = [NGGNN, NGT]
PLAIN = {NGGNN: (PlainNGGNN, to_batch), NGT: (PlainNGT, lambda graph: graph)}


def plain_name(name: str) -> str:
    """The plain models keep one flat list of modules per layer."""
    return name.replace("standardize.", "").replace(".attention.", ".")


def pair(model, wiring, graph, dtype, **options):
    """A fast model and its plain version with the same weights."""
    torch.manual_seed(0)
    fast = model(wiring, 10, dropout=0.0, **options).to(dtype)
    fast.fit_normalization(graph)
    plain = PLAIN[model][0](wiring, 10, dropout=0.0, **options).to(dtype)
    plain.load_state_dict({plain_name(name): value for name, value in fast.state_dict().items()})
    return fast, plain


def random_batch(wiring, count, dtype=torch.float64):
    return wiring.graph({n: 0.3 * torch.randn(count, *s, dtype=dtype) for n, s in wiring.shapes.items()})


@pytest.mark.parametrize(
    ("model", "probes", "count"), [(NGGNN, 0, 331_466), (NGGNN, 64, 348_746), (NGT, 0, 376_586), (NGT, 64, 393_866)]
)
def test_parameter_counts(model, probes, count):
    assert sum(p.numel() for p in model(INR, 10, probes=probes).parameters()) == count


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("training", [True, False])
@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=3, max_size=5), st.sampled_from([0, 3]))
def test_invariant_to_neuron_permutations_and_to_the_batch(model, training, sizes, probes):
    wiring = mlp(sizes, "siren")
    graph = random_batch(wiring, 3)
    metanetwork = model(wiring, 7, probes=probes, dropout=0.0).double().train(training)
    metanetwork.fit_normalization(graph)
    scores = metanetwork(graph)
    twins = metanetwork(permute(graph, random_permutations(wiring)))
    torch.testing.assert_close(twins, scores, rtol=0, atol=1e-9)
    alone = torch.cat([metanetwork(graph[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-9)
    assert (scores[0] - scores[1]).abs().max() > 1e-4  # it does see the weights


@pytest.mark.parametrize("model", MODELS)
def test_positions_tell_input_neurons_apart(model, random_graph):
    wiring = mlp([3, 4, 2], "tanh")
    graph = random_graph(wiring)
    flipped = NeuralGraph(wiring, graph.nodes, (graph.edges[0].flip(2), graph.edges[1]))
    for positions in (True, False):
        metanetwork = model(wiring, 5, positions=positions).double().eval()
        difference = (metanetwork(graph) - metanetwork(flipped)).abs().max()
        assert difference > 1e-5 if positions else difference < 1e-9


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("probes", [0, 3])
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=4))
def test_agrees_with_the_plain_form_in_float64(model, probes, sizes):
    wiring = mlp(sizes, "siren")
    graph = random_batch(wiring, 3)
    fast, plain = pair(model, wiring, graph, torch.float64, probes=probes)
    ours, theirs = fast(graph), plain(PLAIN[model][1](graph))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[plain_name(name)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_agrees_with_the_plain_form_in_float32_at_full_size(model):
    torch.manual_seed(1)
    graph = random_batch(INR, 4, torch.float32)
    fast, plain = pair(model, INR, graph, torch.float32, probes=4)
    ours, theirs = fast(graph), plain(PLAIN[model][1](graph))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    names = [name for name, _ in fast.named_parameters()]
    wanted = dict(plain.named_parameters())
    found = torch.cat([p.grad.flatten() for p in fast.parameters()])
    reference = torch.cat([wanted[plain_name(name)].grad.flatten() for name in names])
    assert (found - reference).norm() < 1e-4 * reference.norm()


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_near_float32(model):
    torch.manual_seed(2)
    graph = random_batch(INR, 4, torch.float32)
    metanetwork = model(INR, 10, dropout=0.0)
    scores = metanetwork(graph)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = metanetwork(graph)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - scores).norm() < 0.05 * scores.norm()


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_parts_add_up(model, random_graph):
    """Nothing mixes networks, so a batch may be worked on in parts."""
    wiring = mlp([2, 4, 3, 1], "siren")
    graph = random_graph(wiring, 6)
    metanetwork = model(wiring, 3, dropout=0.0).double()
    metanetwork(graph).square().sum().backward()
    whole = [p.grad.clone() for p in metanetwork.parameters()]
    metanetwork.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        metanetwork(graph[part]).square().sum().backward()
    for parameter, gradient in zip(metanetwork.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", MODELS)
def test_forward_leaves_its_input_alone(model, random_graph):
    graph = random_graph(mlp([2, 3, 1], "siren"))
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    model(graph.wiring, 3, probes=2).double()(graph)
    assert all(torch.equal(before[name], value) for name, value in graph.state_dict().items())


def test_probe_features_against_a_loop(random_graph):
    wiring = mlp([2, 3, 2, 1], "siren")
    graph = random_graph(wiring)
    probe = ProbeFeatures(wiring, 5, 8).double()
    found = probe(graph)
    for n in range(graph.num_networks):
        values = activations(graph[n], probe.points)
        rows = []
        for g, group in enumerate(wiring.groups):
            for i in range(group.size):
                rows.append(probe.norm[g](probe.project[g](values[g][i])))
        torch.testing.assert_close(found[n], torch.stack(rows), rtol=0, atol=1e-12)


def test_standardized_layers_have_mean_0_and_deviation_1(random_graph):
    wiring = mlp([2, 5, 1])
    graph = random_graph(wiring, 50).map(lambda tensor: tensor * 7 + 3)
    standardize = Standardize(wiring).double()
    standardize.fit(graph)
    for name, values in standardize(graph).state_dict().items():
        assert values.mean().item() == pytest.approx(0, abs=1e-5), name
        assert values.std(correction=0).item() == pytest.approx(1, abs=1e-5), name


def test_constant_parameters_are_left_finite(random_graph):
    wiring = mlp([2, 3, 1])
    graph = random_graph(wiring).map(torch.ones_like)
    standardize = Standardize(wiring).double()
    standardize.fit(graph)
    assert all(torch.isfinite(values).all() for values in standardize(graph).state_dict().values())


def test_nan_is_named(random_graph):
    graph = random_graph(mlp([2, 3, 1]))
    graph.edges[1][2, 0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.weight of network 2"):
        Standardize(graph.wiring).fit(graph)


class Added(torch.nn.Module):
    """Edges without weights lead to the sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_networks_that_are_no_mlps_are_refused():
    normalized = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1)).eval()
    wiring = trace(normalized, torch.randn(5, 2))
    for model in MODELS:
        with pytest.raises(ValueError, match=r"normalization block of 1\.weight.*HeterogeneousNGT"):
            model(wiring, 3)
        with pytest.raises(ValueError, match="residual block of groups 1 -> 2"):
            model(trace(Added(), torch.randn(5, 2)), 3)
        model(trace(torch.nn.Sequential(normalized[0], torch.nn.Tanh(), normalized[2]), torch.randn(5, 2)), 3)


@pytest.mark.parametrize("model", MODELS)
def test_graphs_without_a_batch_axis_are_refused(model, random_graph):
    graph = random_graph(mlp([2, 3, 1]))
    with pytest.raises(ValueError, match="one batch axis, of their networks, not 0"):
        model(graph.wiring, 3).double()(graph[0])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.one(x), self.other(x)


def test_several_layers_of_outputs():
    network = TwoHeads()
    wiring = trace(network, torch.randn(5, 2))
    graph = wiring.graph({name: values.detach().unsqueeze(0) for name, values in network.state_dict().items()})
    assert NGGNN(wiring, 10)(graph).shape == (1, 10)
    with pytest.raises(ValueError, match="one layer of outputs, and this network has 2: use NGGNN"):
        NGT(wiring, 10)
