"""Batches of networks of one architecture and of many, against `to_data` and against each other."""

import itertools
from dataclasses import fields, replace

import networkx
import pytest
import torch
from cnns import RESIDUAL, SHALLOW, GroupedCNN, architectures, random_graphs, wiring_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ngcore.graph import Wiring, mlp, trace
from ngcore.graph.architectures import cnn
from ngcore.graph.batch import FAR, Nodes, batch_of
from ngcore.graph.collection import Collection
from ngcore.graph.frame import Frame
from ngcore.graph.structure import Block, Group, View


def nodes_of(ends, batch, blocks):
    """Places of a stack's neurons among all nodes of a copy, (blocks, n)."""
    first = sum(batch.tensors[: ends.tensor])
    own = torch.arange(batch.tensors[ends.tensor]).expand(blocks, -1) if ends.nodes is None else ends.nodes
    return first + own


def edges_of_batch(batch):
    """For every network its edges: source, target, features, which of them are present."""
    found = [[] for _ in range(batch.num_networks)]
    first = batch.sizes.cumsum(0) - batch.sizes
    for stack in batch.stacks:
        copies, blocks, targets, sources, features = stack.weights.shape
        present = torch.ones(blocks, features, dtype=torch.bool) if stack.present is None else stack.present
        of_target, of_source = (nodes_of(ends, batch, blocks) for ends in (stack.targets, stack.sources))
        assert of_target.shape == (blocks, targets)
        assert of_source.shape == (blocks, sources)
        for copy, b, t, s in itertools.product(*map(range, (copies, blocks, targets, sources))):
            network = int(batch.network[of_target[b, t]])
            ends = of_source[b, s] - first[network], of_target[b, t] - first[network]
            edge = *map(int, ends), *stack.weights[copy, b, t, s].tolist(), *present[b].tolist()
            found[copy * len(batch.sizes) + network].append(edge)
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
    assert torch.equal(batch.biases, torch.cat([data.x for data in datas]).unsqueeze(0))
    first = 0
    for i, data in enumerate(datas):
        for role, places in ((0, batch.inputs[i]), (2, batch.outputs[i])):
            assert (places[places >= 0] - first).tolist() == (data.role == role).nonzero().squeeze(1).tolist()
        first += data.num_nodes
    wanted = {row: edges_of_network(networks[row], collection.frame) for row in set(rows)}
    assert edges_of_batch(batch) == [wanted[row] for row in rows]


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


@settings(max_examples=15, deadline=None)
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


PARTIAL = Wiring(
    (Group(3, "input", 0), Group(2, "output", 1)),
    (
        Block(0, 1, "weight", source_nodes=(0, 2)),
        Block(0, 1, None, "residual", groups=2, source_nodes=(0, 2)),
        Block(0, 1, "last", target_nodes=(1,)),
    ),
    (("weight", (2, 2)), ("last", (1, 3))),
)


def grouped():
    return trace(GroupedCNN().eval(), torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize(
    "wiring",
    [mlp([2, 3, 1], "siren"), RESIDUAL, grouped(), PARTIAL, cnn((3, 4), (3,), ("relu",), (-1,), 2, pool=2)],
    ids=["mlp", "residual", "groups of channels", "blocks of some neurons", "flattened"],
)
def test_a_batch_of_one_wiring_is_the_union_of_its_networks(wiring):
    (graph,) = random_graphs([wiring], [3])
    collection = Collection([graph, *random_graphs([RESIDUAL], [1])])
    static, union = batch_of(graph, collection.frame), collection[torch.arange(3)]
    assert static.is_static
    assert not union.is_static
    assert (static.copies, union.copies) == (3, 1)
    assert static.num_networks == union.num_networks == 3
    assert edges_of_batch(static) == edges_of_batch(union)
    assert torch.equal(static.biases.flatten(0, 1), union.biases[0])
    for f in fields(Nodes):
        assert torch.equal(getattr(static.nodes, f.name).repeat(3), getattr(union.nodes, f.name)), f.name
    for role in ("input", "output"):
        places = torch.arange(3 * wiring.num_nodes).view(1, -1, 1).double()
        of_union = union.of_role(places, role)
        assert torch.equal(static.of_role(places.view(3, -1, 1), role), of_union)
        assert len(of_union) == 3
    slots = [[(len(stack.weights[0, 0].flatten(0, 1)), s) for stack in batch.stacks for s in stack.slot.tolist()]
             for batch in (static, union)]  # fmt: skip
    assert sorted(slots[0] * 3) == sorted(slots[1])


@settings(max_examples=10, deadline=None)
@given(st.lists(architectures(), min_size=1, max_size=3), st.data())
def test_numbers_come_back_as_graphs(found, data):
    """Two numbers for every parameter, side by side, of every network once more by its wiring."""
    graphs = random_graphs(map(wiring_of, found), [2] * len(found))
    collection = Collection(graphs)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(collection) - 1), min_size=1, max_size=5)))
    networks = [graph[i] for graph in graphs for i in range(2)]
    scale = torch.tensor([1.0, 10.0], dtype=torch.float64)
    for batch, order in ((collection[rows], rows), (batch_of(graphs[0], collection.frame), torch.arange(2))):
        weights = [(stack.weights.flatten(0, 1).unsqueeze(-1) * scale).flatten(-2) for stack in batch.stacks]
        seen = []
        for (places, _), own in zip(batch.graphs, batch.on_graphs(batch.biases * scale, weights), strict=True):
            for i, place in enumerate(places.tolist()):
                network = networks[int(order[place])]
                assert own.wiring == network.wiring
                for values, like in zip((*own.nodes, *own.edges), (*network.nodes, *network.edges), strict=True):
                    assert torch.equal(values[i], (like.unsqueeze(-1) * scale).flatten(-2))
                seen.append(place)
        assert sorted(seen) == list(range(batch.num_networks))


@settings(max_examples=15, deadline=None)
@given(architectures())
def test_hops_to_the_outputs(architecture):
    wiring = wiring_of(architecture)
    (graph,) = random_graphs([wiring], [1])
    groups = networkx.Graph([(block.source, block.target) for block in wiring.blocks])
    of_group = networkx.single_source_shortest_path_length(groups, len(wiring.groups) - 1)
    neurons = networkx.Graph(torch.cat([wiring.edge_index(block) for block in wiring.blocks], dim=1).T.tolist())
    group_of = [g for g, group in enumerate(wiring.groups) for _ in range(group.size)]
    for batch in (Collection([graph])[torch.tensor([0])], batch_of(graph, Frame.of([wiring]))):
        of_neuron = networkx.multi_source_dijkstra_path_length(neurons, batch.outputs[0].tolist())
        for stack in batch.stacks:
            order = slice(None) if stack.by_sources is None else stack.by_sources
            for ends, near, by_hops in (
                (stack.targets, stack.near_targets, slice(None)),
                (stack.sources, stack.near_sources, order),
            ):
                own = nodes_of(ends, batch, stack.weights.shape[1])[by_hops].tolist()
                hops = [of_group[group_of[nodes[0]]] for nodes in own]
                assert hops == sorted(hops)
                assert near == tuple(sum(far <= most for far in hops) for most in range(FAR + 1))
                for nodes, far in zip(own, hops, strict=True):
                    assert {of_group[group_of[node]] for node in nodes} == {far}
                    assert all(of_neuron[node] >= far for node in nodes)  # nothing that is read is taken for far


def test_rows_of_statistics_and_embeddings():
    """Counted by hand: 3 inputs, hidden layers of 4, 2 and 5 channels, the third with a skip connection, 2 outputs."""
    graphs = random_graphs([SHALLOW, RESIDUAL], [1, 1])
    collection = Collection(graphs)
    assert collection.frame == Frame((5, 5), 3, 2, 3, ("gelu", "relu", "sigmoid", "tanh"), input_shape=None)
    assert collection.frame.features == 25
    batch = collection[torch.tensor([1, 0])]
    deep, shallow = batch.sizes.tolist()
    for found, of_deep, of_shallow in (
        (batch.nodes.slot, [*[0] * 3, *[1] * 4, *[2] * 2, *[3] * 5, *[4] * 2], [0, 0, 0, 1, 1, 4, 4]),
        (batch.nodes.position, [0, 1, 2, *[3] * 4, *[4] * 2, *[5] * 5, 6, 7], [0, 1, 2, 3, 3, 6, 7]),
        (batch.nodes.activation, [*[4] * 3, *[1] * 4, *[3] * 2, *[0] * 5, *[4] * 2], [4, 4, 4, 2, 2, 4, 4]),
    ):
        assert [own.tolist() for own in found.split([deep, shallow])] == [of_deep, of_shallow]
    slots, features = [], []
    for stack in batch.stacks:
        slots.append(stack.slot.repeat_interleave(stack.weights[0, 0].flatten(0, 1).shape[0]))
        features.append(stack.weights.flatten(0, 3))
    slots, features = torch.cat(slots), torch.cat(features)
    assert slots.bincount().tolist() == [4, 3 * 4 + 3 * 2, 4 * 2, 2 * 5, 5 * 2 + 2 * 2]
    skips = features[slots == 0]
    assert skips[:, 12].tolist() == [1] * 4  # in the middle of the window
    assert skips.count_nonzero() == 4


def test_rows_of_flattened_locations_and_of_several_layers_of_outputs():
    flattened = cnn((1, 2), (3,), ("relu",), (-1,), 2, pool=2)
    batch = batch_of(random_graphs([flattened], [1])[0], Frame.of([flattened]))
    assert batch.frame.locations == 4
    assert batch.nodes.position.tolist() == [0, 1, 1, *[5, 6, 7, 8] * 2, 3, 4]
    heads = Wiring(
        (Group(2, "input", 0), Group(3, "output", 1), Group(1, "output", 1)),
        (Block(0, 1, "one"), Block(0, 2, "other")),
        (("one", (3, 2)), ("other", (1, 2))),
    )
    batch = batch_of(random_graphs([heads], [1])[0], Frame.of([heads]))
    assert batch.nodes.position.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.outputs.tolist() == [[2, 3, 4, 5]]


def test_the_smallest_frame():
    assert Frame.of([mlp([2, 3, 1], "siren")]) == Frame((), 2, 1, 1, ("siren",), input_shape=(2,))
    assert Frame.of([mlp([2, 1])]) == Frame((), 2, 1, 0, (), input_shape=(2,))
    assert Frame.of([mlp([2, 1]), mlp([3, 1])]) == Frame((), 3, 1, 0, ())
    assert Frame.of([trace(GroupedCNN().eval(), torch.randn(2, 3, 9, 9))]).input_shape == (3, 9, 9)
    wide = cnn((1, 8), (7,), ("relu",), (-1,), 2)
    assert Frame.of([wide, RESIDUAL]) == Frame((7, 7), 3, 2, 3, ("gelu", "relu", "tanh"))


FRAME = Frame.of([RESIDUAL])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": ("relu", "tanh")}, r"unknown activation 'gelu' in layer 3 of \[3, 4, 2, 5, 2\]"),
        ({"layers": 2}, "layer 3 of .* is deeper than the frame's 2 hidden layers"),
        ({"inputs": 2}, "has 3 input neurons, the frame 2"),
        ({"outputs": 1}, "has 2 output neurons, the frame 1"),
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


def test_a_collection_moves_to_another_dtype():
    collection, rows = Collection(random_graphs([RESIDUAL], [2])), torch.tensor([1, 0])
    before, after = collection[rows], collection.to("cpu", torch.float32)[rows]
    assert after.biases.dtype == torch.float32
    assert torch.equal(after.biases, before.biases.float())
    assert torch.equal(after.network, before.network)
    for old, new in zip(before.stacks, after.stacks, strict=True):
        assert torch.equal(new.weights, old.weights.float())
        assert torch.equal(new.slot, old.slot)
    assert collection.to("cpu")[rows].biases.dtype == torch.float64


def test_a_collection_says_how_it_is_indexed():
    networks = Collection([mlp([2, 3, 1]).graph({n: torch.zeros(2, *s) for n, s in mlp([2, 3, 1]).shapes.items()})])
    with pytest.raises(ValueError, match="index a collection with a tensor"):
        networks[torch.tensor([], dtype=torch.long)]


def test_a_collection_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one graph"):
        Collection([])
