"""Trouble that repeats itself, told at most twice a minute with the count of what was held back.

Trouble after a time when all was well is no repetition: each outage has its own lines, unless the line only flaps.

Invariant: the first of a kind is always said.
"""

from __future__ import annotations

from collections.abc import Callable

from tidegate.store.report import WARNING, Level, Say

_SAY_AGAIN = 30.0
_STEADY = 2.0
"""Seconds after which what is well counts as well."""


class Rarely:
    """`rarely(event, text, …)` says it, or counts it, and tells whether it was said. `now`: seconds that never go back."""

    def __init__(self, say: Say, now: Callable[[], float]) -> None:
        self._say = say
        self._now = now
        self._said: dict[str, tuple[float, int]] = {}
        self._well = float("-inf")

    def well(self) -> None:
        """The trouble is over, for now."""
        self._well = self._now()

    def __call__(self, event: str, text: str, level: Level = WARNING, **fields: object) -> bool:
        now = self._now()
        before, held = self._said.get(event, (float("-inf"), 0))
        if now - before < _SAY_AGAIN and not before < self._well <= now - _STEADY:
            self._said[event] = before, held + 1
            return False
        self._said[event] = now, 0
        self._say(event, text, level, **(fields | {"repeated": held} if held else fields))
        return True
