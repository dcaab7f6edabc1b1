"""What a far end can answer besides yes: the only three exceptions a backend may raise, and who must react.

`NotConnected`: nobody; the worker backs off and tries again for ever, nothing is dropped. `Misconfigured`: a person; the
pool waits in that state and tries again each minute. `Rejected`: nobody can; the far end refuses what was sent because of
what is in it. What the backend can name goes to quarantine; else the worker halves the batch until the bad entry stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping


class NotConnected(Exception):
    """Unreachable, throttled, starting or shutting down, read-only, out of memory: try again later."""


class Rejected(Exception):
    """Something in this batch is refused, nothing was applied. `rows`: which operations (by their place) and why, if known."""

    def __init__(self, text: str, rows: Mapping[int, str] | None = None) -> None:
        super().__init__(text)
        self.rows = rows or {}


class Misconfigured(Exception):
    """Refused because of us: login, rights, wrong database. `hint` says what to do."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.hint = hint
