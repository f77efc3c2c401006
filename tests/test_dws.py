"""DWS layers against all linear maps that commute with the group; the merged form against the plain one."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ngcore.bench.plain_dws import PlainDWSNet
from ngcore.graph import NeuralGraph, Wiring, mlp
from ngcore.models.baselines import DWSNet
from ngcore.models.baselines.dws import DWSLayer, WeightSpace, max_over

# In a hidden layer of one neuron pooling and identity are the same map; a parameter for each is then one too
# many, and ranks differ. So every hidden size here is at least two. Inputs and outputs may be one.
WIRINGS = [
    mlp(sizes) for sizes in ([2, 3], [2, 3, 2], [1, 2, 1], [2, 2, 3, 1], [1, 3, 2, 2], [1, 3, 3, 1], [1, 2, 2, 2, 1])
]
each_wiring = pytest.mark.parametrize(
    "wiring", WIRINGS, ids=lambda wiring: "-".join(str(group.size) for group in wiring.groups)
)


def vector_to_parameters(wiring: Wiring, vectors: Tensor) -> dict[str, Tensor]:
    parts = vectors.split([torch.Size(shape).numel() for shape in wiring.shapes.values()], dim=-1)
    return {name: part.unflatten(-1, shape) for part, (name, shape) in zip(parts, wiring.shapes.items(), strict=True)}


def generators(wiring: Wiring) -> list[Tensor]:
    """Matrices, on vectors of all parameters, of swaps of neighbouring neurons: they generate the group."""
    count = sum(torch.Size(shape).numel() for shape in wiring.shapes.values())
    matrices = []
    for layer in wiring.with_role("hidden"):
        for first in range(wiring.groups[layer].size - 1):
            order = torch.arange(wiring.groups[layer].size)
            order[[first, first + 1]] = order[[first + 1, first]]
            # Row k of the identity, laid out as parameters, tells where entry k stands.
            state = vector_to_parameters(wiring, torch.eye(count, dtype=torch.float64))
            state[f"layers.{layer - 1}.weight"] = state[f"layers.{layer - 1}.weight"][:, order]
            state[f"layers.{layer - 1}.bias"] = state[f"layers.{layer - 1}.bias"][:, order]
            state[f"layers.{layer}.weight"] = state[f"layers.{layer}.weight"][:, :, order]
            matrices.append(torch.cat([values.flatten(1) for values in state.values()], dim=1).T.contiguous())
    return matrices


def rank(rows: Tensor) -> int:
    return int(torch.linalg.matrix_rank(rows, tol=1e-9))


def commutant_dimension(group: list[Tensor], count: int) -> int:
    """Dimension of {A : P A = A P for every generator P}: the null space of A -> P A - A P."""
    eye = torch.eye(count, dtype=torch.float64)
    gram = torch.zeros(count**2, count**2, dtype=torch.float64)
    for p in group:
        equations = torch.kron(p, eye) - torch.kron(eye, p.T.contiguous())  # acts on A flattened by rows
        gram += equations.T @ equations
    return int((torch.linalg.eigvalsh(gram) < 1e-9).sum())


def affine_maps(wiring: Wiring) -> tuple[Tensor, Tensor]:
    """What each parameter of a one-channel layer contributes, as matrices and as constant vectors.

    Shapes: (weights, parameters, parameters) and (biases, parameters), in the order of `wiring.shapes`.
    """
    space = WeightSpace(wiring)
    layer = DWSLayer(space, 1, 1, "mean").double()
    count = sum(torch.Size(shape).numel() for shape in wiring.shapes.values())
    points = torch.cat([torch.eye(count), torch.zeros(1, count)]).double()
    inputs = space.features(vector_to_parameters(wiring, points))

    def flatten(features: list[Tensor]) -> Tensor:
        return torch.cat([x.flatten(1) for x in features], dim=1)

    layout = flatten(inputs)[:count]  # how the layer orders the parameters: a permutation, undone below
    torch.testing.assert_close(layout @ layout.T, torch.eye(count).double(), rtol=0, atol=0)
    matrices, constants = [], []
    for name, parameter in layer.named_parameters():
        for k in range(parameter.numel()):
            with torch.no_grad():
                for other in layer.parameters():
                    other.zero_()
                parameter.view(-1)[k] = 1
                outputs = flatten(layer(inputs)) @ layout.T
            if name.endswith("bias"):
                constants.append(outputs[-1])
            else:
                assert outputs[-1].abs().max() == 0
                matrices.append(outputs[:-1].T)
    return torch.stack(matrices), torch.stack(constants)


@each_wiring
def test_a_layer_spans_exactly_the_linear_maps_that_commute(wiring):
    group, (matrices, _) = generators(wiring), affine_maps(wiring)
    for p in group:
        torch.testing.assert_close(p @ matrices, matrices @ p, rtol=0, atol=1e-12)
    count = matrices.shape[-1]
    assert rank(matrices.flatten(1)) == len(matrices) == commutant_dimension(group, count)


@each_wiring
def test_the_biases_of_a_layer_span_exactly_the_invariant_vectors(wiring):
    group, (_, constants) = generators(wiring), affine_maps(wiring)
    count = constants.shape[-1]
    for p in group:
        torch.testing.assert_close(constants @ p.T, constants, rtol=0, atol=1e-12)
    fixed = torch.cat([p - torch.eye(count) for p in group]) if group else torch.zeros(1, count).double()
    assert rank(constants) == len(constants) == count - rank(fixed)


def random_graph(wiring: Wiring, count: int) -> NeuralGraph:
    return wiring.graph(
        {name: torch.randn(count, *shape, dtype=torch.float64) for name, shape in wiring.shapes.items()}
    )


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
    features = [x.float() for x in space.features(random_graph(wiring, 64).state_dict())]
    for width_in, width_out in pairwise([1, 32, 32]):
        outputs = DWSLayer(space, width_in, width_out, reduction)(features)
        for x in outputs:
            assert 0.2 < x.std() < 5
        features = [torch.relu((x - x.mean()) / x.std()) for x in outputs]


def test_a_layer_without_bias_is_refused():
    wiring = mlp([2, 3, 1])
    groups = (wiring.groups[0], dataclasses.replace(wiring.groups[1], bias=None), wiring.groups[2])
    with pytest.raises(ValueError, match=r"layers\.0\.weight has none"):
        DWSNet(Wiring(groups, wiring.blocks), 4)
