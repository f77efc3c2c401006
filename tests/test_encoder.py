"""First states of nodes and edges: statistics against numpy, what is no parameter, probe features against a loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cnns import RESIDUAL, SHALLOW, architectures, random_graphs, wiring_of
from hypothesis import given, settings
from hypothesis import strategies as st
from metanetworks import everything, fitted, random_batch
from torch import nn

from ngcore.data.zoos.cnn import ACTIVATIONS
from ngcore.graph import mlp, trace
from ngcore.graph.batch import batch_of
from ngcore.graph.collection import Collection
from ngcore.graph.forward import activations
from ngcore.graph.frame import Frame
from ngcore.models import NGGNN, Scores
from ngcore.models.affine import Affine
from ngcore.models.encoder import ProbeFeatures, Standardize

FRAME = Frame((7, 7), 3, 2, 4, tuple(sorted(ACTIVATIONS)))


@settings(max_examples=10, deadline=None)
@given(st.lists(architectures(), min_size=1, max_size=4), st.data())
def test_statistics_against_numpy(found, data):
    graphs = random_graphs(map(wiring_of, found), [3] * len(found))
    networks = Collection(graphs, FRAME)
    rows = data.draw(st.lists(st.integers(0, len(networks) - 1), min_size=1, max_size=8))
    standardize = Standardize(FRAME).double()
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
            # else the same as the layer before it, which has the last values
            assert found_mean[slot].item() == pytest.approx(mean, abs=1e-12)
            assert found_std[slot].item() == pytest.approx(std, abs=1e-12)


def test_statistics_of_a_graph_are_those_of_its_networks_in_a_collection():
    (graph,) = random_graphs([RESIDUAL], [4])
    of_graph, of_collection = Standardize(FRAME), Standardize(FRAME)
    of_graph.fit(graph, torch.tensor([0, 2]))
    of_collection.fit(Collection([graph], FRAME), torch.tensor([0, 2]))
    for name, values in of_graph.state_dict().items():
        assert torch.equal(values, of_collection.state_dict()[name]), name


def standardized(standardize, batch):
    """Biases, weights, which of these are present, and the slots of both, as rows."""
    biases = standardize.nodes(batch)[0, :, 0]
    weights, present, slots = [], [], []
    for stack in batch.stacks:
        own = standardize.edges(stack)
        shape = own.shape[:3]
        weights.append(own.flatten(0, 2))
        present.append(stack.present[:, None, None].expand(*shape, -1).flatten(0, 2))
        slots.append(stack.slot[:, None, None].expand(shape).flatten())
    return biases, *map(torch.cat, (weights, present, slots))


def test_what_is_no_parameter_is_not_standardized():
    networks = Collection(random_graphs([RESIDUAL, SHALLOW], [3, 3]), FRAME)
    standardize, batch = Standardize(FRAME).double(), everything(networks)
    standardize.fit(networks)
    biases, weights, present, slots = standardized(standardize, batch)
    assert not weights[~present].any()
    assert weights[slots == 0].sum() == weights[slots == 0].count_nonzero() == 3 * 4  # channels that a skip joins
    assert not biases[batch.nodes.slot == 0].any()
    for slot in (1, 2, 3, 5):
        for values in (weights[slots == slot][present[slots == slot]], biases[batch.nodes.slot == slot]):
            assert values.mean().item() == pytest.approx(0, abs=1e-12)
            assert values.std(correction=0).item() == pytest.approx(1, abs=1e-12)


def test_constant_parameters_are_left_finite():
    networks = Collection([random_graphs([SHALLOW], [2])[0].map(torch.ones_like)], FRAME)
    standardize = Standardize(FRAME)
    standardize.fit(networks)
    batch = everything(networks.to("cpu", torch.float32))
    biases, weights, *_ = standardized(standardize, batch)
    assert not biases[batch.nodes.slot > 0].any()
    assert not weights.any()


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_training_set_that_is_not_finite_is_refused(kind, value):
    graphs = random_graphs([RESIDUAL, SHALLOW], [2, 3])
    state = graphs[1].state_dict()
    state[f"layers.0.{kind}"][2].view(-1)[1] = value
    networks = Collection([graphs[0], SHALLOW.graph(state)], FRAME)
    with pytest.raises(ValueError, match=rf"parameter layers\.0\.{kind} of network 4 is not finite"):
        Standardize(FRAME).fit(networks, torch.tensor([0, 3, 4, 1]))
    Standardize(FRAME).fit(networks, torch.tensor([0, 3, 1]))


def test_a_training_set_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="is deeper than the frame's 2 hidden layers"):
        Standardize(replace(FRAME, layers=2)).fit(random_graphs([RESIDUAL], [1])[0])


def test_amplification_is_relative_to_the_mean_degree():
    networks = Collection(random_graphs([RESIDUAL, SHALLOW], [1, 2]), FRAME)
    metanetwork = fitted(NGGNN, networks, Scores())
    deep = [4] * 3 + [3 + 2 + 1] * 4 + [4 + 5] * 2 + [2 + 2 + 1] * 4 + [2 + 2] + [5] * 2  # of every neuron
    shallow = [2] * 3 + [3 + 2] * 2 + [2] * 2
    wanted = np.log(np.array(deep + 2 * shallow) + 1).mean()
    assert metanetwork.mean_log_degree.item() == pytest.approx(wanted, abs=1e-12)


class Siren(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize("wiring", [mlp([2, 3, 2, 1], "siren"), trace(Siren(), torch.randn(5, 2))])
def test_probe_features_against_a_loop(wiring):
    torch.manual_seed(0)
    graph, frame = random_batch(wiring), Frame.of([wiring])
    probe = ProbeFeatures(frame, 5, 8).double()
    found = probe(batch_of(graph, frame))
    for n in range(graph.num_networks):
        values = activations(graph[n : n + 1], probe.points)
        rows = []
        for g, group in enumerate(wiring.groups):
            for i in range(group.size):
                rows.append(probe.norm[g](probe.project[g](values[g][0, i])))
        torch.testing.assert_close(found[n], torch.stack(rows), rtol=0, atol=1e-12)


def test_affine_maps_compose():
    torch.manual_seed(0)
    first, last, x = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    own = Affine.of(last)
    torch.testing.assert_close(own.after(Affine.of(first))(x), last(first(x)), rtol=0, atol=1e-12)
    assert own.after(None) is own
