"""What a pool was to carry, and what became of it: wanted = delivered + waiting + parked + cancelled + dropped.

Counted in entries of the log, whose numbers have no holes of their own: every number up to the last is delivered, was not for
this pool (its rules do not name it, or it was gone before the pool began), waits, or is missing. What is missing must be named
by gap records. `wanted` is every number that was given out, less what was not for it; of what waits nobody knows yet what will
not be. The counters are saved with the cursor, in one transaction; what is in quarantine is counted with its rows.

Invariant: a balance whose `mismatch` is 0 explains every number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from tidegate.store.entry import GAP, Entry

NO_REASON = "unexplained"


class Tally(NamedTuple):
    """Of one stretch of the log: entries there, entries for the pool, what its gap records name, by reason, and messages and
    acknowledgements that cancelled each other."""

    entries: int = 0
    delivered: int = 0
    named: Mapping[str, int] = {}
    cancelled: int = 0


class Account(NamedTuple):
    """Of everything up to the cursor. cursor + again = delivered + passed + missing + cancelled."""

    again: int = 0
    """Numbers that were passed more than once, because the far end or the log lost them."""
    passed: int = 0
    """Not for this pool."""
    missing: int = 0
    solid: int = 0
    """Numbers up to here that are not there are no loss: the pool had been past them, or had not begun."""
    named: str = "{}"
    """JSON: reason -> entries that gap records name."""
    cancelled: int = 0
    """Messages of queues and their acknowledgements that were both still here."""

    def moved(self, cursor: int, through: int, tally: Tally) -> Account:
        """The cursor goes on to `through`."""
        holes = through - cursor - tally.entries
        known = min(holes, max(0, min(self.solid, through) - cursor))
        named = self.named
        if tally.named:
            counts: dict[str, int] = json.loads(named)
            named = json.dumps(dict(Counter(counts) + Counter(tally.named)))
        return self._replace(
            passed=self.passed + tally.entries - tally.delivered - tally.cancelled + known,
            missing=self.missing + holes - known,
            named=named,
            cancelled=self.cancelled + tally.cancelled,
        )

    def gone_back(self, cursor: int, back: int, lost_tail: bool = False) -> Account:
        """The cursor goes back; after a lost tail the numbers name other entries."""
        solid = min(self.solid, back) if lost_tail else max(self.solid, cursor)
        return self._replace(again=self.again + cursor - back, solid=solid)


class Parked(NamedTuple):
    """Entries with records in quarantine, and what became of all that ever came there."""

    now: int = 0
    came: int = 0
    sent: int = 0
    cancelled: int = 0
    lost: int = 0


def named_by(entries: list[Entry]) -> dict[str, int]:
    """What the gap records among these entries name, by reason."""
    named: dict[str, int] = {}
    for entry in entries:
        if entry.kind == GAP:
            gap = json.loads(entry.payload)
            named[str(gap["reason"])] = named.get(str(gap["reason"]), 0) + int(gap["count"])
    return named


def balance(
    cursor: int, delivered: int, account: Account, parked: Parked, last: int, ahead: Mapping[str, int]
) -> dict[str, Any]:
    """For `status`. `last`: the number given out last; `ahead`: what is gone above the cursor, by reason."""
    dropped: Counter[str] = Counter(quarantine_full=parked.lost)
    waiting, left = max(0, last - cursor), account.missing
    for reason, count in ahead.items():
        gone = min(waiting, count)
        dropped[reason] += gone
        waiting -= gone
    for reason, count in json.loads(account.named).items():
        part = min(left, count)
        dropped[reason] += part
        left -= part
    if waiting or ahead:  # what names it comes after what waits
        dropped["disk_budget"] += left
        left = 0
    dropped[NO_REASON] += left
    off = cursor + account.again - delivered - account.passed - account.missing - account.cancelled
    odd = parked.came - parked.now - parked.sent - parked.cancelled - parked.lost
    return {
        "wanted": max(last, cursor) + account.again - account.passed,
        "delivered": delivered - parked.came + parked.sent,
        "waiting": waiting,
        "parked": parked.now,
        "cancelled": parked.cancelled + account.cancelled,
        "expired": 0,
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "mismatch": abs(off) + abs(odd) + left,
    }
