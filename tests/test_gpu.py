"""What can be told on a GPU alone: run these first where there is one."""

import copy

import pytest
import torch

from ngcore.data.inrs import siren
from ngcore.data.inrs.augment import Augmentation
from ngcore.data.inrs.sets import INRSet
from ngcore.precision import products
from ngcore.study.step import Step, loss_of
from ngcore.study.training import Schedule, optimizer_of, train_epoch
from ngcore.tasks.inr_classification import Classification, build_model
from ngcore.tasks.inr_editing import Editing, Pictures, build_editor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

BATCH, COUNT = 128, 128 * 12
SCHEDULE = Schedule(epochs=2, batch=BATCH, warmup=2)
METHODS = [("NG-GNN", 64), ("NG-GNN", 0), ("NG-T", 64), ("NG-T", 0), ("DWSNet", 0)]


def inrs() -> INRSet:
    """Of random parameters, of about the size of fitted ones."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: 0.1 * torch.randn(COUNT, *shape, generator=generator) for name, shape in siren.SHAPES.items()}
    labels = torch.randint(10, (COUNT,), generator=generator)
    return INRSet(parameters, labels, torch.arange(COUNT), torch.zeros(COUNT)).to("cuda")


def classification(method, probes, dropout=0.2, augment=True):
    torch.manual_seed(0)
    model = build_model(method, probes, dropout=dropout).cuda()
    return Classification(model, {"train": inrs()}, Augmentation() if augment else None)


def editing(method, probes):
    torch.manual_seed(0)
    targets = torch.rand(COUNT, 28, 28, generator=torch.Generator().manual_seed(1)).cuda()
    return Editing(build_editor(method, probes).cuda(), Pictures({"train": inrs()}, {"train": targets}))


PROBLEMS = [(classification, *row) for row in METHODS] + [(editing, "NG-GNN", 64), (editing, "NG-T", 0)]


@pytest.mark.parametrize(("make", "method", "probes"), PROBLEMS)
def test_a_captured_step_is_the_step(make, method, probes, capsys):
    """Losses and weights after two epochs, which draw the same random numbers; sums differ in their order alone."""
    found = []
    for captured in (False, True):
        problem = make(method, probes)
        step = Step(problem, SCHEDULE, optimizer_of(problem.model, SCHEDULE), captured=captured)
        assert step.is_captured == captured
        losses = [train_epoch(step, 0, epoch) for epoch in range(SCHEDULE.epochs)]
        found.append((torch.tensor(losses), torch.cat([p.detach().flatten() for p in problem.model.parameters()])))
    assert "not captured" not in capsys.readouterr().out
    for plain, own in zip(*found, strict=True):
        assert (own - plain).norm() < 1e-3 * plain.norm()


@pytest.mark.parametrize(("method", "probes"), METHODS)
def test_tf32_is_lost_in_the_noise_of_batches(method, probes):
    """What TF32 changes in a gradient is less than a fiftieth of its distance from the next batch's."""
    problem = classification(method, probes, dropout=0.0, augment=False)
    problem.model.train()
    parameters = [p for p in problem.model.parameters() if p.requires_grad]

    def gradient(first, precision):
        rows = torch.arange(first, first + BATCH, device="cuda")
        with products(precision):
            found = torch.autograd.grad(loss_of(problem, SCHEDULE, rows), parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    exact, other, tf32 = gradient(0, "highest"), gradient(BATCH, "highest"), gradient(0, "high")
    assert (tf32 - exact).norm() < (other - exact).norm() / 50


def test_inrs_are_fitted_as_on_a_cpu():
    x, y = siren.pixel_coordinates()
    images = torch.stack([0.5 + 0.3 * torch.sin(x + i) * torch.cos(y) for i in range(4)]).unflatten(1, (28, 28))
    initial = siren.initialize(range(4))
    fits = [
        siren.fit_sirens(images.to(device), initial.to(device), steps=20, learning_rate=1e-3)
        for device in ("cpu", "cuda")
    ]
    for name, values in fits[0].parameters.items():
        torch.testing.assert_close(fits[1].parameters[name].cpu(), values, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_a_cpu_goes_on_here():
    """An optimizer's states come back on the GPU, with a GPU's own settings."""
    problem = classification("DWSNet", 0)
    on_cpu = copy.deepcopy(problem.model).cpu()
    before = optimizer_of(on_cpu, SCHEDULE)
    sum(p.sum() for p in on_cpu.parameters()).backward()
    before.step()
    optimizer = optimizer_of(problem.model, SCHEDULE)
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": before.state_dict()["state"], "param_groups": own})
    assert optimizer.param_groups[0]["capturable"]
    step = Step(problem, SCHEDULE, optimizer, captured=True)
    assert train_epoch(step, 0, 0) > 0
