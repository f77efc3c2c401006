"""Repeated work without a GPU: what it is given is copied, and where it can't be captured it runs as it is."""

import pytest
import torch

from ngcore.study import captured
from ngcore.study.captured import Captured


class Recorded(Captured):
    """Repeats as a graph does: on the very tensors of the first call, without Python's part of the work."""

    def _warm_up(self):
        self._as_it_is()

    def _captured(self):
        inputs = self.inputs
        return lambda: self.work(*inputs)


def sums(kind, calls=8):
    """What work adds up, given one tensor that its owner changes between the calls."""
    total, seen = torch.zeros(3), []

    def work(x, y):
        total.add_(x * y)
        seen.append((x.data_ptr(), y.data_ptr()))

    repeated, x = kind(work), torch.zeros(3)
    for i in range(calls):
        x.copy_(torch.arange(3.0) + i)
        repeated(x, torch.tensor(float(i)))
    return total, seen


def test_every_call_sees_its_own_inputs_at_one_place():
    expected = sum((torch.arange(3.0) + i) * i for i in range(8))
    found, seen = sums(Recorded)
    assert torch.equal(found, expected)
    assert len(set(seen)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be captured")
def test_what_cant_be_captured_runs_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(Captured, "_warm_up", Captured._as_it_is)
    expected = sum((torch.arange(3.0) + i) * i for i in range(8))
    assert torch.equal(sums(Captured)[0], expected)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert told[0].startswith("a step is not captured as one graph: RuntimeError")


def test_what_waits_runs_as_it_is(monkeypatch, capsys):
    """The last call before the capture finds it out; its work is done all the same."""
    modes = []

    def work(x):
        if modes and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        done.append(x.item())

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(Captured, "_warm_up", Captured._without_waiting)
    done, repeated = [], Captured(work)
    for i in range(captured.WARM_UP + 2):
        repeated(torch.tensor(float(i)))
    assert done == [float(i) for i in range(captured.WARM_UP + 2)]
    assert modes[-1] == 0
    assert "synchronizing" in capsys.readouterr().out
