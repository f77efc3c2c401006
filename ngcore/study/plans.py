"""Plans: which runs a notebook is made of. Some runs need the results of others, so a plan is a conversation.

A plan is a generator: it yields lists of configs, is sent their records, and returns the records that are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ngcore.study.runs import Record, publish, published, results_directory

Runs = Generator[list[Any], list[Record], list[Record]]


@dataclass(frozen=True)
class Plan:
    """The runs of a notebook.

    Args:
        runs: (parameters of the notebook) -> the conversation.
        tasks: of the records that it returns.
    """

    runs: Callable[[Mapping[str, Any]], Runs]
    tasks: tuple[str, ...]


def carry_out(runs: Runs, execute_all: Callable[[list[Any]], list[Record]]) -> list[Record]:
    """Execute what a plan asks for; what it returns, by hash, each once."""
    try:
        configs = next(runs)
        while True:
            configs = runs.send(execute_all(configs))
    except StopIteration as end:
        by_hash = {record["hash"]: record for record in end.value}
    return [by_hash[name] for name in sorted(by_hash)]


def records_of(
    plan: Plan, parameters: Mapping[str, Any], execute_all: Callable[[list[Any]], Sequence[Record]]
) -> list[Record]:
    """The records that a notebook shows, in the same order either way.

    With the parameter `train` they are executed, or found where they are stored, and published; without, they are those
    that are published in the profile's directory.

    Raises:
        RunError: nothing is published.
    """
    directory = results_directory(parameters["profile"])
    if not parameters["train"]:
        return published(directory, plan.tasks)
    found = carry_out(plan.runs(parameters), execute_all)
    publish(found, directory)
    return found
