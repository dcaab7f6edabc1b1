"""Collecting names: client ids and topics whose last use the trim has removed, so that random ones do not fill the box.

Nobody counts uses, that would be a write per message, and no index on the log tells them. Instead the log is looked through
in bounded steps, newest entries first, and what is met is struck off a list of candidates (in memory, a temporary table);
the look ends as soon as none is left, early in a log whose names are all alive. It is due when the trim has taken a quarter
of the log since the last one, so each trimmed row pays for a few rows looked at. What stays on the list is handed out a few
at a time, and removed at the very end of a commit, which checks again all that happened since the look (`collect`).

Invariants: whoever hands out a name first makes sure that nobody in memory will write its number into a *later* batch
(`Broker.collect`); numbers in earlier batches are seen by the check. A number is never given to another name: the highest
of each table stays, and SQLite counts on from it. So readers may cache names, and read entries with their names in one
transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterable
from dataclasses import dataclass

from .log import Name

STEP = 5_000
"""Rows that one step looks at; a disk that must be read for it is busy for about 25 ms."""
CANDIDATES = 500_000
"""Names looked for at once: about 5 MiB of memory while a look is under way."""
AT_ONCE = 500
KEEP_FIRST = "INSERT OR REPLACE INTO meta (key, value) VALUES ('names', ?)"
"""Where the log began when the last look ended."""

_ELSEWHERE = {
    "topic": "NOT EXISTS (SELECT 1 FROM retained WHERE topic = n.id) AND id NOT IN (SELECT topic FROM position)",
    "client": "state IS NOT 1 AND NOT EXISTS (SELECT 1 FROM session WHERE client = n.id)"
    " AND NOT EXISTS (SELECT 1 FROM subscription WHERE client = n.id)"
    " AND NOT EXISTS (SELECT 1 FROM inflight WHERE client = n.id)"
    " AND NOT EXISTS (SELECT 1 FROM received WHERE client = n.id)"
    " AND NOT EXISTS (SELECT 1 FROM position WHERE client = n.id)"
    " AND NOT EXISTS (SELECT 1 FROM fetch WHERE client = n.id)"
    " AND NOT EXISTS (SELECT 1 FROM addressed WHERE client = n.id)",
}
_COLUMN = {"topic": "name", "client": "clientid"}


def _free(table: str) -> str:
    """The names of the table that no other table than `entry` uses."""
    return f"{table} AS n WHERE id < (SELECT max(id) FROM {table}) AND {_ELSEWHERE[table]}"


@dataclass(frozen=True, slots=True)
class Unused:
    """(number, text) of names that no entry through seq `checked` uses; none yet: go on. `first`: set when the look is over."""

    checked: int
    topics: tuple[tuple[int, str], ...] = ()
    clients: tuple[tuple[int, str], ...] = ()
    first: int | None = None


Look = Generator[Unused, None, None]


class Names:
    """The committer's thread asks for one step after the other."""

    def __init__(self) -> None:
        self._look: Look | None = None

    @property
    def looking(self) -> bool:
        """Whether a look is under way: it will make room."""
        return self._look is not None

    def step(self, db: sqlite3.Connection) -> Unused | None:
        """The next step, None when there is nothing to do. Raises sqlite3.Error; then the look begins again later."""
        if self._look is None:
            first, last, before = _extent(db)
            if first - before < max(1, (last - first) // 4):
                return None
            self._look = _look_through(db, first)
        found = next(self._look, None)
        if found is None:
            self._look = None
        return found


def collect(db: sqlite3.Connection, unused: Iterable[Unused], numbered: Iterable[Name]) -> None:
    """Remove the names that are still unused now, at the end of a transaction in which `numbered` were given their numbers."""
    spared = {(name.table, name.text) for name in numbered}
    for found in unused:
        for table, names in (("topic", found.topics), ("client", found.clients)):
            numbers = ",".join([str(number) for number, text in names if (table, text) not in spared])
            db.execute(
                f"DELETE FROM {_free(table)} AND id IN ({numbers})"
                f" AND id NOT IN (SELECT {table} FROM entry WHERE seq > ? AND {table} IS NOT NULL)",
                (found.checked,),
            )


def _extent(db: sqlite3.Connection) -> tuple[int, int, int]:
    """Where the log begins (retained messages aside), its last seq, and where it began when the last look ended."""
    kept = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('seq', 'names')").fetchall())
    (top,) = db.execute("SELECT max(seq) FROM entry").fetchone()
    last = max(top or 0, int(kept.get("seq", 0)))
    (first,) = db.execute(
        "SELECT (SELECT seq FROM entry WHERE kind <> 9 AND seq NOT IN (SELECT seq FROM retained) ORDER BY seq LIMIT 1)"
    ).fetchone()
    return first or last + 1, last, int(kept.get("names", 1))


def _look_through(db: sqlite3.Connection, first: int) -> Look:
    """One look for unused names through the whole log; a bounded step between one yield and the next."""
    after = {"topic": 0, "client": 0}
    for table in after:
        db.execute(f"CREATE TEMP TABLE IF NOT EXISTS unused_{table} (id INTEGER PRIMARY KEY)")
        db.execute(f"DELETE FROM temp.unused_{table}")
    while after:
        for table in list(after):
            yield from _gather(db, table, after)
        (top,) = db.execute("SELECT ifnull(max(seq), 0) FROM entry").fetchone()
        yield from _strike_off_backward(db, top)
        while True:
            top = yield from _strike_off_forward(db, top)
            topics, clients = _take(db, "topic"), _take(db, "client")
            if not topics and not clients:
                break
            yield Unused(top, topics, clients)
    for table in _COLUMN:
        db.execute(f"DROP TABLE temp.unused_{table}")
    yield Unused(0, first=first)


def _gather(db: sqlite3.Connection, table: str, after: dict[str, int]) -> Look:
    """The next names to look for; a table that has no more is taken out of `after`."""
    for _ in range(CANDIDATES // STEP):
        more = f"SELECT id FROM {_free(table)} AND id > ? ORDER BY id LIMIT {STEP}"
        new = db.execute(f"INSERT INTO temp.unused_{table} {more}", (after[table],)).rowcount
        if new < STEP:
            del after[table]
            return
        (after[table],) = db.execute(f"SELECT max(id) FROM temp.unused_{table}").fetchone()
        yield Unused(0)


def _strike_off_backward(db: sqlite3.Connection, top: int) -> Look:
    """From the newest entry to the oldest, until nothing is left to look for."""
    while (
        top
        and db.execute(
            "SELECT EXISTS (SELECT 1 FROM temp.unused_topic) OR EXISTS (SELECT 1 FROM temp.unused_client)"
        ).fetchone()[0]
    ):
        (low,) = db.execute(
            f"SELECT min(seq) FROM (SELECT seq FROM entry WHERE seq <= ? ORDER BY seq DESC LIMIT {STEP})", (top,)
        ).fetchone()
        if low is None:
            return
        _strike_off(db, low, top)
        top = low - 1
        yield Unused(0)


def _strike_off_forward(db: sqlite3.Connection, top: int) -> Generator[Unused, None, int]:
    """What came after seq `top`; the last seq looked at. More may come all the time: `collect` looks at the last few."""
    while True:
        high, count = db.execute(
            f"SELECT max(seq), count(*) FROM (SELECT seq FROM entry WHERE seq > ? ORDER BY seq LIMIT {STEP})", (top,)
        ).fetchone()
        if high is None:
            return top
        _strike_off(db, top + 1, high)
        top = high
        if count < STEP:
            return top
        yield Unused(0)


def _strike_off(db: sqlite3.Connection, low: int, high: int) -> None:
    for table in _COLUMN:
        db.execute(
            f"DELETE FROM temp.unused_{table} WHERE id IN (SELECT {table} FROM entry WHERE seq BETWEEN ? AND ?)", (low, high)
        )


def _take(db: sqlite3.Connection, table: str) -> tuple[tuple[int, str], ...]:
    """The next unused names, taken off the list."""
    found = f"temp.unused_{table} AS u JOIN {table} AS n ON n.id = u.id ORDER BY u.id LIMIT {AT_ONCE}"
    names = db.execute(f"SELECT n.id, n.{_COLUMN[table]} FROM {found}").fetchall()
    if names:
        db.execute(f"DELETE FROM temp.unused_{table} WHERE id <= ?", (names[-1][0],))
    return tuple(names)
