"""A model whose parts can't be compiled, or come out wrong, trains as it is: with one line, and said in its record."""

import re

import pytest
import torch
from torch import nn

from ngcore.study import compiling
from ngcore.study.compiling import compile_or_not, difference, gradients_of

RAISES = RuntimeError("the C++ compiler failed\nkernel.cpp:7: error: conflicting declaration\n" + "more\n" * 1000)


class Failing(torch.autograd.Function):
    """Stands for compiled code: what its backward pass does is given."""

    @staticmethod
    def forward(ctx, x, spoil):
        ctx.spoil = spoil
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.spoil(gradient), None


def fail(*_):
    raise RAISES


class Model(nn.Module):
    """Two Linears, the second of which stays as it is; `backend` makes the compiled form of the first."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.backend = nn.Linear(3, 4), nn.Linear(4, 1), backend
        self.activation = torch.tanh

    def compile_parts(self):
        self.first._compiled_call_impl = self.backend(
            self.first
        )  # as Module.compile does, without torch's own compiler
        self.activation = fail if self.backend is at_forward else torch.tanh

    def forward(self, x):
        return self.last(self.activation(nn.functional.dropout(self.first(x), 0.5, self.training)))


def at_forward(module):
    return module._call_impl


def spoiling(spoil):
    return lambda module: lambda x: Failing.apply(module._call_impl(x), spoil)


def at_backward(module):
    return spoiling(fail)(module)


def right(module):
    return module._call_impl


X = torch.linspace(-1, 1, 15).view(5, 3)


def loss_of(model):
    return lambda: model(X).square().sum()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", [at_forward, at_backward])
def test_a_failing_compiler_leaves_the_model_as_it_was(backend, precision, capsys):
    model = Model(backend)
    expected = gradients_of(model, loss_of(model))
    assert compile_or_not(model, loss_of(model), precision) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line == ("Model runs without torch.compile: RuntimeError: kernel.cpp:7: error: conflicting declaration")
    assert model.training
    assert model.first._compiled_call_impl is None
    assert torch.equal(gradients_of(model, loss_of(model)), expected)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(lambda g: g * float("nan"), "gradients are not finite"), (lambda g: -g, "gradients differ by .* of their norm")],
)
def test_wrong_gradients_are_found_where_precision_is_bfloat16(spoil, reason, capsys):
    model = Model(spoiling(spoil))
    assert compile_or_not(model, loss_of(model), "bfloat16") is False
    assert re.search(reason, capsys.readouterr().out)


def test_what_compiles_stays_compiled_and_draws_the_same_numbers(capsys):
    model = Model(right)
    state = torch.get_rng_state()
    assert compile_or_not(model, loss_of(model), "bfloat16") is True
    assert model.first._compiled_call_impl is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().out == ""
    assert compile_or_not(nn.Linear(3, 1), loss_of(model), "float32") is False  # it has no parts


def test_tolerance_is_of_the_whole_gradient():
    expected = torch.tensor([3.0, 4.0])
    assert difference(expected + compiling.TOLERANCE * 4.9 * torch.tensor([1.0, 0.0]), expected) is None
    assert difference(expected + compiling.TOLERANCE * 5.1 * torch.tensor([1.0, 0.0]), expected) is not None
    assert difference(torch.tensor([3.0, torch.inf]), expected) == "gradients are not finite"
