"""Compiling a model's hot parts, so that a run never fails or goes wrong by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Of bfloat16 gradients of one micro-batch, as a whole, compiled against not compiled: both round, at different places.
# Measured on INRs: 0.012 (NG-GNN) and 0.064 (NG-T).
TOLERANCE = 0.1
REASON_LENGTH = 160  # characters of an error that are shown


def compile_or_not(model: nn.Module, loss: Callable[[], Tensor], precision: str) -> bool:
    """Compile a model's parts, unless it has none, that does not work here, or gradients come out wrong.

    Then one line says so, and the model is what it was before. Parts are only compiled when they are first run, the
    backward pass too: so one training step's gradients are computed here, and in bfloat16, which compilers round as
    they like, compared with those of the model as it was.

    Args:
        loss: of one micro-batch, of the shapes that training has; called up to twice with the same random numbers.

    Returns:
        Whether the model is compiled.
    """
    if not hasattr(model, "compile_parts"):
        return False
    model.train()
    plain = gradients_of(model, loss) if precision == "bfloat16" else None
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    model.compile_parts()
    try:
        compiled = gradients_of(model, loss)
        reason = None if plain is None else difference(compiled, plain)
    except Exception as error:  # a compiler may raise anything; a fault of the model's own comes again without it
        reason = summary_of(error)
    if reason is None:
        return True
    for module, before in attributes:  # compiling a module has no inverse
        vars(module).clear()
        vars(module).update(before)
    print(f"{type(model).__name__} runs without torch.compile: {reason}", flush=True)
    return False


def summary_of(error: Exception) -> str:
    """One line of an error that may have a thousand: the compiler's first complaint where there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = next((line for line in lines if "error: " in line), lines[0])
    return f"{type(error).__name__}: {told}"[:REASON_LENGTH]


def gradients_of(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """All gradients of a loss in one vector; the random numbers that it draws are drawn again afterwards."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[p.device for p in parameters[:1] if p.device.type == "cuda"]):
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    zeros = (torch.zeros_like(p) if own is None else own for own, p in zip(found, parameters, strict=True))
    return torch.cat([own.flatten() for own in zeros])


def difference(found: Tensor, expected: Tensor) -> str | None:
    """What is wrong with gradients beside those expected; None where they are near."""
    if not bool(torch.isfinite(found).all()):
        return "gradients are not finite"
    distance = ((found - expected).norm() / expected.norm()).item()
    return None if distance < TOLERANCE else f"gradients differ by {distance:.2g} of their norm"
