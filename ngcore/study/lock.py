"""A lock on a run: of two processes that are asked for the same one, one works and the other waits or takes over.

The lock is a file that names host and process, and whose time of change its holder renews. It is stale where it has
not been renewed for long, or where its process is no more on this host. Should two processes ever pass all the same,
they do the same work twice: what a run stores is written whole, and is the same.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT = 1.0  # seconds between renewals
STALE = 30.0  # seconds without one
POLL = 0.5  # seconds between looks of who waits


@contextmanager
def exclusive(path: Path, tick: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock; wait for it while another process does.

    Args:
        tick: called while waiting; what it raises ends the wait.
    """
    while not _take(path):
        _remove_stale(path)
        if path.exists():
            tick()
            time.sleep(POLL)
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, done), daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        path.unlink(missing_ok=True)
        with suppress(OSError):  # a run that stored anything has a directory that is not empty
            path.parent.rmdir()


def _take(path: Path) -> bool:
    """Make the lock's file, if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    except FileNotFoundError:  # who had the lock before has just removed the directory
        return False
    with os.fdopen(handle, "w") as file:
        json.dump(about, file)
    return True


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _remove_stale(path: Path) -> None:
    """Take a stale lock away, by renaming it: of several who try only one succeeds."""
    content = _read(path)
    if content is None or not _is_stale(path, content):
        return
    grave = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        os.rename(path, grave)
        if _read(grave) != content:  # meanwhile another process took it over: give it back
            os.link(grave, path)
    grave.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _is_stale(path: Path, content: str) -> bool:
    try:
        silence = time.time() - path.stat().st_mtime
    except OSError:
        return False
    if silence > STALE:
        return True
    try:
        holder = json.loads(content)
        return holder["host"] == socket.gethostname() and not _is_alive(holder["pid"])
    except (ValueError, KeyError, TypeError):  # it is being written
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
