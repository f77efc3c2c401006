"""Weights that were stored under earlier names load, and mean what they meant."""

import pytest
import torch
from cnns import RESIDUAL, SHALLOW, random_graphs
from metanetworks import HEADS, answers, assert_same, everything, fitted

from ngcore.graph import mlp
from ngcore.graph.collection import Collection
from ngcore.models import NGGNN, NGT, Editor, PerParameter

each_model = pytest.mark.parametrize("model", [NGGNN, NGT])
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def old_names(state_dict):
    """Of a model of one wiring: two heads per parameter, no row of statistics for inputs, δ known from the wiring."""
    old = {}
    for name, values in state_dict.items():
        if name.endswith(("standardize.edge_mean", "standardize.edge_std")):
            values = values[1:]
        name = name.replace("head.node.", "node_head.").replace("head.edge.", "edge_head.")
        if not name.endswith("mean_log_degree"):
            old[name] = values
    return old


@each_model
@each_head
def test_weights_of_models_of_one_wiring(model, head):
    (graph,) = random_graphs([mlp([2, 4, 3, 1], "siren")], [3])
    stored = fitted(model, graph, head, probes=3)
    torch.manual_seed(1)
    again = model(graph.wiring, head, probes=3, dropout=0.0).double()
    old = old_names(stored.state_dict())
    assert old.keys() != stored.state_dict().keys() or model is NGT
    again.load_state_dict(old)
    with torch.no_grad():
        assert_same(answers(again, graph), answers(stored, graph), 1e-7)  # δ was made in float32


@each_model
def test_weights_of_editors(model):
    (graph,) = random_graphs([mlp([2, 4, 3, 1], "siren")], [2])
    stored = Editor(fitted(model, graph, PerParameter(2)))
    again = Editor(model(graph.wiring, PerParameter(2), dropout=0.0)).double()
    again.load_state_dict(old_names(stored.state_dict()))
    with torch.no_grad():
        for name, values in again(graph).state_dict().items():
            torch.testing.assert_close(values, stored(graph).state_dict()[name], rtol=0, atol=1e-7)


@each_model
def test_weights_of_models_of_many_wirings(model):
    """Their names are the present ones."""
    networks = Collection(random_graphs([RESIDUAL, SHALLOW], [2, 2]))
    stored = fitted(model, networks, HEADS["scores"])
    again = model(networks.frame, HEADS["scores"], dropout=0.0).double()
    again.load_state_dict(stored.state_dict())
    with torch.no_grad():
        assert torch.equal(again(everything(networks)), stored(everything(networks)))


@each_model
def test_other_weights_are_refused(model):
    wiring = mlp([2, 4, 1], "siren")
    state = model(wiring, PerParameter()).state_dict()
    state["node_heads.weight"] = state.pop("head.node.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.node\.weight"):
        model(wiring, PerParameter()).load_state_dict(state)
