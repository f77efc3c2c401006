"""Rows of a table as a notebook's parameters list them, the most telling first: runs are made in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

PAPER = "paper"  # the recipe of rows that are the paper's own


@dataclass(frozen=True)
class Row:
    """A run of a table: one method with one seed.

    Args:
        recipe: what its way of training is called, where that is not the paper's.
        changes: what differs from the table's other rows, see `ngcore.tasks.variants.changed`.
    """

    method: str
    probes: int
    seed: int
    recipe: str = PAPER
    changes: Mapping[str, Any] = field(default_factory=dict)


def rows_of(entries: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The runs of a list such as `[{methods: [NG-GNN], probes: [0, 64], seeds: [0], recipe: linear, sigma: null}]`.

    An entry stands for all combinations of its methods, probe features (none where not given) and seeds (0 where not
    given). What else it says are changes.

    Raises:
        ValueError: an entry names no methods; a recipe that is not the paper's changes nothing.
    """
    for entry in entries:
        if not entry.get("methods"):
            raise ValueError(f"a row of a table is a mapping with `methods`, not {entry!r}")
        changes = dict(entry)
        methods, probes, seeds = (
            changes.pop(name, default) for name, default in (("methods", ()), ("probes", [0]), ("seeds", [0]))
        )
        recipe = changes.pop("recipe", PAPER)
        if recipe != PAPER and not changes:
            raise ValueError(f"the recipe {recipe!r} of {', '.join(methods)} says nothing that it changes")
        for method, count, seed in product(methods, probes, seeds):
            yield Row(method, count, seed, recipe, changes)


def of_dataset(parameter: Any, dataset: str) -> Any:
    """A parameter's value for a data set, where it has one for each."""
    return parameter[dataset] if isinstance(parameter, Mapping) else parameter
