"""Command line of the study: `python -m ngcore.study run`, `train`, `figures`, `pack` and `unpack`.

Profile `paper` on one GPU, in pieces. A piece needs torch and the packages of pyproject.toml, but no network, no
Jupyter and no git. Of `cache/` it needs the full image sets, which are fetched where there is a network:

    python -c "from ngcore.data.images.sources import *; [fetch(n, Path('cache')) for n in ('mnist', 'fashion_mnist')]"
    tar czf mnist.tgz cache/mnist; tar czf fashion_mnist.tgz cache/fashion_mnist   # 12 and 31 MB

On the GPU:

    export NGCORE_CACHE=$PWD/cache TORCHINDUCTOR_CACHE_DIR=$PWD/cache/inductor   # both are to stay between pieces
    python -m pytest -q -o addopts= -o filterwarnings= tests/test_gpu.py         # first, once
    python -m ngcore.study train --profile paper --only 01,02 --minutes 8        # then, again and again
    python -m ngcore.study pack "$OUT" --profile paper                           # at the end of every piece

Where a test of TF32 fails, the profile's `matmul: high` becomes `highest`; where one of captured steps fails,
`captured: false` is put below it. Without `--only`, notebooks 03 to 05 follow, which need CIFAR-10 too. `train` exits
with 3 when time ended first, and with 1 when a run failed; the next call goes on in either case, from the last whole
epoch of each run. Where the pack came to:

    python -m ngcore.study unpack DIRECTORY                                      # into cache/ and data/results/paper/
    ./run_all.sh figures --profile paper

Unpacked checkpoints go on in a later session if `cache/runs/` travels there. INRs are fitted again by each machine,
and fits differ in their last digits from machine to machine: a run that goes on needs the very INRs that it began with
(its name holds a digest of them), so that a session is best spent on runs that it finishes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ngcore.study.execution import Execution, OutOfTime
from ngcore.study.executor import RunsFailed
from ngcore.study.packing import PackError, pack, unpack
from ngcore.study.profiles import (
    NotebookError,
    ProfileError,
    declared_parameters,
    load_training,
    plan_notebooks,
)
from ngcore.study.runs import ROOT, RunError, read_records, results_directory

MARGIN = 0.05, 20.0  # of the minutes given, and at most so many seconds, for coming to an end
FAILED, WRONG, OUT_OF_TIME, INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a notebook or run failed, 2 wrong arguments, 3 the time was over first, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        if getattr(options, "data_dir", None) is not None:
            _use_archives(options.data_dir)
        if options.command == "train":
            train(options.profile, options.only, options.minutes)
        elif options.command == "pack":
            for path in pack(options.directory, options.profile, not options.no_checkpoints):
                print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        elif options.command == "unpack":
            found = unpack(options.directory)
            print(f"new: {found.runs} runs, {found.records} published records, {found.checkpoints} checkpoints")
        else:
            show(options.profile, getattr(options, "only", None), options.command == "run")
    except ProfileError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except (NotebookError, RunsFailed, RunError, PackError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except OutOfTime as end:
        print(f"Time is over: {end}. Start again to go on: finished runs and checkpoints are stored.")
        return OUT_OF_TIME
    except KeyboardInterrupt:
        print("Stopped. Start again to go on: finished runs are stored.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _use_archives(directory: Path) -> None:
    """Let this process, and those that it starts, read the published archives of a directory."""
    if not directory.is_dir():
        raise ProfileError(f"--data-dir: {directory} is no directory")
    os.environ["NGCORE_DATA"] = str(directory.resolve())


def show(profile: str, only: Sequence[str] | None, train: bool) -> None:
    """Execute the notebooks, to redraw those that have stored runs or need none; then write which claims hold.

    Raises:
        RunError: to redraw, nothing is stored.
    """
    from ngcore.study.figures import figures_directory
    from ngcore.study.notebooks import execute  # Jupyter is needed here alone
    from ngcore.tasks import claims

    execute(profile, only if train else drawable(profile, only), train)
    claims.write(figures_directory(profile), read_records(results_directory(profile)))


def drawable(profile: str, only: Sequence[str] | None, root: Path = ROOT) -> list[str]:
    """The numbers of the notebooks whose runs a profile has, all or some of them, or that show none; one line names
    each of the others.

    Raises:
        RunError: no runs are stored.
    """
    from ngcore import tasks

    directory = results_directory(profile)
    stored = {record["config"]["task"] for record in read_records(directory)}
    if not stored:
        raise RunError(
            f"{directory} holds no stored runs: `python -m ngcore.study train --profile {profile}` makes them"
        )
    chosen = []
    for notebook in plan_notebooks(profile, only, root / "notebooks"):
        plan = tasks.PLANS.get(notebook.name[:2])
        if plan is None or stored & set(plan.tasks):
            chosen.append(notebook.name[:2])
        else:
            print(f"{notebook.stem} is left out: {directory} holds no runs of it", flush=True)
    return chosen


def train(profile: str, only: Sequence[str] | None = None, minutes: float | None = None, root: Path = ROOT) -> None:
    """Execute the runs that the notebooks show, and publish them, without executing a notebook.

    Notebook after notebook, or by the profile's order of worth, see `ngcore.study.profiles.Training`.

    Raises:
        OutOfTime: so many minutes are nearly over.
        RunsFailed: some runs failed; all others that need no result of theirs are stored.
    """
    started = time.time()
    from ngcore import tasks  # this command stands above the packages that it joins

    share, most = MARGIN
    deadline = None if minutes is None else started + 60 * minutes - min(most, share * 60 * minutes)
    training = load_training(profile, root / "notebooks" / "profiles")
    notebooks = {
        notebook.name[:2]: (notebook.stem, declared_parameters(notebook) | parameters | {"train": True})
        for notebook, parameters in plan_notebooks(profile, only, root / "notebooks").items()
        if notebook.name[:2] in tasks.PLANS
    }
    print(f"Runs of {', '.join(name for name, _ in notebooks.values())}", flush=True)
    tasks.train_all(
        {number: parameters for number, (_, parameters) in notebooks.items()},
        training.worth,
        Execution(deadline=deadline, matmul=training.matmul, captured=training.captured),
        lambda number, count: print(f"{count} records of {notebooks[number][0]} are stored", flush=True),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ngcore.study", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks; runs that are stored are not trained again")
    runs = commands.add_parser("train", help="execute their runs alone, without Jupyter; stored ones not again")
    figures = commands.add_parser("figures", help="redraw tables and figures from stored runs, without training")
    packing = commands.add_parser("pack", help="write stored runs into a few small files, for another machine")
    unpacking = commands.add_parser("unpack", help="take the runs of such files into the cache and the results")
    for command in (packing, unpacking):
        command.add_argument("directory", type=Path, help="of these files")
    packing.add_argument("--no-checkpoints", action="store_true", help="nothing of runs that are not finished")
    for command in (run, runs, figures, packing):
        command.add_argument("--profile", default="quick", help="a file of notebooks/profiles (default: quick)")
    for command in (run, runs):
        command.add_argument(
            "--data-dir", type=Path, help="a directory of published archives, read where there are any"
        )
        command.add_argument("--only", type=lambda text: text.split(","), help="numbers of notebooks, such as 01,03")
    runs.add_argument("--minutes", type=float, help="come to an end before so many minutes are over")
    return parser


if __name__ == "__main__":
    sys.exit(main())
