"""What holds of NG-GNN and NG-T whoever made the wiring: symmetry, distinctness, independence of the batch."""

from functools import cache, partial

import metanetworks
import pytest
import torch
from cnns import GroupedCNN, TwoHeads, architectures, random_graphs, wiring_of
from hypothesis import given, settings
from hypothesis import strategies as st
from metanetworks import HEADS, assert_same, distance, everything, fitted
from torch import nn

from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.graph import cnn, mlp, trace
from ngcore.graph.collection import Collection
from ngcore.models import NGGNN, NGT, PerParameter, Scores, Widths


class Siren(nn.Module):
    def __init__(self, inputs=2, outputs=1):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, 5), nn.Linear(5, 4), nn.Linear(4, outputs)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)


def relu_mlp(inputs=2):
    return nn.Sequential(nn.Linear(inputs, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


# Two convolutions that share channels by a skip connection, and 2 x 2 locations that are flattened.
FLATTENED = dict(
    channels=(3, 4, 2, 4), kernel_size=(3, 1, 3), activation=("relu", "tanh", "relu"), residual=(-1, -1, 0), pool=2
)
STRIDES = dict(stride=(1, 1, 1), padding=(1, 0, 1))
PRODUCERS = {
    "traced SIREN": lambda: trace(Siren(), torch.randn(5, 2)),
    "traced ReLU MLP": lambda: trace(relu_mlp(), torch.randn(5, 2)),
    "traced CNN": lambda: trace(CNN(Architecture(**FLATTENED, **STRIDES, classes=2)), torch.randn(2, 3, 9, 9)),
    "traced CNN with groups": lambda: trace(GroupedCNN().eval(), torch.randn(2, 3, 9, 9)),
    "traced MLP with two outputs": lambda: trace(TwoHeads(), torch.randn(5, 2)),
    "mlp": lambda: mlp([2, 5, 4, 1], "siren"),
    "cnn": lambda: cnn(**FLATTENED, classes=2),
    "cnn, repeated": lambda: cnn(**FLATTENED, classes=2, flatten="repeat"),
}
PROBED = ("traced SIREN", "traced ReLU MLP", "traced CNN", "mlp")  # whose inputs have a known shape
MODELS = {"NG-GNN": partial(NGGNN, width=16), "NG-T": partial(NGT, widths=Widths(16, 8, 32, 2))}
CASES = [
    pytest.param(name, model, head, probes, id=f"{name}, {method}, {asked}" + ", probes" * bool(probes))
    for name in PRODUCERS
    for method, model in MODELS.items()
    for asked, head in HEADS.items()
    for probes in ((0, 3) if name in PROBED else (0,))
]
each_case = pytest.mark.parametrize(("producer", "model", "head", "probes"), CASES)
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


@cache
def wiring_by(producer):
    return PRODUCERS[producer]()


answers = torch.no_grad()(metanetworks.answers)


def twin_of(graph, seed=0):
    """The same functions with neurons in another order, and how a network's numbers are brought into it."""
    symmetry = graph.wiring.symmetry
    permutations = symmetry.random(torch.Generator().manual_seed(seed))
    assert any((order != torch.arange(order.shape[-1])).any() for order in permutations.values())
    return graph.wiring.graph(symmetry.permute(graph.state_dict(), permutations)), partial(
        symmetry.permute, permutations=permutations
    )


@each_case
def test_answers_follow_the_symmetries(producer, model, head, probes):
    (graph,) = random_graphs([wiring_by(producer)], [2])
    metanetwork = fitted(model, graph, head, probes=probes)
    twin, permuted = twin_of(graph)
    for training in (True, False):
        metanetwork.train(training)
        wanted = [permuted(own) for own in answers(metanetwork, graph)]
        assert_same(answers(metanetwork, twin), wanted)
        assert distance(*wanted) > 1e-4  # it does see the weights


@each_case
def test_every_parameter_is_read(producer, model, head, probes):
    wiring = wiring_by(producer)
    (graph,) = random_graphs([wiring], [1])
    metanetwork, state = fitted(model, graph, head, probes=probes).eval(), graph.state_dict()
    (before,) = answers(metanetwork, graph)
    for name, values in state.items():
        count = min(8, values.numel())
        changed = values.repeat(count, *[1] * (values.dim() - 1)).flatten(1)
        places = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(1))[:count]
        changed[torch.arange(count), places] += 0.1
        stacked = {other: own.repeat(count, *[1] * (own.dim() - 1)) for other, own in state.items()}
        after = answers(metanetwork, wiring.graph(stacked | {name: changed.view(count, *values.shape[1:])}))
        assert min(distance(own, before) for own in after) > 1e-9, name


def mixed_graphs(count=2):
    return random_graphs([wiring_by(name) for name in PRODUCERS], [count] * len(PRODUCERS))


@each_model
@each_head
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_networks_do_not_see_each_other(model, head, training):
    """Alone, among others of their wiring, and in a batch of all architectures, which also have other inputs."""
    graphs = mixed_graphs()
    networks = Collection(graphs)
    metanetwork = fitted(model, networks, head).train(training)
    together = answers(metanetwork, everything(networks))
    of_wirings = [own for graph in graphs for own in answers(metanetwork, graph)]
    alone = [own for graph in graphs for i in range(2) for own in answers(metanetwork, graph[i : i + 1])]
    assert_same(of_wirings, alone)
    assert_same(together, alone)
    rows = torch.tensor([9, 0, 3, 0, 12])  # some again, in another order
    assert_same(answers(metanetwork, networks[rows]), [alone[row] for row in rows])


@each_model
@each_head
@settings(max_examples=8, deadline=None)
@given(found=st.lists(architectures(), min_size=1, max_size=3), seed=st.integers(0, 100))
def test_drawn_architectures_keep_the_contract(model, head, found, seed):
    graphs = random_graphs(map(wiring_of, found), [2] * len(found), seed)
    networks = Collection(graphs)
    metanetwork = fitted(model, networks, head)
    together = answers(metanetwork, everything(networks))
    assert_same(together, [own for graph in graphs for own in answers(metanetwork, graph)])
    twins, wanted = [], []
    for g, graph in enumerate(graphs):
        symmetry = graph.wiring.symmetry
        permutations = symmetry.random(torch.Generator().manual_seed(seed))
        twins.append(graph.wiring.graph(symmetry.permute(graph.state_dict(), permutations)))
        wanted += [symmetry.permute(own, permutations) for own in together[2 * g : 2 * g + 2]]
    assert_same(answers(metanetwork, everything(Collection(twins, networks.frame))), wanted)


def other_function(graph):
    """The same network with the weights of two flattened locations exchanged, and how its numbers are."""

    def exchanged(state):
        weight = state["fc.weight"].unflatten(-1, (4, 4))  # channels, locations
        return state | {"fc.weight": weight[..., [1, 0, 2, 3]].flatten(-2)}

    return graph.wiring.graph(exchanged(graph.state_dict())), exchanged


@each_model
@each_head
@pytest.mark.parametrize("producer", ["traced CNN", "cnn", "cnn, repeated"])
def test_flattened_locations_are_distinguished(producer, model, head):
    (graph,) = random_graphs([wiring_by(producer)], [1])
    changed, exchanged = other_function(graph)
    metanetwork = fitted(model, graph, head).eval()
    (before,), (after,) = answers(metanetwork, graph), answers(metanetwork, changed)
    wanted = exchanged(before) if isinstance(head, PerParameter) else before
    assert distance(after, wanted) > 1e-5
    union = Collection([graph, changed, *random_graphs([mlp([2, 3, 1])], [1])])
    before, after, _ = answers(fitted(model, union, head).eval(), everything(union))
    wanted = exchanged(before) if isinstance(head, PerParameter) else before
    assert distance(after, wanted) > 1e-5


@each_model
@each_head
@pytest.mark.parametrize("are_traced", [True, False], ids=["traced", "written"])
def test_activations_are_distinguished(model, head, are_traced):
    if are_traced:
        networks = [nn.Sequential(nn.Linear(2, 4), own, nn.Linear(4, 1)) for own in (nn.ReLU(), nn.Tanh())]
        wirings = [trace(network, torch.randn(5, 2)) for network in networks]
    else:
        wirings = [mlp([2, 4, 1], "relu"), mlp([2, 4, 1], "tanh")]
    (graph,) = random_graphs(wirings[:1], [1])
    networks = Collection([graph, wirings[1].graph(graph.state_dict())])
    for activations, is_seen in ((None, True), (False, False)):
        metanetwork = fitted(model, networks, head, activations=activations)
        assert (distance(*answers(metanetwork, everything(networks))) > 1e-5) == is_seen


@each_model
@each_head
def test_input_and_output_neurons_are_distinguished(model, head):
    wiring = mlp([3, 4, 2], "tanh")
    (graph,) = random_graphs([wiring], [1])
    state = graph.state_dict()

    def exchanged(state, role):
        if role == "input":
            return state | {"layers.0.weight": state["layers.0.weight"].flip(-1)}
        return state | {name: state[name].flip(1) for name in ("layers.1.weight", "layers.1.bias")}

    for positions in (True, False):
        metanetwork = fitted(model, graph, head, positions=positions)
        (before,) = answers(metanetwork, graph)
        for role in ("input", "output"):
            (after,) = answers(metanetwork, wiring.graph(exchanged(state, role)))
            by_order = isinstance(head, Scores) and role == "output"  # its head reads them side by side
            wanted = exchanged(before, role) if isinstance(head, PerParameter) else before
            assert (distance(after, wanted) > 1e-5) == (positions or by_order), role


@each_model
@each_head
def test_networks_of_other_numbers_of_inputs_and_outputs_share_a_model(model, head):
    graphs = random_graphs([mlp([2, 4, 1], "relu"), mlp([3, 4, 2], "relu"), mlp([1, 4, 3], "relu")], [1, 1, 1])
    networks = Collection(graphs)
    metanetwork = fitted(model, networks, head)
    together = answers(metanetwork, everything(networks))
    assert_same(together, [own for graph in graphs for own in answers(metanetwork, graph)])
    for own, graph in zip(together, graphs, strict=True):
        if isinstance(head, PerParameter):
            assert {n: tuple(values.shape[1:]) for n, values in own.items()} == graph.wiring.shapes
        else:
            assert own["scores"].shape == (3,)


@each_model
def test_outputs_that_a_network_lacks_have_no_part_in_its_scores(model):
    graphs = random_graphs([mlp([2, 4, 1]), mlp([2, 4, 2])], [1, 1])
    networks = Collection(graphs)
    metanetwork = fitted(model, networks, Scores(3))
    before = answers(metanetwork, everything(networks))
    with torch.no_grad():
        metanetwork.head[0].weight[:, 16:].normal_()  # what is read of a second output
    after = answers(metanetwork, everything(networks))
    assert distance(after[0], before[0]) < 1e-9
    assert distance(after[1], before[1]) > 1e-3


def networks_of_one_input_shape(inputs):
    """Traced networks of several architectures, all with points of two coordinates, or all with small images."""
    if inputs == "coordinates":
        networks = [Siren(), relu_mlp(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))]
        return [trace(network, torch.randn(5, 2)) for network in networks] + [mlp([2, 4, 2], "sine")]
    cnns = [CNN(Architecture(**FLATTENED, **STRIDES, classes=2)), NoSkip()]
    return [trace(network, torch.randn(2, 3, 9, 9)) for network in cnns]


class NoSkip(nn.Module):
    """A convolution and a mean over all locations."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 2)

    def forward(self, images):
        return self.head(torch.tanh(self.convolution(images)).mean((2, 3)))


@each_model
@each_head
@pytest.mark.parametrize("inputs", ["coordinates", "images"])
def test_probed_networks_do_not_see_each_other(model, head, inputs):
    wirings = networks_of_one_input_shape(inputs)
    graphs = random_graphs(wirings, [2] * len(wirings))
    networks = Collection(graphs)
    metanetwork = fitted(model, networks, head, probes=3)
    together = answers(metanetwork, everything(networks))
    assert_same(together, [own for graph in graphs for own in answers(metanetwork, graph)])
    assert_same(together, [own for graph in graphs for i in range(2) for own in answers(metanetwork, graph[i : i + 1])])
    twins = [twin_of(graph) for graph in graphs]
    found = answers(metanetwork, everything(Collection([twin for twin, _ in twins], networks.frame)))
    assert_same(found, [twins[i // 2][1](own) for i, own in enumerate(together)])


@each_model
def test_probes_see_what_a_network_does(model):
    """Without positions and weights that differ, two functions differ in what they do at the points alone."""
    wirings = [trace(nn.Sequential(nn.Linear(2, 4), own, nn.Linear(4, 1)), torch.randn(5, 2)) for own in
               (nn.Tanh(), nn.Sigmoid())]  # fmt: skip
    (graph,) = random_graphs(wirings[:1], [1])
    networks = Collection([graph, wirings[1].graph(graph.state_dict())])
    for probes in (0, 3):
        metanetwork = fitted(model, networks, Scores(3), probes=probes, activations=False)
        assert (distance(*answers(metanetwork, everything(networks))) > 1e-5) == (probes > 0)
