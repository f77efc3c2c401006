"""Files of learned optimizers, and those that come with the repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ngcore.files import SHIPPED, write_atomically
from ngcore.models.optimizers import FEATURES, METHODS, LearnedOptimizer
from ngcore.models.optimizers.learned import ALPHA, BETA, DECAYS, P

OPTIMIZERS = SHIPPED / "optimizers"
RULE = {"features": FEATURES, "decays": list(DECAYS), "p": P, "alpha": ALPHA, "beta": BETA}


def shipped_file(method: str) -> Path:
    """Where a learned optimizer lies that comes with the repository.

    Raises:
        ValueError: an unknown method.
        FileNotFoundError: ngcore is not installed from a clone, where `data/` lies.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    path = OPTIMIZERS / f"{method}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: learned optimizers lie in a clone of the repository")
    return path


def shipped(method: str) -> LearnedOptimizer:
    """A learned optimizer that comes with ngcore, meta-trained on FashionMNIST; raises what `shipped_file` does.

    `shipped(method).bind(network, example_input)` optimizes a network.
    """
    return load(shipped_file(method))


def provenance(method: str) -> dict[str, Any]:
    """The meta-training that a shipped optimizer comes from: its config's fields, its device, its commit."""
    about, _ = read(shipped_file(method))
    return about["provenance"]


def save(rule: LearnedOptimizer, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write a learned optimizer with its method, its options and where it comes from."""
    about = {"method": rule.method, "options": rule.options, "rule": RULE, "provenance": dict(provenance)}
    write_atomically(path, safetensors.torch.save(rule.state_dict(), metadata={"ngcore": json.dumps(about)}))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of its optimizer ("method", "options", "rule", "provenance"), and the weights.

    Raises:
        ValueError: it is no such file, or truncated.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["ngcore"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no learned optimizer ({error!r})") from error


def load(path: Path) -> LearnedOptimizer:
    """Read a learned optimizer.

    Raises:
        ValueError: the file is none, is truncated, or was trained for other features or another rule.
    """
    about, weights = read(path)
    if about.get("rule") != RULE:
        raise ValueError(f"{path} was trained for another rule, {about.get('rule')}; ngcore's is {RULE}")
    try:
        rule = LearnedOptimizer(about["method"], **about["options"])
        rule.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no optimizer of the method it names: {error}") from error
    return rule.eval()
