"""Parameters standardized one by one, which permuting neurons does not respect: what normalization per layer avoids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ngcore.graph import NeuralGraph, Wiring


class StandardizedEntries(nn.Module):
    """A model that reads every weight and bias less its own mean, divided by its own deviation over a training set."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.wiring = model, model.wiring
        for name, shape in self.wiring.parameters:
            self.register_buffer(_buffer("mean", name), torch.zeros(shape))
            self.register_buffer(_buffer("std", name), torch.ones(shape))

    @torch.no_grad()
    def fit_normalization(self, graph: NeuralGraph) -> None:
        """Take the training set's statistics."""
        for name, values in graph.state_dict().items():
            std = values.std(0, correction=0)
            getattr(self, _buffer("mean", name)).copy_(values.mean(0))
            getattr(self, _buffer("std", name)).copy_(torch.where(std > 0, std, 1.0))
        self.model.fit_normalization(self.standardized(graph))

    def compile_parts(self) -> None:
        """Compile the parts that a training step spends its time in."""
        self.model.compile_parts()

    def standardized(self, graph: NeuralGraph) -> NeuralGraph:
        """The same wiring with standardized entries."""
        wiring: Wiring = graph.wiring
        return wiring.graph(
            {
                name: (values - getattr(self, _buffer("mean", name))) / getattr(self, _buffer("std", name))
                for name, values in graph.state_dict().items()
            }
        )

    def forward(self, graph: NeuralGraph) -> Tensor:
        """What the model says of the standardized networks."""
        return self.model(self.standardized(graph))


def _buffer(statistic: str, name: str) -> str:
    return f"{statistic}_of_{name.replace('.', '_')}"
