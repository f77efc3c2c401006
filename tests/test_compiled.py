"""Compiled code against eager code, in a process of its own: torch.compile can't read functions under type checks."""

import subprocess
import sys

import pytest

MODEL = """
import copy
import torch
from ngcore.graph import mlp
from ngcore.models import NGGNN, NGT, Editor, PerParameter, Scores

torch.manual_seed(0)
wiring = mlp([2, 4, 1], "siren")
metanetwork = {model}  # compiled or not, the same random numbers are drawn
graph = wiring.graph({{name: 0.3 * torch.randn(4, *shape) for name, shape in wiring.shapes.items()}})
metanetwork.fit_normalization(graph)

def numbers_and_gradients():
    torch.manual_seed(1)
    metanetwork.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled={bfloat16}):
        found = {found}
    found.float().square().sum().backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in metanetwork.parameters()])

eager = numbers_and_gradients()
metanetwork.compile_parts()
for plain, compiled in zip(eager, numbers_and_gradients(), strict=True):
    assert (compiled - plain).norm() < {tolerance} * plain.norm(), (compiled, plain)
original, metanetwork = metanetwork, copy.deepcopy(metanetwork)
for parameter in original.parameters():
    parameter.data.zero_()
for plain, copied in zip(eager, numbers_and_gradients(), strict=True):
    assert (copied - plain).norm() < {tolerance} * plain.norm(), "a copy computes with the original's weights"
"""

FIT = """
import torch
from ngcore.data.inrs.sets import siren

x, y = siren.pixel_coordinates()
images = torch.stack([0.5 + 0.3 * torch.sin(x + phase) * torch.cos(y) for phase in (0, 1)]).unflatten(1, (28, 28))
fits = [
    siren.fit_sirens(images, siren.initialize(range(2)), steps=10, learning_rate=1e-3, compiled=compiled)
    for compiled in (False, True)
]
for name, values in fits[0].parameters.items():
    torch.testing.assert_close(fits[1].parameters[name], values, rtol=1e-4, atol=1e-5)
"""


PARAMETERS = "torch.cat([values.flatten() for values in metanetwork(graph).state_dict().values()])"


def script(model, found="metanetwork(graph)", bfloat16=False):
    """Compiled code keeps some numbers in float32 that eager code rounds to bfloat16, 0.004 of each at a time."""
    return MODEL.format(model=model, found=found, bfloat16=bfloat16, tolerance=0.05 if bfloat16 else 1e-5)


SCRIPTS = {
    "fit": FIT,
    "NG-GNN": script("NGGNN(wiring, Scores(3))"),
    "NG-T": script("NGT(wiring, Scores(3))"),
    "NG-GNN bfloat16": script("NGGNN(wiring, Scores(3))", bfloat16=True),
    "NG-T bfloat16": script("NGT(wiring, Scores(3))", bfloat16=True),
    "editor": script("Editor(NGGNN(wiring, PerParameter()))", PARAMETERS),
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_compiled_agrees_with_eager(script):
    check = "from ngcore.study.training import can_compile\nif not can_compile(): raise SystemExit(3)\n"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", check + script], capture_output=True, text=True)
    if found.returncode == 3:
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    assert found.returncode == 0, found.stderr
