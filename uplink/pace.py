"""How fast a far end takes a backlog, in entries of the log a second.

Measured only while one batch follows another because more waits: with idle time in it a rate says nothing of how long the
rest will take. It is that of about the last second, and of nothing before the last connection.

Invariant: no rate is told that was not measured under the backlog that there is now.
"""

from __future__ import annotations

from collections.abc import Callable

_FIRST, _OVER = 0.2, 1.0
"""Seconds until a first rate is told, and until the next."""


class Pace:
    """`rate` is 0 while it is not known. `now`: seconds that never go back."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._since: float | None = None
        self._count = 0
        self.rate = 0.0

    def begins(self, backlog: bool) -> None:
        """Something is to be carried, or nothing; with a `backlog` more follows after it."""
        if not backlog:
            self._since, self._count, self.rate = None, 0, 0.0
        elif self._since is None:
            self._since = self._now()

    def carried(self, entries: int) -> None:
        """The far end has them."""
        if self._since is None:
            return
        self._count += entries
        passed = self._now() - self._since
        if passed >= (_OVER if self.rate else _FIRST):
            self.rate = round(self._count / passed, 1)
            self._since, self._count = self._now(), 0
