"""Equivariant layers by brute force, on tiny networks: they are exactly the linear maps that commute."""

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product

import pytest
import torch
from examples import examples
from hypothesis import given
from properties import permute
from torch import Tensor, nn
from torch.func import functional_call, vmap
from weight_spaces import ARCHITECTURES, assert_same_graph, cnn, name_of, partly_biased, random_graph, wiring_of

from ngcore.graph import NeuralGraph, Wiring, mlp, trace
from ngcore.models.baselines.weight_space import EquivariantLayer, PermutationGroup, WeightSpace

# In a permuted layer of one neuron pooling and identity are the same map; a parameter for each is then one too many,
# and ranks differ. So permuted layers have at least two neurons here. Inputs and outputs may be one with HNP.
HNP = [
    *map(mlp, ([2, 3], [2, 3, 2], [1, 2, 1], [2, 2, 3, 1], [1, 3, 2, 2], [1, 3, 3, 1], [1, 2, 2, 2, 1])),
    partly_biased((1, 3, 2, 2), ()),
    partly_biased((2, 2, 3, 1), (1,)),
    cnn((1, 2, 2), 1, (2, 1)),
    cnn((1, 2), 2, (2, 2)),
]
NP = [
    *map(mlp, ([2, 3], [2, 2], [2, 3, 2], [2, 2, 2, 2])),
    partly_biased((2, 3, 2), ()),
    partly_biased((2, 2, 2, 2), (0, 2)),
    cnn((2, 2), 2, (2, 1)),
    cnn((2, 2, 2), 2, (2, 1)),
]
each_space = pytest.mark.parametrize(
    ("wiring", "group"),
    [pytest.param(w, "HNP", id=f"HNP {name_of(w)}") for w in HNP]
    + [pytest.param(w, "NP", id=f"NP {name_of(w)}") for w in NP],
)


def permuted_groups(wiring: Wiring, group: PermutationGroup) -> Sequence[int]:
    return wiring.with_role("hidden") if group == "HNP" else range(len(wiring.groups))


def as_graph(wiring: Wiring, vectors: Tensor) -> NeuralGraph:
    """Vectors of all parameters as networks."""
    parts = vectors.split([torch.Size(shape).numel() for shape in wiring.shapes.values()], dim=-1)
    shapes = wiring.shapes.items()
    return wiring.graph({name: part.unflatten(-1, shape) for part, (name, shape) in zip(parts, shapes, strict=True)})


def as_vectors(graph: NeuralGraph) -> Tensor:
    state = graph.state_dict()
    return torch.cat([state[name].flatten(1) for name in graph.wiring.shapes], dim=1)


def count_of(wiring: Wiring) -> int:
    return sum(torch.Size(shape).numel() for shape in wiring.shapes.values())


def matrix_of(wiring: Wiring, orders: dict[int, Tensor]) -> Tensor:
    """What permuting neurons does to vectors of all parameters."""
    # Row k of the identity, laid out as parameters, tells where entry k stands.
    eye = torch.eye(count_of(wiring), dtype=torch.float64)
    return as_vectors(permute(as_graph(wiring, eye), orders)).T.contiguous()


def generators(wiring: Wiring, group: PermutationGroup) -> list[Tensor]:
    """Matrices of the swaps of neighbouring neurons: they generate the group."""
    matrices = []
    for g in permuted_groups(wiring, group):
        for first in range(wiring.groups[g].size - 1):
            order = torch.arange(wiring.groups[g].size)
            order[[first, first + 1]] = order[[first + 1, first]]
            matrices.append(matrix_of(wiring, {g: order}))
    return matrices


def all_elements(wiring: Wiring, group: PermutationGroup) -> list[Tensor]:
    """Matrices of the whole group."""
    groups = permuted_groups(wiring, group)
    orders = ([torch.tensor(order) for order in permutations(range(wiring.groups[g].size))] for g in groups)
    return [matrix_of(wiring, dict(zip(groups, chosen, strict=True))) for chosen in product(*orders)]


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


@cache
def affine_maps(wiring: Wiring, group: PermutationGroup) -> tuple[Tensor, Tensor]:
    """What each parameter of a one-channel layer contributes, as matrices and as constant vectors.

    Shapes: (weights, parameters, parameters) and (biases, parameters), in the order of `wiring.shapes`.
    """
    space = WeightSpace(wiring, group)
    layer = EquivariantLayer(space, 1, 1, "mean").double()
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    numbers = sum(shape.numel() for shape in shapes.values())
    count = count_of(wiring)
    inputs = space.features(as_graph(wiring, torch.cat([torch.eye(count), torch.zeros(1, count)]).double()))

    def outputs(vector: Tensor) -> list[Tensor]:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        parameters = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return functional_call(layer, parameters, (inputs,))

    one_at_a_time = vmap(outputs)(torch.eye(numbers, dtype=torch.float64))
    graph = space.graph([x.flatten(0, 1) for x in one_at_a_time], 1)
    of_units, of_zero = as_vectors(graph).unflatten(0, (numbers, count + 1)).split([count, 1], dim=1)
    is_bias = torch.cat([torch.full((shape.numel(),), name.endswith("bias")) for name, shape in shapes.items()])
    assert of_zero[~is_bias].abs().max() == 0
    return of_units[~is_bias].transpose(1, 2), of_zero[is_bias].squeeze(1)


@each_space
def test_a_layer_spans_exactly_the_linear_maps_that_commute(wiring, group):
    swaps, (matrices, _) = generators(wiring, group), affine_maps(wiring, group)
    for p in swaps:
        torch.testing.assert_close(p @ matrices, matrices @ p, rtol=0, atol=1e-12)
    assert rank(matrices.flatten(1)) == len(matrices) == commutant_dimension(swaps, count_of(wiring))


@each_space
def test_the_biases_of_a_layer_span_exactly_the_invariant_vectors(wiring, group):
    swaps, (_, constants) = generators(wiring, group), affine_maps(wiring, group)
    count = count_of(wiring)
    for p in swaps:
        torch.testing.assert_close(constants @ p.T, constants, rtol=0, atol=1e-12)
    fixed = torch.cat([p - torch.eye(count) for p in swaps]) if swaps else torch.zeros(1, count).double()
    assert rank(constants) == len(constants) == count - rank(fixed)


@each_space
def test_random_maps_averaged_over_the_group_are_layers(wiring, group):
    """The average of P A P⁻¹ over the whole group is the projection of A onto the maps that commute."""
    torch.manual_seed(0)
    matrices, _ = affine_maps(wiring, group)
    basis = matrices.flatten(1).T
    elements, drawn = all_elements(wiring, group), torch.randn(3, count_of(wiring), count_of(wiring)).double()
    projected = sum(p @ drawn @ p.T for p in elements).flatten(1).T / len(elements)
    found = basis @ torch.linalg.lstsq(basis, projected).solution
    torch.testing.assert_close(found, projected, rtol=0, atol=1e-9)
    # and it is the orthogonal one: what it leaves of A is orthogonal to every layer
    left = basis.T @ (drawn.flatten(1).T - projected)
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-9)


@pytest.mark.parametrize("group", ["HNP", "NP"])
@examples(5)
@given(architecture=ARCHITECTURES)
def test_features_and_graph_are_inverse(group, architecture):
    wiring = wiring_of(architecture)
    space = WeightSpace(wiring, group)
    for width in (1, 3):
        graph = random_graph(wiring, 2, width)
        assert_same_graph(space.graph(space.features(graph), width), graph, tolerance=0)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(x + self.second(x)))


class Shared(nn.Module):
    """The same layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.first(x))
        return self.second(x), self.third(x)


vectors, images = torch.randn(3, 2), torch.randn(3, 2, 9, 9)


@pytest.mark.parametrize(
    ("network", "inputs", "block"),
    [
        (Residual(), vectors, "block 2 .*residual.* 'second'"),
        (Shared(), vectors, "block 2 .*second.weight"),
        (TwoHeads(), vectors, "block 2 .*third.weight"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)),
            vectors,
            "block 1 .*normalization.*1.weight",
        ),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3, groups=2)), images, "block 1 .*convolution.*1.weight"),
        (nn.Sequential(nn.Conv2d(2, 1, 3), nn.Flatten(), nn.Linear(49, 2)), images, "block 1 .*flatten"),
    ],
    ids=["residual", "shared", "two heads", "norm", "grouped", "flatten"],
)
def test_what_is_no_chain_of_layers_is_refused_by_block(network, inputs, block):
    with pytest.raises(ValueError, match=block):
        WeightSpace(trace(network, inputs))
