"""NG-GNN and NG-T on networks of many shapes: the plain form, symmetry, independence of the batch, what is read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cnns import RESIDUAL, SHALLOW, GroupedCNN, architectures, random_graphs, wiring_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ngcore.data.zoos.cnn import ACTIVATIONS
from ngcore.data.zoos.wild_park import draw_architecture
from ngcore.graph import Wiring, mlp, trace
from ngcore.graph.architectures import cnn
from ngcore.graph.batch import Collection, Frame
from ngcore.graph.structure import Block, Group
from ngcore.models.heterogeneous import FrameStandardize, HeterogeneousNGGNN, HeterogeneousNGT, padded
from ngcore.reference.heterogeneous import PlainHeterogeneousNGGNN, PlainHeterogeneousNGT, to_batch, to_data_list

WILD_PARK = Frame((7, 7), 3, 10, 5, tuple(sorted(ACTIVATIONS)))
FRAME = replace(WILD_PARK, outputs=2, layers=4)
MODELS = [HeterogeneousNGGNN, HeterogeneousNGT]
PLAIN = {
    HeterogeneousNGGNN: (PlainHeterogeneousNGGNN, to_batch),
    HeterogeneousNGT: (PlainHeterogeneousNGT, to_data_list),
}
SEVERAL = st.lists(architectures(), min_size=1, max_size=4)


def everything(networks):
    return torch.arange(len(networks))


def fitted(model, networks, dtype=torch.float64, seed=0, **options):
    """A model that standardizes by the statistics of these networks, of which it makes two numbers each."""
    torch.manual_seed(seed)
    metanetwork = model(networks.frame, 2, **options).to(dtype)
    metanetwork.fit_normalization(networks, everything(networks))
    return metanetwork


def plain_name(name):
    """The plain NG-T keeps one flat list of modules per layer."""
    return name.replace(".attention.", ".")


def plain_twin(fast, frame, dtype=torch.float64, **options):
    """The plain version of a model, with its weights."""
    plain = PLAIN[type(fast)][0](frame, 2, **options).to(dtype)
    plain.load_state_dict({plain_name(name): value for name, value in fast.state_dict().items()})
    return plain


def predict(model, *graphs):
    """Of the networks of these batches, each standardized by what the model already knows."""
    networks = Collection(graphs, model.encoder.frame)
    with torch.no_grad():
        return model(networks[everything(networks)])


def test_parameter_counts():
    """The paper's number of NG-GNN's parameters (appendix D.2) is of the model with Fourier features."""
    wirings = []
    for run in range(100):
        a = draw_architecture(0, run)
        wirings.append(cnn(a.channels, a.kernel_size, a.activation, a.residual, a.classes))
    assert Frame.of(wirings) == WILD_PARK
    for sigma, count in ((1.0, 369_025), (None, 345_729)):
        for model in (HeterogeneousNGGNN, PlainHeterogeneousNGGNN):
            assert sum(p.numel() for p in model(WILD_PARK, sigma=sigma).parameters()) == count


def test_either_form_loads_the_others_weights():
    fast, plain = HeterogeneousNGGNN(FRAME, sigma=1.0), PlainHeterogeneousNGGNN(FRAME, sigma=1.0)
    plain.load_state_dict(fast.state_dict())
    fast.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=8, deadline=None)
@given(SEVERAL, st.sampled_from([None, 1.0]), st.booleans(), st.booleans())
def test_agrees_with_the_plain_form_in_float64(model, found, sigma, positions, activations):
    options = dict(sigma=sigma, positions=positions, activations=activations)
    assert_same(model, random_graphs(map(wiring_of, found), [2] * len(found)), FRAME, **options)


def assert_same(model, graphs, frame, **options):
    """The fast and the plain form predict the same, with the same gradients."""
    networks = Collection(graphs, frame)
    fast = fitted(model, networks, **options)
    plain = plain_twin(fast, frame, **options)
    ours, theirs = fast(networks[everything(networks)]), plain(PLAIN[model][1](graphs, frame))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[plain_name(name)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sigma", [None, 1.0])
def test_agrees_with_the_plain_form_in_float32(model, sigma):
    wirings = [RESIDUAL, cnn((3, 8, 16, 8), (7, 3, 5), ("identity", "leaky_relu", "relu"), (-1, -1, 0), 2)]
    graphs = [graph.map(torch.Tensor.float) for graph in random_graphs(wirings, [2, 2])]
    networks = Collection(graphs, FRAME)
    fast = fitted(model, networks, torch.float32, sigma=sigma)
    plain = plain_twin(fast, FRAME, torch.float32, sigma=sigma)
    theirs = plain(PLAIN[model][1](graphs, FRAME))
    torch.testing.assert_close(fast(networks[everything(networks)]), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_agrees_with_the_plain_form_on_other_networks(model):
    """Parallel edges, normalization and groups of channels; an input that nothing reads."""
    read = dict(source_nodes=(0, 2))
    blocks = Block(0, 1, "weight", **read), Block(0, 1, None, "residual", groups=2, **read)
    groups = Group(3, "input", 0), Group(2, "output", 1)
    wirings = [trace(GroupedCNN().eval(), torch.randn(2, 3, 9, 9)), mlp([3, 5, 4, 2], "relu"), RESIDUAL]
    wirings.append(Wiring(groups, blocks, (("weight", (2, 2)),)))
    graphs = random_graphs(wirings, [2, 2, 1, 2])
    assert_same(model, graphs, Collection(graphs).frame, sigma=1.0)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=10, deadline=None)
@given(SEVERAL, st.data())
def test_a_prediction_does_not_depend_on_the_batch(model, found, data):
    networks = Collection(random_graphs(map(wiring_of, found), [2] * len(found)), FRAME)
    rows = data.draw(st.lists(st.integers(0, len(networks) - 1), min_size=1, max_size=6))
    metanetwork = fitted(model, networks)
    for training in (True, False):
        metanetwork.train(training)
        with torch.no_grad():
            together = metanetwork(networks[torch.tensor(rows)])
            alone = torch.cat([metanetwork(networks[torch.tensor([row])]) for row in rows])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=10, deadline=None)
@given(SEVERAL, st.integers(0, 100))
def test_hidden_channels_may_be_permuted(model, found, seed):
    generator = torch.Generator().manual_seed(seed)
    graphs = random_graphs(map(wiring_of, found), [2] * len(found), seed)
    twins = []
    for graph in graphs:
        symmetry = graph.wiring.symmetry
        twins.append(graph.wiring.graph(symmetry.permute(graph.state_dict(), symmetry.random(generator))))
    metanetwork = fitted(model, Collection(graphs, FRAME))
    for training in (True, False):
        metanetwork.train(training)
        torch.testing.assert_close(predict(metanetwork, *twins), predict(metanetwork, *graphs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_input_and_output_neurons_may_not_be_permuted(model):
    (graph,) = random_graphs([RESIDUAL], [2])
    state = graph.state_dict()
    inputs = state | {"layers.0.weight": state["layers.0.weight"].flip(2)}
    ends = state | {name: state[name].flip(1) for name in ("fc.weight", "fc.bias")}
    metanetwork = fitted(model, Collection([graph], FRAME))
    for changed in (inputs, ends):
        assert (predict(metanetwork, RESIDUAL.graph(changed)) - predict(metanetwork, graph)).abs().max() > 1e-6


def relaid(graph, **changes):
    """The same parameters in a CNN of another description."""
    description = dict(
        channels=(3, 4, 4, 4, 4), kernel_size=(3,) * 4, activation=("relu",) * 4, residual=(-1, -1, 0, -1), classes=2
    )
    return cnn(**description | changes).graph(graph.state_dict())


@pytest.fixture
def described():
    return relaid(random_graphs([cnn((3, 4, 4, 4, 4), (3,) * 4, ("relu",) * 4, (-1,) * 4, 2)], [2])[0])


@pytest.mark.parametrize("model", MODELS)
def test_activations_are_read(model, described):
    other = relaid(described, activation=("relu", "relu", "tanh", "relu"))
    for activations in (True, False):
        metanetwork = fitted(model, Collection([described], FRAME), activations=activations)
        found, wanted = predict(metanetwork, other), predict(metanetwork, described)
        if activations:
            assert (found - wanted).abs().amax(1).min() > 1e-7
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("residual", [(-1, -1, -1, 0), (-1, -1, -1, 1), (-1,) * 4, (-1, -1, 0, 0)])
def test_skip_connections_are_read(model, residual, described):
    metanetwork = fitted(model, Collection([described], FRAME))
    found = predict(metanetwork, relaid(described, residual=residual))
    assert (found - predict(metanetwork, described)).abs().amax(1).min() > 1e-7


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sigma", [None, 1.0])
def test_where_the_numbers_of_a_kernel_lie_is_read(model, sigma):
    """A frame of zeros around a kernel is many more weights, which standardization moves away from 0 as all others."""
    small, large = (cnn((3, 4, 4), (3, k), ("relu", "relu"), (-1, -1), 2) for k in (3, 5))
    state = random_graphs([small], [2])[0].state_dict()
    kernel = state["layers.1.weight"]
    inside = small.graph(state)
    around = large.graph(state | {"layers.1.weight": torch.nn.functional.pad(kernel, (1, 1, 1, 1))})
    corner = large.graph(state | {"layers.1.weight": torch.nn.functional.pad(kernel, (0, 2, 0, 2))})
    turned = small.graph(state | {"layers.1.weight": kernel.transpose(3, 4)})
    torch.manual_seed(0)
    unfitted = model(FRAME, 2, sigma=sigma).double()
    torch.testing.assert_close(predict(unfitted, around), predict(unfitted, inside), rtol=0, atol=1e-12)
    metanetwork = fitted(model, Collection([inside], FRAME), sigma=sigma)
    wanted = predict(metanetwork, inside)
    for other in (around, corner, turned):
        assert (predict(metanetwork, other) - wanted).abs().amax(1).min() > 1e-7
    assert (predict(unfitted, corner) - predict(unfitted, around)).abs().amax(1).min() > 1e-7


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_a_network_is_read(model):
    (graph,) = random_graphs([RESIDUAL], [1])
    state = graph.state_dict()
    metanetwork = fitted(model, Collection([graph], FRAME), sigma=1.0)
    before = predict(metanetwork, graph)
    for name, values in state.items():
        count = values.numel()
        changed = values.flatten() + 0.1 * torch.eye(count, dtype=values.dtype)
        stacked = {other: own.repeat(count, *[1] * (own.dim() - 1)) for other, own in state.items()}
        after = predict(metanetwork, RESIDUAL.graph(stacked | {name: changed.view(count, *values.shape[1:])}))
        assert ((after - before).abs().amax(1) > 1e-8).all(), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sigma", [None, 1.0])
def test_gradients_reach_every_parameter(model, sigma):
    graphs = random_graphs([RESIDUAL, SHALLOW], [2, 2])
    networks = Collection(graphs, FRAME)
    metanetwork = fitted(model, networks, sigma=sigma, dropout=0.1)
    metanetwork(networks[everything(networks)]).square().sum().backward()
    for name, parameter in metanetwork.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("model", MODELS)
def test_dropout_acts_in_training_alone(model):
    graphs = random_graphs([RESIDUAL, SHALLOW], [1, 1])
    metanetwork = fitted(model, Collection(graphs, FRAME), dropout=0.5)
    assert not torch.equal(predict(metanetwork, *graphs), predict(metanetwork, *graphs))
    metanetwork.eval()
    assert torch.equal(predict(metanetwork, *graphs), predict(metanetwork, *graphs))


@settings(max_examples=15, deadline=None)
@given(SEVERAL, st.data())
def test_statistics_against_numpy(found, data):
    graphs = random_graphs(map(wiring_of, found), [3] * len(found))
    networks = Collection(graphs, FRAME)
    rows = data.draw(st.lists(st.integers(0, len(networks) - 1), min_size=1, max_size=8))
    standardize = FrameStandardize(FRAME).double()
    standardize.fit(networks, torch.tensor(rows))
    states = [graph[i].state_dict() for graph in graphs for i in range(3)]
    for kind, suffix in (("edge", "weight"), ("node", "bias")):
        found_mean, found_std = getattr(standardize, f"{kind}_mean"), getattr(standardize, f"{kind}_std")
        assert (found_mean[0], found_std[0]) == (0, 1)
        for slot, layer in [(i + 1, f"layers.{i}") for i in range(4)] + [(5, "fc")]:
            name = f"{layer}.{suffix}"
            own = [states[row][name].numpy().ravel() for row in rows if name in states[row]]
            if own:
                values = np.concatenate(own)
                mean, std = values.mean(), values.std() if np.ptp(values) > 0 else 1.0
            # else as of the layer before it, which has the last values
            assert found_mean[slot].item() == pytest.approx(mean, abs=1e-12)
            assert found_std[slot].item() == pytest.approx(std, abs=1e-12)


def test_what_is_no_parameter_is_not_standardized():
    networks = Collection(random_graphs([RESIDUAL, SHALLOW], [3, 3]), FRAME)
    standardize = FrameStandardize(FRAME).double()
    standardize.fit(networks, everything(networks))
    batch = networks[everything(networks)]
    biases, weights = standardize(batch)
    assert not weights[~batch.present].any()
    skips = batch.edge_slot == 0
    assert torch.equal(weights[skips], batch.weights[skips])
    assert weights[skips].sum() == 3 * 4  # channels that a skip connection joins
    assert not biases[batch.node_slot == 0].any()
    for slot in (1, 2, 3, 5):
        own = weights[batch.edge_slot == slot][batch.present[batch.edge_slot == slot]]
        for values in (own, biases[batch.node_slot == slot]):
            assert values.mean().item() == pytest.approx(0, abs=1e-12)
            assert values.std(correction=0).item() == pytest.approx(1, abs=1e-12)


def test_constant_parameters_are_left_finite():
    networks = Collection([random_graphs([SHALLOW], [2])[0].map(torch.ones_like)], FRAME)
    standardize = FrameStandardize(FRAME)
    standardize.fit(networks, everything(networks))
    batch = networks.to("cpu", torch.float32)[everything(networks)]
    biases, weights = standardize(batch)
    assert not biases[batch.node_slot > 0].any()
    assert not weights.any()


def test_amplification_is_relative_to_the_mean_degree():
    networks = Collection(random_graphs([RESIDUAL, SHALLOW], [1, 2]), FRAME)
    metanetwork = fitted(HeterogeneousNGGNN, networks)
    deep = [4] * 3 + [3 + 2 + 1] * 4 + [4 + 5] * 2 + [2 + 2 + 1] * 4 + [2 + 2] + [5] * 2  # of every neuron
    shallow = [2] * 3 + [3 + 2] * 2 + [2] * 2
    wanted = np.log(np.array(deep + 2 * shallow) + 1).mean()
    assert metanetwork.mean_log_degree.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_networks_that_are_not_finite_are_named(kind, value):
    graphs = random_graphs([RESIDUAL, SHALLOW], [2, 3])
    state = graphs[1].state_dict()
    state[f"layers.0.{kind}"][2].view(-1)[1] = value
    graphs[1] = SHALLOW.graph(state)
    networks = Collection(graphs, FRAME)
    with pytest.raises(ValueError, match="network 4 of the collection holds NaN or infinity"):
        FrameStandardize(FRAME).fit(networks, torch.tensor([0, 3, 4, 1]))
    FrameStandardize(FRAME).fit(networks, torch.tensor([0, 3, 1]))


@pytest.mark.parametrize("model", MODELS)
def test_nan_stays_in_its_network(model):
    graphs = random_graphs([RESIDUAL, SHALLOW], [2, 2])
    metanetwork = fitted(model, Collection(graphs, FRAME))
    before = predict(metanetwork, *graphs)
    state = graphs[0].state_dict()
    state["layers.1.weight"][1] = float("nan")
    graphs[0] = RESIDUAL.graph(state)
    after = predict(metanetwork, *graphs)
    assert after[1].isnan().all()
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(SEVERAL, st.data())
def test_places_in_a_padded_batch(found, data):
    networks = Collection(random_graphs(map(wiring_of, found), [1] * len(found)), FRAME)
    rows = data.draw(st.lists(st.integers(0, len(networks) - 1), min_size=1, max_size=6))
    batch = networks[torch.tensor(rows)]
    place, present = padded(batch)
    assert present.shape == (len(rows), max(batch.sizes.tolist()))
    for network, size in enumerate(batch.sizes.tolist()):
        assert present[network].tolist() == [True] * size + [False] * (present.shape[1] - size)
        own = place[batch.network == network]
        assert sorted(own.tolist()) == list(range(size))
        assert place[batch.outputs[network]].tolist() == [0, 1]


@pytest.mark.parametrize("build", [HeterogeneousNGGNN, HeterogeneousNGT])
def test_networks_in_another_frame_are_refused(build):
    graphs = random_graphs([SHALLOW, RESIDUAL], [1, 1])
    model = build(Collection(graphs).frame).double()
    alone = Collection(graphs[:1])
    rows = torch.tensor([0])
    for use in (lambda: model(alone[rows]), lambda: model.fit_normalization(alone, rows)):
        with pytest.raises(ValueError, match="collect them in the model's own"):
            use()
    assert model(Collection(graphs[:1], model.frame)[rows]).shape == (1, 1)
