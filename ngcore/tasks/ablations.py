"""Ablations (paper, tables 6 and 7) and the choices that the papers leave open: variants of other tasks' runs.

A variant is the config of a run of another task with one thing changed; the full model is that task's own run, found
where it is stored. Records of ablations tell which run they are of, and for which question it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ngcore.data.inrs.augment import Augmentation
from ngcore.study.executor import execute_all
from ngcore.study.runs import Record, run_hash
from ngcore.tasks import generalization, inr_classification
from ngcore.tasks.variants import changed

RUN = {"inr_classification": inr_classification.run, "generalization": generalization.run}
# Edges of "both" have the sum of two Fourier frequencies, which has this deviation: variants with one get it too.
EDGE_SIGMA = 3.0 * 2**0.5
ORDER = Augmentation(translate=0.0, rotate=0.0, zoom=0.0, weight_dropout=0.0, permute=True)  # of neurons, and no more

# question -> variant -> what differs from the full model: options of the model, or fields of the config
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "positional embeddings": {"with": {}, "without": {"positions": False}},
    "activation embeddings": {"with": {}, "without": {"activations": False}},
    "directions": {
        "both, with their sum": {},
        "both, without their sum": {"directions": "without_sum", "edge_sigma": EDGE_SIGMA},
        "the sum alone (undirected)": {"directions": "sum", "edge_sigma": EDGE_SIGMA},
        "forward": {"directions": "forward", "edge_sigma": EDGE_SIGMA},
        "reversed": {"directions": "reversed", "edge_sigma": EDGE_SIGMA},
    },
    "normalization": {
        "per layer": {},
        "none": {"normalization": "none"},
        "per neuron": {"normalization": "neuron"},
    },
    "biases": {"features of neurons": {}, "edges of bias nodes": {"biases": "node"}},
    "probe points": {"learned": {}, "random": {"probing": "random"}, "a grid": {"probing": "grid"}},
    "augmentation": {
        "none": {},
        "images": {"augmentation": Augmentation()},
        "order of neurons": {"augmentation": ORDER},
        "both": {"augmentation": replace(Augmentation(), permute=True)},
    },
    "linear layers": {"as 1x1 convolutions": {}, "as linear layers": {"method": "NG-GNN_linear"}},
    "flattening": {"a layer of its own": {}, "repeated neurons": {"method": "NG-GNN_repeat"}},
}


@dataclass(frozen=True)
class Trial:
    """A run of another task, and what it is one variant of."""

    question: str
    variant: str
    config: Any


def trials(question: str, configs: Iterable[Any], variants: Sequence[str] = ()) -> list[Trial]:
    """The variants of some full models that a question asks for, all of them or those that are named.

    Raises:
        ValueError: an unknown question or variant.
    """
    if question not in VARIANTS:
        raise ValueError(f"unknown question {question!r}; there are {', '.join(VARIANTS)}")
    known = VARIANTS[question]
    unknown = [name for name in variants if name not in known]
    if unknown:
        raise ValueError(f"{question!r} has no variants {', '.join(unknown)}; there are {', '.join(known)}")
    names = variants or tuple(known)
    return [Trial(question, name, changed(config, **known[name])) for config in configs for name in names]


def run(config: Any, on_epoch: Callable[[int, Record], None] = lambda epoch, scores: None) -> Record:
    """The result of a run of whichever task."""
    return RUN[config.task](config, on_epoch)


def run_all(every: Sequence[Trial], workers: int | None = None) -> list[Record]:
    """The records of trials, each run once however many questions ask for it; errors as of `execute_all`."""
    configs = list(dict.fromkeys(trial.config for trial in every))
    records = dict(zip(configs, execute_all(run, configs, workers=workers), strict=True))
    return [record_of(trial.question, trial.variant, records[trial.config]) for trial in every]


def record_of(question: str, variant: str, record: Record) -> Record:
    """A run's record under the question that it answers; its metrics that are one number, and its own hash as `run`."""
    of = record["config"]
    shown = {name: of[name] for name in ("dataset", "method", "seed", "probes") if name in of}
    config = {"task": "ablations", **shown, "question": question, "variant": variant}
    if "data" in of and "train" in of["data"]:
        config |= {"train": of["data"]["train"], "epochs": of["schedule"]["epochs"]}
    config["of"] = {name: value for name, value in of.items() if name != "seed"}
    metrics = {name: value for name, value in record["metrics"].items() if isinstance(value, int | float)}
    return {
        "hash": run_hash(config, record["data"]),
        "config": config,
        "data": record["data"],
        "metrics": metrics | {"run": record["hash"]},
        "environment": record["environment"],
    }


def asked(records: Sequence[Record], question: str, **fields: Any) -> list[Record]:
    """The records of a question whose configs have these fields, in the order of its variants."""
    expected: Mapping[str, Any] = {"question": question} | fields
    found = [r for r in records if all(r["config"].get(name) == value for name, value in expected.items())]
    order = list(VARIANTS.get(question, ()))
    place = {name: i for i, name in enumerate(order)}
    return sorted(found, key=lambda r: (place.get(r["config"]["variant"], len(order)), r["config"]["seed"]))
