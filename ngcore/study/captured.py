"""Work that a GPU repeats as one CUDA graph: hundreds of launches become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ngcore.study.compiling import summary_of

WARM_UP = 3  # calls before the capture: libraries choose their algorithms, an optimizer makes its states


class Captured:
    """The same work again and again, on inputs of the same shapes.

    The first calls run as they are. In the last of them nothing may wait for the GPU, for that can't be captured: where
    something does, or the capture fails, one line says so and all calls run as they are.

    Args:
        work: (inputs) changes tensors in place, and returns nothing; what it does depends on no value of a tensor.
    """

    def __init__(self, work: Callable[..., None]) -> None:
        self.work = work
        self.inputs: tuple[Tensor, ...] = ()
        self.calls = 0
        self.repeat: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> None:
        self.calls += 1
        if not self.inputs:
            self.inputs = tuple(map(torch.clone, inputs))
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        if self.repeat is None and self.calls <= WARM_UP:
            self._warm_up()
            return
        if self.repeat is None:
            self.repeat = self._captured()
        self.repeat()

    def _as_it_is(self) -> None:
        self.work(*self.inputs)

    def _give_up(self, error: Exception) -> None:
        print(f"a step is not captured as one graph: {summary_of(error)}", flush=True)
        self.repeat = self._as_it_is

    def _warm_up(self) -> None:
        """On a stream of its own, as the capture is."""
        if self.calls == 1:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.calls < WARM_UP:
                self._as_it_is()
            else:
                self._without_waiting()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _without_waiting(self) -> None:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._as_it_is()
        except RuntimeError as error:
            torch.cuda.set_sync_debug_mode(before)
            self._give_up(error)
            self._as_it_is()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _captured(self) -> Callable[[], None]:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._as_it_is()
        except RuntimeError as error:
            self._give_up(error)
            return self._as_it_is
        return graph.replay
