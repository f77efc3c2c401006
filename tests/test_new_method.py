"""A new method is a model, and a line in its task: nothing else needs to know of it."""

import ast
from pathlib import Path

import torch
from torch import nn

from ngcore.study.methods import Method
from ngcore.study.tables import summarize
from ngcore.study.training import Schedule
from ngcore.tasks import execute, inr_classification
from ngcore.tasks.inr_sets import INRData

ROOT = Path(__file__).resolve().parents[1]


class MeanOfParameters(nn.Module):
    """Class scores from a network's mean weight and mean bias in every layer: as little as a method can read."""

    def __init__(self, wiring, classes):
        super().__init__()
        self.wiring = wiring
        self.head = nn.Linear(len(wiring.shapes), classes)

    def fit_normalization(self, graph):
        means = self.means(graph)
        self.register_buffer("mean", means.mean(0))
        self.register_buffer("std", means.std(0))

    def means(self, graph):
        return torch.stack([values.flatten(1).mean(1) for values in graph.state_dict().values()], dim=1)

    def forward(self, graph):
        return self.head((self.means(graph) - self.mean) / self.std)


def test_a_method_that_the_study_does_not_know_is_trained_stored_and_tabled(monkeypatch, tmp_path):
    monkeypatch.setenv("NGCORE_CACHE", str(tmp_path))
    monkeypatch.setitem(inr_classification.METHODS, "MeanOfParameters", Method(MeanOfParameters, colour=5))
    data = INRData("mnist", 32, 16, 16, steps=5)
    config = inr_classification.Config(
        "mnist", "MeanOfParameters", 0, 0, data, Schedule(2, 16, warmup=0), augmentation=None
    )
    record = execute(config)
    assert record["metrics"]["best_epoch"] in (0, 1)
    assert execute(config) == record  # found again
    table = summarize([record], metric="test_accuracy", scale=100, methods=inr_classification.METHODS)
    assert table["method"].tolist() == ["MeanOfParameters"]


def test_the_study_names_no_method():
    """What tables and figures know of methods comes from the tasks."""
    names = set(inr_classification.METHODS) - {"MLP"}
    for path in (ROOT / "ngcore" / "study").glob("*.py"):
        found = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not names & found, path.name
