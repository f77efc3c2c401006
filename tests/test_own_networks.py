"""Training on networks that the study did not make: the README's few lines."""

import pytest
import torch
from torch import nn

from ngcore.graph import trace
from ngcore.graph.collection import Collection
from ngcore.models import NGGNN, NGT, Scores
from ngcore.tasks.own_networks import fit, predict


def line_networks(count, width, seed):
    """Networks that compute about a x with a = -1 or 1, and which: a property of all of their weights together."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1))
    labels = torch.arange(count) % 2
    states = []
    for label in labels.tolist():
        first = torch.rand(width, 1, generator=generator) + 0.5
        last = (2 * label - 1) * (torch.rand(1, width, generator=generator) + 0.5)
        biases = (0.1 * torch.randn(n, generator=generator) for n in (width, 1))
        states.append(dict(zip(net.state_dict(), (first, next(biases), last, next(biases)), strict=True)))
    return trace(net, torch.zeros(3, 1)).graph(states), labels


@pytest.mark.parametrize("model", [NGGNN, NGT])
def test_labels_of_networks_of_one_architecture_are_learned(model):
    graph, labels = line_networks(64, 4, seed=0)
    torch.manual_seed(0)
    found = fit(model(graph.wiring, Scores(2), sigma=None), graph, labels, epochs=12, batch=8)
    assert found.score == 1.0
    assert len(found.history) == 12
    assert not found.model.training
    assert not set(found.test.tolist()) & set(found.validation.tolist())


def test_numbers_of_networks_of_several_architectures_are_learned():
    parts = [line_networks(32, width, seed=width) for width in (3, 5)]
    networks = Collection([graph for graph, _ in parts])
    targets = torch.cat([labels for _, labels in parts]).float()
    torch.manual_seed(0)
    model = NGGNN(networks, Scores(), sigma=None)
    found = fit(model, networks, targets, epochs=12, batch=8)
    assert -found.score < 0.05  # the variance of the targets is 0.25
    assert predict(found.model, networks).shape == (64, 1)


def test_targets_must_fit_the_networks():
    graph, labels = line_networks(8, 3, seed=0)
    with pytest.raises(ValueError, match="8 networks have 7 targets"):
        fit(NGGNN(graph.wiring, Scores(2)), graph, labels[:7])
