"""`uplink.db`: how far each pool has come, how it fares, and what its far end refused.

`Progress` is the child's one writing connection; every other part of the gateway reads through `read_pools`, `cursors` and
`saved_wants`, which open read-only and hold no transaction. Losing the last moves of a cursor costs nothing: the mark at the
far end is the truth. What goes to quarantine is synced before the far end may forget it.

Invariant: a pool that was ever configured has a cursor here until a file without it is loaded, so the broker keeps what it
still has to send.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.store.entry import Want
from tidegate.store.reader import LogReader
from tidegate.store.schema import StoreError, close_unmoved, explain, is_ours, open_reader, open_writer

from .balance import Account, Parked, balance
from .retry import Due
from .uplink_db import UPLINK

MAX_QUARANTINE = 50_000
"""Rows kept; the oldest go first and are counted."""
_CHECKPOINT_EVERY = 200
_RATE_HOLDS = 5_000
"""Milliseconds since a pool was saved, which it is each second while it carries."""

_STANDING = "state, error, hint, warning, cursor, gateway, epoch, delivered, refused, rate"
_ACCOUNT = "again, passed, missing, solid, named, cancelled"
_CAME_AND_WENT = "ifnull((SELECT value FROM meta WHERE key = 'parked_{}.' || name), 0)"
_PARKED_OF = "(SELECT count(*) FROM (SELECT DISTINCT gateway, epoch, seq FROM quarantine WHERE pool = name)), " + ", ".join(
    _CAME_AND_WENT.format(what) for what in ("came", "sent", "cancelled", "lost")
)
_PARKED = f"SELECT {_PARKED_OF} FROM (SELECT :pool AS name)"
Ahead = Callable[[int], Mapping[str, int]]


class Standing(NamedTuple):
    """A pool's row: what is saved of it. `gateway` and `epoch` are those of the entry at `cursor`."""

    state: str = "starting"
    error: str = ""
    hint: str = ""
    warning: str = ""
    cursor: int = 0
    gateway: str = ""
    epoch: int = 0
    delivered: int = 0
    refused: int = 0
    rate: float = 0.0
    account: Account = Account()


class Quarantined(NamedTuple):
    """One refused operation and where it came from."""

    gateway: str
    epoch: int
    seq: int
    number: int
    msgid: str
    target: str
    reason: str
    original: bytes


class Dead(NamedTuple):
    """A quarantined row as a person sees it; `edited` is sent instead of `original`, `due` tells that it waits for that."""

    id: int
    pool: str
    gateway: str
    epoch: int
    seq: int
    number: int
    msgid: str
    target: str
    reason: str
    original: bytes
    at: int
    edited: bytes | None
    due: bool


class PoolStatus(NamedTuple):
    """A pool as it was saved at `at`, in ms. `waiting` counts entries after its cursor, `rate` how many it takes a second."""

    name: str
    state: str
    error: str
    hint: str
    warning: str
    cursor: int
    waiting: int
    oldest_at: int | None
    rate: float
    delivered: int
    refused: int
    at: int
    balance: dict[str, Any] = {}  # noqa: RUF012

    def as_dict(self, wall: int) -> dict[str, object]:
        """For `status`: the age in seconds instead of a moment; `wall` is now in ms. Of a far end that confirmed nothing lately
        nobody knows when it will have the rest."""
        values = self._asdict()
        oldest, at = values.pop("oldest_at"), values.pop("at")
        rate = self.rate if abs(wall - at) < _RATE_HOLDS else 0.0
        return values | {
            "oldest_age": None if oldest is None else max(0, wall - oldest) / 1000,
            "rate": rate,
            "drain": self.waiting / rate if rate else None,
        }


class Progress:
    """The writing side; its methods may be called from every pool's thread."""

    def __init__(self, data: Path) -> None:
        self._path = data / "uplink.db"
        self._db = open_writer(self._path, UPLINK, "NORMAL")
        self._lock = threading.Lock()
        self._commits = 0

    def close(self) -> None:
        with self._lock:
            # What is not checkpointed now is at the next start; of a damaged file nothing can be.
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._db.close()

    def keep_only(self, pools: Collection[str]) -> None:
        """Forget pools that are configured no more; their mark at the far end still knows how far they came."""
        gone = [(name,) for name in self.names() if name not in pools]
        with self.transaction():
            for (name,) in gone:
                now = self._parked(name).now
                self._db.execute("DELETE FROM meta WHERE key GLOB 'parked_*.' || ?", (name,))
                self._add(f"parked_came.{name}", now)
            self._db.executemany("DELETE FROM pool WHERE name = ?", gone)
            self._db.executemany("DELETE FROM mark WHERE pool = ?", gone)

    def rows(self, sql: str, *parameters: object) -> list[Any]:
        """What a SELECT finds."""
        with self._lock:
            return self._db.execute(sql, parameters).fetchall()

    def names(self) -> list[str]:
        """Every pool there is a row of."""
        with self._lock:
            return [name for (name,) in self._db.execute("SELECT name FROM pool ORDER BY name").fetchall()]

    def standing(self, pool: str) -> Standing:
        """What is saved of the pool; a fresh one begins with the oldest entry."""
        with self._lock:
            row = self._db.execute(
                f"SELECT {_STANDING}, {_ACCOUNT} FROM pool WHERE name = ?",
                (pool,),
            ).fetchone()
            parked = self._parked(pool).now if row is None else 0
        if row is None:  # what it has in quarantine from another life counts as carried
            return Standing(delivered=parked, account=Account(again=parked))
        return _standing_of(row)

    def marks(self, pool: str) -> dict[tuple[str, int], int]:
        """(gateway, epoch) -> the mark this pool's far end confirmed last."""
        with self._lock:
            rows = self._db.execute("SELECT gateway, epoch, seq FROM mark WHERE pool = ?", (pool,)).fetchall()
        return {(gateway, epoch): seq for gateway, epoch, seq in rows}

    def save(self, pool: str, standing: Standing, marks: Mapping[tuple[str, int], int], at: int) -> None:
        """Write the pool's row and the marks that moved, as one transaction."""
        with self.transaction():
            self._db.execute(
                f"INSERT OR REPLACE INTO pool (name, {_STANDING}, at, {_ACCOUNT}) VALUES ({','.join('?' * 18)})",
                (pool, *standing[:10], at, *standing.account),
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO mark VALUES (?,?,?,?)",
                [(pool, gateway, epoch, seq) for (gateway, epoch), seq in marks.items()],
            )
        self.checkpoint()

    def quarantine(self, pool: str, rows: Iterable[Quarantined], at: int) -> int:
        """Keep what was refused, synced to disk; how many of the rows are new."""
        rows = list(rows)
        with self.transaction("FULL"):
            fresh = {row[:3] for row in rows if not self._has_rows(pool, *row[:3])}
            self._add(f"parked_came.{pool}", len(fresh))
            before = self._db.total_changes
            self._db.executemany(
                # A far end that was restored refuses again what is here, or what other rules make of the entry by now.
                "INSERT INTO quarantine (pool, gateway, epoch, seq, number, msgid, target, reason, original, at)"
                " VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT (pool, gateway, epoch, seq, number) DO UPDATE SET"
                " target = excluded.target, reason = excluded.reason, original = excluded.original, at = excluded.at,"
                " attempt = NULL, edited = NULL WHERE original <> excluded.original",
                [(pool, *row, at) for row in rows],
            )
            new = self._db.total_changes - before
            self._bound_quarantine()
        self.checkpoint()
        return new

    def due(self, pool: str) -> Due | None:
        """The oldest row of the pool that waits to be sent again."""
        with self._lock:
            row = self._db.execute(
                "SELECT id, gateway, attempt, target, coalesce(edited, original) FROM quarantine"
                " WHERE pool = ? AND attempt IS NOT NULL ORDER BY id LIMIT 1",
                (pool,),
            ).fetchone()
        return Due(*row) if row else None

    def sent(self, due: Due) -> None:
        """The far end has it: it leaves the quarantine, synced."""
        with self.transaction("FULL"):
            self._remove("id = ? AND attempt = ?", (due.id, due.attempt), "dead_sent", "parked_sent")
        self.checkpoint()

    def refused_again(self, due: Due, reason: str, at: int) -> None:
        """It stays, with the new reason, and waits for a person."""
        with self.transaction("FULL"):
            self._db.execute(
                "UPDATE quarantine SET attempt = NULL, reason = ?, at = ? WHERE id = ? AND attempt = ?",
                (reason, at, due.id, due.attempt),
            )
        self.checkpoint()

    def apply(self, name: str, action: str, ids: Collection[int], edited: bytes, alone: bool = False) -> None:
        """Do what the request `name` asks, once; `alone`: no uplink runs.

        Raises ValueError for an unknown action, StoreError.
        """
        with self.transaction("FULL"):
            if self._db.execute("SELECT 1 FROM meta WHERE key = ?", (f"dead.{name}",)).fetchone():
                return
            self._db.execute("INSERT INTO meta VALUES (?, 1)", (f"dead.{name}",))
            for number in ids:
                self._apply_to(number, action, edited, alone)

    def forget(self, name: str) -> None:
        """The request's file is gone: it cannot come twice."""
        with self.transaction():
            self._db.execute("DELETE FROM meta WHERE key = ?", (f"dead.{name}",))

    def _apply_to(self, number: int, action: str, edited: bytes, alone: bool) -> None:
        free = "(attempt IS NULL OR ? OR pool NOT IN (SELECT name FROM pool))"
        if action == "drop":
            self._remove(f"id = ? AND {free}", (number, alone), "dead_dropped", "parked_cancelled")
        elif action == "retry":
            where = "WHERE id = ? AND attempt IS NULL AND original != x''"
            self._db.execute(f"UPDATE quarantine SET attempt = ? {where}", (secrets.randbits(62), number))
        elif action == "edit":
            where = f"WHERE id = ? AND {free} AND original != x''"
            values = (secrets.randbits(62), edited, number, alone)
            self._db.execute(f"UPDATE quarantine SET attempt = ?, edited = ? {where}", values)
        else:
            raise ValueError(action)

    def _add(self, key: str, count: int) -> None:
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = value + excluded.value",
            (key, count),
        )

    def save_wants(self, backend: str, wants: Iterable[Want]) -> None:
        """Remember what a good file wanted, for the day when nobody can read it."""
        text = json.dumps([list(want) for want in wants])
        key = f"wants.{backend}"
        if self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone() == (text,):
            return
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, text))

    @contextlib.contextmanager
    def transaction(self, synchronous: str = "NORMAL") -> Iterator[sqlite3.Connection]:
        """All of it or nothing. Raises StoreError, for a full disk as well."""
        with self._lock:
            try:
                self._db.execute(f"PRAGMA synchronous = {synchronous}")
                with self._db:
                    self._db.execute("BEGIN IMMEDIATE")
                    yield self._db
            except sqlite3.Error as error:
                raise StoreError(explain(self._path, error)) from error

    def _bound_quarantine(self) -> None:
        (count,) = self._db.execute("SELECT count(*) FROM quarantine").fetchone()
        if count > MAX_QUARANTINE:
            oldest = "id IN (SELECT id FROM quarantine ORDER BY id LIMIT ?)"
            self._remove(oldest, (count - MAX_QUARANTINE,), "quarantine_dropped", "parked_lost")

    def _remove(self, where: str, parameters: tuple[int, ...], rows_key: str, entries_key: str) -> None:
        """Take rows out of the quarantine; what becomes of an entry is what became of its last row."""
        gone = self._db.execute(
            f"DELETE FROM quarantine WHERE {where} RETURNING pool, gateway, epoch, seq", parameters
        ).fetchall()
        self._add(rows_key, len(gone))
        for pool, *entry in set(gone):
            if not self._has_rows(pool, *entry):
                self._add(f"{entries_key}.{pool}", 1)

    def _has_rows(self, *entry: object) -> bool:
        sql = "SELECT 1 FROM quarantine WHERE pool = ? AND gateway = ? AND epoch = ? AND seq = ? LIMIT 1"
        return self._db.execute(sql, entry).fetchone() is not None

    def _parked(self, pool: str) -> Parked:
        return Parked(*self._db.execute(_PARKED, {"pool": pool}).fetchone())

    def checkpoint(self) -> None:
        """Nobody else checkpoints this file; a busy reader only delays it."""
        self._commits += 1
        if self._commits % _CHECKPOINT_EVERY == 0:
            # Left for the next time when a reader is busy or the disk is full.
            with self._lock, contextlib.suppress(sqlite3.OperationalError):
                self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()


def read_pools(data: Path, ahead: Ahead = lambda cursor: {}) -> list[PoolStatus]:
    """Every pool as last saved, with what waits for it in the log; empty before the first uplink.

    `ahead` tells what the disk budget has taken above a cursor, by reason, as far as that is known.
    """
    old = _is_older(data, 3)
    known = _ACCOUNT.replace("cancelled", "0") if _is_older(data, 5) else _ACCOUNT
    account = "0, 0, 0, 0, '{}', 0, 0, 0, 0, 0, 0" if old else f"{known}, {_PARKED_OF}"
    rows = read_rows(data, f"SELECT name, at, {_STANDING}, {account} FROM pool ORDER BY name")
    if not rows:
        return []
    log = LogReader(data / "log.db")
    try:
        return [_status(log, name, at, _standing_of(row), Parked(*row[16:]), ahead) for name, at, *row in rows]
    finally:
        log.close()


def cursors(data: Path) -> dict[str, int]:
    """Pool (`redis.pool1`) -> the last entry it is done with."""
    return {name: cursor for name, cursor in read_rows(data, "SELECT name, cursor FROM pool")}


def held(data: Path, named: Iterable[str]) -> list[int]:
    """The cursors that hold the log back; a pool that the files name has one from the start, before its worker says so."""
    known = cursors(data)
    lanes = [] if _is_older(data, 4) else [cursor for (cursor,) in read_rows(data, "SELECT cursor FROM lane")]
    return [*(known.get(name, 0) for name in {*known, *named}), *lanes] or [0]


def read_dead(data: Path) -> list[Dead]:
    """The quarantine, oldest first."""
    columns = "id, pool, gateway, epoch, seq, number, msgid, target, reason, original, at"
    old = _is_older(data, 2)
    new = "NULL, 0" if old else "edited, attempt IS NOT NULL"
    rows = read_rows(data, f"SELECT {columns}, {new} FROM quarantine ORDER BY id")
    return [Dead(*row)._replace(due=bool(row[-1])) for row in rows]


def stranded(data: Path, served: Collection[str]) -> list[dict[str, object]]:
    """What is in quarantine of pools that nobody serves, and how much of it waits to be sent again. Raises StoreError."""
    waiting = "0" if _is_older(data, 2) else "count(attempt)"
    rows = read_rows(data, f"SELECT pool, count(*), {waiting} FROM quarantine GROUP BY pool")
    return [{"pool": pool, "records": count, "waiting": due} for pool, count, due in rows if pool not in served]


def saved_wants(data: Path) -> dict[str, list[Want]]:
    """Backend -> what its last good file wanted (see `rule.wants`)."""
    rows = read_rows(data, "SELECT key, value FROM meta WHERE key LIKE 'wants.%'")
    return {key.removeprefix("wants."): [Want(*want) for want in json.loads(text)] for key, text in rows}


def _standing_of(row: Sequence[Any]) -> Standing:
    return Standing(*row[:10])._replace(account=Account(*row[10:16]))


def _status(log: LogReader, name: str, at: int, standing: Standing, parked: Parked, ahead: Ahead) -> PoolStatus:
    cursor = standing.cursor
    low, high = log.bounds()
    past = max(cursor, low - 1)
    sheet = balance(cursor, standing.delivered, standing.account, parked, high, ahead(cursor))
    waiting = min(int(sheet["waiting"]), max(0, high - past))
    return PoolStatus(
        name, standing.state, standing.error, standing.hint, standing.warning, cursor, waiting, log.at(cursor), standing.rate,
        standing.delivered, standing.refused, at, sheet,
    )  # fmt: skip


def _is_older(data: Path, version: int) -> bool:
    return bool(read_rows(data, f"SELECT 1 FROM pragma_user_version WHERE user_version < {version}"))


def read_rows(data: Path, sql: str) -> list[tuple]:  # type: ignore[type-arg]
    """What a SELECT on the file finds; nothing before it was made. Raises StoreError."""
    path = data / "uplink.db"
    if not path.exists():
        return []
    try:
        with contextlib.closing(open_reader(path)) as db:
            return _select(db, path, sql)
    except sqlite3.DatabaseError as error:
        # Made, or being moved forward, since its version was looked at: as good as not there.
        if "no such table" in str(error) or "no such column" in str(error):
            return []
        code = getattr(error, "sqlite_errorcode", 0) & 255
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            return _read_unattended(path, data / "uplink.lock", sql)
        raise StoreError(explain(path, error)) from error


def _read_unattended(path: Path, lock: Path, sql: str) -> list[tuple]:  # type: ignore[type-arg]
    """A child that was killed left a write-ahead log that a reader may not recover: done here if no child is alive."""
    try:
        held = open(lock, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise StoreError(f"{lock}: {error.strerror}: run this as the user of the gateway") from error
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return []  # it starts right now, and will be read next time
        try:
            db = sqlite3.connect(path, isolation_level=None)
            try:
                return _select(db, path, sql)
            finally:
                close_unmoved(db, path)
        except sqlite3.Error as error:
            raise StoreError(explain(path, error)) from error


def _select(connection: sqlite3.Connection, path: Path, sql: str) -> list[tuple]:  # type: ignore[type-arg]
    return connection.execute(sql).fetchall() if is_ours(connection, path, UPLINK) else []
