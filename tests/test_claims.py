"""Verdicts on claims whose truth is known."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ngcore.study import claims
from ngcore.study.claims import FAILS, HOLDS, NOT_RUN, OPEN, Claim
from ngcore.study.evidence import mean_of, number_of
from ngcore.tasks.claims import CLAIMS

ROOT = Path(__file__).resolve().parents[1]
MEAN = mean_of(lambda record: record["metrics"]["right"], 100)


def record(method, right, seed=0, seen=None):
    metrics = {"right": [float(value) for value in right]} | ({"networks_seen": seen} if seen else {})
    return {"config": {"method": method, "seed": seed}, "data": "d", "metrics": metrics}


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    levels = {"low": 0.3, "middle": 0.6, "alike": 0.61}
    return [record(name, hard < level, seen=1000) for name, level in levels.items()]


@pytest.mark.parametrize(
    ("better", "worse", "lower_is_better", "expected"),
    [
        ("middle", "low", False, HOLDS),
        ("low", "middle", False, FAILS),
        ("low", "middle", True, HOLDS),
        ("middle", "middle", False, OPEN),
        ("middle", "absent", False, NOT_RUN),
    ],
)
def test_verdicts(better, worse, lower_is_better, expected, records):
    claim = Claim("c", "ours", {"method": better}, {"method": worse}, MEAN, lower_is_better=lower_is_better)
    assert claims.verdict(claim.tested(records)) == expected


def test_a_row_says_what_was_measured(records):
    claim = Claim("middle above low", "table 1", {"method": "middle"}, {"method": "low"}, MEAN, paper=5.0)
    (row,) = claims.table_of([claim], records).to_dict("records")
    difference = 100 * (np.mean(records[1]["metrics"]["right"]) - np.mean(records[0]["metrics"]["right"]))
    assert row["Ours, 95 % interval"].startswith(f"{difference:+.1f} (")
    assert (row["Paper"], row["Seeds"], row["Networks seen"]) == ("+5.0", "1", "1,000")


def test_seeds_are_all_that_is_drawn_of_single_numbers():
    own = [
        {"config": {"method": m, "seed": s}, "data": "d", "metrics": {"a": v + s}}
        for m, v in (("x", 10), ("y", 0))
        for s in range(5)
    ]
    claim = Claim("c", "ours", {"method": "x"}, {"method": "y"}, number_of("a"))
    found = claim.tested(own)
    half = stats.t.ppf(0.975, 8) * np.sqrt(2 * 2.5 / 5)  # both rows have variance 2.5
    np.testing.assert_allclose(found, [10, 10 - half, 10 + half])
    alone = claim.tested([r for r in own if r["config"]["seed"] == 0])
    assert (alone.value, claims.verdict(alone)) == (10, OPEN)
    (row,) = claims.table_of([claim], own[::5]).to_dict("records")
    assert row["Ours, 95 % interval"] == "+10.0 points"


def test_orders_are_of_rows_that_the_paper_has(tmp_path, records):
    table = pd.DataFrame(
        {"method": list("abcd"), "mean": [1.0, 2.0, 3.0, 9.0], "paper_mean": [5.0, 7.0, 6.0, math.nan]}
    )
    table.to_csv(tmp_path / "table_9.csv", index=False)
    claims.write(tmp_path, [Claim("c", "ours", {"method": "middle"}, {"method": "low"}, MEAN)], records)
    text = (tmp_path / "claims.md").read_text()
    assert "1 claims: 1 holds, 0 does not hold" in text
    assert "| table 9 |  | 3 | 0.33 |" in text


def test_claims_go_between_their_marks():
    text = "a\n<!-- claims of figures/x -->\nold\n<!-- end of claims -->\nb\n"
    found = claims.into(text, "figures/x", "new\n")
    assert found == text.replace("old", "new")
    assert claims.into(found, "figures/x", "new") == found
    assert claims.into(text, "figures/y", "new") == text
    with pytest.raises(ValueError, match="is missing"):
        claims.into("<!-- claims of figures/x -->", "figures/x", "new")


def test_the_readme_shows_the_stored_claims():
    readme, stored = ((ROOT / name).read_text() for name in ("README.md", "figures/cpu/claims.md"))
    assert claims.into(readme, "figures/cpu", stored) == readme
    assert stored.strip() in readme


def test_the_papers_differences_are_the_papers():
    by_text = {claim.text: claim for claim in CLAIMS}
    assert len(by_text) == len(CLAIMS)
    assert by_text["NG-GNN reads weights better than DWSNet (digits)"].paper == pytest.approx(91.4 - 85.7)
    assert by_text["NG-T is better than NG-GNN, 64 probe features (clothes)"].paper == pytest.approx(74.8 - 74.2)
