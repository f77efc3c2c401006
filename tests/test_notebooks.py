"""Every notebook runs in the smoke profile and leaves what its paper section promises."""

import pandas as pd
import pytest

from ngcore.study import notebooks

ARTEFACTS = {
    "00": ["figure_1", "figure_5", "figure_6", "figure_symmetry", "figure_residual", "figure_transformer"],
    "01": ["table_3", "table_4", "figure_2a", "figure_2b", "figure_training_mnist", "figure_confusion_mnist"],
}


@pytest.mark.parametrize("number", sorted(ARTEFACTS))
def test_notebook(number, tmp_path, monkeypatch):
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path / "output"))
    notebooks.execute("smoke", [number])
    written = {path.name for path in (tmp_path / "output" / "figures" / "smoke").iterdir()}
    for name in ARTEFACTS[number]:
        suffixes = ("csv", "tex", "md") if name.startswith("table") else ("pdf", "png")
        assert {f"{name}.{suffix}" for suffix in suffixes} <= written
    if number == "01":
        table = pd.read_csv(tmp_path / "output" / "figures" / "smoke" / "table_3.csv")
        assert len(table) == 11
        assert table["mean"].between(0, 100).all()
