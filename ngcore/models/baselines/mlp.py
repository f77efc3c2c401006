"""The MLP on flattened parameters, and the standardized parameters that every baseline reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.frame import Frame
from ngcore.models.encoder import Standardize


class ParameterReader(nn.Module):
    """A model that reads the parameters of networks of one wiring, standardized as the graph models do it."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.wiring = wiring
        self.normalization = Standardize(Frame.of([wiring]))

    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Store the statistics of a training set: one mean and one deviation per layer, weights and biases apart.

        Until then parameters are read as they are.

        Raises:
            ValueError: a parameter holds NaN or infinity, or the graph is of another wiring.
        """
        self._check(graph)
        self.normalization.fit(graph)

    def standardized(self, graph: NeuralGraph) -> dict[str, Tensor]:
        """The standardized parameters by name, in the order of `wiring.shapes`.

        Shapes: (batch, target, source) for weights, (batch, target) for biases.

        Raises:
            ValueError: the graph is of another wiring.
        """
        return self.standardized_graph(graph).state_dict()

    def standardized_graph(self, graph: NeuralGraph) -> NeuralGraph:
        """The same, where they lie on the graph."""
        self._check(graph)
        return self.normalization.graph(graph)

    def _check(self, graph: NeuralGraph) -> None:
        if graph.wiring is not self.wiring and graph.wiring != self.wiring:
            own, found = ([group.size for group in wiring.groups] for wiring in (self.wiring, graph.wiring))
            raise ValueError(
                f"this model was built for layers of {own} neurons, the graph is of {found} or differs in kind"
            )


def perceptron(sizes: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear layers with batch norm, ReLU and dropout between them; `sizes` runs from input to output."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(size_in, size_out), nn.BatchNorm1d(size_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


class MLP(ParameterReader):
    """All parameters as one vector through an MLP: the baseline of Navon et al. (2023) that ignores symmetry.

    The paper states neither depth nor width. The defaults, three hidden layers of 256, give 439,306
    parameters for ten classes of 2-32-32-1 INRs: between NG-GNN (331,466) and DWSNet (about 550,000).
    """

    def __init__(
        self, wiring: Wiring, num_classes: int, *, width: int = 256, depth: int = 3, dropout: float = 0.2
    ) -> None:
        super().__init__(wiring)
        num_parameters = sum(torch.Size(shape).numel() for shape in wiring.shapes.values())
        self.classifier = perceptron([num_parameters, *[width] * depth, num_classes], dropout)

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        return self.classifier(flatten(self.standardized(graph)))


def flatten(parameters: dict[str, Tensor]) -> Float[Tensor, "batch parameters"]:
    """Every entry of every parameter tensor, behind one batch axis."""
    return torch.cat([values.flatten(1) for values in parameters.values()], dim=1)
