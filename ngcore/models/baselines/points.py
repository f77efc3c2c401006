"""The control of probe features: a classifier that sees what a network computes at some inputs, and no parameter."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring
from ngcore.graph.forward import outputs
from ngcore.graph.frame import Frame
from ngcore.models.baselines.mlp import perceptron
from ngcore.models.encoder import Probing, check_finite, probe_points
from ngcore.precision import exact


class PointsMLP(nn.Module):
    """The network's outputs at k inputs through an MLP: of an INR, k grey values of its picture.

    A model that reads weights *and* has k probe features can do as much by its probes alone; what it knows beyond is
    the difference to this.

    Args:
        probes: k.
        probing: see `ProbeFeatures`: "grid" for pixels, "learned" for points of its own choice.

    Raises:
        ValueError: there are no points, or as `probe_points`.
    """

    def __init__(
        self,
        wiring: Wiring,
        num_classes: int,
        *,
        probes: int = 0,
        probing: Probing = "learned",
        width: int = 256,
        depth: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if probes < 1:
            raise ValueError("a classifier of a network's outputs needs at least one probe point")
        self.wiring = wiring
        points = probe_points(Frame.of([wiring]), probes, probing)
        self.points = nn.Parameter(points, requires_grad=probing == "learned")
        count = probes * sum(group.size for group in wiring.groups if group.role == "output")
        self.classifier = perceptron([count, *[width] * depth, num_classes], dropout)

    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Nothing to store; parameters that are not finite are an error, as with every model."""
        check_finite(graph)

    def forward(self, graph: NeuralGraph) -> Float[Tensor, "batch classes"]:
        with exact(self.points.device.type):  # a sine's phase needs all of its digits
            values = outputs(graph, self.points)
        return self.classifier(values.flatten(1))
