"""τ with intervals: against scipy, against numbers by hand, and against what is known of bootstraps."""

import numpy as np
import pytest
from scipy.stats import kendalltau, t

from ngcore.study.evidence import interval
from ngcore.tasks import generalization_tables as shown

TEST = "test_cifar10_wild_park"


def record(method, predicted, true, runs, seed=0, split_seed=0, **config):
    config = {"dataset": "cifar10_wild_park", "method": method, "seed": seed, "split_seed": split_seed, **config}
    lists = {"predicted": predicted, "true": true, "run": runs}
    found = {name: np.asarray(own).tolist() for name, own in lists.items()}
    found |= {"tau": float(kendalltau(predicted, true).statistic)}
    return {"config": config, "data": "d", "metrics": {f"{TEST}_{name}": value for name, value in found.items()}}


@pytest.mark.parametrize("ties", [False, True])
def test_tau_is_scipys(ties):
    rng = np.random.default_rng(0)
    for count in (2, 3, 50, 301):
        values = rng.normal(size=(2, count)) + rng.normal(size=count)
        x, y = np.round(values) if ties else values
        expected = np.nan_to_num(kendalltau(x, y).statistic)  # scipy has no order among equal numbers
        assert shown.kendall(x, y) == pytest.approx(expected, abs=1e-12)
    assert shown.kendall(np.ones(5), np.arange(5.0)) == 0


def test_an_interval_is_of_runs_and_not_of_their_checkpoints():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.1, 0.4, 40)
    predicted = true + rng.normal(scale=0.1, size=40)
    alone = record("StatNN", predicted, true, np.arange(40))
    own, many = np.repeat(np.arange(40), 10), rng.normal(scale=1e-6, size=(2, 400))
    copies = record("StatNN", predicted[own] + many[0], true[own] + many[1], own)
    by_run, wide = interval([copies], shown.tau_of(TEST)), interval([alone], shown.tau_of(TEST))
    copies["metrics"][f"{TEST}_run"] = np.arange(400)
    by_checkpoint = interval([copies], shown.tau_of(TEST))
    assert by_run.high - by_run.low == pytest.approx(wide.high - wide.low, rel=0.15)
    assert by_checkpoint.high - by_checkpoint.low < 0.5 * (by_run.high - by_run.low)


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    true, runs = rng.uniform(0.1, 0.4, 60), np.arange(60)
    noisy = true + rng.normal(scale=0.1, size=60)
    closer = true + 0.9 * (noisy - true)
    records = [record("StatNN", noisy, true, runs), record("NG-GNN", closer, true, runs)]
    (row,) = shown.differences(records, TEST).to_dict("records")
    taus = [kendalltau(own, true).statistic for own in (noisy, closer)]
    assert (row["method"], row["ahead_of"]) == ("NG-GNN", "StatNN")
    assert row["difference"] == pytest.approx(taus[1] - taus[0])
    single = interval(records[:1], shown.tau_of(TEST))
    assert row["high"] - row["low"] < 0.5 * (single.high - single.low)


def test_records_without_runs_have_no_interval():
    old = record("StatNN", [0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0, 1, 2])
    del old["metrics"][f"{TEST}_run"]
    table = shown.table([old], TEST, ("dataset", "method"))
    assert table["mean"].tolist() == [1.0]
    assert table["low"].isna().all()


def test_splits_are_paired_and_their_interval_is_corrected():
    taus = {"StatNN": [0.5, 0.6, 0.4], "NG-GNN": [0.6, 0.8, 0.4]}
    records = []
    for method, own in taus.items():
        for seed, value in enumerate(own):
            one = record(method, [0.1, 0.2], [0.1, 0.2], [0, 1], split_seed=seed)
            one["metrics"][f"{TEST}_tau"] = value
            records.append(one)
    records.append({**records[0], "config": records[0]["config"] | {"seed": 1}})  # a second seed of one split: left out
    base, row = shown.over_splits(records).to_dict("records")
    assert (base["method"], base["mean"], base["splits"]) == ("StatNN", pytest.approx(0.5), 3)
    assert np.isnan(base["difference"])
    gaps = np.array([0.1, 0.2, 0.0])
    half = t.ppf(0.975, 2) * np.sqrt(gaps.var(ddof=1) * (1 / 3 + 0.25 / 0.6))
    found = [row["difference"], row["low"], row["high"]]
    np.testing.assert_allclose(found, [0.1, 0.1 - half, 0.1 + half])


def test_chance_is_two_standard_errors_of_a_tenth():
    assert shown.chance_limit(10_000) == pytest.approx(0.106)
    true, predicted = [0.1, 0.09, 0.3, 0.2], [0.5, 0.1, 0.2, 0.3]
    (row,) = shown.above_chance([record("StatNN", predicted, true, range(4))], TEST, 0.106).to_dict("records")
    assert (row["networks"], row["above_chance"]) == (4, 2)
    assert row["tau_above_chance"] == -1
    assert row["tau"] == pytest.approx(kendalltau(predicted, true).statistic)


def test_table_1_is_of_the_first_split():
    rows = {"loss": "bce", "target": "accuracy", "split": "random", "shuffled": False}
    records = [record("StatNN", [0.1, 0.2], [0.1, 0.2], [0, 1], split_seed=seed, **rows) for seed in (0, 1)]
    assert shown.having(records) == records[:1]
    assert shown.having(records, split_seed=1) == records[1:]
