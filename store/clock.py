"""What time it is and was: of each boot of the machine one offset between CLOCK_BOOTTIME and the time of day.

CLOCK_BOOTTIME (`mono`, ms) never steps, so within a boot every length of time is exact, and the time of day is `mono` plus an
offset that all rows of the boot share. How far the offset is known is its level: UNKNOWN (an estimate from the last time that
was kept; far ends wait for better), BELIEVED (plausible, nothing confirms it), CONFIRMED. Between two boots a length of time is
known only if both are CONFIRMED; else only what has certainly passed counts, so no wrong clock makes anything old.

Invariant: `take` is the only way an offset changes, and its changes put everything that was written with the old one right.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .schema import WHEN

UNKNOWN, BELIEVED, CONFIRMED = 0, 1, 2
BUILT = 1_735_689_600_000
"""2025-01-01 in ms: a clock before that was never set."""

Change = tuple[str, tuple[Any, ...]]
Judge = Callable[["Clock", int, int], tuple[int, int]]
"""(clock, what the wall clock shows, mono) -> the offset to go by, and its level."""

_STEP_RUN = (
    "UPDATE run SET clock_offset = ?, clock = ?, started_at = started_at + ?, alive_at = alive_at + ?"
    " WHERE boot = ? AND clock_offset IS NOT NULL"
)
_TIMES = (("client", "online_at"), ("client", "offline_at"), ("client", "created"), ("session", "created"))
_STEP_EXPIRY = "UPDATE session SET expires_at = expires_at + ? WHERE expires_at IS NOT NULL"


class Boot(NamedTuple):
    """The clock of a run that is over; `is_ours`: the machine was not started anew since."""

    is_ours: bool
    offset: int | None
    level: int


class Moment(NamedTuple):
    """Now: on this boot's clock and as time of day (ms)."""

    boot: str
    mono: int
    wall: int
    confirmed: bool


class Clock:
    """This boot's clock. `is_new`: no time is known from before; `since`: the time of day at which this boot begins for us."""

    def __init__(
        self, boot: str, offset: int, level: int, since: int, is_new: bool = False, runs: Mapping[int, Boot] | None = None
    ) -> None:
        self.boot = boot
        self.offset = offset
        self.level = level
        self.is_new = is_new
        self._since = since
        self._runs = dict(runs or {})

    def at(self, mono: int) -> Moment:
        return Moment(self.boot, mono, mono + self.offset, self.level == CONFIRMED)

    def born(self, at: int, mono: int, run: int) -> int:
        """When a row of the log was written, on this boot's clock; 0 (as early as is certain) if that cannot be told."""
        past = self._runs.get(run)
        if past is None or past.is_ours:
            return mono
        if past.offset is None or not self.level == past.level == CONFIRMED:
            return 0
        return (mono + past.offset if mono else at) - self.offset

    def take(self, offset: int, level: int) -> list[Change]:
        """Go by this offset from now on; what must be changed in the log for it, in one transaction."""
        step = offset - self.offset
        if not step and level == self.level:
            return []
        changes: list[Change] = [(_STEP_RUN, (offset, level, step, step, self.boot))]
        if step:
            changes += [
                (f"UPDATE {table} SET {column} = {column} + ? WHERE {column} >= ?", (step, self._since))
                for table, column in _TIMES
            ]
            changes.append((_STEP_EXPIRY, (step,)))
        self.offset, self.level = offset, level
        self._since += step
        return changes


def believe(_: Clock, wall: int, mono: int) -> tuple[int, int]:
    """The judge who takes every clock at its word."""
    return wall - mono, CONFIRMED


def begin(db: sqlite3.Connection, boot: str, wall: int, mono: int, judge: Judge) -> Clock:
    """The clock of a run that begins, in the transaction of its beginning; what earlier runs wrote is put right."""
    rows = db.execute("SELECT id, boot, clock_offset, clock FROM run ORDER BY id").fetchall()
    if rows and rows[-1][1].startswith(f"{boot}/"):
        boot = rows[-1][1]
    if _went_back(db, boot, mono):
        boot = f"{boot.partition('/')[0]}/{uuid.uuid4().hex}"
    runs = {run: Boot(name == boot and offset is not None, offset, level) for run, name, offset, level in rows}
    before = list(runs.values()) or [Boot(False, None, UNKNOWN)]
    last = next((run for run in reversed(before) if run.is_ours), before[-1])
    if last.is_ours and last.offset is not None:
        (since,) = db.execute("SELECT min(started_at) FROM run WHERE boot = ? AND clock_offset IS NOT NULL", (boot,)).fetchone()
        clock = Clock(boot, last.offset, last.level, since, runs=runs)
    else:
        known = last_known(db)
        # Of the time since then only what this boot has lasted is certain.
        offset = max(known, BUILT)
        clock = Clock(boot, offset, UNKNOWN, mono + offset, is_new=not known, runs=runs)
    changes = clock.take(*judge(clock, wall, mono))
    if last.is_ours or not last.level == clock.level == CONFIRMED:
        for sql, parameters in changes:
            db.execute(sql, parameters)
    return clock


def this_boot() -> str:
    """What tells this boot clock from others: the start of the machine, and what a container has shifted it by."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid.uuid4().hex  # nothing to compare with: as if the machine had started anew
    try:
        shifts = Path("/proc/self/timens_offsets").read_text().split()
    except OSError:
        return boot
    seconds, nanoseconds = shifts[shifts.index("boottime") + 1 :][:2]
    return boot if seconds == nanoseconds == "0" else f"{boot} {seconds}.{nanoseconds}"


def _went_back(db: sqlite3.Connection, boot: str, mono: int) -> bool:
    """A snapshot of a running machine was started again, beside a disk that went on: its boot clock is another one now."""
    row = db.execute("SELECT e.mono, r.boot FROM entry e JOIN run r ON r.id = e.run ORDER BY e.seq DESC LIMIT 1").fetchone()
    return row is not None and row[1] == boot and row[0] > mono


def last_known(db: sqlite3.Connection) -> int:
    """The latest time of day that the log has kept, 0 if none."""
    (alive,) = db.execute("SELECT ifnull(max(alive_at), 0) FROM (SELECT alive_at FROM run ORDER BY id DESC LIMIT 1)").fetchone()
    row = db.execute(f"SELECT {WHEN} FROM entry e LEFT JOIN run r ON r.id = e.run ORDER BY e.seq DESC LIMIT 1").fetchone()
    return max(int(alive), int(row[0]) if row else 0)
