"""Plans: which runs a notebook is made of. Some runs need the results of others, so a plan is a conversation.

A plan is a generator: it yields lists of configs, is sent their records, and returns the records that are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ngcore.study.execution import OutOfTime
from ngcore.study.executor import RunsFailed
from ngcore.study.runs import Record, add_published, publish, published, results_directory

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
        return _each_once(end.value)


def _each_once(records: Sequence[Record]) -> list[Record]:
    by_hash = {record["hash"]: record for record in records}
    return [by_hash[name] for name in sorted(by_hash)]


# Several plans at once

Worth = Sequence[Mapping[str, Any]]
"""Which runs come first: each entry names the values of fields of their configs, one or a list of them, and with
`notebook` the numbers of the notebooks that ask for them."""


def rank(worth: Worth, notebook: str, config: Any) -> int:
    """The first entry that a config fits; behind all of them what fits none."""
    fields = {**vars(config), "notebook": notebook}

    def fits(entry: Mapping[str, Any]) -> bool:
        return all(
            name in fields and fields[name] in (wanted if isinstance(wanted, list) else [wanted])
            for name, wanted in entry.items()
        )

    return next((i for i, entry in enumerate(worth) if fits(entry)), len(worth))


def carry_out_by_worth(
    conversations: Mapping[str, Runs],
    worth: Worth,
    execute_all: Callable[[str, list[Any]], list[Record]],
    note: Callable[[str, Sequence[Record], bool], None],
) -> None:
    """Carry out the plans of several notebooks at once: of all runs that they wait for those that are worth most are
    executed first, whichever plan asks for them. What fails keeps no other run waiting, but those that need its result.

    Args:
        conversations: by the number of the notebook.
        execute_all: (notebook, configs) -> their records.
        note: told (notebook, some more records, False), and at the end of a plan (notebook, what it returns, True).

    Raises:
        RunsFailed: after all others.
        OutOfTime: from `execute_all`.
    """
    asked: dict[str, list[Any]] = {}
    found: dict[Any, Record] = {}
    failures: list[RunsFailed] = []

    def answer(notebook: str, records: list[Record] | None) -> None:
        try:
            asked[notebook] = conversations[notebook].send(records)
        except StopIteration as end:
            asked.pop(notebook, None)
            note(notebook, _each_once(end.value), True)

    for notebook in conversations:
        answer(notebook, None)
    failed: set[Any] = set()
    while True:
        for notebook in list(asked):
            while all(config in found for config in asked.get(notebook, [None])):
                answer(notebook, [found[config] for config in asked[notebook]])
        waiting: dict[tuple[int, str], list[Any]] = {}
        for notebook, configs in asked.items():
            for config in dict.fromkeys(configs):
                if config not in found and config not in failed:
                    waiting.setdefault((rank(worth, notebook, config), notebook), []).append(config)
        if not waiting:
            break
        (_, notebook), configs = min(waiting.items(), key=lambda item: item[0])
        more: Mapping[Any, Record] = {}
        try:
            more = dict(zip(configs, execute_all(notebook, configs), strict=True))
        except RunsFailed as error:
            more = error.finished
            failed |= set(configs) - more.keys()
            failures.append(error)
        except OutOfTime as end:
            more = end.finished
            raise
        finally:
            found |= more
            note(notebook, list(more.values()), False)
    if failures:
        raise RunsFailed("\n".join(map(str, failures)), found) from failures[0]


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


def publish_some(plan: Plan, profile: str, records: Sequence[Record], complete: bool) -> None:
    """Publish what a plan returned, or, where it is not `complete`, what there is already of its own tasks."""
    directory = results_directory(profile)
    if complete:
        publish(records, directory)
    else:
        add_published([record for record in records if record["config"]["task"] in plan.tasks], directory)
