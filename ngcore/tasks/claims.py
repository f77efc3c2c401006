"""What the papers claim, and what a sceptic asks: each claim with the rows that test it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngcore.files import REPOSITORY, write_atomically
from ngcore.study import claims
from ngcore.study.claims import Claim
from ngcore.study.evidence import Measure
from ngcore.study.runs import Record
from ngcore.study.tables import load_reported
from ngcore.tasks import inr_classification
from ngcore.tasks.rows import PAPER

REPORTED = load_reported()["neural_graphs"]
LINEAR = "linear inputs"  # the recipe whose weights enter through Linears, without Fourier features


def classification_claims(dataset: str, number: int) -> list[Claim]:
    """Of table 3 or 4: graph models read weights, graph models with probe features see more than the picture does."""
    table = REPORTED[f"table_{number}_{dataset}_inr_classification"]
    title = {"mnist": "digits", "fashion_mnist": "clothes"}[dataset]

    def claim(text: str, source: str, ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> Claim:
        rows = [dict(zip(("method", "probes", "recipe"), (*row, PAPER)[:3], strict=True)) for row in (ours, theirs)]
        cells = [table.get(method, {}).get(probes) for method, probes, *recipe in (ours, theirs) if not recipe]
        paper = cells[0]["mean"] - cells[1]["mean"] if len(cells) == 2 and all(cells) else None
        shared = {"task": "inr_classification", "dataset": dataset}
        return Claim(f"{text} ({title})", source, *rows, inr_classification.ACCURACY, paper, shared=shared)

    paper = f"table {number}"
    found = []
    for model in ("NG-GNN", "NG-T"):
        found += [
            claim(f"{model} reads weights better than DWSNet", paper, (model, 0), ("DWSNet", 0)),
            claim(f"{model}, {LINEAR}, reads weights better than DWSNet", "ours", (model, 0, LINEAR), ("DWSNet", 0)),
            claim(f"64 probe features help {model}", paper, (model, 64), (model, 0)),
            claim(f"{model} with 64 probe features knows more than 64 points of the picture tell", "ours",
                  (model, 64), ("Points", 64)),
        ]  # fmt: skip
    for probes in (0, 64):
        text = f"NG-T is better than NG-GNN, {probes or 'no'} probe features"
        found.append(claim(text, paper, ("NG-T", probes), ("NG-GNN", probes)))
    return found


CLAIMS = [*classification_claims("mnist", 3), *classification_claims("fashion_mnist", 4)]


def write(directory: Path, records: Sequence[Record]) -> None:
    """Write `claims.md` beside a profile's tables, and into the README, if it shows those of this directory."""
    claims.write(directory, CLAIMS, records)
    if REPOSITORY and directory.is_relative_to(REPOSITORY):
        readme, place = REPOSITORY / "README.md", directory.relative_to(REPOSITORY).as_posix()
        text = readme.read_text(encoding="utf-8")
        found = claims.into(text, place, (directory / "claims.md").read_text(encoding="utf-8"))
        if found != text:
            write_atomically(readme, found)


def metric_of_runs(metric: str, scale: int | float = 1) -> Measure:
    """A number of every run, with seeds as all that is drawn."""
    return Measure(lambda record: ([record["metrics"][metric]],), lambda own: scale * float(own.mean()))
