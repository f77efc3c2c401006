"""Figures of the study: one look, stable file names, the paper's numbers faint beside ours.

Every drawing function takes the axes to draw on and reads stored results only.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ngcore.files import write_atomically
from ngcore.study.methods import Methods, method_order
from ngcore.study.runs import output_directory

# Without dates and program versions, the same figure is the same file.
_METADATA = {"pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "png": {"Software": None}}
_NONE: Methods = MappingProxyType({})
_LINES = ("solid", "dashed", "dashdot", "dotted")
_MARKERS = ("o", "s", "^", "D")


def style() -> None:
    """Set the look of all figures: colour-blind safe, readable in print, text kept as text in PDF."""
    sns.set_theme(
        context="paper",
        style="ticks",
        palette="colorblind",
        font_scale=1.15,
        rc={
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "legend.frameon": False,
            "legend.fontsize": "small",
            "pdf.fonttype": 42,
        },
    )


def figures_directory(profile: str) -> Path:
    """Where a profile's tables and figures go: `figures/<profile>/`."""
    return output_directory() / "figures" / profile


def save_figure(fig: Figure, directory: Path, name: str) -> None:
    """Write `name.pdf` and `name.png` (200 dpi) into `directory`; the same figure gives the same bytes."""
    for suffix, metadata in _METADATA.items():
        buffer = io.BytesIO()
        # Saving sets the layout anew: by these parameters, which must not give one to a figure that has none.
        with matplotlib.rc_context({"figure.constrained_layout.use": False}):
            fig.savefig(buffer, format=suffix, dpi=200, bbox_inches="tight", metadata=metadata)
        write_atomically(directory / f"{name}.{suffix}", buffer.getvalue())


def probe_curve(table: pd.DataFrame, ax: Axes, *, ylabel: str = "Test accuracy (%)", methods: Methods = _NONE) -> None:
    """Metric against the number of probe features (paper, figure 2): ours solid, the paper's, if any, faint dashes.

    Methods that take probe features are drawn along them, any other is a horizontal line, and controls are dotted.
    Error bars are the table's intervals, if it has them, else one standard deviation over seeds. A point of one seed is
    hollow. What a method that is not among `methods` takes is seen from its rows.

    Args:
        table: one data set of `summarize` or `beside_published`; columns method, probes, mean, std, seeds, perhaps low,
            high, paper_mean.
    """
    names = list(table["method"].unique())
    curves = [name for name in names if _takes_probes(methods, name, table[table["method"] == name]["probes"])]
    probes = sorted(table.loc[table["method"].isin(curves), "probes"].unique())
    has_paper = "paper_mean" in table and table["paper_mean"].notna().any()
    paper = table["paper_mean"] if has_paper else pd.Series(np.nan, table.index)
    for i, name in enumerate(names):
        rows, colour = table[table["method"] == name], _colour(methods, name, i)
        if name in curves:
            x, marker = rows["probes"].map(probes.index), _MARKERS[curves.index(name) % len(_MARKERS)]
            line = _line(methods, name)
            ax.errorbar(x, rows["mean"], _bars(rows), color=colour, linestyle=line, capsize=3)
            ax.plot([], [], color=colour, marker=marker, linestyle=line, label=name)
            for point, mean, seeds in zip(x, rows["mean"], rows["seeds"], strict=True):
                ax.plot(point, mean, color=colour, marker=marker, markerfacecolor="white" if seeds == 1 else colour)
            ax.plot(x, paper[rows.index], color=colour, marker=marker, linestyle="dashed", alpha=0.4)
        else:
            ax.axhline(rows["mean"].iloc[0], color=colour, linestyle=_line(methods, name), label=name)
            ax.axhline(paper[rows.index].iloc[0], color=colour, linestyle="dashed", alpha=0.4)
    ax.set_xticks(range(len(probes)), [str(count) for count in probes])
    ax.set_xlabel("Number of probe features")
    ax.set_ylabel(ylabel)
    handles, _ = ax.get_legend_handles_labels()
    if has_paper:
        handles.append(Line2D([], [], color="grey", linestyle="dashed", alpha=0.6, label="paper"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _line(methods: Methods, name: str) -> str:
    """The line of a method: controls are dotted."""
    return "dotted" if name in methods and methods[name].is_control else "solid"


def _bars(rows: pd.DataFrame) -> np.ndarray:
    """Lengths of error bars, (2, rows) down and up: 0 where nothing is known."""
    if "low" in rows:
        ends = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
    else:
        ends = [rows["std"], rows["std"]]
    return np.nan_to_num(np.array(ends, dtype=float))


def _takes_probes(methods: Methods, name: str, probes: pd.Series) -> bool:
    return methods[name].probes if name in methods else bool(probes.any())


def _colour(methods: Methods, name: str, place: int | None = None) -> tuple[float, float, float]:
    """A method's colour, the same in every figure. An unknown one has the colour of its place in the figure, if any;
    others are dark grey."""
    palette = sns.color_palette("colorblind", 10)
    position = methods[name].colour if name in methods else None if place is None else place % len(palette)
    return (0.3, 0.3, 0.3) if position is None else palette[position]


def training_curves(
    records: Sequence[Mapping[str, Any]],
    ax: Axes,
    quantity: str,
    *,
    scale: int | float = 1,
    ylabel: str | None = None,
    methods: Methods = _NONE,
) -> None:
    """A quantity against the epoch: mean over seeds, with a band of one standard deviation.

    Args:
        quantity: a name in the records' metrics that holds one number per epoch.
        scale: factor from the stored unit to the axis's, such as 100 for per cent.
        ylabel: with the unit; None for the quantity's name.

    Raises:
        ValueError: runs of a method that differ in seed alone have different numbers of epochs.
    """
    groups: dict[tuple[str, int], list[Sequence[float]]] = {}
    for record in records:
        key = record["config"]["method"], record["config"].get("probes", 0)
        groups.setdefault(key, []).append(record["metrics"][quantity])
    counts = sorted({probes for _, probes in groups})
    for method, probes in sorted(groups, key=lambda key: (method_order(methods, key[0]), key[1])):
        curves = groups[method, probes]
        if len({len(curve) for curve in curves}) > 1:
            lengths = ", ".join(str(len(curve)) for curve in curves)
            raise ValueError(f"{quantity!r} of {method} with {probes} probe features has {lengths} epochs by seed")
        values = scale * np.asarray(curves)
        epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(axis=0)
        line = _LINES[counts.index(probes) % len(_LINES)]
        label = f"{method}, {probes} probes" if probes else method
        marker = "o" if len(epochs) == 1 else None  # a line of one point would not be seen
        ax.plot(epochs, mean, color=_colour(methods, method), linestyle=line, marker=marker, label=label)
        _band(ax, epochs, values, _colour(methods, method))
    ax.set_xlabel("Epoch")
    ax.set_xlim(0.5, len(epochs) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(ylabel or quantity)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def against_seen(
    records: Sequence[Mapping[str, Any]],
    ax: Axes,
    quantity: str,
    published: pd.DataFrame,
    *,
    seen: int,
    scale: int | float = 1,
    ylabel: str,
    methods: Methods = _NONE,
) -> None:
    """A validated quantity against the networks that a training has seen, with the paper's final levels.

    Args:
        records: of which those that differ in seed alone make one line, their mean; controls are dotted.
        quantity: a name in the metrics, one number an epoch.
        published: of `beside_published`; columns method, probes, paper_mean.
        seen: networks that the paper's trainings see.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for record in records:
        config = record["config"]
        groups.setdefault((config["method"], config["probes"], config["recipe"]), []).append(record["metrics"])
    counts = sorted({probes for _, probes, _ in groups})
    for method, probes, recipe in sorted(groups, key=lambda key: (method_order(methods, key[0]), key[1:])):
        own, colour = groups[method, probes, recipe], _colour(methods, method)
        values = scale * np.mean([metrics[quantity] for metrics in own], axis=0)
        x = own[0]["networks_seen"] * np.arange(1, len(values) + 1) / len(values)
        parts = [method, f"{probes} probes" if probes else "", recipe if recipe != "paper" else ""]
        line = _LINES[counts.index(probes) % 3] if _line(methods, method) == "solid" else "dotted"
        marker = _MARKERS[counts.index(probes) % len(_MARKERS)] if recipe == "paper" else "x"
        label = ", ".join(part for part in parts if part)
        ax.plot(x, values, color=colour, linestyle=line, marker=marker, markersize=4, label=label)
        level = published[(published["method"] == method) & (published["probes"] == probes)]["paper_mean"].dropna()
        if len(level) and recipe == "paper":
            ax.plot(seen, level.iloc[0], color=colour, marker=marker, markersize=6, markerfacecolor="white")
    ax.plot([], [], color="grey", marker="o", markerfacecolor="white", linestyle="", label="paper, at its end")
    ax.set(xscale="log", xlabel="Networks seen in training", ylabel=ylabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _band(ax: Axes, x: ArrayLike, values: np.ndarray, colour: tuple[float, float, float]) -> None:
    """One standard deviation around the mean of several seeds' curves, (seeds, points)."""
    if len(values) > 1:
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
        ax.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)


def variants(table: pd.DataFrame, ax: Axes, *, xlabel: str, methods: Methods = _NONE) -> None:
    """How far every variant is from the base, which stands at 0: a row per variant, a point per method.

    Args:
        table: of `comparison.differences`; columns method, variant, difference, low, high (both of the bars), verdict.
        xlabel: should say what the bars are.
    """
    names = list(dict.fromkeys(table["variant"]))
    shown = sorted(table["method"].unique(), key=partial(method_order, methods))
    for i, method in enumerate(shown):
        rows = table[table["method"] == method]
        shift = 0.5 * (i - (len(shown) - 1) / 2) / len(shown)
        x, y = rows["difference"].mask(rows["verdict"] == "base", 0.0), rows["variant"].map(names.index) + shift
        bars = [(x - rows["low"]).fillna(0), (rows["high"] - x).fillna(0)]
        marker = _MARKERS[i % len(_MARKERS)]
        colour = _colour(methods, method)
        ax.errorbar(x, y, xerr=bars, color=colour, marker=marker, linestyle="", capsize=3, label=method)
    ax.axvline(0, color="0.4", linestyle="dotted", zorder=0)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel(xlabel)
    if len(shown) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def loss_curves(
    records: Sequence[Mapping[str, Any]], axes: Sequence[Axes] | np.ndarray, methods: Methods = _NONE
) -> None:
    """Left, training (dashed) and validation loss (solid) along the epochs, means over seeds; right, one against the
    other after every epoch of every seed.

    Args:
        records: with the metrics `fitted_loss` and `val_loss`, after every epoch.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: method_order(methods, record["config"]["method"])):
        rows.setdefault(record["config"]["method"], []).append(record["metrics"])
    along, against = axes
    for i, (name, own) in enumerate(rows.items()):
        look = {"color": _colour(methods, name), "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4}
        for quantity, line, kind in (("val_loss", "solid", "validation"), ("fitted_loss", "dashed", "training")):
            mean = np.mean([metrics[quantity] for metrics in own], axis=0)
            along.plot(np.arange(1, len(mean) + 1), mean, linestyle=line, label=f"{name}: {kind}", **look)
        points = np.concatenate([[metrics["fitted_loss"], metrics["val_loss"]] for metrics in own], axis=1)
        against.plot(*points, linestyle="", label=name, **look)
    ends = [value for own in rows.values() for m in own for value in (*m["fitted_loss"], *m["val_loss"])]
    against.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", linestyle="dotted", zorder=0)
    along.set(xlabel="Epoch", ylabel="Loss (nats)")
    along.xaxis.set_major_locator(MaxNLocator(integer=True))
    against.set(xlabel="Training loss (nats)", ylabel="Validation loss (nats)")
    for ax in axes:
        ax.legend()


def curves(table: pd.DataFrame, ax: Axes, quantity: str, *, xlabel: str, ylabel: str, methods: Methods = _NONE) -> None:
    """The mean of every method against a quantity on a logarithmic axis of base 2, with error bars as in `probe_curve`;
    where every point is of one seed they are hollow.

    Args:
        table: of `summarize`; columns method, `quantity`, mean, std, seeds, perhaps low, high. What is no known
            method is coloured by its order.
    """
    for i, method in enumerate(table["method"].unique()):
        rows = table[table["method"] == method].sort_values(quantity)
        ax.errorbar(
            rows[quantity],
            rows["mean"],
            _bars(rows),
            color=_colour(methods, method, i),
            markerfacecolor="white" if (rows["seeds"] == 1).all() else None,
            marker=_MARKERS[i % len(_MARKERS)],
            capsize=3,
            label=method,
        )
    ax.set_xscale("log", base=2)
    ticks = sorted(table[quantity].unique())
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def picture_rows(rows: Mapping[str, ArrayLike]) -> Figure:
    """Rows of pictures with their names at the left, grey values from 0 (black) to 1.

    Args:
        rows: name -> (pictures, height, width), as many in every row.
    """
    count = len(next(iter(rows.values())))
    fig, axes = plt.subplots(len(rows), count, figsize=(1.2 + 0.62 * count, 0.66 * len(rows)), squeeze=False)
    for (name, pictures), cells in zip(rows.items(), axes, strict=True):
        for ax in cells:
            ax.set(xticks=[], yticks=[], frame_on=False)
        for ax, picture in zip(cells, pictures, strict=True):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        cells[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return fig


def histograms(values: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str, bins: int = 30) -> Figure:
    """A histogram per name, side by side, on one horizontal axis, with the number of values and their median."""
    fig, axes = plt.subplots(1, len(values), figsize=(4.6 * len(values), 3.0), sharex=True, squeeze=False)
    everything = np.concatenate([np.asarray(own) for own in values.values()])
    edges = np.linspace(everything.min(), everything.max() + 1e-9, bins + 1)
    for (name, own), ax in zip(values.items(), axes[0], strict=True):
        ax.hist(own, edges, color=sns.color_palette("colorblind")[0], alpha=0.8)
        ax.axvline(np.median(own), color="black", linestyle="dashed", label=f"median {np.median(own):.1f}")
        ax.set(title=f"{name} ({len(own):,})", xlabel=xlabel, ylabel=ylabel)
        ax.legend()
    return fig


def predicted_against_true(
    rows: Mapping[str, tuple[ArrayLike, ArrayLike]],
    axes: Sequence[Axes] | np.ndarray,
    quantity: str,
    methods: Methods = _NONE,
) -> None:
    """Predictions against what is true, a panel per method; on the dashed line both are the same.

    Args:
        rows: method -> (predicted, true), in the unit that `quantity` names.
    """
    low = min(np.min(values) for pair in rows.values() for values in pair)
    high = max(np.max(values) for pair in rows.values() for values in pair)
    for (method, (predicted, true)), ax in zip(rows.items(), axes, strict=True):
        ax.plot([low, high], [low, high], color="grey", linestyle="dashed", zorder=1)
        colour = _colour(methods, method)
        ax.scatter(true, predicted, s=6, alpha=0.5, color=colour, linewidths=0, zorder=2, rasterized=True)
        ax.set(title=method, xlabel=f"True {quantity}", aspect="equal")
    axes[0].set_ylabel(f"Predicted {quantity}")


def confusion(matrix: np.ndarray, ax: Axes, labels: Sequence[str]) -> None:
    """A confusion matrix in per cent of each true class.

    Args:
        matrix: (classes, classes) counts, rows the true, columns the predicted class; an empty row stays 0.
        labels: names of the classes.

    Raises:
        ValueError: the matrix is not square or does not fit the labels.
    """
    counts = np.asarray(matrix, dtype=float)
    if counts.shape != (len(labels), len(labels)):
        raise ValueError(f"{len(labels)} labels need a matrix of {len(labels)} x {len(labels)}, not {counts.shape}")
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    sns.heatmap(
        percent,
        ax=ax,
        vmin=0,
        vmax=100,
        cmap="Blues",
        square=True,
        annot=True,
        fmt=".0f",
        annot_kws={"size": "x-small"},
        xticklabels=labels,
        yticklabels=labels,
        cbar_kws={"label": "Share of the true class (%)", "shrink": 0.8},
    )
    ax.set_xlabel("Predicted class")
    ax.set_ylabel("True class")
    ax.tick_params(length=0)
    if max(map(len, labels)) > 2:
        ax.set_xticks(ax.get_xticks(), labels, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticklabels(labels, rotation=0)


def write_readme(directory: Path, records: Sequence[Mapping[str, Any]], profile: str) -> None:
    """Write `README.md` beside tables and figures: what they were made with.

    States scale-independent facts of the runs behind them; the scale itself stands in every table's caption.
    """
    environments = [record["environment"] for record in records]

    def every(name: str) -> str:
        return ", ".join(sorted({str(environment[name]) for environment in environments}))

    seeds = sorted({record["config"]["seed"] for record in records})
    # an ablation's record is of a run, `run`, that other records may be of too
    runs = {record["metrics"].get("run", record["hash"]): record["environment"]["train_seconds"] for record in records}
    hours = sum(runs.values()) / 3600
    lines = [
        f"# Tables and figures of the profile `{profile}`",
        "",
        f"Made by `./run_all.sh --profile {profile}`, redrawn by `./run_all.sh figures --profile {profile}`.",
        "",
        f"- runs: {len(runs)}, seeds {', '.join(map(str, seeds))}",
        f"- training time, summed over the runs: {hours:.1f} hours",
        f"- device: {every('device')}",
        f"- PyTorch {every('torch')}, Python {every('python')}, ngcore at {every('commit')}",
        "",
        "Each table's caption states its scale. Runs are kept while their config and data stay as they are, so they",
        "come from several commits; -dirty marks one with changes that were not yet committed.",
        "",
    ]
    write_atomically(directory / "README.md", "\n".join(lines))
