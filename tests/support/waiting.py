"""The one way a test waits for a real process: until a condition holds, or the deadline has passed and the test fails."""

from __future__ import annotations

import time
from collections.abc import Callable

PAUSE = 0.01


def wait_until(condition: Callable[[], object], deadline: float = 10.0, say: Callable[[], object] | None = None) -> None:
    """Return when `condition()` is true; after `deadline` seconds fail, with what `say()` returns as the reason."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline} s: {say() if say else condition}")
        time.sleep(PAUSE)
