"""What a user types first: models on graphs as they come, and what is said where they don't fit."""

import inspect
import subprocess
import sys

import pytest
import torch
from cnns import TwoHeads
from metanetworks import random_batch

from ngcore.graph import cnn, mlp, trace
from ngcore.graph.collection import Collection
from ngcore.models import NGGNN, NGT, PerParameter, Scores

WIRING = mlp([2, 4, 1], "siren")
each_model = pytest.mark.parametrize("model", [NGGNN, NGT])


def graph_of(wiring=WIRING, dtype=torch.float32):
    torch.manual_seed(0)
    return random_batch(wiring, 3, dtype)


@each_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_graphs_of_any_precision_are_read(model, dtype):
    graph = graph_of(dtype=dtype)
    for head in (Scores(3), PerParameter()):
        metanetwork = model(WIRING, head).eval()
        metanetwork.fit_normalization(graph)
        found, wanted = metanetwork(graph), metanetwork(graph.map(torch.Tensor.float))
        if isinstance(head, PerParameter):
            found, wanted = (torch.cat([x.flatten() for x in own.state_dict().values()]) for own in (found, wanted))
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@each_model
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_parameter_that_is_not_finite_is_named_with_its_network(model, value):
    metanetwork = model(WIRING, Scores(), normalization="none")
    state = graph_of().state_dict()
    for name in ("layers.1.weight", "layers.0.bias"):
        bad = state[name].clone()
        bad[2].view(-1)[3] = value
        for read in (metanetwork, metanetwork.fit_normalization):
            with pytest.raises(ValueError, match=rf"parameter {name} of network 2 is not finite".replace(".", r"\.")):
                read(WIRING.graph(state | {name: bad}))


@each_model
def test_a_model_without_statistics_says_so_once(model):
    metanetwork, graph = model(WIRING, Scores()), graph_of()
    with pytest.warns(UserWarning, match=rf"{model.__name__} reads parameters as they are: give it its training set "
                      r"first, model\.fit_normalization\(graph\), or make it with normalization='none'"):  # fmt: skip
        metanetwork(graph)
    metanetwork(graph)  # warnings are errors here


@each_model
def test_nothing_is_said_once_statistics_are_there_or_not_wanted(model):
    graph, known = graph_of(), model(WIRING, Scores())
    known.fit_normalization(graph)
    loaded = model(WIRING, Scores())
    loaded.load_state_dict(known.state_dict())
    for metanetwork in (known, loaded, model(WIRING, Scores(), normalization="none")):
        metanetwork(graph)


@each_model
def test_options_are_in_the_signature_and_explained(model):
    options = {"probes", "probing", "positions", "activations", "sigma", "normalization", "dropout", "layers"}
    options |= {"width", "directions"} if model is NGGNN else {"widths"}
    parameters = inspect.signature(model).parameters
    assert options <= parameters.keys()
    assert not [p for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    explained = inspect.getdoc(model)
    assert not [name for name in options | {"networks", "head"} if name not in explained]


@each_model
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mlp([3, 4, 1], "siren"), "a network has 3 input neurons, the frame 2"),
        (mlp([2, 4, 2], "siren"), "a network has 2 output neurons, the frame 1"),
        (mlp([2, 4, 1], "tanh"), r"unknown activation 'tanh' in layer 1 of \[2, 4, 1\]; the frame has siren"),
        (mlp([2, 4, 4, 1], "siren"), r"layer 2 of \[2, 4, 4, 1\] is deeper than the frame's 1 hidden layers"),
        (cnn((2, 4), (3,), ("siren",), (-1,), 1), r"a kernel of size \(3, 3\) does not fit into the window \(\)"),
    ],
)
def test_a_network_that_does_not_fit_says_why(model, other, message):
    with pytest.raises(ValueError, match=message):
        model(WIRING, Scores(), normalization="none")(graph_of(other))


@each_model
def test_other_widths_are_read(model):
    assert model(WIRING, Scores(3), normalization="none")(graph_of(mlp([2, 9, 1], "siren"))).shape == (3, 3)


@each_model
def test_a_collection_in_another_frame_says_what_to_do(model):
    metanetwork, rows = model(WIRING, Scores(), normalization="none"), torch.tensor([1])
    graph = graph_of(mlp([1, 4, 1], "siren"))
    with pytest.raises(ValueError, match=r"collect them in the model's own, Collection\(graphs, model\.frame\)"):
        metanetwork(Collection([graph])[rows])
    assert metanetwork(Collection([graph], metanetwork.frame)[rows]).shape == (1, 1)


@each_model
def test_graphs_without_a_batch_axis_are_refused(model):
    graph = graph_of()
    for wrong, axes in ((graph[0], 0), (graph.map(lambda values: values.unsqueeze(0)), 2)):
        with pytest.raises(ValueError, match=f"one batch axis, of their networks, not {axes}: bind a list"):
            model(WIRING, Scores(), normalization="none")(wrong)


@each_model
def test_several_layers_of_outputs_are_read(model):
    network = TwoHeads()
    wiring = trace(network, torch.randn(5, 2))
    metanetwork = model(wiring, Scores(10), normalization="none").eval()
    graph = wiring.graph([network.state_dict()])
    scores = metanetwork(graph)
    assert scores.shape == (1, 10)
    for name in ("one.bias", "other.bias"):
        state = graph.state_dict()
        changed = metanetwork(wiring.graph(state | {name: state[name] + 1}))
        assert (changed - scores).abs().max() > 1e-5, name


@each_model
def test_probes_need_inputs_of_a_known_shape(model):
    with pytest.raises(ValueError, match="read them with `trace`, which knows the operators between their neurons"):
        model(cnn((3, 4), (3,), ("relu",), (-1,), 2), Scores(), probes=4)
    with pytest.raises(ValueError, match="power 2, not 5"):
        model(WIRING, Scores(), probes=5, probing="grid")


def test_numbers_per_parameter_need_messages_along_the_edges():
    with pytest.raises(ValueError, match="numbers per parameter need messages along the edges, and 'reversed' has no"):
        NGGNN(WIRING, PerParameter(), directions="reversed")
    with pytest.raises(ValueError, match=r"directions is one of both, .*, not 'sideways'"):
        NGGNN(WIRING, Scores(), directions="sideways")


def test_a_number_in_place_of_a_head_is_told_what_a_head_is():
    """Annotations are checked in tests alone, so a process without that is asked."""
    code = "from ngcore.graph import mlp\nfrom ngcore.models import NGGNN\nNGGNN(mlp([2, 3, 1]), 10)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "TypeError: the second argument says what is asked for: Scores(10)" in found.stderr
