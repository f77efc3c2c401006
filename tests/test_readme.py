"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest

from ngcore.graph.tracing.reader import RULES

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def code_of(title: str) -> list[str]:
    """The Python blocks of a section."""
    (section,) = re.findall(rf"^## {title}\n(.*?)^## ", README, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def _own_rules():
    """Rules registered in a test end with it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("_own_rules")
@pytest.mark.parametrize(
    ("title", "blocks"), [("Explore", 4), ("Bring your own network", 4), ("Optimize with a network", 1)]
)
def test_code_runs_in_order(title, blocks):
    found = code_of(title)
    assert len(found) == blocks
    names: dict[str, object] = {"__name__": "readme"}
    for number, code in enumerate(found):
        exec(compile(code, f"README.md, {title}, block {number}", "exec"), names)
    if title == "Bring your own network":
        assert [group.size for group in names["wiring"].groups] == [3, 8, 8, 2]
        assert [block.kind for block in names["wiring"].blocks] == ["convolution", "convolution", "residual", "linear"]
        assert names["data"].num_nodes == 21
        assert names["bessel"].num_nodes == 11
    if title == "Optimize with a network":
        assert names["loss"] < 1.2  # from about log 4
