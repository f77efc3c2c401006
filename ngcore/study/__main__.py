"""Command line of the study: `python -m ngcore.study run` and `python -m ngcore.study figures`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ngcore.study.notebooks import NotebookError, execute
from ngcore.study.profiles import ProfileError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a notebook failed, 2 wrong arguments, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "run":
            execute(options.profile, options.only)
        else:
            execute(options.profile, train=False)
    except (ProfileError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ProfileError) else 1
    except KeyboardInterrupt:
        print("Stopped. Start again to go on: finished runs are stored.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ngcore.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks; runs that are stored are not trained again")
    figures = commands.add_parser("figures", help="redraw tables and figures from stored runs, without training")
    for command in (run, figures):
        command.add_argument("--profile", default="quick", help="a file of notebooks/profiles (default: quick)")
    run.add_argument("--only", type=lambda text: text.split(","), help="numbers of notebooks, such as 01,03")
    return parser


if __name__ == "__main__":
    sys.exit(main())
