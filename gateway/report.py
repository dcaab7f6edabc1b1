"""What the gateway says on stderr: one line per event, and a failure that repeats itself at most twice a minute.

Whoever listens may go away or stop reading (`store.lines`): that must not stop a gateway.

Invariant: memory is bounded, and what was not said is counted in the next line that is.
"""

from __future__ import annotations

import time

from tidegate.store.lines import Lines

PER_MINUTE = 2
MAX_KINDS = 200


class Reporter:
    """Call it with a line; lines with the same `kind` are held back when they come too often."""

    def __init__(self) -> None:
        self.lines = Lines(lambda count: f"tidegate: {count} lines are missing here: nobody read the log")
        self._kinds: dict[str, tuple[float, int]] = {}

    def __call__(self, text: str, kind: str = "") -> None:
        """Say it. Without a `kind` it is always said."""
        if kind:
            text = self._held(text, kind)
        if text:
            self.lines.put(f"tidegate: {text}")

    def _held(self, text: str, kind: str) -> str:
        now = time.monotonic()
        began, count = self._kinds.get(kind, (now, 0))
        if now - began > 60:
            if count > PER_MINUTE:
                text += f" ({count - PER_MINUTE} more like it in the minute before)"
            began, count = now, 0
        if len(self._kinds) >= MAX_KINDS and kind not in self._kinds:
            self._kinds.clear()
        self._kinds[kind] = (began, count + 1)
        return text if count < PER_MINUTE else ""
