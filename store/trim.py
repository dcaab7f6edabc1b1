"""What the log may let go of: by age, and by the disk budget when the age does not suffice; then the names nobody uses.

By age, and first of all above the budget, goes only what every consumer is done with, oldest first. If that does not suffice,
what somebody still waits for goes: the lowest priority first (`store.policy`), in it the oldest, also from the middle of the
log (`store.thinning`); that is a loss and leaves a gap record. `Trim.plan` only looks, in the committer's thread, a bounded
step at a time; the removal then rides in the log's next batch, one transaction. What a retained pointer names stays, and a gap
record until everyone has had it.

A row's age is what has certainly passed since it was written (`store.clock`), so no wrong clock makes it old.

Invariant: after a plan that asks for nothing the budget holds, or there is nothing left that may be dropped.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import NamedTuple

from .clock import CONFIRMED, Moment
from .names import Names, Unused
from .policy import Policies
from .schema import WHEN
from .thinning import MAY_GO, SIZE, Lost, Plan, Thinning

REMOVE = f"DELETE FROM entry WHERE seq <= ? AND {MAY_GO}"
"""Carries out a plan that takes from the log's beginning."""
FORGET_TAKEN = "DELETE FROM taken WHERE seq <= ? AND NOT EXISTS (SELECT 1 FROM entry WHERE entry.seq = taken.seq)"
"""Goes with it: a queue need not know any more that these were acknowledged."""
FORGET_ADDRESSED = (
    "DELETE FROM addressed WHERE seq <= ? AND NOT acked AND NOT EXISTS (SELECT 1 FROM entry WHERE entry.seq = addressed.seq)"
)
"""And these can be sent to nobody any more."""
KEEP_SEQ = "INSERT OR REPLACE INTO meta (key, value) VALUES ('seq', ?)"
"""Goes with every removal: the last seq given out, so that an emptied log does not count from the start again."""
KEEP_AT = "INSERT OR REPLACE INTO meta (key, value) VALUES ('at', ?)"
"""Likewise its time: what comes after a crash must not seem to be older."""
STEP, STEP_ABOVE = 5_000, 20_000
"""Rows that one step takes from the beginning: by age, and above the budget. *Measured*: 100,000 write 9 MiB of WAL at once."""
STEP_BYTES = 8 << 20
WAL_SHARE = 16 << 20
"""Of the budget, for the write-ahead log (at most half of it)."""
LEAST = 16 << 20
"""A free-space floor never makes the budget smaller than this."""
HIGH, LOW = 0.9, 0.85
"""Above the one part of the budget the log is cut to the other, so that not every step has to."""
RELIEF = 0.75
"""Below this part nothing is refused any more."""
TIGHT = 0.95
"""Above this part the log must not grow faster than it is cut."""
VACUUM_PAGES = 256
"""Free pages given back to the file system in one step."""
REWALK = 60_000
"""ms between two walks through the whole log in search of what could not go the first time (retained then, not now)."""
PATIENT = 0.94
"""As long as names are being collected only above this one: what they free need not be taken from the messages."""

_PREFIX = (
    "SELECT max(seq), sum(size) FROM (SELECT seq, size, sum(size) OVER (ORDER BY seq) - size AS before FROM"
    f" (SELECT seq, {SIZE} AS size FROM entry WHERE seq <= ? AND {MAY_GO} ORDER BY seq LIMIT ?))"
    " WHERE before < ?"
)
_YOUNG = (
    "SELECT e.seq FROM (SELECT seq, at, mono, run FROM entry"
    f" WHERE seq <= ? AND {MAY_GO} ORDER BY seq LIMIT {STEP}) e LEFT JOIN run r ON r.id = e.run"
    " WHERE NOT CASE WHEN r.boot = ? AND r.clock_offset IS NOT NULL THEN e.mono < ?"
    f" WHEN ? AND r.clock = {CONFIRMED} AND r.clock_offset IS NOT NULL"
    f" THEN {WHEN} < ?"
    " ELSE 0 < ? END ORDER BY e.seq LIMIT 1"
)
"""The first row that may not go by age; the same reckoning as `Clock.born`."""
GO_ON = Plan()
"""Nothing to carry out yet, but more to look at."""


class Size(NamedTuple):
    """Pages of the database, how many of them are free, the bytes of the others; and what these may be, and why."""

    pages: int
    free: int
    used: int
    limit: int
    reason: str
    page: int


class Trim:
    """`budget` in bytes for database and write-ahead log together, `max_age` in ms.

    `free` tells the bytes free on the file system, of which `free_floor` are left alone; `beside` the bytes of other files
    that count against the budget.
    """

    def __init__(
        self,
        budget: int,
        max_age: int,
        policies: Policies | None = None,
        free_floor: int = 0,
        free: Callable[[], int] = lambda: 1 << 62,
        beside: Callable[[], int] = lambda: 0,
    ) -> None:
        self._budget = max(budget - WAL_SHARE, budget // 2)
        self._max_age = max_age
        self._free_floor = free_floor
        self._free = free
        self._beside = beside
        self._names = Names()
        self._names_first = False
        self._cutting = False
        self._thinning = Thinning(policies or Policies())
        self._walked_at = -REWALK
        self.is_stuck = False
        """Whether the budget does not hold and nothing is left that may go: retained messages, sessions, names."""
        self.look_every = budget // 128
        """Bytes of new entries after which it is time to ask `above`."""
        self.tight = False
        """Whether the log is near its budget, and must not grow faster than it is cut."""
        self.level: int | None = None
        """The lowest priority of which something is left to drop, when only what somebody waits for is; else None."""

    def above(self, db: sqlite3.Connection) -> bool:
        """Whether the budget asks for a removal now; cheap."""
        size = self._size(db)
        self.tight = size.used > size.limit * TIGHT
        return size.used > size.limit * HIGH

    def plan(self, db: sqlite3.Connection, now: Moment, floor: int) -> Plan | Unused | None:
        """The next step. `floor`: all at or below it is done with by everyone. Raises sqlite3.Error."""
        self._names_first = not self._names_first  # neither starves the other
        if self._names_first and (self._names.looking or not self._cutting):
            return self._names.step(db) or self._removal(db, now, floor)
        found = self._removal(db, now, floor) or self._names.step(db)
        self.is_stuck = self.is_stuck and found is None  # not while names may go
        return found

    def _removal(self, db: sqlite3.Connection, now: Moment, floor: int) -> Plan | None:
        size = self._size(db)
        self.tight = size.used > size.limit * TIGHT
        high, low = (PATIENT, HIGH) if self._names.looking else (HIGH, LOW)
        self._cutting = size.used > size.limit * (low if self._cutting else high)
        if not self._cutting:
            self.is_stuck = False
            if self.level is not None and (size.used < size.limit * RELIEF or _prefix(db, floor, 1, 1)):
                self.level = None
            old = self._first_young(db, now, floor) - 1
            return _prefix(db, floor, STEP, 1 << 62, old) or self._vacuum(db, size)
        need = max(size.used - int(size.limit * low), size.limit // 200)
        plan = _prefix(db, floor, STEP_ABOVE, need)
        if plan is not None:
            self.level = None
            return plan
        found = self._thinning.step(db, need, size.reason)
        if found is None and now.mono - self._walked_at >= REWALK:
            self._walked_at = now.mono
            self._thinning.begin_again()
            return GO_ON
        self.level = self._thinning.level
        self._cutting = found is not None
        self.is_stuck = found is None and size.used > size.limit
        return found

    def _vacuum(self, db: sqlite3.Connection, size: Size) -> Plan | None:
        """Give free pages back, when there are many or the file must become smaller."""
        enough = size.free > VACUUM_PAGES and size.free > size.pages // 10
        if not enough and not (size.free and size.pages * size.page > size.limit):
            return None
        # `execute` would take one step of it, which frees a single page.
        db.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return GO_ON

    def _size(self, db: sqlite3.Connection) -> Size:
        values = [int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")]
        pages, free, page = values
        limit, reason = max(self._budget - self._beside(), self._budget // 2), "disk_budget"
        if self._free_floor:
            room = max(pages * page + self._free() - self._free_floor, LEAST // 2)
            if room < limit:
                limit, reason = room, "free_floor"
        return Size(pages, free, (pages - free) * page, limit, reason, page)

    def _first_young(self, db: sqlite3.Connection, now: Moment, floor: int) -> int:
        oldest = now.mono - self._max_age
        bound = (floor, floor, now.boot, oldest, now.confirmed, now.wall - self._max_age, oldest)
        row = db.execute(_YOUNG, bound).fetchone()
        return row[0] if row else floor + 1


def _prefix(db: sqlite3.Connection, floor: int, rows: int, size: int, through: int = 1 << 62) -> Plan | None:
    """The oldest of what everyone is done with: so many rows and bytes, and no farther than `through`."""
    last, cost = db.execute(_PREFIX, (min(floor, through), floor, rows, min(size, STEP_BYTES))).fetchone()
    if last is None:
        return None
    return Plan(((REMOVE, (last, floor)), (FORGET_TAKEN, (last,)), (FORGET_ADDRESSED, (last,))), cost)


__all__ = ["GO_ON", "KEEP_AT", "KEEP_SEQ", "REMOVE", "Lost", "Plan", "Trim"]
