"""Figures of optimizers: what happens along the steps of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from ngcore.study.methods import Methods, method_order

Records = Sequence[Mapping[str, Any]]


def step_curves(
    records: Records,
    ax: Axes,
    quantity: str,
    *,
    methods: Methods,
    ylabel: str,
    xlabel: str = "Step",
    at: str | None = None,
    window: int = 1,
    scale: int | float = 1,
    line: str = "solid",
    note: str = "",
    is_apart: bool = False,
) -> None:
    """A quantity against the step, a line per method: median over runs, with a band between their quartiles.

    Not mean and deviation: a loss that explodes in one run takes both along.

    Args:
        records: runs without the quantity are left out.
        quantity: a name in the records' metrics, one number per step, or per element of `at`.
        methods: all that there are.
        at: a name in the metrics, the steps of the quantity; None for every step.
        window: numbers that are averaged into one point, which stands at the last of them.
        scale: factor from the stored unit to the axis's.
        line, note: style of the lines, and what follows the method's name in the legend.
        is_apart: every run has a line of its own, and none a band.

    Raises:
        ValueError: runs of a method have different numbers of steps.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if quantity in record["metrics"]:
            groups.setdefault(record["config"]["method"], []).append(record["metrics"])
    palette = sns.color_palette("colorblind", 10)
    for method in sorted(groups, key=partial(method_order, methods)):
        metrics, colour = groups[method], palette[methods[method].colour]
        if len({len(own[quantity]) for own in metrics}) > 1:
            raise ValueError(f"{quantity!r} of {method} has a different number of steps by seed: draw them apart")
        values = scale * np.array([own[quantity] for own in metrics])
        steps = np.array(metrics[0][at] if at else range(1, values.shape[1] + 1))
        whole = values.shape[1] // window * window
        values = values[:, :whole].reshape(len(values), -1, window).mean(axis=2)
        steps = steps[window - 1 : whole : window]
        shown = values if is_apart else np.median(values, axis=0, keepdims=True)
        look = {"color": colour, "linestyle": line, "marker": "o" if len(steps) == 1 else None}
        for i, own in enumerate(shown):
            ax.plot(steps, own, label=method + note if i == 0 else None, **look)
        if len(values) > 1 and not is_apart:
            low, high = np.quantile(values, [0.25, 0.75], axis=0)
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def focus(ax: Axes, start: float, margin: float = 1.0) -> None:
    """Let the vertical axis show the lines from the step `start` on: how they rise before it leaves the picture."""
    ends = [y for line in ax.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if x >= start]
    if ends:
        ax.set_ylim(min(ends) - margin, max(ends) + margin)


QUANTITIES = {
    "loss": "Training loss (nats)",
    "weight_norm": "Norm of the weights",
    "change_norm": "Norm of a step's change",
    "straightness": "Straightness of the way",
    "outside_weights": "Weights outside (%)",
    "outside_gradients": "Gradients, momenta outside (%)",
}  # of a trajectory


def trajectories(records: Records, axes: np.ndarray, horizon: int, methods: Methods, **options: Any) -> None:
    """Loss, norms, straightness and inputs out of range along the steps, one picture each.

    Args:
        records: of `ngcore.tasks.optimizer_trajectories`.
        axes: six.
        horizon: steps whose range of inputs is what "outside" means; a dotted line.
        options: of `step_curves`.
    """
    for ax, (quantity, label) in zip(axes.flat, QUANTITIES.items(), strict=True):
        scale = 100 if quantity.startswith("outside") else 1
        step_curves(records, ax, quantity, at="measured", scale=scale, ylabel=label, methods=methods, **options)
        ax.axvline(horizon, color="black", linestyle="dotted", lw=1)
        if quantity in ("loss", "weight_norm", "change_norm"):
            ax.set_yscale("log")
    for ax in (*axes.flat[:2], *axes.flat[3:]):
        ax.get_legend().remove()


def spiral(points: np.ndarray, sides: np.ndarray, classified: Mapping[str, np.ndarray], axes: np.ndarray) -> None:
    """Points of two classes, and behind them what networks say of the plane, a picture per network.

    Args:
        points: (points, 2); sides: (points,) 0 or 1.
        classified: name -> (n, n) the probability of class 1 on a square grid that spans [-2, 2], rows from below.
    """
    for (name, plane), ax in zip(classified.items(), axes, strict=True):
        ax.imshow(plane, origin="lower", extent=(-2, 2, -2, 2), cmap="RdBu_r", vmin=0, vmax=1, alpha=0.6)
        ax.scatter(*points.T, c=sides, cmap="RdBu_r", s=5, edgecolors="black", linewidths=0.2)
        ax.set(title=name, xticks=[], yticks=[], xlim=(-2, 2), ylim=(-2, 2))
        ax.grid(visible=False)
