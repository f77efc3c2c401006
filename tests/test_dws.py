"""DWSNet: the merged form against the plain one, outputs per parameter, the scale that it starts with."""

from itertools import pairwise

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from properties import permute, random_permutations
from weight_spaces import ARCHITECTURES, assert_same_graph, random_graph, wiring_of

from ngcore.graph import Wiring, mlp
from ngcore.models.baselines import DWSNet, EquivariantDWSNet
from ngcore.models.baselines.weight_space import EquivariantLayer, WeightSpace, max_over
from ngcore.reference.dws import PlainDWSNet


def both_forms(wiring: Wiring, **settings) -> tuple[DWSNet, PlainDWSNet]:
    """The merged form, with every parameter and statistic drawn at random, and the plain form of it."""
    settings = {"width": 3, "depth": 2, "head_width": 5, "dropout": 0.0} | settings
    merged = DWSNet(wiring, 4, **settings).double()
    with torch.no_grad():
        for tensor in (*merged.parameters(), *merged.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 1.0).mul_(torch.randn(()).sign() if tensor.requires_grad else 1)
        for layer in merged.layers:
            layer.reset_parameters()
            layer.maps[0].bias.normal_()
    plain = PlainDWSNet(wiring, 4, **settings).double()
    plain.load_state_dict(plain.cut(merged.state_dict()))
    return merged, plain


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("sizes", [[2, 3], [2, 4, 3], [2, 5, 4, 3], [3, 2, 4, 1, 2], [1, 3, 3, 3, 3, 1]], ids=str)
def test_merged_and_plain_form_agree_in_outputs_and_gradients(sizes, training, reduction):
    torch.manual_seed(0)
    wiring = mlp(sizes)
    merged, plain = (model.train(training) for model in both_forms(wiring, reduction=reduction))
    graph, direction = random_graph(wiring, 6), torch.randn(6, 4, dtype=torch.float64)
    outputs, expected = merged(graph), plain(graph)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
    (outputs * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = plain.cut({name: parameter.grad for name, parameter in merged.named_parameters()})
    assert gradients.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_merged_and_plain_form_agree_after_training_steps():
    """Batch norm's running statistics included."""
    torch.manual_seed(0)
    wiring = mlp([2, 4, 3, 1])
    merged, plain = both_forms(wiring)
    graph = random_graph(wiring, 6)
    for model in (merged, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(graph).square().sum().backward()
            optimizer.step()
    expected = plain.state_dict()
    for name, values in plain.cut(merged.state_dict()).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 5, 4), (1, 1, 3, 1)])
def test_max_over_is_amax_with_its_gradient(shape):
    torch.manual_seed(0)
    for dim in range(1, len(shape) - 1):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected = x.amax(dim)
        direction = torch.randn_like(expected)
        pooled = max_over(x, dim)
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad((pooled * direction).sum(), x)
        (expected_gradient,) = torch.autograd.grad((expected * direction).sum(), x)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_activations_start_at_order_one(reduction):
    torch.manual_seed(0)
    wiring = mlp([2, 32, 32, 1])
    space = WeightSpace(wiring)
    features = [x.float() for x in space.features(random_graph(wiring, 64))]
    for width_in, width_out in pairwise([1, 32, 32]):
        outputs = EquivariantLayer(space, width_in, width_out, reduction)(features)
        for x in outputs:
            assert 0.2 < x.std() < 5
        features = [torch.relu((x - x.mean()) / x.std()) for x in outputs]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@examples(5)
@given(architecture=ARCHITECTURES, seed=st.integers(0, 2**20))
def test_outputs_per_parameter_are_equivariant(training, architecture, seed):
    torch.manual_seed(seed)
    wiring = wiring_of(architecture)
    graph, orders = random_graph(wiring, 5), random_permutations(wiring)
    model = EquivariantDWSNet(wiring, 2, width=3, depth=1).double().train(training)
    model.fit_normalization(graph)
    outputs = model(graph)
    assert_same_graph(model(permute(graph, orders)), permute(outputs, orders))
    assert all(
        x.shape == (*own.shape[:-1], 2 * own.shape[-1]) for x, own in zip(outputs.edges, graph.edges, strict=True)
    )


def test_dropout_of_features_is_of_training_alone():
    torch.manual_seed(0)
    wiring = mlp([2, 4, 3, 1])
    graph, model = random_graph(wiring, 5), EquivariantDWSNet(wiring, width=3, depth=1, dropout=0.5).double()
    assert not torch.equal(model(graph).edges[1], model(graph).edges[1])
    model.eval()
    assert torch.equal(model(graph).edges[1], model(graph).edges[1])


def test_the_parameter_count_is_the_one_stated():
    model = EquivariantDWSNet(mlp([2, 32, 32, 1], "siren"))
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in EquivariantDWSNet.__doc__
