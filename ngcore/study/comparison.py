"""Is a variant better, or is it noise? Paired differences over seeds, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd
from scipy import stats

from ngcore.study.methods import Methods, method_order
from ngcore.study.tables import values_of

LEVEL = 0.95


def differences(
    records: Sequence[Mapping[str, Any]],
    base: str,
    *,
    metric: str,
    scale: int | float = 1,
    by: Sequence[str] = ("method",),
    methods: Methods = MappingProxyType({}),
) -> pd.DataFrame:
    """Every variant of a method beside the variant `base` of the same method.

    Runs of one seed share data and the order of batches, first weights only where both models draw the same random
    numbers: seeds are paired. The interval is Student's for the mean of the paired differences; with three seeds it is
    2.5 of their standard deviations to either side, so only large differences show.

    Args:
        metric, scale, methods: see `tables.summarize`; more is better.
        by: names in the records' configs that distinguish the methods, beside `variant` and `seed`.

    Returns:
        A row per method and variant, variants in the order of the records: *by,
        variant, mean, std, seeds and, of what is over the base, difference, low, high (the interval's ends; missing
        below two seeds) and verdict: "base", "better", "worse", "inside the noise", "unchanged" (no seed's number
        differs), "one seed" or "no common seed".

    Raises:
        ValueError: a method has no base, or as `tables.summarize`.
    """
    values = values_of(records, metric=metric, scale=scale, by=(*by, "variant"))
    rows = []
    groups = sorted(values.groupby(list(by), sort=False), key=lambda pair: _place(methods, by, pair[0]))
    for _, own in groups:
        of_base = own[own["variant"] == base].set_index("seed")["value"]
        if of_base.empty:
            raise ValueError(f"{', '.join(map(str, own.iloc[0][list(by)]))} has no runs of the variant {base!r}")
        for variant, runs in own.groupby("variant", sort=False):
            found = runs.set_index("seed")["value"]
            row = {**runs.iloc[0][list(by)], "variant": variant}
            row |= {"mean": found.mean(), "std": found.std(), "seeds": len(found)}
            rows.append(row | (_difference(found - of_base) if variant != base else {"verdict": "base"}))
    columns = [*by, "variant", "mean", "std", "seeds", "difference", "low", "high", "verdict"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _place(methods: Methods, by: Sequence[str], key: tuple[Any, ...]) -> list[Any]:
    return [method_order(methods, value) if name == "method" else value for name, value in zip(by, key, strict=True)]


def conclusion(table: pd.DataFrame, unit: str, decimals: int = 1) -> str:
    """The table of `differences` in a sentence per row that is no base: how far, and whether that is noise."""
    told = {
        "better": "better than the base",
        "worse": "worse than the base",
        "inside the noise": "inside the noise",
        "unchanged": "nothing changes",
        "one seed": "one seed, which tells nothing about noise",
        "no common seed": "no seed in common with the base",
    }
    lines = []
    for row in table[table["verdict"] != "base"].to_dict("records"):
        name = ", ".join(str(value) for column, value in row.items() if column in ("dataset", "method", "probes"))
        lines.append(f"{name}: {row['variant']}: {row['difference']:+.{decimals}f} {unit}, {told[row['verdict']]}")
    return "\n".join(lines)


def interval(values: pd.Series) -> tuple[float, float]:
    """Ends of Student's interval for the mean; NaN below two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.sem()
    return values.mean() - half, values.mean() + half


def _difference(paired: pd.Series) -> dict[str, Any]:
    """Mean and interval of the differences of the seeds that both have."""
    found = paired.dropna()
    mean, (low, high) = found.mean(), interval(found)
    if len(found) < 2:
        verdict = "one seed" if len(found) else "no common seed"
    elif (found == 0).all():
        verdict = "unchanged"
    else:
        verdict = "inside the noise" if low <= 0 <= high else "better" if mean > 0 else "worse"
    return {"difference": mean, "low": low, "high": high, "verdict": verdict}
