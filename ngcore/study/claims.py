"""Claims against records: each says that one row is above another; the interval of the difference gives the verdict.

The rule, the same for all: a claim *holds* where the whole interval is on its side of 0, *does not hold* where it is on
the other side, and *cannot be told at this scale* where it has 0 in it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import kendalltau

from ngcore.files import write_atomically
from ngcore.study.evidence import Interval, Measure, difference, keeps_results
from ngcore.study.runs import Record, having

HOLDS, FAILS, OPEN, NOT_RUN = "holds", "does not hold", "cannot be told at this scale", "not run"
RULE = (
    "A claim holds where the 95 % interval of the difference is on its side of 0, does not hold where it is on the "
    "other side, and cannot be told at this scale where it has 0 in it. Intervals are of test networks and, in rows of "
    "several seeds, of seeds (bootstrap); those of one seed say nothing of another training. Of learned optimizers "
    "they are of the networks that these train (Student's), not of other meta-trainings."
)


@dataclass(frozen=True)
class Claim:
    """That a row is better than another.

    Args:
        text: the claim, in words.
        source: who makes it: a table or figure of the paper, or "ours".
        ours, theirs: fields of the configs of the two rows.
        measure: what is compared.
        paper: the paper's difference, None where it has none.
        decimals, unit: of the difference.
        lower_is_better: the better row has the lower number.
        shared: fields that both rows' configs have.
        kept: which records count, where configs do not tell.
    """

    text: str
    source: str
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    measure: Measure
    paper: float | None = None
    unit: str = "points"
    decimals: int = 1
    lower_is_better: bool = False
    shared: Mapping[str, Any] = field(default_factory=dict)
    kept: Callable[[Record], bool] = lambda record: True

    def rows(self, records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        """The records of both rows that keep the results of single units."""
        shared = having(records, **self.shared)
        kept = [record for record in shared if keeps_results(self.measure, record) and self.kept(record)]
        return having(kept, **self.ours), having(kept, **self.theirs)

    def tested(self, records: Sequence[Record]) -> Interval | None:
        """The difference, positive where the claim is right; None where a row was not run."""
        first, second = self.rows(records)
        if not (first and second):
            return None
        return (
            difference(second, first, self.measure) if self.lower_is_better else difference(first, second, self.measure)
        )


def verdict(found: Interval | None) -> str:
    """By the module's rule; without an interval nothing can be told."""
    if found is None:
        return NOT_RUN
    return HOLDS if found.low > 0 else FAILS if found.high < 0 else OPEN


def table_of(claims: Sequence[Claim], records: Sequence[Record]) -> pd.DataFrame:
    """A row per claim: who makes it, the paper's difference and ours, seeds and networks seen of both rows, verdict."""
    return pd.DataFrame([_row(claim, records) for claim in claims])


def _row(claim: Claim, records: Sequence[Record]) -> dict[str, str]:
    found, rows = claim.tested(records), claim.rows(records)
    number = f"+.{claim.decimals}f"
    ours = "" if found is None else f"{found.value:{number}}"
    if found is not None and not math.isnan(found.low):
        ours += f" ({found.low:{number}} to {found.high:{number}})"
    return {
        "Claim": claim.text,
        "Source": claim.source,
        "Paper": "" if claim.paper is None else f"{claim.paper:{number}}",
        "Ours, 95 % interval": f"{ours} {claim.unit}".strip() if ours else "",
        "Seeds": _both([str(len(row)) for row in rows]) if found else "",
        "Networks seen": _both([_seen(row) for row in rows]) if found else "",
        "Verdict": verdict(found),
    }


def _seen(row: Sequence[Record]) -> str:
    counts = {record["metrics"].get("networks_seen") for record in row}
    return f"{max(counts):,}" if None not in counts else ""


def _both(pair: Sequence[str]) -> str:
    """Of two rows, once where it is the same."""
    return pair[0] if pair[0] == pair[1] else " / ".join(pair)


def order_agreement(table: pd.DataFrame) -> float:
    """Kendall's τ between our column and the paper's: 1 where every pair of rows stands in the same order, 0 where
    there is no relation. Rows that the paper does not have, or that are not trained as it has them, don't count."""
    both = table.dropna(subset=["mean", "paper_mean"])
    return float(kendalltau(both["mean"], both["paper_mean"]).statistic)


def orders(directory: Path) -> pd.DataFrame:
    """`order_agreement` of every stored table that has the paper's column, data sets apart."""
    rows = []
    for path in sorted(directory.glob("table_*.csv")):
        table = pd.read_csv(path)
        if {"mean", "paper_mean"} <= set(table):
            for dataset, own in table.groupby("dataset") if "dataset" in table else [("", table)]:
                count = len(own.dropna(subset=["mean", "paper_mean"]))
                if count > 2:
                    name = path.stem.replace("_", " ")
                    rows.append({"Table": name, "Data set": dataset, "Rows": count, "τ": f"{order_agreement(own):.2f}"})
    return pd.DataFrame(rows)


def write(directory: Path, claims: Sequence[Claim], records: Sequence[Record]) -> None:
    """Write `claims.md` beside the tables: every claim with its verdict, and how far orders agree."""
    found, agreement = table_of(claims, records), orders(directory)
    counts = ", ".join(f"{(found['Verdict'] == name).sum()} {name}" for name in (HOLDS, FAILS, OPEN, NOT_RUN))
    parts = [f"{len(found)} claims: {counts}.", textwrap.fill(RULE, 120), markdown(found)]
    if len(agreement):
        parts += ["Kendall's τ between our column and the paper's:", markdown(agreement)]
    write_atomically(directory / "claims.md", "\n\n".join(parts) + "\n")


BEGIN, END = "<!-- claims of {} -->", "<!-- end of claims -->"


def into(text: str, directory: str, claims: str) -> str:
    """A text with the claims of a directory between its marks; as it is where it has no marks of that directory.

    Raises:
        ValueError: the end is missing.
    """
    begin = BEGIN.format(directory)
    if begin not in text:
        return text
    before, rest = text.split(begin, 1)
    if END not in rest:
        raise ValueError(f"after {begin!r} the mark {END!r} is missing")
    return f"{before}{begin}\n{claims.strip()}\n{END}{rest.split(END, 1)[1]}"


def markdown(table: pd.DataFrame) -> str:
    """A table of texts."""
    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
