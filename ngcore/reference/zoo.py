"""Training the CNNs of the Small CNN Zoo the plain way: one module with one optimizer of torch's at a time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ngcore.data.zoos.small_zoo import Draw

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}


class SmallCNN(nn.Module):
    """Three 3x3 convolutions of 16 channels with stride 2, average pooling and a linear layer; torch's initialization.

    Args:
        activation: "relu" or "tanh".
        dropout: probability of zeroing a pooled feature.
    """

    def __init__(self, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.activation = {"relu": torch.relu, "tanh": torch.tanh}[activation]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2) for a, b in pairwise((1, 16, 16, 16)))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Float[Tensor, "b 32 32"]) -> Float[Tensor, "b 10"]:
        x = x.unsqueeze(1)
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


def train_one(
    model: SmallCNN,
    images: Float[Tensor, "n 32 32"],
    labels: Int[Tensor, " n"],
    batches: Iterable[Int[Tensor, " b"]],
    draw: Draw,
) -> None:
    """Train a network by the optimizer, learning rate and l2 of a draw, one step for every batch of image numbers."""
    weights = [values for name, values in model.named_parameters() if name.endswith("weight")]
    biases = [values for name, values in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 2 * draw.l2}, {"params": biases}]
    optimizer = OPTIMIZERS[draw.optimizer](groups, lr=draw.learning_rate)
    model.train()
    for rows in batches:
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
