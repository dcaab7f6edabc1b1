"""What a far end can answer besides yes: the only three exceptions a backend may raise, and who must react.

`NotConnected`: nobody; the worker backs off and tries again for ever, nothing is dropped. `Misconfigured`: a person; the
pool waits in that state and tries again each minute. `Rejected`: nobody can; the far end refuses what was sent because of
what is in it, and the worker halves the batch until the bad entry stands alone and goes to quarantine.
"""

from __future__ import annotations


class NotConnected(Exception):
    """Unreachable, throttled, starting or shutting down, read-only, out of memory: try again later."""


class Rejected(Exception):
    """Something in this batch is refused and the far end cannot say which record; nothing was applied."""


class Misconfigured(Exception):
    """Refused because of us: login, rights, wrong database. `hint` says what to do."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.hint = hint
