"""NG-T's attention over pairs against its plain form, and where nodes and edges stand among all pairs."""

import pytest
import torch
from cnns import RESIDUAL, GroupedCNN, TwoHeads, architectures, random_graphs, wiring_of
from hypothesis import given, settings
from hypothesis import strategies as st
from metanetworks import everything

from ngcore.graph import mlp, trace
from ngcore.graph.batch import batch_of
from ngcore.graph.collection import Collection
from ngcore.graph.frame import Frame
from ngcore.models import Widths
from ngcore.models.ng_t import RelationalAttention
from ngcore.models.pairs import EVERY, Places, of_stacks, pair_states, pairs_of
from ngcore.reference.ng_t import Attention

WIDTHS = Widths(6, 4, 8, 2)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return RelationalAttention(WIDTHS).double()


def plain_of(attention):
    plain = Attention(WIDTHS).double()
    plain.load_state_dict(attention.state_dict())
    return plain


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("rows", [EVERY, slice(2, 4)])
def test_attention_is_the_plain_one(attention, rows):
    nodes, edges = random(3, 5, 6), random(3, 5, 5, 4)
    found, expected = attention(nodes, edges[:, rows], rows), plain_of(attention)(nodes, edges)[:, rows]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_absent_nodes_are_not_read(attention):
    nodes, edges = random(2, 5, 6), random(2, 5, 5, 4)
    present = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    found, plain = attention(nodes, edges, EVERY, present), plain_of(attention)
    torch.testing.assert_close(found[:1, :3], plain(nodes[:1, :3], edges[:1, :3, :3]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1:], plain(nodes[1:], edges[1:]), rtol=0, atol=1e-12)


def test_attention_over_blocks_is_the_plain_one(attention):
    """Of pairs that all have one state, and those of some blocks another: values and gradients."""
    blocks = [((slice(2, 5), slice(0, 2)), random(3, 3, 2, 4)), ((slice(5, 6), slice(2, 5)), random(3, 1, 3, 4))]
    nodes, common, plain = random(3, 6, 6).requires_grad_(), random(4).requires_grad_(), plain_of(attention)
    edges = common.expand(3, 6, 6, 4).clone()
    for (rows, columns), own in blocks:
        edges[:, rows, columns] += own
    found, expected = attention.of_blocks(nodes, common, blocks), plain(nodes, edges)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    for ours, theirs in ((attention.parameters(), plain.parameters()), ([nodes, common], [nodes, common])):
        gradients = (
            torch.autograd.grad((out * weights).sum(), list(inputs), retain_graph=True)
            for out, inputs in ((found, ours), (expected, theirs))
        )
        for own, other in zip(*gradients, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(st.lists(architectures(), min_size=1, max_size=3), st.data())
def test_outputs_come_first_where_networks_differ(found, data):
    networks = Collection(random_graphs(map(wiring_of, found), [1] * len(found)))
    rows = data.draw(st.lists(st.integers(0, len(networks) - 1), min_size=1, max_size=5))
    batch = networks[torch.tensor(rows)]
    places = Places.of(batch)
    assert not places.in_order
    assert (places.networks, places.size) == (len(rows), max(batch.sizes.tolist()))
    assert places.outputs == slice(2)
    for network, size in enumerate(batch.sizes.tolist()):
        assert places.present[network].tolist() == [True] * size + [False] * (places.size - size)
        own = places.place[batch.network == network]
        assert sorted(own.tolist()) == list(range(size))
        assert places.place[batch.outputs[network]].tolist() == [0, 1]
    states = random(1, len(batch.network), 3)
    spread = places.spread(states)
    assert not spread[~places.present].any()
    assert torch.equal(places.collect(spread, 1), states)


def batches():
    wirings = [mlp([2, 4, 1]), RESIDUAL, trace(GroupedCNN().eval(), torch.randn(2, 3, 9, 9))]
    graphs = random_graphs(wirings, [2, 2, 2])
    frame = Frame.of(wirings)
    return [*(batch_of(graph, frame) for graph in graphs), everything(Collection(graphs, frame))]


@pytest.mark.parametrize("number", range(4), ids=["mlp", "residual", "groups of channels", "of all"])
def test_edges_come_back_from_pairs(number):
    """Edges' own states are added to the common one, parallel edges' added up; others stay as they are."""
    batch = batches()[number]
    places = Places.of(batch)
    common, counts = torch.zeros(1).double(), [stack.weights[..., :1].flatten(0, 1) for stack in batch.stacks]
    ones = [torch.ones_like(x) for x in counts]
    states = pair_states(batch, places, None, common, ones)
    assert states.sum() == sum(len(x.flatten()) for x in ones)
    for found in of_stacks(states, batch, places):
        assert found.min() >= 1  # 2 where two edges join a pair of neurons
    assert any(found.max() == 2 for found in of_stacks(states, batch, places)) == (number > 1)


def test_pairs_are_slices_where_blocks_are_of_whole_layers():
    batch = batches()[0]
    pairs, places = pairs_of(batch), Places.of(batch)
    assert pairs == ((slice(2, 6), slice(0, 2)), (slice(6, 7), slice(2, 6)))
    own = [random(2, 4, 2, 3), random(2, 1, 4, 3)]
    common = random(3)
    by_slices, by_index = (pair_states(batch, places, some, common, own) for some in (pairs, None))
    assert torch.equal(by_slices, by_index)
    assert [pairs_of(other) for other in batches()[1:]] == [None] * 3


def test_copies_of_one_network_keep_their_order_where_outputs_are_consecutive():
    wiring = mlp([2, 4, 1])
    (graph,) = random_graphs([wiring], [2])
    for frame in (Frame.of([wiring]), Frame.of([wiring, mlp([2, 4, 3])])):  # a frame with more outputs too
        places = Places.of(batch_of(graph, frame))
        assert places.in_order
        assert places.outputs == slice(6, 7)
    wiring = trace(TwoHeads(), torch.randn(5, 2))
    batch = batch_of(random_graphs([wiring], [2])[0], Frame.of([wiring]))
    assert batch.outputs.tolist() == [[2, 3, 4, 9]]
    places = Places.of(batch)
    assert not places.in_order
    assert places.place[[2, 3, 4, 9]].tolist() == [0, 1, 2, 3]
    states = random(2, 10, 3)
    assert torch.equal(places.collect(places.spread(states), 2), states)
