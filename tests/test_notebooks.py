"""Every notebook runs in the smoke profile and leaves what its paper section promises."""

import pandas as pd
import pytest

from ngcore.study import notebooks
from ngcore.study.profiles import find_notebooks
from ngcore.study.runs import ROOT
from ngcore.tasks import inr_editing

ARTEFACTS = {
    "00": ["figure_1", "figure_5", "figure_6", "figure_symmetry", "figure_residual", "figure_transformer"],
    "01": [
        *("table_3", "table_4", "figure_2a", "figure_2b", "figure_overfitting", "figure_seen_mnist"),
        *("figure_training_mnist", "figure_confusion_fashion_mnist"),
    ],
    "02": [
        *("table_5", "table_editing_controls", "table_networks", "table_edit", "table_transfer"),
        *("table_transfer_controls", "figure_task", "figure_equivariance", "figure_2c", "figure_edited"),
        *("figure_networks", "figure_edit", "figure_training_editing"),
    ],
    "03": [
        *(
            "table_1",
            "table_ahead",
            "table_splits",
            "table_control",
            "table_losses",
            "table_joint",
            "table_shapes",
            "table_probing",
        ),
        *("figure_populations", "figure_park_graphs", "figure_training_generalization"),
        *("figure_predictions_cifar10_gs", "figure_predictions_cifar10_wild_park"),
    ],
    "04": [
        *(
            "table_2",
            "table_other_networks",
            "table_order",
            "table_interventions",
            "table_horizons",
            "table_horizon",
            "table_cost",
            "figure_3",
            "figure_3_fashion_mnist",
        ),
        *("figure_optimizee", "figure_spiral", "figure_meta_training", "figure_trajectories", "figure_horizon"),
    ],
    "05": [
        *(
            "table_6",
            "table_7",
            "table_equal_fit",
            "table_directions",
            "table_updates",
            "table_normalization",
            "table_biases",
        ),
        *("table_probe_points", "table_linear", "table_flattening", "table_noise", "table_sizes"),
        *("table_augmentation", "figure_4", "figure_directions", "figure_normalization", "figure_biases"),
        *("figure_probe_points", "figure_linear", "figure_flattening", "figure_noise", "figure_sizes"),
        "figure_augmentation",
    ],
}


def test_every_notebook_is_tested():
    assert set(ARTEFACTS) == set(find_notebooks(ROOT / "notebooks"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", sorted(ARTEFACTS))
def test_notebook(number, tmp_path, study_cache, monkeypatch):
    monkeypatch.setenv("NGCORE_CACHE", str(study_cache))
    monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path / "output"))
    notebooks.execute("smoke", [number])
    written = {path.name for path in (tmp_path / "output" / "figures" / "smoke").iterdir()}
    for name in ARTEFACTS[number]:
        suffixes = ("csv", "tex", "md") if name.startswith("table") else ("pdf", "png")
        assert {f"{name}.{suffix}" for suffix in suffixes} <= written
    directory = tmp_path / "output" / "figures" / "smoke"
    if number == "01":
        table = pd.read_csv(directory / "table_3.csv")
        assert len(table) == 3 + 2 * 3 + 2 * 4 + 1  # baselines, controls, graph models, one recipe
        assert table["mean"].between(0, 100).all()
    if number == "02":
        table = pd.read_csv(directory / "table_5.csv")
        assert table["method"].tolist()[:5] == [*inr_editing.CONTROLS, "DWSNet"]
        assert len(table) == 15
        assert (table["mean"] > 0).all()
    if number == "03":
        table = pd.read_csv(directory / "table_1.csv")
        assert table["method"].tolist() == [
            *("StatNN", "NFN_HNP", "NG-GNN", "NG-GNN_Fourier", "NG-T"),
            *("StatNN", "NG-GNN", "NG-GNN_Fourier", "NG-T"),
        ]
        assert table["mean"].between(-1, 1).all()
    if number == "04":
        table = pd.read_csv(directory / "table_2.csv")
        assert table["method"].tolist() == 2 * ["Adam", "FF", "LSTM", "NFN", "NG-GNN", "NG-T"]
        assert table["seeds"].tolist() == 2 * [1, 2, 2, 2, 2, 2]  # of two meta-seeds
        assert table["mean"].between(0, 100).all()
    if number == "05":
        table = pd.read_csv(directory / "table_6.csv")
        assert table["method"].tolist() == ["StatNN", "NG-GNN", "NG-GNN_without", "NG-T", "NG-T_without"]
        assert table["paper_mean"].tolist() == [0.719, 0.804, 0.778, 0.817, 0.728]
