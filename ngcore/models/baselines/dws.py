"""DWSNet (Navon et al., 2023): layers that commute with permutations of hidden neurons, batch norm, ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.baselines.mlp import ParameterReader, perceptron
from ngcore.models.baselines.weight_space import EquivariantLayer, Reduction, WeightSpace, poolings
from ngcore.models.kernels.dropout import dropout as drop


class NormReLU(nn.ModuleList):
    """Batch norm of every channel over networks and neurons, then ReLU, for each support."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__(map(nn.BatchNorm1d, channels))

    def forward(self, features: Sequence[Float[Tensor, "batch ..."]]) -> list[Float[Tensor, "batch ..."]]:
        return [torch.relu(norm(x.flatten(0, -2)).view_as(x)) for norm, x in zip(self, features, strict=True)]


class DWSStack(ParameterReader):
    """What both forms of DWSNet share: DWS layers, each with batch norm and ReLU.

    The first layer lifts each scalar of the input network to `width` channels; `depth` hidden layers follow.
    """

    def __init__(self, wiring: Wiring, width: int, depth: int, reduction: Reduction) -> None:
        super().__init__(wiring)
        self.space = WeightSpace(wiring)
        self.reduction: Reduction = reduction
        self.channels = [width * m for m in self.space.multiplicity]
        widths = [1, *[width] * (depth + 1)]
        self.layers = nn.ModuleList(EquivariantLayer(self.space, *pair, reduction) for pair in pairwise(widths))
        self.norms = nn.ModuleList(NormReLU(self.channels) for _ in self.layers)


class DWSNet(DWSStack):
    """Invariant DWSNet (Navon et al., 2023): the stack, then pooling and an MLP.

    After the stack all hidden neurons are pooled; a Linear layer on the result (the invariant layer) opens the head.

    552,586 parameters for ten classes of 2-32-32-1 INRs, 310,720 of them in the DWS layers. The published model has
    552,650, of which its layers have 320,586 with deep sets and self-attention blocks the rest; here the head is larger
    instead.
    """

    def __init__(
        self,
        wiring: Wiring,
        num_classes: int,
        *,
        width: int = 32,
        depth: int = 4,
        head_width: int = 384,
        reduction: Reduction = "max",
        dropout: float = 0.2,
    ) -> None:
        super().__init__(wiring, width, depth, reduction)
        self.head = perceptron([sum(self.channels), head_width, head_width, num_classes], dropout)

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        features = self.space.features(self.standardized_graph(graph))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            features = norm(layer(features))
        pooled = [poolings(x, s, self.reduction)[()] for x, s in zip(features, self.space.supports, strict=True)]
        return self.head(torch.cat(pooled, dim=-1))


class EquivariantDWSNet(DWSStack):
    """DWSNet with an output per parameter: the stack, then one more DWS layer.

    Its outputs are raw numbers, to be scaled and added to the parameters.

    315,367 parameters for 2-32-32-1 INRs and one output. In training mode batch norm reads the whole batch.

    Args:
        outputs: numbers per scalar of the input network.
        dropout: of the features after every ReLU; it treats neurons unalike, so training is equivariant without it.

    Shapes:
        output: nodes[g] (batch, size, outputs), zeros where group g has no biases;
            edges[b] (batch, targets, sources, positions * outputs), the outputs of a kernel's position side by side
    """

    def __init__(
        self,
        wiring: Wiring,
        outputs: int = 1,
        *,
        width: int = 32,
        depth: int = 4,
        reduction: Reduction = "max",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(wiring, width, depth, reduction)
        self.outputs, self.dropout = outputs, dropout
        self.last = EquivariantLayer(self.space, width, outputs, reduction)

    def forward(self, graph: NeuralGraph) -> NeuralGraph:
        features = self.space.features(self.standardized_graph(graph))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            features = [drop(x, self.dropout, self.training) for x in norm(layer(features))]
        return self.space.graph(self.last(features), self.outputs)
