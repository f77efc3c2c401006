"""Tables: runs summarized over their seeds, beside the published numbers, as CSV, LaTeX and Markdown.

A record is what is kept of a run: {"config": {...}, "metrics": {...}, "environment": {...}}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import yaml

from ngcore.files import SHIPPED, write_atomically
from ngcore.study.methods import Methods, method_order

REPORTED = SHIPPED / "reported.yaml"

_NUMBERS = ("mean", "interval", "paper_mean", "difference")  # though they are shown with deviations or as two
_COUNTS = ("networks_seen", "steps")  # of training, in a record's metrics
_HEADINGS = {
    "dataset": "Data set",
    "probes": "Probe features",
    "difference": "Difference, 95 % interval",
    "mean": "Ours",
    "interval": "95 % interval",
    "networks_seen": "Networks seen",
    "steps": "Gradient steps",
    "paper_mean": "Paper",
}  # of other columns their own names

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "τ": r"$\tau$",
    "²": r"$^2$",
}


def summarize(
    records: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    scale: int | float = 1,
    by: Sequence[str] = ("dataset", "method", "probes"),
    methods: Methods = MappingProxyType({}),
) -> pd.DataFrame:
    """Mean and standard deviation of a metric over seeds.

    Args:
        metric: a name in the records' metrics that holds one number.
        scale: factor from the stored unit to the table's, such as 100 for per cent.
        by: names in the records' configs that distinguish the rows.
        methods: whose order the rows take; others follow by name.

    Returns:
        A row per distinct `by`, ordered, with columns *by, mean, std, seeds and, where records have them, how many
        networks a training saw in how many gradient steps. `std` is the sample standard deviation (divisor seeds - 1;
        the papers do not say which is theirs), missing for a single seed.

    Raises:
        ValueError: no records; a config or metric is missing; a metric is not finite; a row has a seed twice.
    """
    rows = values_of(records, metric=metric, scale=scale, by=by)
    grouped = rows.assign(**_counts(records)).groupby(list(by), dropna=False)
    counts = grouped[list(_counts(records))].max().reset_index(drop=True)
    table = grouped["value"].agg(["mean", "std", "count"]).reset_index().rename(columns={"count": "seeds"})
    table = pd.concat([table, counts], axis=1)

    def place(column: pd.Series) -> pd.Series:
        return column.map(partial(method_order, methods)) if column.name == "method" else column

    return table.sort_values(list(by), key=place, ignore_index=True)


def _counts(records: Sequence[Mapping[str, Any]]) -> dict[str, pd.Series]:
    """Those of _COUNTS that some records have, missing in the others."""
    values = {name: pd.Series([r["metrics"].get(name) for r in records], dtype="Int64") for name in _COUNTS}
    return {name: own for name, own in values.items() if own.notna().any()}


def values_of(
    records: Sequence[Mapping[str, Any]], *, metric: str, scale: int | float = 1, by: Sequence[str]
) -> pd.DataFrame:
    """A metric of every run: columns *by, seed, value; arguments and errors are those of `summarize`."""
    if not records:
        raise ValueError(f"no records to summarize {metric!r} of: run the notebook's profile first")
    rows = pd.DataFrame([_row(record, metric, by) for record in records])
    twice = rows[rows.duplicated([*by, "seed"])]
    if len(twice):
        row = ", ".join(f"{name} {twice.iloc[0][name]}" for name in [*by, "seed"])
        raise ValueError(f"several records of {row}: name in `by` what tells them apart, or drop one")
    return rows.assign(value=rows["value"] * scale)


def _row(record: Mapping[str, Any], metric: str, by: Sequence[str]) -> dict[str, Any]:
    """One run: what identifies it, and the value of its metric."""
    config, metrics = record["config"], record["metrics"]
    for name, holder, what in [
        *((name, config, "config") for name in (*by, "seed")),
        (metric, metrics, "metric"),
    ]:
        if name not in holder:
            raise ValueError(f"a record has no {what} {name!r}, only {', '.join(holder)}: its config is {dict(config)}")
    value = float(metrics[metric])
    if not math.isfinite(value):
        raise ValueError(f"metric {metric!r} is {value} in the run {dict(config)}: it cannot enter a mean")
    return {**{name: config[name] for name in by}, "seed": config["seed"], "value": value}


def load_reported(path: Path = REPORTED) -> dict[str, Any]:
    """The published numbers: paper -> table -> ... -> {"mean": ..., "std": ...}, see the file's comments."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def beside_published(table: pd.DataFrame, published: Mapping[str, Any]) -> pd.DataFrame:
    """Add `paper_mean` and `paper_std` to a summary; missing where the paper has no such row.

    Args:
        published: one table of `load_reported`, as [dataset ->] method -> [probes ->] {"mean", "std"}.
    """
    cells = [_published_cell(published, row) for row in table.to_dict("records")]
    paper = {
        f"paper_{name}": pd.Series([cell.get(name) for cell in cells], table.index, dtype=float)
        for name in ("mean", "std")
    }
    return table.assign(**paper)


def _published_cell(published: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, float | None]:
    """The published {"mean", "std"} of a row, empty where there is none."""
    methods = published.get(row.get("dataset"), published)
    cell = methods.get(row["method"], {})
    return cell if "mean" in cell else cell.get(row.get("probes"), {})


def describe_scale(records: Sequence[Mapping[str, Any]], profile: str, fields: Mapping[str, str]) -> str:
    """The scale behind a table, for its caption: profile, sizes, seeds, device.

    Args:
        fields: name in the configs -> its words, such as {"data.train": "training INRs", "epochs": "epochs"};
            a dot leads into a nested config.

    Returns:
        Such as "Profile cpu: 4,096 training INRs, 10 to 20 epochs; 1 to 2 seeds; device cpu."
    """
    sizes = [_counted([_field(record["config"], name) for record in records], words) for name, words in fields.items()]
    runs: dict[str, int] = {}
    for record in records:
        row = str(sorted((name, value) for name, value in record["config"].items() if name != "seed"))
        runs[row] = runs.get(row, 0) + 1
    devices = sorted({str(record["environment"]["device"]) for record in records})
    seeds = _counted(list(runs.values()), "seeds")
    return f"Profile {profile}: {', '.join(sizes)}; {seeds}; device {', '.join(devices)}."


def _field(config: Mapping[str, Any], name: str) -> int:
    """The value of a dotted name in a nested config."""
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value


def _counted(values: Sequence[int], words: str) -> str:
    """Such as "1 epoch", "5 epochs" or "5 to 1,000 epochs"."""
    low, high = min(values), max(values)
    number = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{number} {words.removesuffix('s') if high == 1 else words}"


def write_table(
    table: pd.DataFrame,
    directory: Path,
    name: str,
    caption: str,
    *,
    decimals: int = 1,
    headings: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write `name.csv` (six significant digits), `name.tex` (booktabs) and `name.md` into `directory`.

    In LaTeX and Markdown a value is "mean ± std" with `decimals` digits, the ends `low` and `high` of its interval have
    a column of their own, and ours is bold where the column `best` says so (`evidence.with_intervals`). The caption
    should state the scale: see `describe_scale`.

    Args:
        headings: of columns that are not called by their names; numbers stand at the right.
    """
    text = _as_text(table, decimals)
    bold = table["best"] if "best" in table else pd.Series(False, index=table.index)
    words = [name for name in text if name not in _NUMBERS and not pd.api.types.is_numeric_dtype(table[name])]
    titles = [(_HEADINGS | dict(headings)).get(name, _title(name)) for name in text]
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / f"{name}.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    write_atomically(directory / f"{name}.tex", _latex(text, bold, titles, words, name, caption))
    write_atomically(directory / f"{name}.md", _markdown(text, bold, titles, words, caption))


def _title(name: str) -> str:
    """Such as "Tested on" of "tested_on"."""
    return str(name).replace("_", " ").capitalize()


def _as_text(table: pd.DataFrame, decimals: int) -> pd.DataFrame:
    """The columns to show, as strings, under their original names."""
    text = table.drop(columns=["std", "paper_std", "low", "high", "best"], errors="ignore").astype(object)
    for mean, std in (("mean", "std"), ("paper_mean", "paper_std")):
        if mean in table:
            text[mean] = [_value(*pair, decimals) for pair in zip(table[mean], table[std], strict=True)]
    for name in table.columns.intersection(_COUNTS):
        text[name] = ["" if pd.isna(count) else f"{count:,}" for count in table[name]]
    if "difference" in table:
        found = zip(table["difference"], table["low"], table["high"], strict=True)
        text["difference"] = [_with_interval(*cell, decimals) for cell in found]
    elif "low" in table:
        ends = [_interval(*pair, decimals) for pair in zip(table["low"], table["high"], strict=True)]
        text.insert(text.columns.get_loc("mean") + 1, "interval", ends)
    return text.map(lambda cell: "" if pd.isna(cell) else str(cell))


def _interval(low: float, high: float, decimals: int) -> str:
    return "" if pd.isna(low) else f"{low:.{decimals}f} to {high:.{decimals}f}"


def _value(mean: float, std: float, decimals: int) -> str:
    if pd.isna(mean):
        return ""
    return f"{mean:.{decimals}f}" if pd.isna(std) else f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def _with_interval(mean: float, low: float, high: float, decimals: int) -> str:
    if pd.isna(mean):
        return ""
    return f"{mean:+.{decimals}f}" + ("" if pd.isna(low) else f" ({low:+.{decimals}f} to {high:+.{decimals}f})")


def _latex(text: pd.DataFrame, bold: pd.Series, titles: list[str], words: list[str], name: str, caption: str) -> str:
    def cell(row: int, column: str) -> str:
        value = _escape_latex(text.at[row, column])
        return rf"\textbf{{{value}}}" if bold.at[row] and column == "mean" else value

    rows = [" & ".join(cell(row, column) for column in text) + r" \\" for row in text.index]
    alignment = "".join("l" if column in words else "r" for column in text)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape_latex(caption)}}}",
        rf"\label{{tab:{name}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        " & ".join(map(_escape_latex, titles)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _markdown(text: pd.DataFrame, bold: pd.Series, titles: list[str], words: list[str], caption: str) -> str:
    def cell(row: int, column: str) -> str:
        value = text.at[row, column].replace("|", r"\|")
        return f"**{value}**" if bold.at[row] and column == "mean" else value

    table = [
        titles,
        ["---" if column in words else "---:" for column in text],
        *([cell(row, column) for column in text] for row in text.index),
    ]
    return "\n".join([caption, "", *("| " + " | ".join(row) + " |" for row in table)]) + "\n"
