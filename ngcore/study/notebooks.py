"""Execute the numbered notebooks headless, and keep what they showed as notebook and as HTML."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbconvert
import nbformat
import papermill
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.exceptions import PapermillExecutionError

from ngcore.files import write_atomically
from ngcore.study.profiles import NotebookError, declared_parameters, plan_notebooks
from ngcore.study.runs import ROOT, output_directory


def execute(profile: str, only: Sequence[str] | None = None, train: bool = True, root: Path = ROOT) -> dict[str, float]:
    """Execute the notebooks of `root/notebooks` in order, with the parameters of a profile.

    Executed copies go to `executed/<profile>/NN_name.ipynb` and `.html`, also when a cell fails.
    All parameters are checked before the first notebook starts; the times are printed at the end.

    Args:
        only: numbers of the notebooks to execute, such as ["01", "03"]; None for all.
        train: False gives `train = False` to the notebooks that have this parameter: draw stored runs.

    Returns:
        notebook's name -> wall-clock time in seconds.

    Raises:
        ProfileError: unknown profile, notebook number or parameter.
        NotebookError: a cell failed.
    """
    plan = plan_notebooks(profile, only, root / "notebooks")
    directory = output_directory() / "executed" / profile
    directory.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    try:
        for notebook, parameters in plan.items():
            if not train and "train" in declared_parameters(notebook):
                parameters["train"] = False
            start = time.perf_counter()
            try:
                _execute_one(notebook, parameters, directory)
            finally:
                seconds[notebook.stem] = time.perf_counter() - start
    finally:
        for name, duration in seconds.items():
            print(f"{name:<40} {duration:8.1f} s")
    return seconds


def _execute_one(notebook: Path, parameters: dict[str, Any], directory: Path) -> None:
    """Execute one notebook in its own directory, as Jupyter does; put the outputs into `directory`."""
    print(f"Executing {notebook.name}", flush=True)
    partial = directory / f".{notebook.stem}.{os.getpid()}.ipynb"
    try:
        with _kernels_of_this_environment():
            papermill.execute_notebook(
                notebook,
                partial.resolve(),
                parameters,
                kernel_name="python3",
                language="python",
                cwd=notebook.parent,
            )
    except PapermillExecutionError as error:
        raise NotebookError(_describe(error, notebook, directory)) from error
    except (DeadKernelError, CellControlSignal) as error:
        raise NotebookError(f"{notebook.name}: {error} (out of memory? see {directory})") from error
    finally:
        if partial.exists():
            _publish(partial, directory / notebook.name)


@contextmanager
def _kernels_of_this_environment() -> Iterator[None]:
    """Make "python3" mean this interpreter, whatever kernels the user has registered elsewhere."""
    before = os.environ.get("JUPYTER_PATH")
    own = os.path.join(sys.prefix, "share", "jupyter")
    os.environ["JUPYTER_PATH"] = own if before is None else own + os.pathsep + before
    try:
        yield
    finally:
        if before is None:
            del os.environ["JUPYTER_PATH"]
        else:
            os.environ["JUPYTER_PATH"] = before


def _describe(error: PapermillExecutionError, notebook: Path, directory: Path) -> str:
    """Which cell failed and how, in two lines."""
    line = next((line for line in error.source.splitlines() if line.strip()), "")
    return (
        f"{notebook.name}, cell [{error.exec_count}] that begins with '{line}': "
        f"{error.ename}: {error.evalue}\n"
        f"See {directory / notebook.with_suffix('.html').name}"
    )


def _publish(partial: Path, target: Path) -> None:
    """Write the HTML of an executed notebook, then the notebook itself; of every progress bar its last state alone."""
    resources = {"metadata": {"name": target.stem}}
    tidy = CoalesceStreamsPreprocessor(enabled=True)
    notebook, resources = tidy.preprocess(nbformat.read(partial, as_version=4), resources)
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook, resources)
    write_atomically(target.with_suffix(".html"), html)
    write_atomically(target, nbformat.writes(notebook))
    partial.unlink()
