"""Profiles: how large the experiments are. One YAML file each, of papermill parameters by notebook number."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class ProfileError(ValueError):
    """A profile that does not exist, or that does not fit the notebooks."""


class NotebookError(RuntimeError):
    """A notebook stopped at a cell that failed."""


TRAINING = "train"  # the section of a profile that is of no notebook


@dataclass(frozen=True)
class Training:
    """How `python -m ngcore.study train` makes a profile's runs.

    Args:
        worth: which runs come first, see `ngcore.study.plans`; nothing: notebook after notebook.
        matmul, captured: see `ngcore.study.execution.Execution`.
    """

    worth: tuple[dict[str, Any], ...] = ()
    matmul: str = "highest"
    captured: bool = True


def find_notebooks(directory: Path) -> dict[str, Path]:
    """The notebooks `NN_name.ipynb` of `directory` by their number "NN", in order.

    Raises:
        ProfileError: two notebooks have the same number.
    """
    notebooks: dict[str, Path] = {}
    for path in sorted(directory.glob("[0-9][0-9]_*.ipynb")):
        number = path.name[:2]
        if number in notebooks:
            raise ProfileError(f"{notebooks[number].name} and {path.name} have the same number: rename one")
        notebooks[number] = path
    return notebooks


def load_profile(name: str, directory: Path) -> dict[str, dict[str, Any]]:
    """Parameters of every notebook in the profile `directory/<name>.yaml`.

    The notebooks lie in the directory above. One that the profile does not mention keeps its own values;
    every one is told the profile's name as its parameter `profile`.

    Returns:
        notebook number -> parameters that replace those of the notebook's parameters cell.

    Raises:
        ProfileError: no such profile; no such notebook; the file is no mapping of mappings; keys that are no strings.
    """
    content, path = _read(name, directory), directory / f"{name}.yaml"
    notebooks = find_notebooks(directory.parent)
    of_notebooks = {number: parameters for number, parameters in content.items() if number != TRAINING}
    for number, parameters in of_notebooks.items():
        _check(number, parameters, notebooks, path)
    return {number: {**of_notebooks.get(number, {}), "profile": name} for number in notebooks}


def _read(name: str, directory: Path) -> dict[Any, Any]:
    """What stands in a profile, unchecked but for being a mapping."""
    path = directory / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in directory.glob("*.yaml"))) or "none"
        raise ProfileError(f"unknown profile {name!r}; {directory} holds: {known}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ProfileError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ProfileError(f"{path} must map notebook numbers to parameters, but holds {content!r}")
    return content


def load_training(name: str, directory: Path) -> Training:
    """The section `train` of the profile `directory/<name>.yaml`.

    Raises:
        ProfileError: no such profile; the section is not what it should be.
    """
    section = _read(name, directory).get(TRAINING, {})
    try:
        own = dict(section)
        return Training(**own | {"worth": tuple(map(dict, own.get("worth", ())))})
    except (TypeError, ValueError) as error:
        raise ProfileError(
            f"{directory / name}.yaml: '{TRAINING}' holds `worth`, a list of mappings, `matmul` and `captured`: {error}"
        ) from error


def _check(number: Any, parameters: Any, notebooks: Mapping[str, Path], path: Path) -> None:
    """Raise a ProfileError for an entry that is of no notebook, is no mapping or has keys that are no strings."""
    if number not in notebooks:
        known = ", ".join(f'"{known}"' for known in notebooks) or "none"
        raise ProfileError(f"{path}: there is no notebook {number!r}; numbers, in quotes: {known}")
    if not isinstance(parameters, dict):
        raise ProfileError(f'{path}: "{number}" must map parameters to values, but holds {parameters!r}')
    for parameter, value in parameters.items():
        bare = [key for key in _keys(value) if not isinstance(key, str)]
        if bare:
            raise ProfileError(
                f'{path}: "{number}", {parameter}: put keys in quotes (papermill makes strings of them): {bare}'
            )


def _keys(value: Any) -> list[Any]:
    """The keys of a mapping and of the mappings in it."""
    return [k for key, inner in value.items() for k in (key, *_keys(inner))] if isinstance(value, dict) else []


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Names and values in the notebook's one cell that is tagged `parameters`.

    Raises:
        ProfileError: the file is no notebook, it has no such cell or several, or the cell assigns more than literals.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ProfileError(f"{notebook} is no notebook: {error!r}") from error
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    if len(tagged) != 1:
        raise ProfileError(f"{notebook} has {len(tagged)} cells tagged 'parameters': it needs exactly one")
    values = {}
    for statement in ast.parse(tagged[0]).body:
        try:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            values[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as error:
            line = f"{notebook}, parameters cell, line {statement.lineno}"
            raise ProfileError(f"{line}: a parameter is a name with a literal: {ast.unparse(statement)}") from error
    return values


def parameters_for(notebook: Path, profile: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The parameters that `profile`, as loaded by `load_profile`, gives to one notebook.

    papermill merely warns of a parameter that the notebook does not have, and a typing error would go unseen.

    Raises:
        ProfileError: a parameter does not occur in the notebook's parameters cell.
    """
    parameters = dict(profile[notebook.name[:2]])
    declared = declared_parameters(notebook)
    unknown = sorted(parameters.keys() - declared)
    if unknown:
        known = ", ".join(sorted(declared))
        raise ProfileError(f"{notebook.name} has no parameter {', '.join(unknown)}; its parameters cell has: {known}")
    return parameters


def plan_notebooks(profile: str, only: Sequence[str] | None, directory: Path) -> dict[Path, dict[str, Any]]:
    """Notebooks of a directory, in order, with the parameters that a profile gives them, all checked.

    Args:
        only: numbers such as ["01", "03"]; None for all.

    Raises:
        ProfileError: unknown profile, notebook number or parameter.
    """
    notebooks = find_notebooks(directory)
    unknown = [number for number in only or () if number not in notebooks]
    if unknown:
        raise ProfileError(f"no notebook has the number {', '.join(unknown)}; there are: {', '.join(notebooks)}")
    values = load_profile(profile, directory / "profiles")
    chosen = [notebook for number, notebook in notebooks.items() if only is None or number in only]
    return {notebook: parameters_for(notebook, values) for notebook in chosen}
