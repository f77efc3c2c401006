"""State dicts as users have them, read as the one that a wiring binds: names that it knows, shapes that fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's, before every name
NetworkState = Mapping[str, Tensor]


@dataclass(frozen=True)
class Entries:
    """What the state dict of one architecture holds.

    Attributes:
        shapes: shape of every parameter on the graph.
        aliases: further names of parameters, with the first one.
        others: names of what is not on the graph.
    """

    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    others: tuple[str, ...]

    def read(self, given: NetworkState | Sequence[NetworkState]) -> tuple[NetworkState, tuple[int, ...]]:
        """A state dict under the architecture's own names, and its batch axes; a list is stacked along a first axis.

        Raises:
            ValueError: see `Wiring.graph`.
        """
        if isinstance(given, Mapping):
            state = self._with_known_names(given)
            return state, self._batch_axes(state)
        if not given:
            raise ValueError("the list of state dicts is empty")
        networks = [self._read_network(i, state) for i, state in enumerate(given)]
        first, batch = networks[0]
        for i, (state, axes) in enumerate(networks):
            if axes != batch:
                raise ValueError(f"network {i} has batch axes {axes}, network 0 {batch}")
            _require_alike(first, state, i)
        return {name: torch.stack([state[name] for state, _ in networks]) for name in first}, (len(given), *batch)

    def _read_network(self, i: int, given: NetworkState) -> tuple[NetworkState, tuple[int, ...]]:
        try:
            return self.read(given)
        except ValueError as error:
            raise ValueError(f"network {i}: {error}") from error

    def _with_known_names(self, given: NetworkState) -> NetworkState:
        """Without the prefix that a wrapper put before every name."""
        known = {*self.shapes, *self.aliases, *self.others}
        state, removed = given, ""
        while not known & set(state):
            prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None)
            if prefix is None or not state:
                return given
            state = {name.removeprefix(prefix): values for name, values in state.items()}
            removed += prefix
        if removed:
            warnings.warn(f"names of parameters are read without their prefix {removed!r}", stacklevel=4)
        return state

    def _batch_axes(self, state: NetworkState) -> tuple[int, ...]:
        """The axes before the parameters' own, the same for all."""
        self._require_names(state)
        batch = None
        for name, shape in self.shapes.items():
            values = state[name]
            found = tuple(values.shape)
            if found[len(found) - len(shape) :] != shape:
                raise ValueError(f"parameter {name} has shape {found}; the wiring needs (..., {str(shape)[1:]}")
            if not values.is_floating_point():
                raise ValueError(f"parameter {name} is of {values.dtype}; convert it to floating-point numbers")
            axes = found[: len(found) - len(shape)]
            if batch is not None and axes != batch:
                raise ValueError(f"parameter {name} has batch axes {axes}, the parameters before it {batch}")
            batch = axes
        return batch

    def _require_names(self, state: NetworkState) -> None:
        if not state:
            raise ValueError(f"the state dict is empty; the wiring needs {list(self.shapes)}")
        unknown = sorted(set(state) - {*self.shapes, *self.aliases, *self.others})
        missing = sorted(set(self.shapes) - set(state))
        if unknown or missing:
            raise ValueError(f"parameters do not fit the wiring: missing {missing}, unknown {unknown}")
        for alias, name in self.aliases.items():
            if alias in state and not _same(state[alias], state[name]):
                raise ValueError(f"{alias} and {name} are one parameter of the network, but have different values")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; those in one place of memory need not be compared."""
    if (a.shape, a.stride(), a.data_ptr()) == (b.shape, b.stride(), b.data_ptr()):
        return True
    return torch.equal(a, b)


def _require_alike(first: NetworkState, state: NetworkState, i: int) -> None:
    """Two networks of one list: stacking would promote types, and can't take other shapes of what is off the graph."""
    if only := sorted(set(first) ^ set(state)):
        raise ValueError(f"networks 0 and {i} do not both have {only}")
    for name, values in state.items():
        own, wanted = (f"shape {tuple(x.shape)} and {x.dtype}" for x in (values, first[name]))
        if own != wanted:
            raise ValueError(f"network {i}: {name} has {own}, but {wanted} in network 0")
