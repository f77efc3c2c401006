"""Set NN: Deep Sets over all parameters of a network."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.models.baselines.mlp import ParameterReader, flatten, perceptron


class SetNN(ParameterReader):
    """Deep Sets (Zaheer et al., 2017) on the multiset of all parameters (baseline of Navon et al., 2023).

    Each standardized scalar is an element, whichever layer it comes from, so the output is invariant to every
    permutation of these scalars, far beyond those of neurons. The element network ends in a Linear layer;
    as that commutes with the mean, it is applied once, to the mean of the elements: the head's first layer.

    The paper does not state sizes. The defaults give 352,650 parameters for ten classes of any input network.
    """

    def __init__(
        self,
        wiring: Wiring,
        num_classes: int,
        *,
        element_width: int = 128,
        head_width: int = 512,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(wiring)
        self.element = nn.Sequential(
            nn.Linear(1, element_width), nn.ReLU(), nn.Linear(element_width, element_width), nn.ReLU()
        )
        self.head = perceptron([element_width, head_width, head_width, num_classes], dropout)

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        elements = flatten(self.standardized(graph)).unsqueeze(-1)
        return self.head(self.element(elements).mean(dim=1))
