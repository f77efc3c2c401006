"""Whole training steps on PyTorch's meta device, whose tensors have no values: what looks at one fails.

A GPU would be waited for there. So would it for a tensor that is brought from the CPU, which is looked for too.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ngcore.data.inrs.augment import Augmentation
from ngcore.data.inrs.sets import INRSet
from ngcore.study.profiles import declared_parameters, plan_notebooks
from ngcore.study.runs import ROOT
from ngcore.study.step import Step, has_one_wiring
from ngcore.study.training import Schedule, optimizer_of
from ngcore.tasks import PLANS, inr_classification, inr_editing

BATCH = 8


class OnDeviceAlone(TorchDispatchMode):
    """Fails where an operator reads or makes tensors of two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_flatten((args, kwargs, found))[0] if isinstance(x, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) < 2, f"{func} joins {devices}"
        return found


class NoNumbers(TorchFunctionMode):
    """Fails where Python's numbers become a tensor: they would be copied."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor), f"{func} copies"
        return func(*args, **(kwargs or {}))


def on_meta(value: Any) -> Any:
    """The same without values."""
    if isinstance(value, Tensor | nn.Module | INRSet):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: on_meta(own) for name, own in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(on_meta, value))
    if is_dataclass(value):
        return replace(value, **{field.name: on_meta(getattr(value, field.name)) for field in fields(value)})
    return value


TASKS = {"01": inr_classification, "02": inr_editing}


def trained(config: Any, task: Any) -> bool:
    """Whether the training loop makes the run."""
    method = task.METHODS[config.method]
    return method.build is not None


def variants() -> dict[str, tuple[str, Any]]:
    """Every method of both tasks, with the most probe features that it takes, and every recipe of it."""
    found: dict[str, tuple[str, Any]] = {}
    for number, task in TASKS.items():
        ((notebook, changes),) = plan_notebooks("smoke", [number], ROOT / "notebooks").items()
        for config in next(PLANS[number].runs(declared_parameters(notebook) | changes)):
            if config.dataset == "mnist" and trained(config, task):
                probes = "probes" if config.probes else "none"
                name = f"{config.task}-{config.method}-{probes}-{getattr(config, 'recipe', '')}"
                found.setdefault(name.replace(" ", "_"), (number, config))
    return found


VARIANTS = variants()


def problem_of(name: str) -> Any:
    number, config = VARIANTS[name]
    data, _ = TASKS[number].load(config, "cpu")
    return TASKS[number].problem_of(config, data, "cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_looks_at_no_value(name, study_cache, monkeypatch):
    monkeypatch.setenv("NGCORE_CACHE", str(study_cache))
    problem = problem_of(name)
    for attribute, value in vars(problem).items():
        setattr(problem, attribute, on_meta(value))
    if hasattr(problem, "augmentation"):
        problem.augmentation = Augmentation(permute=True)
    schedule = Schedule(epochs=1, batch=BATCH, warmup=2)
    step = Step(problem, schedule, optimizer_of(problem.model, schedule))
    problem.model.train()
    step.begin([1e-3, 1e-3])
    rows = torch.arange(BATCH, device="meta")
    step(0, rows)  # layouts and coordinates are brought to a device once
    with OnDeviceAlone(), NoNumbers():
        step(1, rows)
    assert has_one_wiring(problem.model)  # so that it is captured on a GPU


def test_the_check_finds_what_it_is_for():
    x = torch.zeros(3, device="meta")
    with OnDeviceAlone(), NoNumbers():
        x + 1
        for wrong in (lambda: x.to("cpu"), lambda: x.item(), lambda: x[x > 0], lambda: x.tolist()):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wrong()
        for wrong in (
            lambda: x.copy_(torch.ones(3)),
            lambda: torch.ones(3).to("meta"),
            lambda: torch.tensor([1.0, 2.0], device="meta"),
            lambda: x.new_tensor([1.0, 2.0]),
        ):
            with pytest.raises(AssertionError):
                wrong()


def test_every_method_is_tried():
    for task in TASKS.values():
        tried = {config.method for _, config in VARIANTS.values() if config.task == task.Config.task}
        wanted = {name for name, method in task.METHODS.items() if method.build is not None}
        assert tried == wanted
