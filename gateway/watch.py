"""`tidegate status --watch`: a text again and again; in place on a terminal, else one block after the other.

Invariant: Ctrl-C ends it cleanly, and a reader that goes away ends it with the next block.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable


def watch_in_blocks(text: str, look: Callable[[], str], interval: float, end: str) -> None:
    """Print `text`, then what `look` says each `interval` seconds, each with `end` after it. Raises OSError."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            print(text, end=end, flush=True)
            time.sleep(interval)
            text = look()


def watch_in_place(text: str, look: Callable[[], str], interval: float) -> None:
    """As `watch_in_blocks`, on a terminal: what was there is overwritten, and the last of it stays."""
    from rich.live import Live
    from rich.text import Text

    with contextlib.suppress(KeyboardInterrupt), Live(Text(text), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            text = look()
            live.update(Text(text), refresh=True)
