"""Where optimizers lead networks: measurements against loops, interventions against what they are said to change."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from ngcore.models.optimizers import LearnedOptimizer
from ngcore.models.optimizers.learned import DECAYS
from ngcore.tasks import execute, learning_to_optimize
from ngcore.tasks.optimization import ImageTask
from ngcore.tasks.optimizer_trajectories import INTERVENTIONS, MEMORY, Config, Interference, summary

TINY = ImageTask("fashion_mnist", (3, 4, 3), train_images=64, validation_images=32, test_images=32, batch=8)
HORIZON, STEPS = 3, 8


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path))


def config_of(method="FF", **changes):
    (config,) = learning_to_optimize.configs_of(
        [method], {"none": TINY}, 1, {"FF": "shipped"}, 1e-3, steps=8, curve_every=4, curve_images=16, held="validation"
    )
    return Config.of(config, HORIZON, **changes)


class Run:
    """A small network on which an optimizer of random weights takes steps of random gradients; all of it is kept."""

    def __init__(self, intervention):
        torch.manual_seed(0)
        rule = LearnedOptimizer("FF").double()
        self.read, self.said, self.weights, self.gradients = [], [], [], []
        self.network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        self.optimizer = rule.bind(self.network)
        rule.register_forward_hook(self._keep)
        self.steps = Interference(self.optimizer, HORIZON, intervention)
        self.outside = []
        for step in range(STEPS):
            for p in self.network.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).double() * 2**step
            self.weights.append(self.flat(self.network.parameters()))
            self.gradients.append(self.flat(p.grad for p in self.network.parameters()))
            self.steps.step()
            self.outside.append(self.steps.outside)
        self.weights.append(self.flat(self.network.parameters()))
        self.changes = [after - before for before, after in zip(self.weights, self.weights[1:], strict=False)]

    def flat(self, tensors):
        return torch.cat([x.detach().flatten() for x in tensors]).clone()

    def _keep(self, rule, inputs, output):
        self.read.append(inputs[0][0].clone())
        self.said.append(output[0].clone())


def test_without_an_intervention_steps_are_the_optimizers_own():
    run = Run("none")
    torch.manual_seed(0)
    rule = LearnedOptimizer("FF").double()
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = rule.bind(network)
    for step in range(STEPS):
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).double() * 2**step
        optimizer.step()
    for own, expected in zip(run.network.parameters(), network.parameters(), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("intervention", INTERVENTIONS[1:])
def test_nothing_changes_before_the_horizon_and_something_after(intervention):
    run, plain = Run(intervention), Run("none")
    for step in range(HORIZON):
        assert torch.equal(run.changes[step], plain.changes[step])
    assert not torch.equal(run.changes[HORIZON + 1], plain.changes[HORIZON + 1])


def test_changes_shrink():
    run = Run("shrink")
    for step in range(HORIZON, STEPS):
        torch.testing.assert_close(run.changes[step], run.said[step] * HORIZON / (step + 1), rtol=0, atol=1e-12)


def test_the_mean_change_is_taken_off():
    run = Run("level")
    for step in range(HORIZON, STEPS):
        weights = [MEMORY ** (step - s) for s in range(step + 1)]
        mean = sum(w * said for w, said in zip(weights, run.said, strict=False)) / sum(weights)
        torch.testing.assert_close(run.changes[step], run.said[step] - mean, rtol=0, atol=1e-12)


def test_what_is_read_stays_in_range():
    run, plain = Run("clamp"), Run("none")
    seen = torch.stack(run.read[:HORIZON]).flatten(0, 1)
    for read in run.read[HORIZON:]:
        assert (read <= seen.amax(0)).all()
        assert (read >= seen.amin(0)).all()
    assert any((read > seen.amax(0)).any() for read in plain.read[HORIZON:])


def test_momenta_start_anew():
    run = Run("restart")
    momenta = torch.cat([run.optimizer.state[p]["momenta"].flatten(1) for p in run.optimizer.parameters], dim=1)
    since = range(STEPS - STEPS % HORIZON, STEPS)
    for decay, own in zip(DECAYS, momenta, strict=True):
        expected = sum((1 - decay) * decay ** (STEPS - 1 - s) * run.gradients[s] for s in since)
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


def test_what_is_outside_is_counted():
    run = Run("none")
    seen = torch.stack(run.read[:HORIZON]).flatten(0, 1).tolist()
    low, high = ([f(row[i] for row in seen) for i in range(14)] for f in (min, max))
    for step in range(STEPS):
        rows = run.read[step].tolist()
        out = [[not low[i] <= row[i] <= high[i] for i in range(14)] for row in rows]
        if step >= HORIZON:
            assert run.outside[step]["weights"] == pytest.approx(sum(any(own[:2]) for own in out) / len(out))
            assert run.outside[step]["gradients"] == pytest.approx(sum(any(own[2:]) for own in out) / len(out))
    assert run.outside[-1]["gradients"] > 0
    assert run.outside[HORIZON - 1] == {"weights": 0, "gradients": 0}


def test_ways_are_measured():
    """Four equal steps along the weights, and a walk around a square."""
    start = torch.tensor([3.0, 4.0])
    line = summary(start, [start / 5] * 4, [1.0, 2.0, 3.0, 4.0])
    expected = {"loss": 2.5, "weight_norm": 9.0, "change_norm": 1.0, "straightness": 1.0, "outward": 1.0}
    assert line == pytest.approx(expected, abs=1e-6)
    bent = summary(start, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])], [1.0, 1.0])
    assert bent["straightness"] == pytest.approx(math.sqrt(5) / 3)
    assert bent["outward"] == pytest.approx((3 * 2 + 4 * 1) / (5 * math.sqrt(5)))
    assert bent["weight_norm"] == pytest.approx(math.sqrt(25 + 25))


def test_a_run_is_the_plain_training_measured():
    """The same losses and the same final accuracy as without measuring; hand-designed optimizers too."""
    for method in ("FF", "Adam"):
        config = config_of(method)
        metrics = execute(config)["metrics"]
        own = {f.name: getattr(config, f.name) for f in dataclasses.fields(learning_to_optimize.Config)}
        plain = execute(learning_to_optimize.Config(**own | {"task": "learning_to_optimize"}))["metrics"]
        assert metrics["measured"] == [4, 8]
        losses = plain["train_loss"]
        assert metrics["loss"] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], abs=2e-5)
        assert metrics["final_accuracy"] == plain["final_accuracy"]
        assert all(len(metrics[name]) == 2 for name in ("weight_norm", "straightness", "outward", "accuracy"))
        assert ("outside_weights" in metrics) == ("horizon" in metrics) == (method == "FF")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intervention": "push"}, "unknown intervention 'push'"),
        ({"curve_every": 3}, "windows of 3 steps must fill the 8 steps"),
        ({"horizon": 0}, "the horizon, 0, must be at least 1"),
        ({"method": "Adam", "weights": None, "learning_rate": 0.1, "intervention": "shrink"}, "and Adam is none"),
    ],
)
def test_runs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config_of(), **changes)
