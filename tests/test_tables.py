"""Tables against numbers computed by hand; figures as files and by what they draw."""

import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns

from ngcore.study import figures
from ngcore.study.methods import Method
from ngcore.study.tables import beside_published, describe_scale, load_reported, summarize, write_table

matplotlib.use("Agg")

METHODS = {"MLP": Method(colour=7), "NG-T": Method(colour=3, probes=True)}
PUBLISHED = {"MLP": {0: {"mean": 17.6, "std": 0.0}}, "NG-T": {0: {"mean": 92.4, "std": None}}}


def record(method, probes, seed, accuracy, **config):
    config = {"dataset": "mnist", "method": method, "probes": probes, "seed": seed, "epochs": 20, **config}
    metrics = {"accuracy": accuracy, "curve": [accuracy / 2, accuracy]}
    return {"config": config, "metrics": metrics, "environment": {"device": "cpu"}}


@pytest.fixture
def records():
    # mean 50, deviations -10, 0, +10: sample variance (100 + 0 + 100) / 2
    ng_t = [record("NG-T", 0, seed, accuracy) for seed, accuracy in enumerate((0.4, 0.5, 0.6))]
    return [*ng_t, record("NG-T", 64, 0, 0.9), record("MLP", 0, 0, 0.123456789)]


@pytest.fixture
def table(records):
    return beside_published(summarize(records, metric="accuracy", scale=100, methods=METHODS), PUBLISHED)


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def test_values_by_hand_in_the_papers_order(table):
    names = ["dataset", "method", "probes", "mean", "std", "seeds", "paper_mean", "paper_std"]
    assert list(table.columns) == names
    assert table[["method", "probes", "seeds"]].values.tolist() == [
        ["MLP", 0, 1],
        ["NG-T", 0, 3],
        ["NG-T", 64, 1],
    ]
    np.testing.assert_allclose(table["mean"], [12.3456789, 50, 90])
    np.testing.assert_allclose(table["std"], [math.nan, 10, math.nan])
    np.testing.assert_allclose(table["paper_mean"], [17.6, 92.4, math.nan])
    np.testing.assert_allclose(table["paper_std"], [0, math.nan, math.nan])


def test_rows_do_not_depend_on_the_order_of_the_records(records, table):
    turned = summarize(records[::-1], metric="accuracy", scale=100, methods=METHODS)
    pd.testing.assert_frame_equal(turned, table[list(turned.columns)])


@pytest.mark.parametrize(
    ("name", "row", "mean"),
    [
        ("table_4_fashion_mnist_inr_classification", {"method": "NG-GNN", "probes": 16}, 73.1),
        ("table_7_positional_embedding", {"method": "NG-T_without"}, 77.9),
        ("table_2_learning_to_optimize", {"dataset": "cifar10", "method": "LSTM"}, 59.10),
        ("table_1_generalization", {"dataset": "unknown", "method": "NG-T"}, math.nan),
    ],
)
def test_every_form_of_published_table(name, row, mean):
    table = beside_published(pd.DataFrame([row]), load_reported()["neural_graphs"][name])
    np.testing.assert_equal(table["paper_mean"].tolist(), [mean])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no records"),
        ([record("MLP", 0, 0, math.nan)], r"'accuracy' is nan in the run .*'MLP'"),
        (
            [record("MLP", 0, 0, 0.1), record("MLP", 0, 0, 0.2, epochs=5)],
            "several records of .*method MLP.* seed 0",
        ),
        ([{"config": {"method": "MLP"}, "metrics": {"accuracy": 1}}], "no config 'dataset', only method"),
        ([{**record("MLP", 0, 0, 1.0), "metrics": {"loss": 1}}], "no metric 'accuracy', only loss"),
    ],
)
def test_bad_records_are_named(records, message):
    with pytest.raises(ValueError, match=message):
        summarize(records, metric="accuracy")


def test_what_tells_runs_apart_can_be_added():
    records = [record("MLP", 0, 0, 0.1), record("MLP", 0, 0, 0.2, epochs=5)]
    table = summarize(records, metric="accuracy", by=("method", "epochs"))
    assert table[["epochs", "mean"]].values.tolist() == [[5, 0.2], [20, 0.1]]


def test_csv_reads_back(table, tmp_path):
    write_table(table, tmp_path, "table_3", "Caption.")
    read = pd.read_csv(tmp_path / "table_3.csv")
    pd.testing.assert_frame_equal(read, table, rtol=1e-5, check_dtype=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table_3.csv", "table_3.md", "table_3.tex"]


def test_latex_and_markdown_rows(table, tmp_path):
    write_table(table, tmp_path, "table_3", "Accuracy (%).")
    latex = (tmp_path / "table_3.tex").read_text()
    assert r"\caption{Accuracy (\%).}" in latex
    assert r"mnist & MLP & 0 & 12.3 & 1 & 17.6 $\pm$ 0.0 \\" in latex
    assert r"mnist & NG-T & 0 & 50.0 $\pm$ 10.0 & 3 & 92.4 \\" in latex
    assert r"mnist & NG-T & 64 & 90.0 & 1 &  \\" in latex
    markdown = (tmp_path / "table_3.md").read_text()
    assert markdown.startswith("Accuracy (%).\n\n| Data set | Method | Probe features | Ours | Seeds | Paper |\n")
    assert "| mnist | NG-T | 64 | 90.0 | 1 |  |" in markdown


def test_bold_is_what_is_best_by_its_interval(table, tmp_path):
    marked = table.assign(low=[11.0, 45.0, math.nan], high=[13.0, 55.0, math.nan], best=[False, True, False])
    write_table(marked, tmp_path, "t", "c")
    markdown = (tmp_path / "t.md").read_text()
    assert "| mnist | NG-T | 0 | **50.0 ± 10.0** | 45.0 to 55.0 | 3 | 92.4 |" in markdown
    assert markdown.count("**") == 2
    assert r"\textbf{50.0 $\pm$ 10.0} & 45.0 to 55.0" in (tmp_path / "t.tex").read_text()
    write_table(table, tmp_path, "t", "c")
    assert "**" not in (tmp_path / "t.md").read_text()
    assert "textbf" not in (tmp_path / "t.tex").read_text()


def test_tables_say_how_much_was_seen(records, tmp_path):
    for one in records[:3]:
        one["metrics"] |= {"networks_seen": 385_000, "steps": 12_031}
    table = summarize(records, metric="accuracy", methods=METHODS)
    assert table["networks_seen"].tolist() == [pd.NA, 385_000, pd.NA]
    write_table(table, tmp_path, "t", "c")
    header, _, mlp, ng_t, _ = (tmp_path / "t.md").read_text().splitlines()[2:]
    assert header.endswith("| Ours | Seeds | Networks seen | Gradient steps |")
    assert mlp.endswith("| 0.1 | 1 |  |  |")
    assert ng_t.endswith("| 0.5 ± 0.1 | 3 | 385,000 | 12,031 |")


def test_special_characters(tmp_path):
    records = [record("50%_a&b|{x}", 0, 0, 1.0, dataset="a\\b~c^d#$")]
    write_table(summarize(records, metric="accuracy"), tmp_path, "t", "τ of 2 × 3")
    latex = (tmp_path / "t.tex").read_text()
    assert r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\#\$ & 50\%\_a\&b\textbar{}\{x\} & 0" in latex
    assert r"\caption{$\tau$ of 2 $\times$ 3}" in latex
    assert r"| 50%_a&b\|{x} |" in (tmp_path / "t.md").read_text()


def test_scale_in_words(records):
    records[0]["config"]["epochs"] = records[1]["config"]["epochs"] = records[2]["config"]["epochs"] = 1000
    text = describe_scale(records, "cpu", {"epochs": "epochs"})
    assert text == "Profile cpu: 20 to 1,000 epochs; 1 to 3 seeds; device cpu."
    text = describe_scale([record("MLP", 0, 0, 1.0, epochs=1)], "cpu", {"epochs": "epochs", "probes": "probes"})
    assert text == "Profile cpu: 1 epoch, 0 probes; 1 seed; device cpu."


def test_saved_figures_are_reproducible(table, tmp_path):
    for name in ("a", "b"):
        with matplotlib.rc_context():
            figures.style()
            fig, ax = plt.subplots()
            figures.probe_curve(table, ax)
            figures.save_figure(fig, tmp_path, name)
            plt.close(fig)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "b.pdf", "b.png"]
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert plt.imread(io.BytesIO((tmp_path / "a.png").read_bytes()), format="png").std() > 0.01
    assert b"/Type3" not in (tmp_path / "a.pdf").read_bytes()


def test_probe_curve_draws_ours_and_the_papers(table, ax):
    figures.probe_curve(table, ax)
    (bars,) = ax.containers
    line, _, (error,) = bars
    np.testing.assert_allclose(line.get_xydata(), [[0, 50], [1, 90]])
    points = {tuple(line.get_xydata()[0]): line for line in ax.lines if len(line.get_xydata()) == 1}
    assert points[0, 50].get_markerfacecolor() != "white"
    assert points[1, 90].get_markerfacecolor() == "white"  # one seed
    heights = [float(np.ptp(segment[:, 1])) for segment in error.get_segments()]
    np.testing.assert_allclose(heights, [20, 0])  # one standard deviation up and down; none for one seed
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "64"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["MLP", "NG-T", "paper"]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert sorted(float(line.get_ydata()[0]) for line in dashed) == [17.6, 92.4]


def test_bars_are_intervals_where_there_are_any_and_controls_are_dotted(table, ax):
    methods = METHODS | {"MLP": Method(colour=7, is_control=True)}
    figures.probe_curve(table.assign(low=[10.0, 45.0, 88.0], high=[13.0, 58.0, 91.0]), ax, methods=methods)
    ((_, _, (error,)),) = ax.containers
    ends = [segment[:, 1].tolist() for segment in error.get_segments()]
    np.testing.assert_allclose(ends, [[45, 58], [88, 91]])
    styles = {line.get_label(): line.get_linestyle() for line in ax.lines}
    assert (styles["MLP"], styles["NG-T"]) == (":", "-")


def test_curves_against_what_was_seen(table, ax):
    records = [record("NG-T", 0, seed, 0.5, recipe="paper") for seed in (0, 1)]
    records.append(record("NG-T", 0, 0, 0.7, recipe="own"))
    for one in records:
        one["metrics"]["networks_seen"] = 3000
    figures.against_seen(records, ax, "curve", table, seen=5_500_000, scale=100, ylabel="%", methods=METHODS)
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["NG-T"] == [[1500, 25], [3000, 50]]
    assert lines["NG-T, own"] == [[1500, 35], [3000, 70]]
    assert [[5_500_000, 92.4]] in lines.values()
    assert ax.get_xscale() == "log"


def test_a_methods_look_comes_from_its_table(ax):
    """Order and colour, whatever the names; unknown ones follow by name, coloured by their place or grey."""
    methods = {"zeta": Method(colour=1), "alpha": Method(colour=4, probes=True)}
    rows = [record(name, probes, 0, 0.5) for name in ("beta", "alpha", "zeta") for probes in (0, 4)]
    table = summarize(rows, metric="accuracy", methods=methods)
    assert table["method"].unique().tolist() == ["zeta", "alpha", "beta"]
    figures.training_curves(rows, ax, "curve", methods=methods)
    colours = [line.get_color() for line in ax.lines]
    palette = sns.color_palette("colorblind", 10)
    assert colours[::2] == [palette[1], palette[4], (0.3, 0.3, 0.3)]


def test_a_table_of_ones_own_is_drawn_and_written(ax, tmp_path):
    """No paper column, and a method that no task knows."""
    rows = [record("mine", probes, seed, 0.5 + probes / 100) for probes in (0, 4) for seed in (0, 1)]
    table = summarize([*rows, record("plain", 0, 0, 0.3)], metric="accuracy")
    figures.probe_curve(table, ax)
    (bars,) = ax.containers
    np.testing.assert_allclose(bars[0].get_xydata(), [[0, 0.5], [1, 0.54]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mine", "plain"]
    write_table(table.assign(kept_apart="x"), tmp_path, "t", "c", headings={"probes": "Points"})
    header, _, first, *_ = (tmp_path / "t.md").read_text().splitlines()[2:]
    assert header == "| Data set | Method | Points | Ours | Seeds | Kept apart |"
    assert first == "| mnist | mine | 0 | 0.5 ± 0.0 | 2 | x |"


def test_training_curves_are_means_over_seeds(records, ax):
    figures.training_curves(records, ax, "curve", scale=100, methods=METHODS)
    curves = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(curves) == ["MLP", "NG-T", "NG-T, 64 probes"]
    np.testing.assert_allclose(curves["NG-T"], [25, 50])
    (band,) = ax.collections  # only NG-T without probe features has several seeds
    assert band.get_paths()[0].get_extents().y1 == pytest.approx(60)


def test_training_curves_of_unequal_length_are_refused(records, ax):
    records[0]["metrics"]["curve"].append(1.0)
    with pytest.raises(ValueError, match="NG-T with 0 probe features has 3, 2, 2 epochs"):
        figures.training_curves(records, ax, "curve")


def test_confusion_is_in_per_cent_of_the_true_class(ax):
    figures.confusion(np.array([[3, 1], [0, 0]]), ax, ["cat", "a_dog"])
    assert [text.get_text() for text in ax.texts] == ["75", "25", "0", "0"]
    assert ax.get_xlabel() == "Predicted class"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "a_dog"]


def test_confusion_must_fit_its_labels(ax):
    with pytest.raises(ValueError, match=r"3 labels need a matrix of 3 x 3, not \(2, 2\)"):
        figures.confusion(np.eye(2), ax, ["a", "b", "c"])


def test_histograms_hold_every_value():
    values = {"one": [1.0, 2.0, 2.0, 5.0], "other": [3.0, 5.0]}
    fig = figures.histograms(values, xlabel="Test accuracy (%)", ylabel="Networks")
    for (name, own), ax in zip(values.items(), fig.axes, strict=True):
        assert sum(bar.get_height() for bar in ax.patches) == len(own)
        assert ax.get_title() == f"{name} ({len(own)})"
        assert ax.get_lines()[0].get_xdata()[0] == np.median(own)
    plt.close(fig)


def test_predictions_are_drawn_against_the_truth():
    fig, axes = plt.subplots(1, 2)
    rows = {"StatNN": ([10.0, 30.0], [20.0, 40.0]), "NG-T": ([15.0, 35.0], [20.0, 40.0])}
    figures.predicted_against_true(rows, axes, "accuracy (%)")
    for (method, (predicted, true)), ax in zip(rows.items(), axes, strict=True):
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), np.stack([true, predicted], axis=1))
        assert ax.get_title() == method
        assert ax.get_xlabel() == "True accuracy (%)"
        np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), [10, 40])
    plt.close(fig)


def test_a_figure_without_a_layout_is_saved_as_it_is(tmp_path, recwarn):
    with matplotlib.rc_context():
        figures.style()
        fig = plt.figure(layout="none")
        ax = fig.add_axes((0.1, 0.1, 0.5, 0.5))
        figures.save_figure(fig, tmp_path, "a")
        assert fig.get_layout_engine() is None
        assert ax.get_position().bounds == pytest.approx((0.1, 0.1, 0.5, 0.5))
        plt.close(fig)
    assert not recwarn.list
