"""Files of learned optimizers, and those that come with the repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ngcore.models.optimizers import FEATURES, METHODS, LearnedOptimizer
from ngcore.study.files import replacing
from ngcore.study.runs import ROOT

SHIPPED = ROOT / "data" / "optimizers"


def shipped(method: str) -> LearnedOptimizer:
    """A learned optimizer that comes with ngcore, meta-trained on FashionMNIST: `.bind(network, example_input)`.

    Raises:
        ValueError: an unknown method.
        FileNotFoundError: ngcore is not installed from a clone, where `data/` lies.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    path = SHIPPED / f"{method}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: learned optimizers lie in a clone of the repository")
    return load(path)


def save(rule: LearnedOptimizer, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write a learned optimizer with its method, its options and where it comes from."""
    about = {"method": rule.method, "options": rule.options, "features": FEATURES, "provenance": dict(provenance)}
    with replacing(path) as partial:
        save_file(rule.state_dict(), partial, metadata={"ngcore": json.dumps(about)})


def load(path: Path) -> LearnedOptimizer:
    """Read a learned optimizer.

    Raises:
        ValueError: the file is none, is truncated, or was made for other features.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["ngcore"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no learned optimizer ({error!r})") from error
    if about["features"] != FEATURES:
        raise ValueError(f"{path} reads {about['features']} features of every scalar; ngcore makes {FEATURES}")
    rule = LearnedOptimizer(about["method"], **about["options"])
    try:
        rule.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {about['method']}: {error}") from error
    return rule.eval()
