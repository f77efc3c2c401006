"""What is known of a method, once: how it is built and executed, and how tables and figures show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One method of a task, whose `METHODS` have the order of the tables' rows.

    Args:
        build: makes its model; None for a row that is no model.
        inputs: of a task's data the form that the model reads, where methods differ in it.
        colour: position in the colour-blind palette; None for dark grey. Methods that meet in one figure differ.
        probes: whether it takes probe features.
        micro_batch: networks per pass that suit a CPU's cache; 0 for the whole batch.
        chunk: networks of like size that are read together; None for all of a batch.
        is_control: a trivial baseline, which a claim has to beat; figures dot its line.
    """

    build: Callable[..., Any] | None = None
    inputs: Callable[[Any], Any] | None = None
    colour: int | None = None
    probes: bool = False
    micro_batch: int = 0
    chunk: int | None = None
    is_control: bool = False


Methods = Mapping[str, Method]


def method_order(methods: Methods, name: str) -> tuple[int, str]:
    """Sort key that puts names in the order of the methods, and others after them by name."""
    return [*methods, name].index(name), name


def known(methods: Methods, name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: an unknown method.
    """
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(methods)}")
    return methods[name]
