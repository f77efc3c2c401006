"""What generalizes better of two models that have fitted as much (paper, appendix A.3, figure 4)?

Every run of INR classification measures two losses after each epoch, both in evaluation mode and without augmentation:
`fitted_loss` on the first training INRs, and `val_loss` on INRs that it is not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ngcore.study.comparison import interval
from ngcore.study.runs import Record


def gap_at_equal_fit(record: Record, other: Record) -> float:
    """How much higher the validation loss of `other` is where both have the same training loss.

    A model's validation loss is interpolated between its two epochs whose training losses are nearest. The gap is the
    mean over the range of training losses in which both models have epochs.

    Returns:
        NaN where there are none.
    """
    curves = [np.array([r["metrics"]["fitted_loss"], r["metrics"]["val_loss"]]) for r in (record, other)]
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
