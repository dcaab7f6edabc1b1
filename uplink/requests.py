"""What a person asks of the quarantine: a file in `DATA/dead/` that the one writer of `uplink.db` takes up.

Who asks writes a whole file and renames it, so it is there or not. The writer applies it in one synced transaction that also
notes its name, then removes it: killed in between, it finds the name noted and does nothing twice. A retried row gets a number
drawn at random, its mark at the far end, so what is sent again after a kill is known there.

Invariant: a row that somebody may be sending is neither edited nor dropped. What waits for a far end that nobody serves can be,
with the words that it may have arrived.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidegate.store.schema import StoreError

from .progress import Progress

DIRECTORY = "dead"


def leave(data: Path, action: str, ids: list[int], edited: str = "") -> Path:
    """Put a request down, synced: `retry`, `drop`, or `edit` with the new bytes in base64. Raises OSError."""
    directory = data / DIRECTORY
    directory.mkdir(mode=0o770, exist_ok=True)
    _give(directory, data)
    name = f"{time.time_ns():020}-{uuid.uuid4().hex[:8]}"
    unfinished = directory / f"{name}.tmp"
    with unfinished.open("w", encoding="ascii") as file:
        json.dump({"action": action, "ids": ids, "edited": edited}, file)
        file.flush()
        os.fsync(file.fileno())
    _give(unfinished, data)
    path = unfinished.rename(directory / f"{name}.json")
    _sync(directory)
    return path


def take_up(data: Path, progress: Progress, alone: bool = False) -> None:
    """Apply what lies there, oldest first. Raises StoreError when it cannot be written; it is taken up the next time then."""
    for path in sorted((data / DIRECTORY).glob("*.json")):
        try:
            progress.apply(path.name, *_read(path), alone)
            path.unlink(missing_ok=True)
            _sync(path.parent)
        except (ValueError, KeyError, TypeError, RecursionError, IsADirectoryError):
            # Nobody of ours wrote it; kept beside for a person to look at.
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".unreadable"))
            continue
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}: check owner and rights of {path.parent}") from error
        progress.forget(path.name)


def take_up_alone(data: Path) -> bool:
    """Take up without an uplink process; False when one runs, which does it then. Raises StoreError."""
    with _without_uplink(data) as alone:
        if alone:
            progress = Progress(data)
            try:
                take_up(data, progress, alone)
            finally:
                progress.close()
    return alone


def uplink_runs(data: Path) -> bool:
    """Whether an uplink process may be sending something right now. Raises StoreError."""
    with _without_uplink(data) as alone:
        return not alone


@contextlib.contextmanager
def _without_uplink(data: Path) -> Iterator[bool]:
    """Meanwhile no uplink process starts; False when one runs."""
    try:
        lock = (data / "uplink.lock").open("w", encoding="ascii")
    except OSError as error:
        raise StoreError(f"{data}/uplink.lock: {error.strerror}: run this as the user of the gateway") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _give(path: Path, data: Path) -> None:
    """What root asks for must be readable and removable by the gateway's user."""
    if os.geteuid() == 0:
        owner = data.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[str, list[int], bytes]:
    """Action, ids and the new bytes. What `leave` does not write: ValueError, KeyError, TypeError or RecursionError."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    action, ids, edited = found["action"], found["ids"], b64decode(found["edited"])
    if not isinstance(action, str) or not all(isinstance(number, int) and abs(number) < 1 << 63 for number in ids):
        raise ValueError
    return action, ids, edited
