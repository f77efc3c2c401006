"""The house rules a reader relies on: where things are, which way imports run, how notebooks are kept."""

import ast
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted(path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml"))

# What each package may import of the others.
ALLOWED = {
    "graph": {"activations"},
    "data": {"activations", "files", "processes"},
    "study": {"files", "processes"},
    "models": {"activations", "files", "graph"},
    "reference": {"activations", "graph", "models", "data"},
    "tasks": {"activations", "files", "graph", "data", "study", "models"},
    "bench": {"activations", "files", "reference", "graph", "data", "study", "models", "tasks"},
}


def imported_packages(source: str, package: str) -> set[str]:
    """The packages directly below ngcore that a module of ngcore.`package` imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in ngcore.{package}: name the package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("ngcore.")}
    return found - {package}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_downwards(package):
    modules = sorted((ROOT / "ngcore" / package).rglob("*.py"))
    assert modules
    for module in modules:
        upwards = imported_packages(module.read_text(), package) - ALLOWED[package]
        assert not upwards, f"{module.relative_to(ROOT)} imports {upwards}"


def test_what_several_packages_use_imports_none_of_them():
    for module in (ROOT / "ngcore").glob("*.py"):
        assert not imported_packages(module.read_text(), ""), module.name


def test_the_layering_test_sees_every_form_of_import():
    source = "import ngcore.tasks.inr as t\nfrom ngcore import data\ndef f():\n    from ngcore.models import NGT\n"
    assert imported_packages(source, "graph") == {"tasks", "data", "models"}


def test_every_package_has_its_layer():
    packages = {path.parent.name for path in (ROOT / "ngcore").glob("*/__init__.py")}
    assert packages == set(ALLOWED)


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert "The ngcore authors" in text


def test_environments_share_their_pins():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in pins
    assert all(line.startswith("#") or line.count("==") == 1 for line in pins)
    assert not any("+" in line or line.lower().startswith("ngcore") for line in pins), "pins for one machine alone"
    assert "-c constraints.txt" in (ROOT / "environment.yml").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_form(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].cell_type == "markdown", "a notebook begins with its title"
    assert "parameters" in code[0].metadata.get("tags", ()), "the first code cell is tagged 'parameters'"
    for cell in code:
        start = cell.source[:60]
        assert not cell.outputs, f"strip the outputs of: {start}"
        assert cell.execution_count is None, f"strip the execution count of: {start}"
        assert len(cell.source.splitlines()) <= 40, f"longer than 40 lines: {start}"
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(cell.source))), (
            f"a class belongs into ngcore: {start}"
        )


def test_the_four_profiles_exist():
    assert {"smoke", "quick", "cpu", "paper"} <= set(PROFILES)
