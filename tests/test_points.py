"""The control of probe features sees what the network draws, and nothing else."""

import pytest
import torch

from ngcore.data.inrs import siren
from ngcore.models.baselines import PointsMLP
from ngcore.tasks.inr_classification import WIRING, build_model


@pytest.fixture
def networks():
    return siren.unflatten(siren.initialize(range(5)).double())


@pytest.mark.parametrize(("method", "is_learned"), [("Pixels", False), ("Points", True)])
def test_it_reads_grey_values_at_its_points(method, is_learned, networks):
    model = build_model(method, 4).double().eval()
    x = model.points.T.expand(5, 2, 4)
    for i in range(2):
        weight, bias = networks[f"layers.{i}.weight"], networks[f"layers.{i}.bias"]
        x = torch.sin(30 * (weight @ x + bias.unsqueeze(-1)))
    grey = (networks["layers.2.weight"] @ x + networks["layers.2.bias"].unsqueeze(-1)).squeeze(1)
    torch.testing.assert_close(model(WIRING.graph(networks)), model.classifier(grey))
    model(WIRING.graph(networks)).sum().backward()
    assert (model.points.grad is not None) == is_learned


def test_a_grid_of_pixels():
    torch.testing.assert_close(build_model("Pixels", 4).points.abs(), torch.full((4, 2), 0.5))


def test_the_same_picture_by_other_weights_is_the_same_to_it(networks):
    model = build_model("Points", 16).double().eval()
    twins = WIRING.symmetry.permute(networks, WIRING.symmetry.random())
    torch.testing.assert_close(model(WIRING.graph(twins)), model(WIRING.graph(networks)))


def test_errors():
    with pytest.raises(ValueError, match="at least one probe point"):
        PointsMLP(WIRING, 10)
    broken = siren.unflatten(siren.initialize(range(2)))
    broken["layers.1.weight"][1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.weight of network 1 is not finite"):
        PointsMLP(WIRING, 10, probes=4).fit_normalization(WIRING.graph(broken))
