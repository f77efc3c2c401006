"""Is a difference there, or is it which networks happened to be tested? Bootstrap intervals over test units and seeds.

A *unit* is what a test set consists of: an INR, or a training run with all of its checkpoints, which are alike. Runs
that are compared were tested on the same units, so these are drawn alike for both; seeds are drawn anew in every row.
With one seed the interval is of the tested networks alone: it says nothing of another training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from ngcore.study.runs import Record

LEVEL = 0.95
DRAWS = 2000
SEED = 0

Rows = np.ndarray  # numbers of test units' members, possibly repeated


@dataclass(frozen=True)
class Measure:
    """How a run is scored on some of its test units.

    Args:
        results: (record) -> what it says of all members of the test set, an array or several of one length.
        score: (results of the rows) -> one number.
        units: (record) -> (members,) the unit of each; None where every member is one.
        has_units: False where a run gives one number alone: then intervals are Student's, of seeds, and rows may be
            of different data.
    """

    results: Callable[[Record], Sequence[Any]]
    score: Callable[..., float]
    units: Callable[[Record], Sequence[Any]] | None = None
    has_units: bool = True


class Interval(NamedTuple):
    """A number and the ends of its interval of LEVEL; NaN for both ends where nothing can be drawn."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside; never without an interval."""
        return bool(self.low > 0 or self.high < 0)


def mean_of(results: Callable[[Record], Sequence[float]], scale: int | float = 1) -> Measure:
    """The measure of a mean over the test set, such as an accuracy or a mean squared error."""
    return Measure(lambda record: (np.asarray(results(record), dtype=float),), lambda own: scale * own.mean())


def number_of(metric: str, scale: int | float = 1) -> Measure:
    """The measure that is one number of every run."""
    return Measure(
        lambda record: ([record["metrics"][metric]],), lambda own: scale * float(own.mean()), has_units=False
    )


def interval(records: Sequence[Record], measure: Measure) -> Interval:
    """A measure of a row: its mean over the row's runs."""
    return _bootstrap([records], measure, lambda values: values[0])


def difference(ours: Sequence[Record], theirs: Sequence[Record], measure: Measure) -> Interval:
    """How far one row's mean is above another's, on the same test units.

    Raises:
        ValueError: the rows were not tested on the same.
    """
    return _bootstrap([ours, theirs], measure, lambda values: values[0] - values[1])


def _bootstrap(rows: Sequence[Sequence[Record]], measure: Measure, combine: Callable[[list[float]], float]) -> Interval:
    """The combined means of rows, and percentiles of them over draws of test units and of seeds."""
    records = [record for row in rows for record in row]
    if not all(rows):
        raise ValueError("a row without runs has no interval")
    if not measure.has_units:
        return _student([[measure.score(*map(np.asarray, measure.results(r))) for r in row] for row in rows])
    if len({record["data"] for record in records}) > 1:
        raise ValueError("runs of different data can't be compared unit by unit")
    results = [[tuple(map(np.asarray, measure.results(record))) for record in row] for row in rows]
    members = _members(records[0], measure, len(results[0][0][0]))
    generator = np.random.default_rng(SEED)

    def mean(row: list[tuple[np.ndarray, ...]], chosen: Rows | slice) -> float:
        return float(np.mean([measure.score(*(own[chosen] for own in one)) for one in row]))

    draws = []
    for _ in range(DRAWS):
        chosen = _joined(members, generator.integers(len(members), size=len(members)))
        seeds = [generator.integers(len(row), size=len(row)) for row in results]
        draws.append(combine([mean([row[i] for i in own], chosen) for row, own in zip(results, seeds, strict=True)]))
    value = combine([mean(row, slice(None)) for row in results])
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _student(rows: Sequence[Sequence[float]]) -> Interval:
    """The mean of a row, or how far the first row's is above the second's (Welch), by the numbers of their runs."""
    means = [float(np.mean(row)) for row in rows]
    value = means[0] if len(rows) == 1 else means[0] - means[1]
    if min(map(len, rows)) < 2:
        return Interval(value, float("nan"), float("nan"))
    test = stats.ttest_1samp(rows[0], 0) if len(rows) == 1 else stats.ttest_ind(*rows, equal_var=False)
    return Interval(value, *map(float, test.confidence_interval(LEVEL)))


def _members(record: Record, measure: Measure, count: int) -> np.ndarray | list[np.ndarray]:
    """Row numbers of every unit, (units, members) where all have as many."""
    if measure.units is None:
        return np.arange(count)[:, None]
    units = pd.Series(list(measure.units(record)))
    members = [np.asarray(own) for own in units.groupby(units, sort=False).indices.values()]
    return np.stack(members) if len({len(own) for own in members}) == 1 else members


def _joined(members: np.ndarray | list[np.ndarray], units: np.ndarray) -> np.ndarray:
    """Row numbers of some units, one after the other."""
    if isinstance(members, np.ndarray):
        return members[units].ravel()
    return np.concatenate([members[i] for i in units])


def with_intervals(
    table: pd.DataFrame,
    records: Sequence[Record],
    measure: Measure,
    *,
    by: Sequence[str] = ("dataset", "method", "probes"),
    lower_is_better: bool = False,
    apart: Sequence[str] = ("dataset",),
) -> pd.DataFrame:
    """Add the ends of every row's interval, `low` and `high`, and whether it is `best`.

    Best is a row that is better than every other of its group, in the columns `apart`, by a difference whose interval
    leaves out 0. Rows of records that keep no results of single units have no interval and don't take part.
    """
    rows = [[r for r in records if all(r["config"][name] == row[name] for name in by)] for _, row in table.iterrows()]
    kept = [bool(own) and all(keeps_results(measure, record) for record in own) for own in rows]
    ends = [interval(own, measure) if is_kept else None for own, is_kept in zip(rows, kept, strict=True)]
    table = table.assign(
        low=[np.nan if found is None else found.low for found in ends],
        high=[np.nan if found is None else found.high for found in ends],
        best=False,
    )
    sign = -1 if lower_is_better else 1
    groups = table[kept].groupby(list(apart), dropna=False) if any(kept) else ()
    for _, own in groups:
        first = own.index[(sign * own["mean"]).argmax()]
        others = own.index.drop(first)
        beats = partial(difference, rows[first], measure=measure)
        table.loc[first, "best"] = len(others) > 0 and all(beats(rows[other]).excludes_zero for other in others)
    return table


def keeps_results(measure: Measure, record: Mapping[str, Any]) -> bool:
    """Whether a record has what the measure needs: earlier ones kept no results of single units."""
    try:
        measure.results(record)
    except KeyError:
        return False
    return True
