"""Wirings of CNNs without tracing, and batches of networks of many shapes, against tracing and `to_data`."""

from dataclasses import replace

import networkx
import pytest
import torch
from cnns import RESIDUAL, SHALLOW, GroupedCNN, architectures, random_graphs, wiring_of
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import difference, outputs, randomized
from torch import nn

from ngcore.data.zoos.cnn import CNN, Architecture
from ngcore.graph import Wiring, mlp, trace
from ngcore.graph.architectures import cnn
from ngcore.graph.collection import Collection
from ngcore.graph.frame import Frame
from ngcore.graph.structure import Block, Group, View


def edges_of_batch(batch):
    """For every network its edges: source, target, features, which of them are present."""
    found = [[] for _ in range(batch.num_networks)]
    first = batch.sizes.cumsum(0) - batch.sizes
    for stack in batch.stacks:
        blocks, targets, sources = stack.shape
        values, present = (x[stack.edges].view(*stack.shape, -1) for x in (batch.weights, batch.present))
        for b in range(blocks):
            network = int(batch.network[stack.targets[b, 0]])
            for t in range(targets):
                for s in range(sources):
                    ends = stack.sources[b, s] - first[network], stack.targets[b, t] - first[network]
                    found[network].append((*map(int, ends), *values[b, t, s].tolist(), *present[b, t, s].tolist()))
    return [sorted(edges) for edges in found]


def edges_of_network(network, frame):
    """The same from `to_data`; what a network of ones shows is there."""
    data, ones = (
        graph.to_data(window=frame.window, linear="convolution") for graph in (network, network.map(torch.ones_like))
    )
    rows = zip(data.edge_index.T.tolist(), data.edge_attr.tolist(), (ones.edge_attr != 0).tolist(), strict=True)
    return sorted((*ends, *values, *present) for ends, values, present in rows)


def assert_batch_holds(collection, graphs, rows):
    """The networks `rows` of a collection are what `to_data` shows of each."""
    networks = [graph[i] for graph in graphs for i in range(graph.num_networks)]
    batch = collection[torch.tensor(rows)]
    datas = [networks[row].to_data() for row in rows]
    assert batch.sizes.tolist() == [data.num_nodes for data in datas]
    assert batch.network.tolist() == [i for i, data in enumerate(datas) for _ in range(data.num_nodes)]
    assert torch.equal(batch.biases, torch.cat([data.x for data in datas]).squeeze(1))
    first = 0
    for data, own in zip(datas, batch.outputs, strict=True):
        assert (own - first).tolist() == (data.role == 2).nonzero().squeeze(1).tolist()
        first += data.num_nodes
    assert len(batch.weights) == len(batch.present) == len(batch.edge_slot) == sum(data.num_edges for data in datas)
    wanted = {row: edges_of_network(networks[row], collection.frame) for row in set(rows)}
    assert edges_of_batch(batch) == [wanted[row] for row in rows]


@settings(max_examples=8, deadline=None)
@given(architectures(classes=3), st.integers(0, 100))
def test_cnn_is_what_tracing_finds(architecture, seed):
    network = randomized(CNN(Architecture(**architecture)), seed)
    traced, ours = trace(network, torch.zeros(1, 3, 33, 33, dtype=torch.float64)), wiring_of(architecture)
    assert ours.shapes == traced.shapes == network.architecture.shapes
    assert ours.symmetry.factors == traced.symmetry.factors
    assert ours.symmetry.order == traced.symmetry.order
    found, wanted = (wiring.graph(network.state_dict()).to_data(linear="convolution") for wiring in (ours, traced))
    assert found.keys() == wanted.keys()
    for name, values in wanted:
        assert torch.equal(found[name], values), name


@settings(max_examples=25, deadline=None)
@given(architectures(), st.integers(0, 100))
def test_permutations_of_a_cnn_keep_its_outputs(architecture, seed):
    generator = torch.Generator().manual_seed(seed)
    network, symmetry = randomized(CNN(Architecture(**architecture)), seed), wiring_of(architecture).symmetry
    state = {name: values.clone() for name, values in network.state_dict().items()}
    images = [torch.randn(2, 3, 17, 17, generator=generator, dtype=torch.float64)]
    twin = symmetry.permute(state, symmetry.random(generator))
    assert difference(outputs(network, state, images), outputs(network, twin, images)) < 1e-9


def test_a_skip_connection_ties_the_channels_that_both_have():
    wiring = cnn((3, 4, 6, 3), (3, 3, 3), ("relu",) * 3, (-1, -1, 0), 2)
    assert wiring.symmetry.order == 6 * 1 * 720  # 3! of the shared channels, one channel alone, 6!


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 4), (3, 3), ("relu",), (-1,), 2), "2 numbers of channels need 1"),
        (((3,), (), (), (), 2), "1 numbers of channels"),
        (((3, 4, 4), (3, 3), ("relu",) * 2, (-1, 0), 2), "convolution 1 can add"),
        (((3, 4), (3,), ("relu",), (-2,), 2), "not -2"),
    ],
)
def test_cnn_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        cnn(*arguments)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_batch_holds_what_to_data_shows(data):
    found = data.draw(st.lists(architectures(), min_size=1, max_size=4))  # some may be the same
    counts = data.draw(st.lists(st.integers(1, 3), min_size=len(found), max_size=len(found)))
    graphs = random_graphs(map(wiring_of, found), counts)
    collection = Collection(graphs)
    assert len(collection) == sum(counts)
    assert collection.sizes.tolist() == [g.wiring.num_nodes for g in graphs for _ in range(g.num_networks)]
    rows = data.draw(st.lists(st.integers(0, sum(counts) - 1), min_size=1, max_size=5))
    assert_batch_holds(collection, graphs, rows)


def test_networks_of_any_kind_share_a_batch():
    mlps = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, n), nn.Tanh(), nn.Linear(n, 2)) for n in (3, 5)]
    wirings = [trace(network, torch.randn(4, 3)) for network in mlps]
    wirings += [trace(GroupedCNN().eval(), torch.randn(2, 3, 9, 9)), RESIDUAL]
    graphs = random_graphs(wirings, [2, 1, 2, 2])
    collection = Collection(graphs)
    assert collection.frame.window == (5, 5)
    assert_batch_holds(collection, graphs, [6, 2, 0, 4, 3, 3, 1, 5])


@settings(max_examples=25, deadline=None)
@given(architectures())
def test_hops_to_the_outputs(architecture):
    wiring = wiring_of(architecture)
    batch = Collection(random_graphs([wiring], [1]))[torch.tensor([0])]
    groups = networkx.Graph([(block.source, block.target) for block in wiring.blocks])
    of_group = networkx.single_source_shortest_path_length(groups, len(wiring.groups) - 1)
    neurons = networkx.Graph(torch.cat([wiring.edge_index(block) for block in wiring.blocks], dim=1).T.tolist())
    of_neuron = networkx.multi_source_dijkstra_path_length(neurons, batch.outputs[0].tolist())
    group_of = [g for g, group in enumerate(wiring.groups) for _ in range(group.size)]
    for stack in batch.stacks:
        for nodes, hops in ((stack.targets, stack.target_hops), (stack.sources, stack.source_hops)):
            for own, number in zip(nodes.tolist(), hops.tolist(), strict=True):
                assert {of_group[group_of[node]] for node in own} == {number}
                assert all(of_neuron[node] >= number for node in own)  # nothing that is read is taken for far


def test_rows_of_statistics_and_embeddings():
    """Counted by hand: 3 inputs, hidden layers of 4, 2 and 5 channels, the third with a skip connection, 2 outputs."""
    graphs = random_graphs([SHALLOW, RESIDUAL], [1, 1])
    collection = Collection(graphs)
    assert collection.frame == Frame((5, 5), 3, 2, 3, ("gelu", "relu", "sigmoid", "tanh"))
    assert collection.frame.features == 25
    batch = collection[torch.tensor([1, 0])]
    deep, shallow = batch.sizes.tolist()
    for found, of_deep, of_shallow in (
        (batch.node_slot, [*[0] * 3, *[1] * 4, *[2] * 2, *[3] * 5, *[4] * 2], [0, 0, 0, 1, 1, 4, 4]),
        (batch.position, [0, 1, 2, *[3] * 4, *[4] * 2, *[5] * 5, 6, 7], [0, 1, 2, 3, 3, 6, 7]),
        (batch.activation, [*[4] * 3, *[1] * 4, *[3] * 2, *[0] * 5, *[4] * 2], [4, 4, 4, 2, 2, 4, 4]),
    ):
        assert [own.tolist() for own in found.split([deep, shallow])] == [of_deep, of_shallow]
    assert batch.edge_slot.bincount().tolist() == [4, 3 * 4 + 3 * 2, 4 * 2, 2 * 5, 5 * 2 + 2 * 2]
    skips = batch.weights[batch.edge_slot == 0]
    assert skips[:, 12].tolist() == [1] * 4  # in the middle of the window
    assert skips.count_nonzero() == 4


def test_the_smallest_frame():
    assert Frame.of([mlp([2, 3, 1], "siren")]) == Frame((), 2, 1, 1, ("siren",))
    assert Frame.of([mlp([2, 1])]) == Frame((), 2, 1, 0, ())
    wide = cnn((1, 8), (7,), ("relu",), (-1,), 2)
    assert Frame.of([wide, RESIDUAL]) == Frame((7, 7), 3, 2, 3, ("gelu", "relu", "tanh"))


FRAME = Frame.of([RESIDUAL])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": ("relu", "tanh")}, r"unknown activation 'gelu' in layer 3 of \[3, 4, 2, 5, 2\]"),
        ({"layers": 2}, "layer 3 of .* is deeper than the frame's 2 hidden layers"),
        ({"inputs": 2}, "has 3 input neurons, the frame 2"),
        ({"outputs": 10}, "has 2 output neurons, the frame 10"),
        ({"window": (3, 3)}, r"a kernel of size \(5, 5\) does not fit into the window \(3, 3\)"),
    ],
)
def test_a_frame_that_does_not_fit(changes, message):
    graphs = random_graphs([RESIDUAL], [1])
    assert len(Collection(graphs, FRAME)) == 1
    with pytest.raises(ValueError, match=message):
        Collection(graphs, replace(FRAME, **changes))


def test_graphs_need_a_batch_axis():
    (graph,) = random_graphs([RESIDUAL], [2])
    for wrong in (graph[0], graph.map(lambda values: values.unsqueeze(0))):
        with pytest.raises(ValueError, match="one batch axis"):
            Collection([graph, wrong])


def test_numbers_along_an_edge_need_a_kernel():
    block = Block(0, 1, "scale", view=View((1, 2, 3, 5), (30, 15, 5, 1), 0))
    wiring = Wiring((Group(3, "input", 0), Group(2, "output", 1)), (block,), (("scale", (2, 3, 5)),))
    with pytest.raises(ValueError, match=r"parameter scale has 5 numbers an edge, but its kernel is \(\)"):
        Collection(random_graphs([wiring], [1]))


@pytest.mark.parametrize("role", ["input", "output"])
def test_frames_hold_one_layer_of_inputs_and_one_of_outputs(role):
    groups = (Group(3, "input", 0), Group(2, "output", 1), Group(2, role, 0))
    wiring = Wiring(groups, (Block(0, 1, "weight"),), (("weight", (2, 3)),))
    with pytest.raises(ValueError, match=f"networks with one {role} layer, not 2"):
        Collection(random_graphs([wiring], [1]))


def test_a_collection_moves_to_another_dtype():
    collection, rows = Collection(random_graphs([RESIDUAL], [2])), torch.tensor([1, 0])
    before, after = collection[rows], collection.to("cpu", torch.float32)[rows]
    assert after.biases.dtype == after.weights.dtype == torch.float32
    assert torch.equal(after.weights, before.weights.float())
    assert torch.equal(after.biases, before.biases.float())
    assert torch.equal(after.network, before.network)
    assert torch.equal(collection[rows].weights, before.weights)
    assert collection.to("cpu")[rows].weights.dtype == torch.float64


def test_a_collection_says_how_it_is_indexed():
    networks = Collection([mlp([2, 3, 1]).graph({n: torch.zeros(2, *s) for n, s in mlp([2, 3, 1]).shapes.items()})])
    with pytest.raises(ValueError, match="index a collection with a tensor"):
        networks[torch.tensor([], dtype=torch.long)]


def test_a_collection_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one graph"):
        Collection([])
