"""Rewrite published records to the form in which execution is no part of a run's identity.

    python data/make/migrate_results.py [DIRECTORY ...]     (default: every directory of data/results)

What only says how a run was executed moves from its config to its environment, its identity is added, and its file is
named by the new hash; records that refer to others follow them. Records of the new form are left as they are.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from ngcore.files import SHIPPED
from ngcore.study.runs import Record, identity, make_record, run_hash, write_record
from ngcore.tasks import EXPERIMENTS, ablations

EXECUTION = ("micro_batch", "compiled")


def main(directories: list[str]) -> None:
    for directory in map(Path, directories) if directories else sorted((SHIPPED / "results").iterdir()):
        paths = sorted(directory.glob("*.json"))
        old = {path: json.loads(path.read_text()) for path in paths}
        new = migrated([record for record in old.values() if "identity" not in record])
        for path, record in old.items():
            if "identity" not in record:
                path.unlink()
        for record in new:
            write_record(record, directory / f"{record['hash']}.json")
        print(f"{directory}: {len(new)} of {len(paths)} records rewritten")


def migrated(records: list[Record]) -> list[Record]:
    """Records in the new form; those that others refer to first."""
    names: dict[str, str] = {}  # of meta-training, old -> new
    found = []
    for record in sorted(records, key=lambda record: record["config"]["task"] != "meta_training"):
        config = record["config"]
        if config["task"] == "ablations":
            found.append(of_ablation(record))
            continue
        if config.get("weights") in names:
            config["weights"] = names[config["weights"]]
        found.append(of_run(config, record))
        names[record["hash"]] = found[-1]["hash"]
    return found


def of_run(stored: Mapping[str, Any], record: Mapping[str, Any]) -> Record:
    """The record of a run whose stored config is of the old form."""
    task = stored["task"]
    fields_of, execution = without_execution(stored)
    if task == "cnn_zoos":
        fields_of["data"] = [fields_of["data"]]
    config = read(EXPERIMENTS[task].config, fields_of)
    if json.loads(json.dumps(asdict(config))) != fields_of:
        raise ValueError(f"{record['hash']}: the config does not survive: {asdict(config)} and {fields_of}")
    environment = dict(record["environment"]) | execution
    return make_record(asdict(config), identity(config), record["data"], record["metrics"], environment)


def of_ablation(record: Mapping[str, Any]) -> Record:
    """An ablation's record, made anew from the run that it is of."""
    config = record["config"]
    run = of_run({**config["of"], "seed": config["seed"]}, record)
    found = ablations.record_of(config["question"], config["variant"], run)
    assert found["metrics"]["run"] == run_hash(run["identity"], run["data"])
    return found


def without_execution(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config without what says how it is executed, and that."""
    kept, execution = dict(config), {}
    if isinstance(config.get("schedule"), dict):
        kept["schedule"] = {name: value for name, value in config["schedule"].items() if name not in EXECUTION}
        execution = {name: value for name, value in config["schedule"].items() if name in EXECUTION}
    if isinstance(config.get("of"), dict):
        kept["of"], execution = without_execution(config["of"])
    return kept, execution


def read(kind: Any, value: Any) -> Any:
    """A value of JSON as the type that a dataclass declares."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        matching = [option for option in options if not is_dataclass(option) or names_of(option) == value.keys()]
        return read(matching[0], value)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        every = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        return tuple(read(own, item) for own, item in zip(every, value, strict=True))
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: read(hints[name], item) for name, item in value.items()})
    return value


def names_of(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}


if __name__ == "__main__":
    main(sys.argv[1:])
