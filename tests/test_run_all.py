"""run_all.sh in a copy of the project's skeleton whose Python is a stub; notebooks with the real one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from ngcore.study.__main__ import drawable, main
from ngcore.study.notebooks import execute
from ngcore.study.profiles import NotebookError, ProfileError
from ngcore.study.runs import RunError, make_record, results_directory, write_record

ROOT = Path(__file__).resolve().parents[1]

# Notes its arguments and what was tuned; "pip" fails while the file `broken` lies beside the log.
STUB = """#!/usr/bin/env bash
here=$(dirname "$0")
if [[ $1 == -c ]]; then exit "$(cat "$here/too_old" 2>/dev/null || echo 0)"; fi
echo "$* | ${TORCHINDUCTOR_CACHE_DIR-} ${MALLOC_MMAP_THRESHOLD_-}" >>"$here/log"
[[ $2 != pip || ! -e $here/broken ]]
"""


class Project:
    """A project directory with an active environment in which nothing is ever installed."""

    def __init__(self, root: Path):
        self.root, self.bin = root / "project", root / "environment" / "bin"
        (self.root / "notebooks" / "profiles").mkdir(parents=True)
        self.bin.mkdir(parents=True)
        shutil.copy(ROOT / "run_all.sh", self.root)
        for name in ("quick", "smoke"):
            (self.root / "notebooks" / "profiles" / f"{name}.yaml").write_text("{}")
        (self.root / "pyproject.toml").write_text("a")
        (self.root / "constraints.txt").write_text("b")
        (self.bin / "python").write_text(STUB)
        (self.bin / "python").chmod(0o755)

    def run(self, *arguments: str, cwd: Path = Path("/"), **variables: str) -> subprocess.CompletedProcess:
        variables = {"VIRTUAL_ENV": str(self.bin.parent), "PATH": os.environ["PATH"], **variables}
        command = [str(self.root / "run_all.sh"), *arguments]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=30)

    def log(self) -> list[str]:
        """Arguments of the calls of Python since the last look."""
        path = self.bin / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.split(" | ")[0] for line in lines]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_installs_once_then_runs(project):
    pip = "-m pip install --quiet --disable-pip-version-check"
    assert project.run().returncode == 0
    assert project.log() == [
        f"{pip} torch==2.13.0 -c constraints.txt",
        f"{pip} -c constraints.txt -e .[dev]",
        "-m ngcore.study run --profile quick",
    ]
    assert project.run("--only", "01,03", "--profile", "smoke").returncode == 0
    assert project.log() == ["-m ngcore.study run --profile smoke --only 01,03"]
    (project.root / "constraints.txt").write_text("other pins")
    assert project.run("figures", "--profile", "smoke").returncode == 0
    assert project.log()[2:] == ["-m ngcore.study figures --profile smoke"]


def test_test_checks_style_then_tests(project):
    assert project.run("test").returncode == 0
    assert project.log()[2:] == ["-m ruff check", "-m ruff format --check", "-m pytest -n auto --dist worksteal"]


def test_an_installation_that_failed_is_repeated(project):
    (project.bin / "broken").touch()
    assert project.run().returncode != 0
    assert len(project.log()) == 1
    (project.bin / "broken").unlink()
    assert project.run().returncode == 0
    assert len(project.log()) == 3


@pytest.mark.parametrize("given", ["elsewhere", "/absolute"])
def test_allocator_and_compiled_code(project, tmp_path, given):
    cache = given.replace("/absolute", str(tmp_path / "absolute"))
    assert project.run(cwd=tmp_path, NGCORE_CACHE=cache).returncode == 0
    last = (project.bin / "log").read_text().splitlines()[-1]
    assert last.endswith(f" | {tmp_path / cache}/inductor 4294967296")
    assert (tmp_path / cache / "inductor").is_dir()


def test_conda_environment_is_used(project):
    assert project.run(VIRTUAL_ENV="", CONDA_PREFIX=str(project.bin.parent)).returncode == 0
    assert len(project.log()) == 3


def test_without_an_environment_one_is_made(project, tmp_path):
    python3 = tmp_path / "path" / "python3"
    python3.parent.mkdir()
    python3.write_text(f'#!/usr/bin/env bash\n[[ $2 == venv ]] && cp -r "{project.bin.parent}" "$3"\nexit 0\n')
    python3.chmod(0o755)
    path = f"{python3.parent}:{os.environ['PATH']}"
    result = project.run(VIRTUAL_ENV="", PATH=path)
    assert result.returncode == 0, result.stderr
    assert "Making the environment" in result.stdout
    assert "Making the environment" not in project.run(VIRTUAL_ENV="", PATH=path).stdout


def test_help(project):
    for arguments in (["--help"], ["-h"], ["test", "--help"]):
        result = project.run(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("Usage: ./run_all.sh [--profile P] [--only 01,03] [--data-dir DIR]")
    assert project.log() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast"], "unknown option '--fast'"),
        (["train"], "unknown command 'train'"),
        (["--profile"], "--profile needs a value"),
        (["--only", ""], "--only needs a value"),
        (["figures", "--only", "01"], "'figures' has no option '--only'"),
        (["--data-dir", "/nowhere"], "--data-dir: /nowhere is no directory"),
        (["test", "--profile", "quick"], "'test' has no option '--profile'"),
        (["--profile", "gpu"], "unknown profile 'gpu'; there are: quick smoke"),
    ],
)
def test_wrong_arguments(project, arguments, message):
    result = project.run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"run_all.sh: {message}")
    assert project.log() == []


def test_no_place_to_write(project):
    (project.root / "cache").write_text("a file where the directory belongs")
    result = project.run()
    assert result.returncode == 1
    assert result.stderr.startswith(f"run_all.sh: cannot write to {project.root}/cache/inductor")
    assert project.log() == []


def test_old_python(project, tmp_path):
    (project.bin / "too_old").write_text("1")
    assert "no Python 3.11 or newer" in project.run().stderr
    python3 = tmp_path / "path" / "python3"
    python3.parent.mkdir()
    python3.write_text('#!/usr/bin/env bash\n[[ $1 == --version ]] && echo "Python 3.9.1" && exit\nexit 1\n')
    python3.chmod(0o755)
    result = project.run(VIRTUAL_ENV="", PATH=f"{python3.parent}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert "Python 3.11 or newer is needed; python3 is Python 3.9.1" in result.stderr
    assert project.log() == []


def test_ci_calls_the_same_command(project):
    (project.root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", project.root / ".ci")
    variables = {"VIRTUAL_ENV": str(project.bin.parent), "PATH": os.environ["PATH"]}
    subprocess.run([project.root / ".ci" / "run"], cwd="/", env=variables, check=True, capture_output=True)
    assert project.log()[-1] == "-m pytest -n auto --dist worksteal"


def write_notebook(path, *sources, parameters='profile = "quick"\nsize = 1\ntrain = True\n'):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two notebooks, of which the second fails, and a profile."""
    monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path))
    notebooks = tmp_path / "notebooks"
    (notebooks / "profiles").mkdir(parents=True)
    show = "import os, sys\nprint([profile, size, train, sys.executable, os.getcwd()])"
    write_notebook(notebooks / "00_good.ipynb", show)
    write_notebook(notebooks / "01_bad.ipynb", "x = 'seen'\nx", "\nvalue = 1 / 0")
    (notebooks / "profiles" / "tiny.yaml").write_text('"00": {size: 5}\n')
    return tmp_path


def printed(path: Path) -> list:
    return [output.text for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]


def test_notebook_gets_its_parameters_and_this_interpreter(study, capsys):
    assert list(execute("tiny", ["00"], root=study)) == ["00_good"]
    directory = study / "executed" / "tiny"
    expected = ["tiny", 5, True, sys.executable, str(study / "notebooks")]
    assert printed(directory / "00_good.ipynb") == [f"{expected}\n"]
    assert "tiny" in (directory / "00_good.html").read_text()
    assert sorted(path.name for path in directory.iterdir()) == ["00_good.html", "00_good.ipynb"]
    assert "00_good  " in capsys.readouterr().out


def test_of_a_progress_bar_the_last_state_is_kept(study):
    show = "from tqdm import tqdm\nfor _ in tqdm(range(50), mininterval=0, desc='fitting'):\n    pass"
    write_notebook(study / "notebooks" / "00_good.ipynb", show)
    execute("tiny", ["00"], root=study)
    directory = study / "executed" / "tiny"
    (bar,) = printed(directory / "00_good.ipynb")
    assert bar.startswith("fitting: 100%")
    assert (directory / "00_good.html").read_text().count("it/s]") == 1


def test_without_training_a_failing_cell_is_named_and_what_was_shown_is_kept(study):
    write_notebook(study / "notebooks" / "00_good.ipynb", "print(train)")
    with pytest.raises(NotebookError, match=r"01_bad\.ipynb, cell .* 'value = 1 / 0': ZeroDivisionError: division"):
        execute("tiny", train=False, root=study)
    directory = study / "executed" / "tiny"
    assert printed(directory / "00_good.ipynb") == ["False\n"]
    html = (directory / "01_bad.html").read_text()
    assert "seen" in html
    assert "ZeroDivisionError" in html
    assert len(list(directory.iterdir())) == 4


def test_wrong_parameters_stop_before_anything_runs(study):
    (study / "notebooks" / "profiles" / "tiny.yaml").write_text('"01": {sise: 5}\n')
    with pytest.raises(ProfileError, match=r"01_bad\.ipynb has no parameter sise"):
        execute("tiny", root=study)
    with pytest.raises(ProfileError, match="no notebook has the number 07; there are: 00, 01"):
        execute("tiny", ["00", "07"], root=study)
    assert not (study / "executed").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(ProfileError("p"), 2), (NotebookError("n"), 1), (KeyboardInterrupt(), 130), (None, 0)],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    calls = []

    def fake(*arguments, **options):
        calls.append((arguments, options))
        if error is not None:
            raise error

    written = []
    monkeypatch.setattr("ngcore.study.notebooks.execute", fake)
    monkeypatch.setattr("ngcore.tasks.claims.write", lambda directory, records: written.append(directory.name))
    monkeypatch.setattr("ngcore.study.__main__.drawable", lambda profile, only: ["00"])
    assert main(["run", "--profile", "smoke", "--only", "01,03"]) == code
    assert main(["figures"]) == code
    assert [arguments for arguments, _ in calls] == [("smoke", ["01", "03"], True), ("quick", ["00"], False)]
    assert written == ([] if error else ["smoke", "quick"])
    assert "Traceback" not in capsys.readouterr().err


def test_only_notebooks_with_stored_runs_are_redrawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path))
    with pytest.raises(RunError, match=r"results.smoke holds no stored runs: .*train --profile smoke"):
        drawable("smoke", None)
    record = make_record({"task": "ablations"}, {"task": "ablations"}, "d", {}, {})
    write_record(record, results_directory("smoke") / f"{record['hash']}.json")
    assert drawable("smoke", None) == ["00", "05"]
    left_out = capsys.readouterr().out.splitlines()
    assert [line.split()[0][:2] for line in left_out] == ["01", "02", "03", "04"]
    assert drawable("smoke", ["02"]) == []
