"""NG-GNN's aggregation, with its backward pass by hand, and dropout from random bits, against torch's own."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ngcore.graph.batch import Ends
from ngcore.models.kernels.dropout import dropout
from ngcore.models.kernels.moments import Moments, messages
from ngcore.models.ng_gnn import EPSILON, aggregate


def leaves(batch, targets, sources, width, values=torch.randn):
    shapes = [(batch, targets, sources, width)] * 2 + [(batch, targets, width), (batch, sources, width)]
    return [values(*shape).double().requires_grad_() for shape in shapes]


def by_autograd(*inputs):
    message = messages(*inputs)
    return message.sum(2), message.square().sum(2), message.amin(2), message.amax(2)


def gradients(function, inputs, weights):
    outputs = function(*inputs)
    return torch.autograd.grad(sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)), inputs)


def small_integers(*shape):
    return torch.randint(-1, 2, shape)


@pytest.mark.parametrize("values", [torch.randn, small_integers], ids=["distinct", "many ties"])
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_moments_and_their_gradients_are_those_of_autograd(values, batch, targets, sources, width):
    inputs = leaves(batch, targets, sources, width, values)
    for ours, plain in zip(Moments.apply(*inputs), by_autograd(*inputs), strict=True):
        assert torch.equal(ours, plain)
    weights = torch.randn(4, batch, targets, width, dtype=torch.float64)
    for ours, plain in zip(
        gradients(Moments.apply, inputs, weights), gradients(by_autograd, inputs, weights), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(2, 5), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.booleans())
def test_aggregates_are_those_of_all_messages(copies, count, sources, of_some):
    """Blocks to all neurons are added up, blocks to some are scattered: both against one node at a time."""
    width, received = 3, []
    every = torch.arange(count)
    gathered = [[torch.empty(0, width).double()] * copies for _ in range(count)]
    for number, k in enumerate(sources):
        targets = torch.randperm(count)[: max(1, count - number)] if of_some else every
        message = torch.randn(copies, len(targets), k, width, dtype=torch.float64)
        found = message.sum(2), message.square().sum(2), message.amin(2), message.amax(2)
        received.append((Ends(0, targets.view(1, -1) if of_some else None), found))
        for i, node in enumerate(targets.tolist()):
            gathered[node] = [torch.cat([old, own[i]]) for old, own in zip(gathered[node], message, strict=True)]
    degree = torch.tensor([[max(1, len(own[0]))] for own in gathered]).double()
    found = aggregate(received, torch.randn(copies, count, width).double(), degree)
    for node, own in enumerate(gathered):
        for copy, m in enumerate(own):
            if len(m):
                std = (m.var(0, correction=0) + EPSILON).sqrt()
                expected = torch.cat([m.mean(0), m.amin(0), m.amax(0), std])
            else:
                expected = torch.cat([torch.zeros(3 * width), torch.full((width,), EPSILON**0.5)]).double()
            torch.testing.assert_close(found[copy, node], expected, rtol=0, atol=1e-9)


def test_scattered_messages_are_combined_messages():
    copies, count, width = 2, 4, 3
    blocks = [tuple(torch.randn(4, copies, count, width, dtype=torch.float64)) for _ in range(3)]
    v, degree = torch.randn(copies, count, width).double(), torch.full((count, 1), 5.0).double()
    combined = aggregate([(Ends(0), found) for found in blocks], v, degree)
    mixed = [(Ends(0), blocks[0])]
    for found in blocks[1:]:
        order = torch.randperm(count)
        mixed.append((Ends(0, order.view(1, -1)), tuple(x[:, order] for x in found)))
    torch.testing.assert_close(aggregate(mixed, v, degree), combined, rtol=0, atol=1e-12)


def test_neurons_without_messages_have_zeros():
    v = torch.randn(2, 3, 4)
    found = aggregate([], v, torch.ones(3, 1))
    assert not found[..., :12].any()
    assert found[..., 12:].unique().tolist() == pytest.approx([EPSILON**0.5])


def test_dropout_keeps_the_mean_and_drops_as_often_as_torch():
    torch.manual_seed(0)
    x = torch.ones(1000, 777, requires_grad=True)  # no multiple of the four values that share a random word
    y = dropout(x, 0.2, training=True)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    kept = 65536 / (65536 - 13107)
    assert y.unique().tolist() == pytest.approx([0.0, kept])
    error = 4 * (0.2 * 0.8 / x.numel()) ** 0.5  # four standard deviations of a Bernoulli mean
    for dim in (0, 1):
        assert ((y == 0).double().mean(dim) - 0.2).abs().max() < 5 * (0.2 * 0.8 / x.shape[dim]) ** 0.5
    assert abs((y == 0).double().mean().item() - 0.2) < error
    assert abs((F.dropout(x, 0.2) == 0).double().mean().item() - 0.2) < error


def test_dropout_draws_anew_and_by_seed():
    x = torch.ones(1000)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5, training=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(dropout(x, 0.5, training=True), dropout(x, 0.5, training=True))


def test_a_compiler_does_not_take_two_draws_for_one():
    unchecked = inspect.unwrap(dropout)  # a compiler can't read the type checks of tests

    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice(x):
        return unchecked(x, 0.5, True), unchecked(x, 0.5, True)

    x = torch.ones(1000, requires_grad=True)
    torch.manual_seed(0)
    one, other = twice(x)
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    assert torch.equal(one, dropout(x, 0.5, training=True))


@pytest.mark.parametrize(("probability", "training"), [(0.0, True), (0.5, False)])
def test_no_dropout_is_the_identity(probability, training):
    x = torch.randn(3, 4)
    assert dropout(x, probability, training) is x
