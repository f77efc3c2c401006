"""Where the project's own files are, and writing files so that a reader never meets half of one."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

REPOSITORY: Path | None = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else None
"""The checkout that ngcore is used from; None where it is installed from a wheel."""

SHIPPED = REPOSITORY / "data" if REPOSITORY else _PACKAGE / "shipped"
"""Image subsets, learned optimizers and published numbers that come with ngcore."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or none: under another name beside it, renamed when it is whole.

    Raises:
        OSError: the directory can't be made or written, or the disk is full; the error names the path, and a file
            that was there is still there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"not written: {error.strerror}", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
