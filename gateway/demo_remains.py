"""What keeps a demo from outliving itself, however it ends: kill -9 included.

Its processes are started through this file (`python -m`), which asks the kernel to send SIGTERM when the demo is gone and then
becomes the program. Its directory is locked while it lives; the next demo removes the directories of those that are gone.

Invariant: a directory that somebody holds, or that is not ours, is never touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PREFIX = "tidegate-demo-"
YOUNG = 60.0
"""Seconds in which a directory may have been made and not be locked yet."""
_PR_SET_PDEATHSIG = 1


def bound(command: Sequence[str]) -> list[str]:
    """The command line of a program that ends with this process. To be started from the main thread: its end is what counts."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


@contextlib.contextmanager
def own_directory() -> Iterator[Path]:
    """A directory for as long as the demo lives."""
    _remove_those_left()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, _opened(Path(name)) as directory:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield Path(name)


def _remove_those_left() -> None:
    for place in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # Somebody's, held, or gone meanwhile: not ours to remove.
        with contextlib.suppress(OSError), _opened(place) as directory:
            seen = os.fstat(directory)
            if seen.st_uid == os.geteuid() and time.time() - seen.st_mtime > YOUNG:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place)


@contextlib.contextmanager
def _opened(place: Path) -> Iterator[int]:
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)


def _become(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == parent:  # else it died before we asked
        os.execv(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
