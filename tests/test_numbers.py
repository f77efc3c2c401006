"""Numbers in texts come from the papers or say what is defined; results stand in tables that are made from records."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.$\\])\d+\.\d+(?![\w.]*\d)")  # with a decimal point; a version has two

# What is no result: definitions and settings.
DEFINED = {
    "0.0001": "mean squared error at 40 dB",
    "2.30": "ln 10, the loss of a guess among ten classes",
    "5.5": "million networks that the paper's training sees: 55,000 in 100 epochs",
    "8.25": "million: 55,000 in 150 epochs",
    "0.01": "first scale of an edit; Adam's usual rate",
    "0.001": "scales of a learned optimizer's update",
    "0.71": "best possible τ between a variable of two equal classes and one without ties: 1/√2",
    "1.1": "a factor in an example",
    "0.5": "decays of momenta",
    "0.9": "decays of momenta",
    "0.99": "decays of momenta",
    "0.999": "decays of momenta",
    "0.9999": "decays of momenta",
    "7.5": "table 7: 91.4 - 83.9",
    "14.5": "table 7: 92.4 - 77.9",
    "0.026": "table 6: 0.804 - 0.778",
    "0.089": "table 6: 0.817 - 0.728",
    "1.5": "standard error of an accuracy near a third on 1,000 images, per cent",
}


def published() -> set[float]:
    """Every published number."""
    found: set[float] = set()

    def values(node: object) -> Iterator[float]:
        if isinstance(node, dict):
            for child in node.values():
                yield from values(child)
        elif isinstance(node, int | float):
            yield float(node)

    for paper in yaml.safe_load((ROOT / "data" / "reported.yaml").read_text()).values():
        for table in paper.values():
            found |= set(values(table))
    return found


PUBLISHED = published()


def texts(notebook: Path) -> Iterator[str]:
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            yield "".join(cell["source"])


def unknown(text: str) -> list[str]:
    """Numbers that are neither published, nor defined, nor the number of a section or an equation."""
    without_places = re.sub(r"(sections?|appendi\w+|equations?) [A-Z]?\.?\d+\.\d+(\.\d+)?", "", text)
    return [n for n in NUMBER.findall(without_places) if n not in DEFINED and float(n) not in PUBLISHED]


def test_a_result_that_was_typed_is_found():
    assert unknown("NG-GNN comes to 76.47 % (section 4.1), the paper to 91.4, 5.71 above DWSNet") == ["76.47", "5.71"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_type_no_result(notebook):
    found = {text.strip()[:60]: bad for text in texts(notebook) if (bad := unknown(text))}
    assert not found, "numbers of results belong into cells that read records"
