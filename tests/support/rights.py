"""What another user may and must not: the test itself becomes one for a while, as root can.

Invariant: after the block the process is root again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="being another user needs root")


@contextmanager
def as_user(user: int) -> Iterator[None]:
    """The file system, and whoever asks, sees this user."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@contextmanager
def seen_by_others() -> Iterator[Path]:
    """A directory of root's that others may look into; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
