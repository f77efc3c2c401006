"""Training and test loss along training (paper, appendix A.3, figure 4): what a model has that has fitted as much?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import pandas as pd
import torch.nn.functional as F

from ngcore.data.inrs.sets import INRSet
from ngcore.study.comparison import interval
from ngcore.study.run import Experiment
from ngcore.study.runs import Record
from ngcore.study.training import by_training
from ngcore.tasks import inr_classification

EVALUATED = 500  # training INRs whose loss is measured after every epoch


@dataclass(frozen=True)
class Config(inr_classification.Config):
    """A run of INR classification whose losses are measured on the training and the test INRs after every epoch."""

    task: str = "loss_curves"

    @classmethod
    def of(cls, config: inr_classification.Config) -> Config:
        """The same training."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(config) if f.name != "task"})


class Losses(inr_classification.Classification):
    """Metrics beside those of classification, of every epoch: `fitted`, the loss on the first training INRs as they
    are, and `tested`, the loss on the test INRs, both in evaluation mode, so that they can be compared."""

    def validate(self) -> dict[str, float]:
        found = {"fitted": self.sets["train"][:EVALUATED], "tested": self.sets["test"]}
        return super().validate() | {name: self.cross_entropy(inrs) for name, inrs in found.items()}

    def cross_entropy(self, inrs: INRSet) -> float:
        return F.cross_entropy(self.logits(inrs), inrs.labels).item()


EXPERIMENT = Experiment(
    Config,
    inr_classification.METHODS,
    inr_classification.load,
    by_training(partial(inr_classification.problem_of, problem=Losses)),
    inr_classification.prepare,
)


def gap_at_equal_fit(record: Record, other: Record) -> float:
    """How much higher the test loss of `other` is where both have the same training loss.

    A model's test loss is interpolated between its two epochs whose training losses are nearest. The gap is the mean
    over the range of training losses in which both models have epochs.

    Returns:
        NaN where there are none.
    """
    curves = [np.array([r["metrics"]["fitted"], r["metrics"]["tested"]]) for r in (record, other)]
    curves = [curve[:, curve[0].argsort()] for curve in curves]
    low = max(curve[0, 0] for curve in curves)
    high = min(curve[0, -1] for curve in curves)
    if low > high:
        return float("nan")
    at = np.linspace(low, high, 100)
    ours, theirs = (np.interp(at, *curve) for curve in curves)
    return float((theirs - ours).mean())


def gaps(records: Sequence[Record], method: str, other: str) -> pd.DataFrame:
    """`gap_at_equal_fit` of two methods: one row with their mean as `difference`, the ends low and high of Student's
    interval, and seeds.

    `seeds` counts those at which both had the same training loss at some time; without any the numbers are missing.

    Raises:
        ValueError: there are no records of one of them.
    """
    by_seed: Mapping[str, dict[int, Record]] = {
        name: {r["config"]["seed"]: r for r in records if r["config"]["method"] == name} for name in (method, other)
    }
    for name, own in by_seed.items():
        if not own:
            raise ValueError(f"no loss curves of {name}")
    seeds = sorted(by_seed[method].keys() & by_seed[other].keys())
    found = pd.Series([gap_at_equal_fit(by_seed[method][s], by_seed[other][s]) for s in seeds], dtype=float).dropna()
    low, high = interval(found)
    row = {"method": method, "other": other, "difference": found.mean(), "low": low, "high": high, "seeds": len(found)}
    return pd.DataFrame([row])
