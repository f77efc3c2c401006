"""Table 2 from runs of several meta-seeds; curves along steps."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ngcore.study import optimizer_figures
from ngcore.tasks import learning_to_optimize
from ngcore.tasks.learning_to_optimize import METHODS


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def run(method, seed, accuracy, meta_seed=None, outer_steps=100):
    about = {} if meta_seed is None else {"meta_seed": meta_seed, "outer_steps": outer_steps, "networks_seen": 7}
    config = {"dataset": "cifar10", "method": method, "seed": seed}
    return {"config": config, "metrics": {"final_accuracy": accuracy} | about}


PUBLISHED = {"cifar10": {"Adam": {"mean": 50.0, "std": 1.0}, "FF": {"mean": 60.0, "std": 1.0}}}
RUNS = [
    *(run("FF", seed, accuracy, 1, 250) for seed, accuracy in enumerate([0.5, 0.7])),
    *(run("FF", seed, accuracy, 0) for seed, accuracy in enumerate([0.4, 0.2])),
    *(run("Adam", seed, accuracy) for seed, accuracy in enumerate([0.1, 0.3])),
    run("NG-T", 0, 0.9, 0, 50),
]


def test_rows_pool_meta_seeds_and_tell_them_apart():
    table = learning_to_optimize.results(RUNS, PUBLISHED).set_index("method")
    assert list(table.index) == ["Adam", "FF", "NG-T"]
    values = [50, 70, 40, 20]
    mean = sum(values) / 4
    assert table.loc["FF", "mean"] == pytest.approx(mean)
    assert table.loc["FF", "std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 3))
    assert table["seeds"].tolist() == [2, 4, 1]
    assert table.loc["FF", ["by_meta_seed", "outer_steps", "networks"]].tolist() == ["30.0, 60.0", "100, 250", "7, 7"]
    assert table.loc["Adam", ["by_meta_seed", "outer_steps"]].isna().all()
    assert table["paper_mean"].tolist()[:2] == [50, 60]


@pytest.mark.parametrize(("ours", "tau"), [((1, 2, 3, 4), 1.0), ((4, 3, 2, 1), -1.0), ((1, 2, 4, 3), 2 / 3)])
def test_order_is_compared_with_the_papers(ours, tau):
    published = {"cifar10": {m: {"mean": float(i), "std": 0.0} for i, m in enumerate(["Adam", "FF", "LSTM", "NG-T"])}}
    runs = [run(m, 0, x / 10, 0) for m, x in zip(["Adam", "FF", "LSTM", "NG-T"], ours, strict=True)]
    found = learning_to_optimize.agreement(learning_to_optimize.results([*runs, run("NFN", 0, 1.0, 0)], published))
    assert found["rows"].tolist() == [4]
    assert found["tau"].iloc[0] == pytest.approx(tau)


def test_the_lead_of_the_graph_is_over_the_best_without_it():
    rows = [run("Adam", 0, 0.6), run("FF", 0, 0.5, 0), run("NFN", 0, 0.4, 0), run("NG-GNN", 0, 0.45, 0)]
    found = learning_to_optimize.agreement(learning_to_optimize.results([*rows, run("NG-T", 0, 0.3, 0)], PUBLISHED))
    assert found.loc[0, ["graph", "other"]].tolist() == ["NG-GNN", "FF"]
    assert found.loc[0, "lead"] == pytest.approx(-5.0)


def steps_of(method, values, seed=0):
    return {
        "config": {"method": method, "seed": seed},
        "metrics": {"loss": values, "at": list(range(5, 5 + len(values)))},
    }


def test_step_curves_average_windows_and_take_medians(ax):
    """An explosion in one of three runs moves neither the line nor, here, the band's lower end."""
    rows = [[1, 3, 5, 7, 9], [3, 3, 5, 9, 9], [2, 4, 1e9, 1e9, 9]]
    records = [steps_of("FF", row, seed) for seed, row in enumerate(rows)]
    optimizer_figures.step_curves(records, ax, "loss", window=2, scale=10, ylabel="Loss", methods=METHODS)
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [2, 4]
    assert line.get_ydata().tolist() == [30, 70]
    (band,) = ax.collections
    heights = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    first = np.quantile([20, 30, 30], [0.25, 0.75])
    assert {(2.0, value) for value in first} <= heights
    assert ax.get_legend().get_texts()[0].get_text() == "FF"


def test_step_curves_stand_where_they_were_measured(ax):
    records = [steps_of("NG-T", [1, 2, 3]), steps_of("FF", [4, 5, 6, 7]), {**steps_of("LSTM", []), "metrics": {}}]
    optimizer_figures.step_curves(records, ax, "loss", at="at", ylabel="Accuracy (%)", methods=METHODS, note=", old")
    assert [line.get_xdata().tolist() for line in ax.lines] == [[5, 6, 7, 8], [5, 6, 7]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["FF, old", "NG-T, old"]


def test_runs_have_lines_of_their_own(ax):
    records = [steps_of("FF", [1, 2], 0), steps_of("FF", [3, 4], 1)]
    optimizer_figures.step_curves(records, ax, "loss", ylabel="Loss", methods=METHODS, is_apart=True)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2], [3, 4]]
    assert not ax.collections
    assert len(ax.get_legend().get_texts()) == 1


def test_step_curves_of_unequal_length_are_refused(ax):
    records = [steps_of("FF", [1, 2]), steps_of("FF", [1], 1)]
    with pytest.raises(ValueError, match="'loss' of FF has a different number of steps by seed"):
        optimizer_figures.step_curves(records, ax, "loss", ylabel="Loss", methods=METHODS)


def test_the_axis_is_that_of_later_steps(ax):
    ax.plot([0, 10, 20], [5, 60, 70])
    ax.plot([0, 10, 20], [5, 65, 62])
    optimizer_figures.focus(ax, 10.0)
    assert ax.get_ylim() == (59, 71)
