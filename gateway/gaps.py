"""What the budget took from those who still waited: gathered by topic, then written down as gap records.

A far end that is away for weeks would make one record for each step of the trim. So what is lost of one topic is joined in one
open record, which the store keeps with the removal itself, and becomes an entry when a far end that waits for it reads on (it
comes to it after what is left), or after a day. The totals by reason and policy ride along.

Invariant: in every commit, what is gone of what somebody waited for is named by an entry or by an open record.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, astuple

from tidegate.store.entry import GAP
from tidegate.store.log import Log
from tidegate.store.thinning import Lost, by_policy, join

MAX_AT_ONCE, MAX_OPEN = 50, 100
"""Topics named one by one; of more, those of one policy are named by its filter."""
OPEN_FOR = 86_400.0
_KEEP = "INSERT OR REPLACE INTO meta (key, value) VALUES (?,?)"
OPEN, TOTALS = "gaps", "dropped"
"""Keys of the table `meta`."""


class Gaps:
    """`dropped` counts by reason, for the status of this run; `totals` by (reason, policy), for ever."""

    def __init__(self, log: Log, dropped: Counter[str]) -> None:
        self.totals: Counter[tuple[str, str]] = Counter()
        self._log = log
        self._dropped = dropped
        self._open: dict[tuple[str, str, str], Lost] = {}
        self._unread: list[tuple[int, Lost]] = []
        """Written as entries, and not read by every far end yet."""
        self._since = 0.0
        self._pools: Counter[int] | None = None
        """Where far ends were at the last look."""

    def load(self, db: sqlite3.Connection) -> None:
        """What an earlier run has left open."""
        kept = dict(db.execute("SELECT key, value FROM meta WHERE key IN (?,?)", (OPEN, TOTALS)).fetchall())
        for fields in json.loads(kept.get(OPEN, "[]")):
            lost = Lost(*fields)
            self._open[lost.reason, lost.event, lost.topic] = lost
        for reason, policies in json.loads(kept.get(TOTALS, "{}")).items():
            for policy, count in policies.items():
                self.totals[reason, policy] = count

    def add(self, found: Iterable[Lost]) -> None:
        """This goes with the present batch."""
        found = tuple(found)
        if not found:
            return
        if len(found) > MAX_AT_ONCE or len(self._open) > MAX_OPEN:
            found = by_policy(found)
        for lost in found:
            key = (lost.reason, lost.event, lost.topic)
            self._open[key] = join(self._open[key], lost) if key in self._open else lost
            self.totals[lost.reason, lost.policy] += lost.count
            self._dropped[lost.reason] += lost.count
        totals: dict[str, dict[str, int]] = {}
        for (reason, policy), count in self.totals.items():
            totals.setdefault(reason, {})[policy] = count
        self._log.change(_KEEP, OPEN, json.dumps([astuple(lost) for lost in self._open.values()]))
        self._log.change(_KEEP, TOTALS, json.dumps(totals))

    def due(self, pools: Collection[int], now: float) -> bool:
        """Whether the open records should become entries: a far end that was before their end has read on, by the cursors of
        all, or they are open for a day. One that was past them needs none."""
        here, before = Counter(pools), self._pools
        last = max((lost.last_seq for lost in self._open.values()), default=0)
        if before is None:  # what an earlier run has left open: by now somebody may be past it
            moved = any(cursor >= lost.first_seq for lost in self._open.values() for cursor in here)
        else:
            moved = any(cursor < last and count > here[cursor] for cursor, count in before.items())
        self._pools = here
        self._unread = [(seq, lost) for seq, lost in self._unread if here and seq > min(here)]
        if not self._open:
            self._since = now
        return bool(self._open) and (moved or now - self._since >= OPEN_FOR)

    def close(self) -> None:
        """Make entries of the open records, in the present batch."""
        for lost in self._open.values():
            fields = asdict(lost)
            del fields["policy"]
            self._unread.append((self._log.append(GAP, None, None, 0, json.dumps(fields).encode()), lost))
        self._open.clear()
        self._log.change("DELETE FROM meta WHERE key = ?", OPEN)

    def ahead(self, cursor: int) -> Counter[str]:
        """What is gone above this number, by reason; of a record that begins below it, its share."""
        found: Counter[str] = Counter()
        for lost in (*self._open.values(), *[lost for seq, lost in self._unread if seq > cursor]):
            above = min(lost.last_seq - cursor, span := lost.last_seq - lost.first_seq + 1)
            found[lost.reason] += max(0, lost.count * above // span)
        return found

    @property
    def open(self) -> int:
        """Entries that are gone and named by no entry yet."""
        return sum(lost.count for lost in self._open.values())
