"""What the log may let go of: by age, and by the disk budget when the age does not suffice.

By age goes only what every consumer is done with. Above the budget the oldest goes whoever still waits for it (policy
`drop_oldest`); that is a loss, and leaves a gap record. `Trim.plan` only looks, in the committer's thread, a bounded step at a
time; the removal and its gap record then ride in the log's next batch, one transaction. What a retained pointer names stays.

Invariant: after a plan that asks for nothing the budget holds, or there is nothing left that may be dropped.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from .entry import GAP, PUBLISH

STEP = 5_000
REMOVE = (
    "DELETE FROM entry WHERE seq IN (SELECT seq FROM entry WHERE seq <= ? AND kind <> 9"
    " AND seq NOT IN (SELECT seq FROM retained) ORDER BY seq LIMIT 5000)"
)
"""The change that carries a plan out; its parameter is `Plan.last`."""
KEEP_SEQ = "INSERT OR REPLACE INTO meta (key, value) VALUES ('seq', ?)"
"""Goes with every removal: the last seq given out, so that an emptied log does not count from the start again."""
WAL_SHARE = 16 << 20
"""Of the budget, for the write-ahead log (at most half of it)."""
ROW_ON_DISK = 24
HEADROOM = 0.9
"""Above the budget the log is cut to this part of it, so that not every step has to."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Remove what stands at or below `last`; `gap` describes what somebody still wanted of it, if anything."""

    last: int
    gap: dict[str, int | str] | None


class Trim:
    """`budget` in bytes for database and write-ahead log together, `max_age` in ms."""

    def __init__(self, budget: int, max_age: int) -> None:
        self._budget = max(budget - WAL_SHARE, budget // 2)
        self._max_age = max_age
        self._above = False

    def plan(self, db: sqlite3.Connection, now: int, floor: int) -> Plan | None:
        """The next step. `floor`: all at or below it is done with by everyone. Raises sqlite3.Error."""
        pages, page, free = (
            int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "page_size", "freelist_count")
        )
        used = (pages - free) * page
        goal = self._budget * HEADROOM if self._above else self._budget
        self._above = used > goal
        rows = db.execute(
            "SELECT seq, at, kind, length(payload) + ifnull(length(properties), 0) FROM entry"
            f" WHERE kind <> {GAP} AND seq NOT IN (SELECT seq FROM retained) ORDER BY seq LIMIT ?",
            (STEP,),
        ).fetchall()
        if self._above:
            rows = _first_bytes(rows, used - int(self._budget * HEADROOM))
        else:
            rows = [row for row in rows if row[1] < now - self._max_age and row[0] <= floor]
        if not rows:
            if free > 256 and free > pages // 10:
                db.execute("PRAGMA incremental_vacuum(2000)").fetchall()
            return None
        lost = [row for row in rows if row[0] > floor and row[2] == PUBLISH]
        if not lost:
            return Plan(rows[-1][0], None)
        gap: dict[str, int | str] = {
            "first_seq": lost[0][0],
            "last_seq": lost[-1][0],
            "first_at": lost[0][1],
            "last_at": lost[-1][1],
            "topic": "#",
            "reason": "disk_budget",
            "count": len(lost),
        }
        return Plan(rows[-1][0], gap)


def _first_bytes(rows: list[tuple[int, int, int, int | None]], wanted: int) -> list[tuple[int, int, int, int | None]]:
    """So many of the oldest rows as hold that many bytes."""
    held = 0
    for number, row in enumerate(rows, 1):
        held += ROW_ON_DISK + (row[3] or 0)
        if held >= wanted:
            return rows[:number]
    return rows
