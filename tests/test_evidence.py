"""Bootstrap intervals against what is known of them; which row is best."""

import numpy as np
import pytest

from ngcore.study.evidence import Measure, difference, interval, mean_of, with_intervals
from ngcore.study.tables import summarize

MEAN = mean_of(lambda record: record["metrics"]["right"], 100)


def record(method, right, seed=0, data="d", **metrics):
    right = [float(value) for value in right]
    config = {"dataset": "mnist", "method": method, "probes": 0, "seed": seed}
    return {"config": config, "data": data, "metrics": {"right": right, "mean": float(np.mean(right)), **metrics}}


def test_interval_of_a_mean_is_about_two_standard_errors():
    right = np.arange(400) % 4 == 0
    found = interval([record("a", right)], MEAN)
    half = 1.96 * 100 * np.sqrt(0.25 * 0.75 / 400)
    np.testing.assert_allclose(found, [25, 25 - half, 25 + half], atol=0.15 * half)


def test_pairs_are_drawn_together():
    """Two rows that differ by the same on every unit differ by just that in every draw."""
    rng = np.random.default_rng(0)
    right = rng.normal(size=300)
    found = difference([record("a", right + 0.5)], [record("b", right)], MEAN)
    np.testing.assert_allclose(found, [50, 50, 50], atol=1e-9)
    assert found.excludes_zero


def test_members_of_a_unit_stay_together():
    """Ten copies of every unit tell no more than one."""
    rng = np.random.default_rng(1)
    values, units = rng.normal(size=50), np.repeat(np.arange(50), 10)
    alone = interval([record("a", values)], MEAN)
    measure = Measure(MEAN.results, MEAN.score, lambda record: record["metrics"]["units"])
    copied = record("a", np.repeat(values, 10), units=units.tolist())
    together, apart = interval([copied], measure), interval([copied], MEAN)
    np.testing.assert_allclose(together, alone, atol=1e-9)
    assert apart.high - apart.low < 0.5 * (together.high - together.low)


def test_seeds_widen_an_interval():
    same, spread = [np.arange(100) % 2] * 3, [np.zeros(100), np.arange(100) % 2, np.ones(100)]
    narrow, wide = (interval([record("a", own, i) for i, own in enumerate(rows)], MEAN) for rows in (same, spread))
    assert narrow.value == pytest.approx(50) == wide.value
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_best_needs_an_interval_without_zero():
    rng = np.random.default_rng(2)
    base = rng.normal(size=500)
    close = [record("a", base), record("b", base + rng.normal(size=500) * 0.5)]
    far = [*close, record("c", base + 1)]
    for records, winners in ((close, []), (far, ["c"])):
        table = with_intervals(summarize(records, metric="mean", methods={}), records, MEAN)
        assert table.loc[table["best"], "method"].tolist() == winners
        assert (table["low"] < table["high"]).all()
    lowest = with_intervals(summarize(far, metric="mean"), far, MEAN, lower_is_better=True)
    assert not lowest["best"].any()


def test_rows_without_results_have_no_interval():
    old = record("old", [9.0])
    del old["metrics"]["right"]
    records = [old, record("a", np.zeros(50)), record("b", np.ones(50))]
    table = with_intervals(summarize(records, metric="mean"), records, MEAN).set_index("method")
    assert np.isnan(table.loc["old", "low"])
    assert not table.loc["old", "best"]
    assert table.loc["b", "best"]


def test_what_can_not_be_compared():
    with pytest.raises(ValueError, match="different data"):
        difference([record("a", [1, 0])], [record("b", [1, 0], data="other")], MEAN)
    with pytest.raises(ValueError, match="without runs"):
        difference([record("a", [1, 0])], [], MEAN)
