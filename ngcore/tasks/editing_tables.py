"""What tables and figures show of editing runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from ngcore.study.evidence import Measure, difference, mean_of, with_intervals
from ngcore.study.figures import picture_rows
from ngcore.study.methods import method_order
from ngcore.study.runs import Record, having
from ngcore.study.tables import beside_published, load_reported, summarize
from ngcore.tasks.editing_pictures import decode
from ngcore.tasks.inr_editing import CONTROLS, METHODS
from ngcore.tasks.inr_sets import describe
from ngcore.tasks.rows import PAPER

SCALE = 100  # tables show mean squared errors in 1e-2
ROW = ("dataset", "method", "probes", "recipe")
NOTES = (
    "Controls: the constant edit is the same seven numbers for every INR; the 3x3 filter acts on the picture and edits "
    "no weight; INRs fitted to the target are what networks of this size can draw."
)
PAPER_SCALE = "The paper: 55,000 training INRs, 100 epochs, 128 INRs a batch (42,900 gradient steps), 4 seeds."
Shown = dict[str, tuple[Float[Tensor, "k side side"], Sequence[float] | None]]  # name -> (pictures, their errors)


def measure_of(split: str) -> Measure:
    """The mean squared error (1e-2) of a run on "test" or "transfer", INR by INR."""
    return mean_of(lambda record: record["metrics"][f"{split}_errors"], SCALE)


def error_table(records: Sequence[Record], split: str = "test", by: Sequence[str] = ROW) -> pd.DataFrame:
    """Mean squared errors (1e-2) on INRs of a split with intervals over them; the best of the editors is marked.

    Controls are never best: they stand there to be held against.
    """
    table = summarize(records, metric=f"{split}_mse", scale=SCALE, by=by, methods=METHODS)
    table["control"] = table["method"].isin(CONTROLS)
    groups = ("dataset", "control")
    table = with_intervals(table, records, measure_of(split), by=by, lower_is_better=True, apart=groups)
    return table.assign(best=table["best"] & ~table["control"]).drop(columns="control")


def beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Add table 5's numbers to rows that are trained as the paper has it; its "NFN" stands beside NFN_HNP."""
    reported = load_reported()["neural_graphs"]["table_5_mnist_inr_dilation"]
    table = beside_published(table, {"mnist": reported | {"NFN_HNP": reported["NFN"]}})
    ours = table["recipe"] != PAPER
    return table.assign(**{name: table[name].mask(ours) for name in ("paper_mean", "paper_std")})


def against(
    records: Sequence[Record], controls: Sequence[str], split: str = "test", by: Sequence[str] = ROW
) -> pd.DataFrame:
    """How much better editors are than controls (1e-2, above 0: better), INR by INR, with intervals."""
    rows = []
    for row in summarize(records, metric=f"{split}_mse", by=by, methods=METHODS)[list(by)].to_dict("records"):
        own = having(records, **row)
        for control in [name for name in controls if row["method"] not in CONTROLS]:
            theirs = [r for r in records if r["config"]["method"] == control]
            value, low, high = difference(theirs, own, measure_of(split))
            rows.append(row | {"ahead_of": control, "difference": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def caption(what: str, records: Sequence[Record], profile: str) -> str:
    """What a table shows, the scale of its trained runs, and their rates and dropout."""
    trained = [record for record in records if "steps" in record["metrics"]]
    schedules = [record["config"]["schedule"] for record in trained]
    rates = ", ".join(sorted({f"{own['learning_rate']:g}" for own in schedules}))
    decays = {"cosine" if own["decay"] else "constant" for own in schedules}
    return f"{what} {describe(trained, profile)} Learning rate {rates}, {', '.join(sorted(decays))}."


def one_of_each(records: Sequence[Record]) -> list[Record]:
    """Of every method the first seed of the row whose validation error was lowest."""
    first = [record for record in records if record["config"]["seed"] == 0]
    found: dict[str, Record] = {}
    for record in sorted(first, key=lambda record: max(record["metrics"].get("val_score", [0.0]))):
        found[record["config"]["method"]] = record
    return [found[method] for method in METHODS if method in found]


def examples(records: Sequence[Record]) -> Shown:
    """What runs of one edit make of the same examples, after what these should draw; "no edit" is what they draw.

    Returns:
        name -> (pictures, their mean squared errors in 1e-2; None for the targets).
    """
    shown = {}
    for record in sorted(records, key=lambda record: method_order(METHODS, record["config"]["method"])):
        config, metrics = record["config"], record["metrics"]
        name = f"{config['method']}, {config['probes']}" if config["probes"] else config["method"]
        errors = [SCALE * metrics["test_errors"][row] for row in metrics["example_rows"]]
        shown[name] = decode(metrics["examples_edited"]), errors
    return {"target": (decode(records[0]["metrics"]["examples_target"]), None), **shown}


def picture_errors(shown: Shown) -> Figure:
    """Rows of pictures with their errors (1e-2) beneath."""
    fig = picture_rows({name: pictures.numpy() for name, (pictures, _) in shown.items()})
    errors = chain.from_iterable([None] * len(pictures) if own is None else own for pictures, own in shown.values())
    for ax, value in zip(fig.axes, errors, strict=True):
        if value is not None:
            ax.set_xlabel(f"{value:.1f}", fontsize="x-small", labelpad=1)
    fig.set_figheight(1.3 * fig.get_figheight())
    return fig
