"""Ablations (paper, tables 6 and 7) and the choices that the papers leave open: variants of other tasks' runs.

A variant is the config of a run of another task with one thing changed; the full model is that task's own run, found
where it is stored. Records of ablations tell which run they are of, and for which question it was asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pandas as pd

from ngcore.data.inrs.augment import Augmentation
from ngcore.data.zoos import wild_park
from ngcore.study import comparison
from ngcore.study.evidence import difference
from ngcore.study.plans import Plan, Runs
from ngcore.study.runs import Record, having, make_record
from ngcore.study.tables import beside_published, describe_scale
from ngcore.study.training import Schedule
from ngcore.tasks import architectural_noise, generalization, inr_classification
from ngcore.tasks.inr_sets import data_of
from ngcore.tasks.rows import rows_of
from ngcore.tasks.variants import changed
from ngcore.tasks.zoos import Zoo, sizes_in_words, zoo_of

_EVERY = inr_classification.METHODS | generalization.METHODS
METHODS = {name: _EVERY[name] for name in ("MLP", "SetNN", "StatNN", "DWSNet", "NG-GNN", "NG-T")}  # of both tasks
HEADINGS = {"train": "Training INRs", "changed": "Networks changed", "noise": "Description"}
# Edges of "both" have the sum of two Fourier frequencies, which has this deviation: variants with one get it too.
EDGE_SIGMA = 3.0 * 2**0.5
KEPT = ("fitted_loss", "val_loss", "test_labels", "test_predicted")  # of a run's metrics, beside single numbers
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
    "updates": {
        "residual, norm per node": {},
        "plain, norm over the network": {"residual": False},
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


def record_of(question: str, variant: str, record: Record) -> Record:
    """A run's record under the question that it answers, with the metrics that answer it and its own hash as `run`."""
    of = record["config"]
    shown = {name: of[name] for name in ("dataset", "method", "seed", "probes") if name in of}
    asked = {"task": "ablations", "question": question, "variant": variant, "seed": of["seed"]}
    config = shown | asked
    if "data" in of and "train" in of["data"]:
        config |= {"train": of["data"]["train"], "epochs": of["schedule"]["epochs"]}
    config["of"] = {name: value for name, value in of.items() if name != "seed"}
    identity = asked | {"of": {name: value for name, value in record["identity"].items() if name != "seed"}}
    metrics = {
        name: value for name, value in record["metrics"].items() if isinstance(value, int | float) or name in KEPT
    }
    return make_record(config, identity, record["data"], metrics | {"run": record["hash"]}, record["environment"])


def asked(records: Sequence[Record], question: str, **fields: Any) -> list[Record]:
    """The records of a question whose configs have these fields, in the order of its variants."""
    expected: Mapping[str, Any] = {"question": question} | fields
    found = [r for r in records if all(r["config"].get(name) == value for name, value in expected.items())]
    order = list(VARIANTS.get(question, ()))
    place = {name: i for i, name in enumerate(order)}
    return sorted(found, key=lambda r: (place.get(r["config"]["variant"], len(order)), r["config"]["seed"]))


INR_SCALE = {
    "data.train": "training INRs",
    "data.test": "test INRs",
    "data.steps": "fitting steps each",
    "schedule.epochs": "epochs",
    "schedule.batch": "INRs a batch",
    "schedule.warmup": "warm-up steps",
}
PARK_SCALE = {"schedule.epochs": "epochs", "schedule.batch": "networks a batch", "schedule.warmup": "warm-up steps"}


def scale_of(records: Sequence[Record], profile: str, of: Zoo | None = None) -> str:
    """For captions: sizes, seeds and device, and what CNNs the records are of, if any."""
    fields = {f"of.{name}": words for name, words in (PARK_SCALE if of else INR_SCALE).items()}
    where = f"{sizes_in_words([of])}." if of else "MNIST INRs."
    return f"{describe_scale(records, profile, fields)} {where}"


def unit_of(of: Zoo | None) -> tuple[str, int]:
    """The unit of differences, and its decimals, of CNNs or of INRs."""
    return ("in τ", 3) if of else ("points", 1)


def compare(
    records: Sequence[Record],
    base: str,
    what: str,
    profile: str,
    *,
    by: Sequence[str] = ("method",),
    of: Zoo | None = None,
) -> tuple[pd.DataFrame, str]:
    """The table of a question's records and its caption. `of` is the population of CNNs, if any."""
    metric, scale = (f"test_{of.dataset}_tau", 1) if of else ("test_accuracy", 100)
    table = comparison.differences(records, base, metric=metric, scale=scale, by=by, methods=METHODS)
    if of is None:
        table = over_test_inrs(table, records, base, by)
    return table, f"{what} {scale_of(records, profile, of)}"


def over_test_inrs(table: pd.DataFrame, records: Sequence[Record], base: str, by: Sequence[str]) -> pd.DataFrame:
    """Differences with intervals over test INRs and seeds in place of seeds alone: one seed, too, has one."""
    table = table.copy()
    for i, row in table[table["verdict"] != "base"].iterrows():
        same = {name: row[name] for name in by}
        ours, theirs = (having(records, variant=name, **same) for name in (row["variant"], base))
        found = difference(ours, theirs, inr_classification.ACCURACY)
        verdict = ("better" if found.value > 0 else "worse") if found.excludes_zero else "inside the noise"
        table.loc[i, ["difference", "low", "high", "verdict"]] = [*found, verdict]
    return table


def with_and_without(table: pd.DataFrame, published: Mapping[str, Any]) -> pd.DataFrame:
    """A table of the variants "with" and "without" beside the paper's, which calls the second <method>_without."""
    names = table["method"] + table["variant"].map({"without": "_without", "with": ""})
    return beside_published(table.assign(method=names).drop(columns="variant"), published)


def noise_rows(records: Sequence[Record]) -> list[Record]:
    """Every wrong description twice, as the networks are and as they are described, in the order of the noises."""
    noises, rows = list(architectural_noise.SHARES), []
    for record in sorted(records, key=lambda r: (noises.index(r["config"]["noise"]), r["config"]["share"])):
        own, metrics = record["config"], record["metrics"]
        label = own["noise"] if own["share"] == 1 else f"{own['noise']}, {100 * own['share']:.0f} %"
        for variant, name in (("as they are", "tau_as_they_are"), ("as described", "tau")):
            if metrics["changed"]:
                config = {**own, "noise": label, "variant": variant}
                rows.append({"config": config, "metrics": {"tau": metrics[name], "changed": metrics["changed"]}})
    return rows


def noise_table(rows: Sequence[Record]) -> pd.DataFrame:
    """τ on networks as they are and as they are described; `changed` says how many are described differently."""
    table = comparison.differences(rows, "as they are", metric="tau", by=("noise", "method"), methods=METHODS)
    changed: dict[str, set[int]] = {}
    for row in rows:
        changed.setdefault(row["config"]["noise"], set()).add(row["metrics"]["changed"])
    counts = {label: " to ".join(map(str, sorted({min(found), max(found)}))) for label, found in changed.items()}
    table.insert(2, "changed", table["noise"].map(counts))
    return table


def populations_of(parameters: Mapping[str, Any]) -> tuple[Zoo, Zoo]:
    """The Wild Park, and the one whose networks flatten, as a notebook's parameters ask for them."""
    return (
        zoo_of(parameters["wild_park"], wild_park.Recipe),
        zoo_of(parameters["flattened_park"], wild_park.FlattenedRecipe),
    )


def inr_configs(
    parameters: Mapping[str, Any],
    method: str,
    probes: int,
    seeds: int,
    *,
    train: int | None = None,
    augmentation: Augmentation | Literal["as in the tables"] | None = "as in the tables",
    **schedule: Any,
) -> list[inr_classification.Config]:
    """Runs of INR classification as in its tables, but for the size of the training set, augmentation or schedule."""
    data, settings = data_of(parameters, "mnist"), inr_classification.settings_of(parameters)
    if augmentation != "as in the tables":
        settings["augmentation"] = augmentation
    own = replace(inr_classification.schedule_of(parameters, parameters["epochs"]), **schedule)
    data = data if train is None else replace(data, train=train)
    return [inr_classification.base_config(data, own, method, probes, seed, **settings) for seed in range(seeds)]


def park_configs(
    parameters: Mapping[str, Any], methods: Sequence[str], seeds: int, population: Zoo
) -> list[generalization.Config]:
    """Runs on a park as in table 1."""
    schedule = Schedule(
        *(parameters[f"park_{name}"] for name in ("epochs", "batch")),
        weight_decay=parameters["weight_decay"],
        warmup=parameters["park_warmup"],
        decay=parameters["decay"],
    )
    rates = parameters["learning_rate"]
    return generalization.configs_of(population.dataset, [population], methods, seeds, schedule, rates)


def trials_of(parameters: Mapping[str, Any]) -> list[Trial]:
    """The variants of every question."""
    p, inrs, parks = parameters, partial(inr_configs, parameters), partial(park_configs, parameters)
    (population, flattened), seeds = populations_of(p), p["seeds"]
    found = trials("activation embeddings", parks(["NG-GNN", "NG-T"], seeds["table_6"], population))
    found += trials("activation embeddings", parks(["StatNN"], seeds["table_6"], population), ["with"])
    found += trials("positional embeddings", long_configs(p, p["table_7"]))
    found += [Trial("equal fit", config.method, config) for config in long_configs(p, p["figure_4"])]
    for question in ("directions", "updates", "normalization", "biases"):
        found += trials(question, inrs("NG-GNN", p["probes"], seeds["variants"]))
    for count in p["probe_counts"]:
        found += trials("probe points", inrs("NG-GNN", count, seeds["curves"]))
    found += trials("linear layers", parks(["NG-GNN"], seeds["linear layers"], population))
    found += trials("flattening", parks(["NG-GNN"], seeds["flattening"], flattened))
    return found + size_trials(p) + augmentation_trials(p)


def long_configs(
    parameters: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> list[inr_classification.Config]:
    """Rows of table 3, at the scale that notebook 01 has in the same profile: the parameters in `long`."""
    p = {**parameters, **parameters["long"]}
    base = data_of(p, "mnist"), inr_classification.schedule_of(p, p["epochs"])
    settings = inr_classification.settings_of(p)
    return [inr_classification.row_config(row, *base, **settings) for row in rows_of(entries)]


def size_trials(parameters: Mapping[str, Any]) -> list[Trial]:
    """The methods of the tables on fewer INRs, for about as many steps."""
    p, found = parameters, []
    steps = p["epochs"] * (p["train_size"] // p["batch"])
    for method, probes in p["size_rows"]:
        for size in [*p["sizes"], p["train_size"]]:
            epochs = round(steps / max(1, size // p["batch"]))
            for config in inr_configs(p, method, probes, p["seeds"]["curves"], train=size, epochs=epochs):
                found.append(Trial("size of the training set", f"{size:,} INRs", config))
    return found


def augmentation_trials(parameters: Mapping[str, Any]) -> list[Trial]:
    """Kinds of augmentation, for multiples of the epochs."""
    p, found = parameters, []
    for method, multiples in p["augmented"].items():
        kinds = ["none", "images", "order of neurons", "both"] if method == "MLP" else ["none", "images"]
        probes = p["probes"] if inr_classification.METHODS[method].probes else 0
        for multiple in multiples:
            epochs = multiple * p["epochs"]
            full = inr_configs(p, method, probes, p["seeds"]["curves"], augmentation=None, epochs=epochs)
            found += trials("augmentation", full, kinds)
    return found


def runs(parameters: Mapping[str, Any]) -> Runs:
    """Every question's variants, each run once; wrong descriptions of the networks of table 6."""
    p, asked = parameters, trials_of(parameters)
    records = yield [trial.config for trial in asked]
    population, _ = populations_of(p)
    noisy = yield [
        architectural_noise.Config.on(config, noise, share)
        for config in park_configs(p, ["StatNN", "NG-GNN", "NG-T"], p["seeds"]["table_6"], population)
        for noise, shares in architectural_noise.SHARES.items()
        for share in shares
    ]
    own = [record_of(trial.question, trial.variant, record) for trial, record in zip(asked, records, strict=True)]
    return own + noisy


PLAN = Plan(runs, ("ablations", "architectural_noise"))
