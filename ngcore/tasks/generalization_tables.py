"""What tables and figures show of runs that predict generalization: τ with intervals over training runs and splits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from ngcore.study import runs
from ngcore.study.evidence import LEVEL, Measure, difference, with_intervals
from ngcore.study.runs import Record
from ngcore.study.tables import describe_scale, summarize
from ngcore.tasks import zoos
from ngcore.tasks.generalization import METHODS, TABLE_1
from ngcore.tasks.zoos import SHARES, Zoo

CHANCE = 0.1  # of ten classes
PARK = "cifar10_wild_park"


def having(records: Sequence[Record], **fields: Any) -> list[Record]:
    """Those of some records whose configs have these fields, and those of table 1 where nothing else is said."""
    return runs.having(records, **TABLE_1 | fields)


def kendall(predicted: Float[np.ndarray, " n"], true: Float[np.ndarray, " n"]) -> float:
    """Kendall's τ-b as `generalization.tau` has it, ten times faster than scipy's for the few hundred networks of a
    test set: bootstrap intervals take thousands of them."""
    order = np.lexsort((true, predicted))
    x, y = predicted[order], true[order]
    later = np.triu(y[:, None] > y[None, :], 1)  # pairs in the wrong order; those of equal predictions are sorted
    pairs = math.comb(len(x), 2)
    equal = [_equal_pairs(values) for values in (x, y, x + 1j * y)]
    untied = (pairs - equal[0]) * (pairs - equal[1])
    if untied == 0:
        return 0.0
    return float((pairs - equal[0] - equal[1] + equal[2] - 2 * np.count_nonzero(later)) / math.sqrt(untied))


def _equal_pairs(values: np.ndarray) -> int:
    counts = np.unique(values, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def tau_of(test: str) -> Measure:
    """τ on a test set, e.g. "test_cifar10_gs", whose units are training runs: checkpoints of one are alike."""

    def results(record: Record) -> tuple[Sequence[float], Sequence[float]]:
        metrics = record["metrics"]
        _ = metrics[f"{test}_run"]  # an earlier record that has none has no units to draw
        return metrics[f"{test}_predicted"], metrics[f"{test}_true"]

    return Measure(results, kendall, lambda record: record["metrics"][f"{test}_run"])


def table(records: Sequence[Record], test: str, by: Sequence[str], apart: Sequence[str] = ("dataset",)) -> pd.DataFrame:
    """τ on a test set: mean and standard deviation over seeds, interval over training runs and seeds, and which row is
    better than every other that agrees in the columns `apart`."""
    found = summarize(records, metric=f"{test}_tau", by=by, methods=METHODS)
    return with_intervals(found, records, tau_of(test), by=by, apart=apart)


def differences(records: Sequence[Record], test: str, base: str = "StatNN") -> pd.DataFrame:
    """How far the methods of one data set are ahead of a base, on the same training runs, with intervals."""
    of = {name: [r for r in records if r["config"]["method"] == name] for name in METHODS}
    rows = []
    for method, own in of.items():
        if own and method != base:
            value, low, high = difference(own, of[base], tau_of(test))
            rows.append({"dataset": own[0]["config"]["dataset"], "method": method, "ahead_of": base}
                        | {"difference": value, "low": low, "high": high})  # fmt: skip
    return pd.DataFrame(rows)


def over_splits(records: Sequence[Record], base: str = "StatNN", dataset: str = PARK) -> pd.DataFrame:
    """τ over several splits into training and test runs, and how far methods are ahead of a base on the same splits.

    Splits share training runs, so that their scores are not independent: the variance of a mean difference is that of
    the differences times 1 / splits + test runs / training runs (Nadeau and Bengio 2003, "Inference for the
    Generalization Error"), with Student's interval.

    Returns:
        A row per method: dataset, method, mean, std over splits, splits, and difference, low, high, missing for the
        base and below two splits.
    """
    first = [record for record in records if record["config"]["seed"] == 0]
    values = {
        method: {r["config"]["split_seed"]: r["metrics"][f"test_{dataset}_tau"] for r in first
                 if r["config"]["method"] == method}
        for method in METHODS
    }  # fmt: skip
    rows = []
    for method, own in values.items():
        if len(own) > 1:
            scores = np.array(list(own.values()))
            row = {"dataset": dataset, "method": method, "mean": scores.mean(), "std": scores.std(ddof=1)}
            gaps = [own[seed] - values[base][seed] for seed in own if seed in values[base]]
            ends = corrected_interval(gaps, dataset) if method != base else (np.nan,) * 3
            rows.append(row | {"splits": len(own)} | dict(zip(("difference", "low", "high"), ends, strict=True)))
    return pd.DataFrame(rows)


def corrected_interval(gaps: Sequence[float], dataset: str) -> tuple[float, float, float]:
    """The mean of differences over splits with the ends of its interval, see `over_splits`; NaN below two."""
    mean, count = float(np.mean(gaps)), len(gaps)
    if count < 2:
        return mean, math.nan, math.nan
    train, validation = SHARES[dataset]
    variance = np.var(gaps, ddof=1) * (1 / count + (1 - train - validation) / train)
    half = stats.t.ppf((1 + LEVEL) / 2, count - 1) * math.sqrt(variance)
    return mean, mean - half, mean + half


def chance_limit(images: int) -> float:
    """Accuracies up to here are within two standard errors of chance, where so many images are tested."""
    return CHANCE + 2 * math.sqrt(CHANCE * (1 - CHANCE) / images)


def above_chance(records: Sequence[Record], test: str, limit: float) -> pd.DataFrame:
    """τ of the same predictions among the test networks whose accuracy is above a limit; mean over seeds."""
    rows = []
    for record in records:
        predicted, true = (np.array(record["metrics"][f"{test}_{kind}"]) for kind in ("predicted", "true"))
        left = true > limit
        own = {"method": record["config"]["method"], "networks": len(true), "above_chance": int(left.sum())}
        rows.append(own | {"tau": kendall(predicted, true), "tau_above_chance": kendall(predicted[left], true[left])})
    table = pd.DataFrame(rows).groupby("method", sort=False).mean().reset_index()
    return table.sort_values("method", key=lambda names: names.map([*METHODS].index), ignore_index=True)


def joint_table(together: Sequence[Record], apart: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """Models of both populations beside the same methods on each, which `apart` has by data set."""
    methods = {record["config"]["method"] for record in together}
    rows = []
    for name, records in apart.items():
        alone = [record for record in records if record["config"]["method"] in methods]
        for trained_on, found in ((name, alone), ("both", together)):
            own = table(found, f"test_{name}", ("dataset", "method")).drop(columns=["dataset", "best"])
            rows.append(own.assign(tested_on=name, trained_on=trained_on))
    found = pd.concat(rows, ignore_index=True)
    return found[["tested_on", "method", "trained_on", "mean", "std", "seeds", "low", "high"]]


def shapes_table(records: Sequence[Record]) -> pd.DataFrame:
    """τ on test networks of the shapes that were trained on, "same", and of others, "other": two different sets."""
    by = ("split", "method")
    parts = [table(records, own, by, apart=["split"]).assign(tested_on=own) for own in ("same", "other")]
    columns = ["split", "tested_on", "method", "mean", "std", "seeds", "low", "high", "best"]
    return pd.concat(parts, ignore_index=True)[columns].sort_values("split", kind="stable", ignore_index=True)


def caption(what: str, records: Sequence[Record], populations: Sequence[Zoo], profile: str) -> str:
    """What a table shows, and the scale of its runs."""
    scale = {"schedule.epochs": "epochs", "schedule.batch": "networks a batch", "schedule.warmup": "warm-up steps"}
    schedules = {record["config"]["method"]: record["config"]["schedule"] for record in records}
    own = [(method, schedules[method]) for method in METHODS if method in schedules]
    rates = ", ".join(f"{method} {schedule['learning_rate']:g}" for method, schedule in own)
    decay = "cosine" if own[0][1]["decay"] else "constant"
    regime = f"{zoos.sizes_in_words(populations)}. Learning rates, {decay}: {rates}."
    return f"{what} {describe_scale(records, profile, scale)} {regime}"


def paper_populations(accuracies: Mapping[str, Sequence[float]]) -> str:
    """Why the paper's numbers are of another task: its populations, and how good the networks of ours are."""
    told = ", ".join(
        f"{zoos.TITLES[name]} {np.median(own):.2f} in the median, {np.max(own):.2f} at best"
        for name, own in accuracies.items()
    )
    return (
        "The paper's populations are others, larger and trained longer (30,000 networks after 86 epochs; 2,800 runs of "
        f"200 to 1,000 epochs); the accuracies of ours: {told}."
    )
