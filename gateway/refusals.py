"""Who was refused lately, and why: what a person asks when a device "does not connect".

Everything in it comes from strangers, so it is cut to a length before it is kept, and only the last ones are kept; how many
older ones fell out is counted.

Invariant: at most KEPT refusals of at most a few hundred bytes each, whatever comes in.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

KEPT = 100
TEXT_LIMIT = 120
"""Characters of a client id or user name that are kept; enough to recognise it by."""


class Refusal(NamedTuple):
    """One connection that was refused, or ended because of what it sent. `at` is wall-clock ms."""

    at: int
    peer: str
    client_id: str
    username: str
    reason: str


class Refusals:
    """See the module."""

    def __init__(self) -> None:
        self._last: deque[Refusal] = deque(maxlen=KEPT)
        self._total = 0

    def note(self, at: int, peer: str, client_id: str, username: str | None, reason: str) -> None:
        self._total += 1
        self._last.append(Refusal(at, peer, _cut(client_id), _cut(username or ""), _cut(reason)))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the refusals, oldest first, and how many before them are not there any more."""
        return {"refusals": [refusal._asdict() for refusal in self._last], "fell_out": self._total - len(self._last)}


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "…"
