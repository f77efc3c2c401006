"""The house rules a reader relies on: where things are, which way imports run, how notebooks are kept."""

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "ngcore").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROVIDERS = packages_distributions()
PROFILES = sorted(path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml"))

# What each package may import of the others.
ALLOWED = {
    "graph": {"activations"},
    "data": {"activations", "files", "precision", "processes"},
    "study": {"digests", "files", "precision", "processes"},
    "models": {"activations", "digests", "files", "graph", "precision"},
    "reference": {"activations", "graph", "models", "data"},
    "tasks": {"activations", "digests", "files", "graph", "data", "study", "models"},
    "bench": {"activations", "files", "reference", "graph", "data", "study", "models", "tasks"},
}

# The floors of `graph`, from the ground up: a module imports from its own floor and those below.
FLOORS = (
    {"structure", "states"},
    {"pyg", "symmetry"},
    {"wiring"},
    {"architectures", "dialects", "frame", "batch", "collection", "tracing"},
    {"steps", "readings", "forward", "simulate", "draw", "message_passing"},
)

# Declared although nothing imports them, and what they do.
RUN = {"jupyterlab": "shows the notebooks, and brings the kernel that runs them"}
RUN_BY_TESTS = {
    "beartype": "checks annotations, see pytest's addopts",
    "pytest-timeout": "ends a test that hangs",
    "pytest-xdist": "run_all.sh test: a process per core",
    "ruff": "run_all.sh test",
}


def imported_modules(source: str) -> Iterator[str]:
    """Every module that code imports, anywhere; `from a import b` gives a.b, which may be a name in a."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: name the package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_packages(source: str, package: str) -> set[str]:
    """The packages directly below ngcore that a module of ngcore.`package` imports, anywhere in its code."""
    return {name.split(".")[1] for name in imported_modules(source) if name.startswith("ngcore.")} - {package}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_among(sources: dict[str, str]) -> dict[str, set[str]]:
    """For every module those of `sources` that it imports, itself included where it does."""
    found = {}
    for name, source in sources.items():
        imported = set(imported_modules(source))
        found[name] = {target if target in sources else target.rpartition(".")[0] for target in imported} & set(sources)
    return found


def circle_in(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def floor(name: str) -> int:
    part = name.removeprefix("ngcore.graph.").split(".")[0]
    found = [i for i, modules in enumerate(FLOORS) if part in modules]
    assert found, f"{name} has no floor: say in FLOORS what it may import"
    return found[0]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> tuple[set[str], set[str]]:
    """Names of the distributions that pyproject.toml declares: what ngcore needs, and what developers need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = project["dependencies"], project["optional-dependencies"]["dev"]
    return tuple({normalized(re.match(r"[\w.-]+", line).group()) for line in lines} for lines in lists)


def distributions(sources: list[str]) -> set[str]:
    """The distributions that code imports from, the standard library, ngcore and the tests' own helpers left out."""
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests"}
    roots = {name.split(".")[0] for source in sources for name in imported_modules(source)}
    found = set()
    for root in roots - sys.stdlib_module_names - helpers - {"ngcore"}:
        assert root in PROVIDERS, f"{root} is imported and not installed"
        found |= {normalized(name) for name in PROVIDERS[root]}
    return found


def code_of(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_downwards(package):
    modules = sorted((ROOT / "ngcore" / package).rglob("*.py"))
    assert modules
    command = ROOT / "ngcore" / "study" / "__main__.py"  # joins packages, and nothing imports it
    for module in modules:
        if module == command:
            continue
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


def test_no_modules_import_each_other_in_a_circle():
    # nothing imports a __main__; bench's imports itself, to be known by its full name
    imported = [path for path in MODULES if path.stem != "__main__"]
    circle = circle_in(imports_among({module_name(path): path.read_text() for path in imported}))
    assert not circle, " <- ".join(circle)


@pytest.mark.parametrize(
    "back", ["import a", "from a import x", "if TYPE_CHECKING:\n    from a import x", "def f():\n    import a"]
)
def test_the_circle_test_sees_every_form_of_import(back):
    assert circle_in(imports_among({"a": "from b import y", "b": "import c", "c": back}))
    assert not circle_in(imports_among({"a": "from b import y", "b": "import c", "c": "import d"}))
    assert circle_in(imports_among({"a": "from a import x"})), "a module that imports itself"


def test_modules_of_graph_import_from_their_floor_and_below():
    sources = {
        module_name(path): path.read_text() for path in MODULES if path.is_relative_to(ROOT / "ngcore" / "graph")
    }
    del sources["ngcore.graph"]  # its names come from everywhere
    for name, targets in imports_among(sources).items():
        upwards = {target for target in targets if floor(target) > floor(name)}
        assert not upwards, f"{name} imports {upwards}"


def test_what_is_imported_is_declared():
    needed, for_developers = declared()
    for path in MODULES:
        allowed = needed | for_developers if path.is_relative_to(ROOT / "ngcore" / "bench") else needed
        undeclared = distributions([path.read_text()]) - allowed
        assert not undeclared, f"{path.relative_to(ROOT)} imports {undeclared}; pyproject.toml does not declare it"
    for path in NOTEBOOKS:
        undeclared = distributions([code_of(path)]) - needed
        assert not undeclared, f"{path.name} imports {undeclared}; pyproject.toml does not declare it"
    for path in (ROOT / "tests").glob("*.py"):
        undeclared = distributions([path.read_text()]) - needed - for_developers
        assert not undeclared, f"{path.name} imports {undeclared}; the extra 'dev' does not declare it"


def test_what_is_declared_is_imported():
    needed, for_developers = declared()
    study = distributions([path.read_text() for path in MODULES] + [code_of(path) for path in NOTEBOOKS])
    tests = distributions([path.read_text() for path in (ROOT / "tests").glob("*.py")])
    assert needed - study == set(RUN)
    assert for_developers - tests == set(RUN_BY_TESTS)


def test_what_is_declared_is_pinned():
    pins = {normalized(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set.union(*declared()) <= pins


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
