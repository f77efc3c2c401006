"""Rows of tables as parameters list them."""

from pathlib import Path

import pytest
import yaml

from ngcore.data.inrs.augment import Augmentation
from ngcore.study.training import Schedule
from ngcore.tasks import inr_classification as task
from ngcore.tasks.inr_sets import INRData
from ngcore.tasks.rows import Row, rows_of

DATA, SCHEDULE = INRData("mnist", 32, 16, 16), Schedule(3, batch=16, decay=True)
PROFILES = Path(__file__).resolve().parents[1] / "notebooks" / "profiles"


def config(entry):
    (row,) = rows_of([entry])
    return task.row_config(row, DATA, SCHEDULE, dropout=0.1)


def test_an_entry_stands_for_all_combinations_in_order():
    rows = list(rows_of([{"methods": ["MLP"], "seeds": [1, 0]}, {"methods": ["NG-GNN", "NG-T"], "probes": [64, 0]}]))
    assert rows == [
        Row("MLP", 0, 1),
        Row("MLP", 0, 0),
        *(Row(method, probes, 0) for method in ("NG-GNN", "NG-T") for probes in (64, 0)),
    ]


def test_changes_reach_the_schedule_the_model_and_the_augmentation():
    plain = config({"methods": ["NG-GNN"], "probes": [4]})
    assert plain == task.base_config(DATA, SCHEDULE, "NG-GNN", 4, 0, dropout=0.1)
    own = {"recipe": "own", "sigma": None, "dropout": 0.3, "epochs": 7, "batch": 8, "augment": True}
    found = config({"methods": ["NG-GNN"], "probes": [4]} | own)
    assert found.schedule == Schedule(7, batch=8, decay=True)
    assert dict(found.options) == {"dropout": 0.3, "sigma": None}
    assert (found.augmentation, found.recipe) == (Augmentation(), "own")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"probes": [4]}, "a mapping with `methods`"),
        ({"methods": []}, "a mapping with `methods`"),
        ({"methods": ["MLP"], "recipe": "smooth"}, "'smooth' of MLP says nothing that it changes"),
    ],
)
def test_wrong_entries_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        list(rows_of([entry]))


@pytest.mark.parametrize("profile", [path.stem for path in PROFILES.glob("*.yaml")])
def test_every_row_of_every_profile_can_be_built(profile):
    values = (yaml.safe_load((PROFILES / f"{profile}.yaml").read_text()) or {}).get("01", {})
    for entries in values.get("rows", {}).values():
        for row in rows_of(entries):
            found = task.row_config(row, DATA, SCHEDULE, dropout=0.1)
            task.build_model(found.method, found.probes, **dict(found.options))
