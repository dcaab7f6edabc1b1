"""What the log may let go of: by age, and by the disk budget when the age does not suffice; then the names nobody uses.

By age goes only what every consumer is done with. Above the budget the oldest goes whoever still waits for it (policy
`drop_oldest`); that is a loss, and leaves a gap record. `Trim.plan` only looks, in the committer's thread, a bounded step at a
time; the removal and its gap record then ride in the log's next batch, one transaction. What a retained pointer names stays,
and a gap record until everyone has had it.

Invariant: after a plan that asks for nothing the budget holds, or there is nothing left that may be dropped.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from .entry import GAP, PUBLISH
from .names import Names, Unused

_MAY_GO = f"(kind <> {GAP} OR seq <= ?) AND seq NOT IN (SELECT seq FROM retained)"
REMOVE = f"DELETE FROM entry WHERE seq <= ? AND {_MAY_GO}"
"""The change that carries a plan out; its parameters are `Plan.last` and `Plan.floor`."""
KEEP_SEQ = "INSERT OR REPLACE INTO meta (key, value) VALUES ('seq', ?)"
"""Goes with every removal: the last seq given out, so that an emptied log does not count from the start again."""
STEP = 5_000
STEP_ABOVE = 100_000
"""Rows looked at in one step; above the budget as many as load can bring in the meantime."""
WAL_SHARE = 16 << 20
"""Of the budget, for the write-ahead log (at most half of it)."""
ROW_ON_DISK = 24
HIGH, LOW = 0.95, 0.9
"""Above the one part of the budget the log is cut to the other, so that not every step has to."""
PATIENT = 0.98
"""As long as names are being collected only above this one: what they free need not be taken from the messages."""

_LOST = f"FILTER (WHERE seq > ? AND kind = {PUBLISH})"
_STEP = (
    f"SELECT max(seq), count(*) {_LOST}, min(seq) {_LOST}, max(seq) {_LOST}, min(at) {_LOST}, max(at) {_LOST} FROM ("
    "SELECT seq, at, kind, sum(size) OVER (ORDER BY seq) - size AS before FROM ("
    f"SELECT seq, at, kind, {ROW_ON_DISK} + length(payload) + ifnull(length(properties), 0) AS size FROM entry"
    f" WHERE {_MAY_GO} ORDER BY seq LIMIT ?)) WHERE "
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Remove what stands at or below `last`; `gap` describes what somebody still wanted of it, if anything."""

    last: int
    floor: int
    gap: dict[str, int | str] | None


class Trim:
    """`budget` in bytes for database and write-ahead log together, `max_age` in ms."""

    def __init__(self, budget: int, max_age: int) -> None:
        self._budget = max(budget - WAL_SHARE, budget // 2)
        self._max_age = max_age
        self._names = Names()
        self._names_first = False
        self._cutting = False
        self.look_every = budget // 64
        """Bytes of new entries after which it is time to ask `above`."""

    def above(self, db: sqlite3.Connection) -> bool:
        """Whether the budget asks for a removal now; cheap."""
        return _size(db)[2] > self._budget * HIGH

    def plan(self, db: sqlite3.Connection, now: int, floor: int) -> Plan | Unused | None:
        """The next step. `floor`: all at or below it is done with by everyone. Raises sqlite3.Error."""
        self._names_first = not self._names_first  # neither starves the other
        if self._names_first:
            return self._names.step(db) or self._removal(db, now, floor)
        return self._removal(db, now, floor) or self._names.step(db)

    def _removal(self, db: sqlite3.Connection, now: int, floor: int) -> Plan | None:
        pages, free, used = _size(db)
        high, low = (PATIENT, HIGH) if self._names.looking else (HIGH, LOW)
        self._cutting = used > self._budget * (low if self._cutting else high)
        bound: tuple[int, ...]
        if self._cutting:
            limit, condition, bound = STEP_ABOVE, "before < ?", (used - int(self._budget * low),)
        else:
            limit, condition, bound = STEP, "at < ? AND seq <= ?", (now - self._max_age, floor)
        row = db.execute(_STEP + condition, (*[floor] * 6, limit, *bound)).fetchone()
        if row[0] is None:
            if free > 256 and free > pages // 10:
                db.execute("PRAGMA incremental_vacuum(2000)").fetchall()
            return None
        last, count, first_seq, last_seq, first_at, last_at = row
        if not count:
            return Plan(last, floor, None)
        times: dict[str, int | str] = {"first_seq": first_seq, "last_seq": last_seq, "first_at": first_at, "last_at": last_at}
        return Plan(last, floor, times | {"topic": "#", "reason": "disk_budget", "count": count})


def _size(db: sqlite3.Connection) -> tuple[int, int, int]:
    """Pages of the database, how many of them are free, and the bytes of the others."""
    values = [int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")]
    pages, free, page = values
    return pages, free, (pages - free) * page
