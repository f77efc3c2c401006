"""What the papers claim, and what a sceptic asks: each claim with the rows that test it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngcore.files import REPOSITORY, write_atomically
from ngcore.study import claims
from ngcore.study.claims import Claim
from ngcore.study.evidence import number_of
from ngcore.study.runs import Record
from ngcore.study.tables import load_reported
from ngcore.tasks import inr_classification
from ngcore.tasks.editing_tables import measure_of
from ngcore.tasks.generalization import TABLE_1
from ngcore.tasks.generalization_tables import PARK, tau_of
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


def editing_claims() -> list[Claim]:
    """Of table 5: graph models edit better than others, and better than edits that do not look at the INR."""
    table = REPORTED["table_5_mnist_inr_dilation"]
    shared = {"task": "inr_editing", "dataset": "mnist", "edit": "dilation", "networks": 1, "recipe": PAPER}

    def claim(text: str, source: str, ours: tuple[str, int], theirs: tuple[str, int]) -> Claim:
        cells = [table.get(method.removesuffix("_HNP"), {}).get(probes) for method, probes in (ours, theirs)]
        paper = cells[1]["mean"] - cells[0]["mean"] if all(cells) else None
        rows = [dict(zip(("method", "probes"), row, strict=True)) for row in (ours, theirs)]
        measure = measure_of("test")
        return Claim(text, source, *rows, measure, paper, "1e-2 MSE", 2, lower_is_better=True, shared=shared)

    paper = "table 5"
    return [
        claim("NG-GNN edits better than NFN", paper, ("NG-GNN", 0), ("NFN_HNP", 0)),
        claim("NG-GNN edits better than DWSNet", paper, ("NG-GNN", 0), ("DWSNet", 0)),
        claim("NG-T edits better than NG-GNN", paper, ("NG-T", 0), ("NG-GNN", 0)),
        claim("64 probe features help NG-GNN edit", paper, ("NG-GNN", 64), ("NG-GNN", 0)),
        claim("64 probe features help NG-T edit", paper, ("NG-T", 64), ("NG-T", 0)),
        claim("DWSNet edits better than one edit for all INRs", "ours", ("DWSNet", 0), ("constant edit", 0)),
        claim("NG-GNN edits better than one edit for all INRs", "ours", ("NG-GNN", 0), ("constant edit", 0)),
        claim("NG-GNN with 64 probe features edits better than a 3x3 filter of the picture", "ours",
              ("NG-GNN", 64), ("3x3 filter", 0)),
    ]  # fmt: skip


def generalization_claims() -> list[Claim]:
    """Of table 1: graph models read more of a CNN's accuracy than statistics of its weights do."""
    found = []
    for dataset, title in (("cifar10_gs", "CIFAR10-GS"), (PARK, "Wild Park")):
        table, shared = REPORTED["table_1_generalization"][dataset], {"task": "generalization", "dataset": dataset}
        for method, other in (("NG-GNN", "StatNN"), ("NG-T", "StatNN"), ("NG-T", "NG-GNN")):
            found.append(
                Claim(
                    f"{method} predicts accuracies better than {other} ({title})",
                    "table 1",
                    {"method": method},
                    {"method": other},
                    tau_of(f"test_{dataset}"),
                    table[method]["mean"] - table[other]["mean"],
                    "in τ",
                    3,
                    shared={**shared, **TABLE_1, "split_seed": 0},
                )
            )
    return found


def ablation_claims() -> list[Claim]:
    """Of tables 6 and 7: what embeddings are worth."""
    tau = number_of(f"test_{PARK}_tau")
    asked = (
        ("Activation", "table 6", REPORTED["table_6_activation_embedding"], tau, "in τ", 3),
        ("Positional", "table 7", REPORTED["table_7_positional_embedding"], inr_classification.ACCURACY, "points", 1),
    )
    return [
        Claim(
            f"{kind} embeddings help {method}",
            source,
            {"variant": "with"},
            {"variant": "without"},
            measure,
            table[method]["mean"] - table[f"{method}_without"]["mean"],
            unit,
            decimals,
            shared={"task": "ablations", "question": f"{kind.lower()} embeddings", "method": method},
        )
        for kind, source, table, measure, unit, decimals in asked
        for method in ("NG-GNN", "NG-T")
    ]


def optimization_claims() -> list[Claim]:
    """Of table 2: optimizers that read the graph are ahead of others, after 1,000 steps."""
    found = []
    for dataset, title in (("fashion_mnist", "FashionMNIST"), ("cifar10", "CIFAR-10")):
        table = REPORTED["table_2_learning_to_optimize"][dataset]
        shared = {
            "task": "learning_to_optimize",
            "dataset": dataset,
            "variation": "none",
            "held": "test",
            "steps": 1000,
        }
        pairs = [(method, other) for method in ("NG-GNN", "NG-T") for other in ("Adam", "LSTM", "NFN")]
        for method, other in [("FF", "Adam"), *pairs]:
            paper = table[method]["mean"] - table[other]["mean"]
            rows = {"method": method}, {"method": other}
            text = f"{method} trains better than {other} ({title})"
            measure = number_of("final_accuracy", 100)
            found.append(Claim(text, "table 2", *rows, measure, paper, shared=shared, kept=_of_whole_trajectories))
    return found


def _of_whole_trajectories(record: Record) -> bool:
    """Not the contrast, meta-trained on young networks alone."""
    return record["metrics"].get("horizon", 1000) >= 1000


CLAIMS = [
    *classification_claims("mnist", 3),
    *classification_claims("fashion_mnist", 4),
    *editing_claims(),
    *generalization_claims(),
    *optimization_claims(),
    *ablation_claims(),
]


def write(directory: Path, records: Sequence[Record]) -> None:
    """Write `claims.md` beside a profile's tables, and into the README, if it shows those of this directory."""
    claims.write(directory, CLAIMS, records)
    if REPOSITORY and directory.is_relative_to(REPOSITORY):
        readme, place = REPOSITORY / "README.md", directory.relative_to(REPOSITORY).as_posix()
        text = readme.read_text(encoding="utf-8")
        found = claims.into(text, place, (directory / "claims.md").read_text(encoding="utf-8"))
        if found != text:
            write_atomically(readme, found)
