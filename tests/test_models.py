"""NG-GNN and NG-T against plain statements of the same models; their sizes, precision and gradients."""

from dataclasses import replace

import pytest
import torch
from cnns import RESIDUAL, SHALLOW, GroupedCNN, architectures, random_graphs, wiring_of
from hypothesis import given, settings
from hypothesis import strategies as st
from metanetworks import (
    HEADS,
    PLAIN,
    answers,
    assert_same,
    assert_same_gradients,
    distance,
    everything,
    fitted,
    plain_answers,
    plain_of,
    random_batch,
)
from torch import nn

from ngcore.data.zoos.cnn import ACTIVATIONS
from ngcore.data.zoos.wild_park import draw_architecture
from ngcore.graph import Wiring, cnn, mlp, trace
from ngcore.graph.collection import Collection
from ngcore.graph.frame import Frame
from ngcore.graph.structure import Block, Group
from ngcore.models import CNN_WIDTHS, NGGNN, NGT, PerParameter, Scores

INR = mlp([2, 32, 32, 1], "siren")
WILD_PARK = Frame((7, 7), 3, 10, 5, tuple(sorted(ACTIVATIONS)))
FRAME = replace(WILD_PARK, outputs=2, layers=4)
each_model = pytest.mark.parametrize("model", [NGGNN, NGT])
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


@pytest.mark.parametrize(
    ("model", "networks", "head", "options", "count"),
    [
        (NGGNN, INR, Scores(10), {}, 331_466),  # of the paper (appendix D.1)
        (NGGNN, INR, Scores(10), {"probes": 64}, 348_746),  # of the paper
        (NGGNN, WILD_PARK, Scores(), {"sigma": 1.0, "activations": True}, 369_025),  # of the paper (appendix D.2)
        (NGGNN, WILD_PARK, Scores(), {"sigma": None, "activations": True}, 345_729),
        (NGGNN, INR, PerParameter(), {"sigma": None}, 306_882),
        (NGGNN, INR, PerParameter(), {"sigma": None, "probes": 64}, 324_162),
        (NGT, INR, Scores(10), {}, 376_586),
        (NGT, INR, Scores(10), {"probes": 64}, 393_866),
        (NGT, INR, PerParameter(), {}, 385_890),
        (NGT, INR, PerParameter(), {"probes": 64}, 403_170),
    ],
)
def test_parameter_counts(model, networks, head, options, count):
    frame = Frame.of([INR]) if networks is INR else networks
    fast, plain = model(networks, head, **options), PLAIN[model](frame, head, **options)
    for form in (fast, plain):
        assert sum(p.numel() for p in form.parameters()) == count
    plain.load_state_dict(fast.state_dict())
    fast.load_state_dict(plain.state_dict())


def test_the_frame_of_the_wild_park():
    wirings = []
    for run in range(100):
        a = draw_architecture(0, run)
        wirings.append(cnn(a.channels, a.kernel_size, a.activation, a.residual, a.classes))
    assert Frame.of(wirings) == WILD_PARK


@each_model
@each_head
@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=3, max_size=4), st.sampled_from([0, 3]), st.sampled_from([None, 3.0]),
    st.booleans(),
)  # fmt: skip
def test_agrees_with_the_plain_form_on_mlps(model, head, sizes, probes, sigma, positions):
    torch.manual_seed(0)
    graph = random_batch(mlp(sizes, "siren"))
    options = dict(probes=probes, sigma=sigma, positions=positions)
    fast = fitted(model, graph, head, **options)
    assert_agree(fast, plain_of(fast, head, **options), graph, [graph])


def assert_agree(fast, plain, networks, graphs):
    """The same answers and gradients in float64."""
    found, wanted = answers(fast, networks), plain_answers(plain, graphs, fast.frame)
    assert_same(found, wanted)
    assert_same_gradients(fast, plain, found, wanted)


@each_model
@each_head
@settings(max_examples=6, deadline=None)
@given(
    st.lists(architectures(), min_size=1, max_size=3, unique_by=str), st.sampled_from([None, 1.0]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_agrees_with_the_plain_form_on_cnns(model, head, found, sigma, positions, activations):
    graphs = random_graphs(map(wiring_of, found), [2] * len(found))
    options = dict(sigma=sigma, positions=positions, activations=activations)
    options |= {"widths": CNN_WIDTHS} if model is NGT else {}
    networks = Collection(graphs, FRAME)
    fast = fitted(model, networks, head, **options)
    assert_agree(fast, plain_of(fast, head, **options), everything(networks), graphs)


@each_model
@each_head
def test_agrees_with_the_plain_form_on_other_networks(model, head):
    """Parallel edges, normalization, groups of channels, flattened locations, an input that nothing reads."""
    read = dict(source_nodes=(0, 2))
    blocks = Block(0, 1, "weight", **read), Block(0, 1, None, "residual", groups=2, **read)
    groups = Group(3, "input", 0), Group(2, "output", 1)
    wirings = [trace(GroupedCNN().eval(), torch.randn(2, 3, 9, 9)), mlp([3, 5, 4, 1], "relu"), RESIDUAL]
    wirings += [cnn((3, 2), (3,), ("relu",), (-1,), 2, pool=2), Wiring(groups, blocks, (("weight", (2, 2)),))]
    graphs = random_graphs(wirings, [2, 2, 1, 1, 2])
    networks = Collection(graphs)
    fast = fitted(model, networks, head)
    plain = plain_of(fast, head)
    assert_agree(fast, plain, everything(networks), graphs)
    for graph in graphs:
        with torch.no_grad():
            assert_same(answers(fast, graph), plain_answers(plain, [graph], networks.frame))


@each_model
@each_head
def test_agrees_with_the_plain_form_in_float32_at_full_size(model, head):
    torch.manual_seed(1)
    graph = random_batch(INR, 2, torch.float32)
    fast = fitted(model, graph, head, torch.float32, probes=4)
    plain = plain_of(fast, head, probes=4)
    found, wanted = answers(fast, graph), plain_answers(plain, [graph], fast.frame)
    assert_same(found, wanted, 3e-5 * max(values.abs().max().item() for own in wanted for values in own.values()))
    for own in (found, wanted):
        sum(values.square().sum() for network in own for values in network.values()).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    ours = torch.cat([p.grad.flatten() for p in fast.parameters()])
    theirs = torch.cat([gradients[name].flatten() for name, _ in fast.named_parameters()])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@each_model
def test_bfloat16_is_near_float32(model):
    torch.manual_seed(2)
    graph = random_batch(INR, 4, torch.float32)
    metanetwork = fitted(model, graph, Scores(10), torch.float32)
    scores = metanetwork(graph)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = metanetwork(graph)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - scores).norm() < 0.05 * scores.norm()


@each_model
def test_gradients_of_parts_add_up(model, random_graph):
    """Nothing mixes networks, so a batch may be worked on in parts."""
    graph = random_graph(mlp([2, 4, 3, 1], "siren"), 6)
    metanetwork = fitted(model, graph, Scores(3))
    metanetwork(graph).square().sum().backward()
    whole = [p.grad.clone() for p in metanetwork.parameters()]
    metanetwork.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        metanetwork(graph[part]).square().sum().backward()
    for parameter, gradient in zip(metanetwork.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-10)


@each_model
@each_head
def test_forward_leaves_its_input_alone(model, head, random_graph):
    graph = random_graph(mlp([2, 3, 1], "siren"))
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    fitted(model, graph, head, probes=2)(graph)
    assert all(torch.equal(before[name], value) for name, value in graph.state_dict().items())


@each_model
@each_head
@pytest.mark.parametrize("sigma", [None, 1.0])
def test_gradients_reach_every_parameter(model, head, sigma):
    networks = Collection(random_graphs([RESIDUAL, SHALLOW], [2, 2]))
    metanetwork = fitted(model, networks, head, sigma=sigma, dropout=0.1)
    found = answers(metanetwork, everything(networks))
    sum(values.square().sum() for own in found for values in own.values()).backward()
    for name, parameter in metanetwork.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@each_model
def test_dropout_acts_in_training_alone(model):
    networks = Collection(random_graphs([RESIDUAL, SHALLOW], [1, 1]))
    metanetwork, batch = fitted(model, networks, Scores(2), dropout=0.5), everything(networks)
    with torch.no_grad():
        assert not torch.equal(metanetwork(batch), metanetwork(batch))
        metanetwork.eval()
        assert torch.equal(metanetwork(batch), metanetwork(batch))


@each_model
def test_nan_stays_in_its_network(model):
    graphs = random_graphs([RESIDUAL, SHALLOW], [2, 2])
    networks = Collection(graphs)
    metanetwork = fitted(model, networks, Scores(2)).eval()
    before = metanetwork(everything(networks))
    state = graphs[0].state_dict()
    state["layers.1.weight"][1] = float("nan")
    after = metanetwork(everything(Collection([RESIDUAL.graph(state), graphs[1]], networks.frame)))
    assert after[1].isnan().all()
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=0, atol=1e-12)


@each_model
@pytest.mark.parametrize("residual", [(-1, -1, -1, 0), (-1, -1, -1, 1), (-1,) * 4, (-1, -1, 0, 0)])
def test_skip_connections_are_read(model, residual):
    """The same parameters in CNNs of other descriptions."""
    description = dict(channels=(3, 4, 4, 4, 4), kernel_size=(3,) * 4, activation=("relu",) * 4, classes=2)
    (graph,) = random_graphs([cnn(**description, residual=(-1, -1, 0, -1))], [2])
    other = cnn(**description, residual=residual).graph(graph.state_dict())
    networks = Collection([graph, other])
    with torch.no_grad():
        scores = fitted(model, networks, Scores(2))(everything(networks))
    assert (scores[:2] - scores[2:]).abs().amax(1).min() > 1e-7


@each_model
@pytest.mark.parametrize("sigma", [None, 1.0])
def test_where_the_numbers_of_a_kernel_lie_is_read(model, sigma):
    """A frame of zeros around a kernel is many more weights, which standardization moves away from 0 as all others."""
    small, large = (cnn((3, 4, 4), (3, k), ("relu", "relu"), (-1, -1), 2) for k in (3, 5))
    state = random_graphs([small], [1])[0].state_dict()
    kernel = state["layers.1.weight"]
    inside = small.graph(state)
    around = large.graph(state | {"layers.1.weight": nn.functional.pad(kernel, (1, 1, 1, 1))})
    corner = large.graph(state | {"layers.1.weight": nn.functional.pad(kernel, (0, 2, 0, 2))})
    turned = small.graph(state | {"layers.1.weight": kernel.transpose(3, 4)})
    networks = Collection([inside, around, corner, turned], FRAME)
    with torch.no_grad():
        torch.manual_seed(0)
        unfitted = model(FRAME, Scores(2), sigma=sigma, normalization="none", dropout=0.0).double()
        inside, around, corner, _ = answers(unfitted, everything(networks))
        assert distance(around, inside) < 1e-12
        assert distance(corner, around) > 1e-7
        inside, *others = answers(fitted(model, networks, Scores(2), sigma=sigma), everything(networks))
    assert min(distance(other, inside) for other in others) > 1e-7
