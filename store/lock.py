"""The lock of a data directory: whoever holds it may write `log.db` there.

It is an `flock` on a file of its own (on the database SQLite would drop it), held by the running gateway and by the commands
that exchange the log under it. It goes with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from .exchange import own_like
from .schema import StoreError


class Held(StoreError):
    """Somebody else holds it; the text is for the user."""


def hold(data: Path) -> int:
    """Make the directory if need be and take its lock; closing the descriptor gives it back. Raises StoreError, Held."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o750)
        lock = os.open(data / "broker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        own_like(data, data / "broker.lock")
    except OSError as error:
        raise StoreError(
            f"cannot write in the data directory {data}: {error.strerror}; give this user the right to, or choose another"
            f" with --data DIR"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise Held(f"another tidegate is running on {data}: stop it first, or choose another --data DIR") from None
    return lock


def is_held(data: Path) -> bool:
    """Whether somebody holds it now, or we may not know."""
    try:
        lock = os.open(data / "broker.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
