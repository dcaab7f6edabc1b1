"""`tidegate salvage`: a damaged `log.db` becomes a whole one with every row that can be read, and the loss is told.

The new log has the same gateway's identity and ends with a run of its own in a new epoch, marked as not cleanly stopped, so
that the next start begins another: no name of a lost message is ever used again. Numbers go on above all that may have been
given out. For each range of seqs that is lost there is a gap record, which far ends get like data. References that lead
nowhere are cleared: the broker may rely on what it loads.

Invariant: the damaged log is moved aside only when the new one is whole and synced, and is never written.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

from .clock import this_boot
from .damaged import TAIL, Damaged, Row, Table, tables_of
from .entry import GAP
from .exchange import exchange, finish_exchange, is_half, make_part, part_of, remove_part, sync, verify
from .first_page import FAULTS
from .leaves import entries_of
from .msgid import TIME_WIDTH, gateway_code
from .schema import LOG, Format, StoreError, is_lost, open_writer
from .store import EPOCH_STEP, next_epoch

Progress = Callable[[str, int], None]
"""Called with a table's name and how many of its rows were saved."""
CHUNK = 500
ROWS_A_PAGE = 128
"""No page holds more entries."""
FIRST = ("meta", "run", "session", "retained", "position", "cursor", "client", "topic", "entry")
"""What says how far the log went and what may stand in it is read before it."""
NAMES = (("client", "clientid"), ("topic", "name"))
YEAR = 365 * 86_400_000
SET_CLOCK = 1_600_000_000_000
"""ms: a clock that shows less was never set."""
UNKNOWN_EPOCHS = 1_000 * EPOCH_STEP
"""Epochs passed over when rows of `run` are lost: more than the starts can have begun that nobody knows of."""
_TOPS = (
    "SELECT max(CAST(value AS INTEGER)) FROM meta WHERE key = 'seq'",
    "SELECT max(first_seq) - 1 FROM run",
    "SELECT max(cursor) FROM session",
    "SELECT max(seq) FROM retained",
    "SELECT max(seq) FROM position",
    "SELECT max(seq) FROM cursor WHERE name NOT LIKE 'inbox:%'",
)
_CLEAR = (
    ("retained", "seq NOT IN (SELECT seq FROM entry) OR topic NOT IN (SELECT id FROM topic)"),
    ("session", "client NOT IN (SELECT id FROM client)"),
    ("subscription", "client NOT IN (SELECT client FROM session)"),
    ("inflight", "client NOT IN (SELECT client FROM session)"),
    ("received", "client NOT IN (SELECT client FROM session)"),
    ("addressed", "client NOT IN (SELECT id FROM client)"),
    ("fetch", "client NOT IN (SELECT client FROM session)"),
    ("position", "client NOT IN (SELECT id FROM client) OR topic NOT IN (SELECT id FROM topic)"),
)
_WHAT = {
    "meta": "notes about the log",
    "run": "starts of the gateway",
    "client": "client ids",
    "topic": "topics",
    "entry": "messages and other entries",
    "retained": "retained messages",
    "session": "sessions",
    "subscription": "subscriptions",
    "inflight": "deliveries under way",
    "received": "guards against repeated QoS 2 messages",
    "cursor": "places in what far ends answer",
    "proxy_subscription": "subscriptions made for clients",
    "position": "positions of clients",
    "fetch": "fetches under way",
    "taken": "messages taken from queues",
    "addressed": "marks of messages for one client",
    "cleared": "retained messages that were cleared",
}
"""What a table holds, for people."""


def salvage(path: Path, now: int, progress: Progress) -> list[str]:
    """Mend the log in `path`, whose directory's lock is held; what there is to say to the user. `now` in ms.

    Raises StoreError, and then the damaged log is where it was.
    """
    try:
        if is_half(path):
            finish_exchange(path, "damaged")
            return [f"an earlier restore or salvage was cut off; it is finished now, and {path} is in its place"]
        if is_lost(path):
            path.touch()
        if not path.exists():
            raise StoreError(f"there is no log in {path.parent}: name its directory with --data DIR")
        try:
            return _salvage(path, now, progress)
        except BaseException:
            remove_part(path)
            raise
    except OSError as error:
        name = error.filename2 or error.filename or path
        raise StoreError(f"cannot write {name}: {error.strerror}; nothing was changed") from error
    except sqlite3.Error as error:
        raise StoreError(f"cannot write {part_of(path)}: {error}; nothing was changed") from error


def _salvage(path: Path, now: int, progress: Progress) -> list[str]:
    try:
        damaged = Damaged(path)
    except FAULTS as error:
        raise StoreError(_nothing(path, str(error))) from error
    with closing(damaged):
        if damaged.version > len(LOG.migrations):
            raise StoreError(f"{path} was written by a newer tidegate: salvage it with that one; nothing was changed")
        part = make_part(path)
        with closing(open_writer(part, Format(LOG.application_id, LOG.name, LOG.migrations[: damaged.version]))) as fresh:
            fresh.execute("PRAGMA journal_mode = OFF")
            fresh.execute("PRAGMA synchronous = OFF")
            rescue = _Rescue(damaged, fresh, now, progress)
            rescue.copy()
            if not damaged.lost and damaged.is_whole():
                remove_part(path)
                return [f"{path} is whole: nothing was changed"]
            rescue.mend()
            fresh.execute("PRAGMA journal_mode = DELETE")
    verify(part)
    sync(part)
    aside = exchange(path, "damaged")
    return [
        *rescue.report,
        f"the damaged log is kept as {aside}: delete it when you are sure",
        "start the gateway again: it goes on with the sessions where they stood, and in a new epoch, so that no far end takes"
        " what is new for what is lost",
    ]


def _nothing(path: Path, why: str) -> str:
    return (
        f"nothing in {path} can be read as a log ({why}); nothing was changed. To begin a new log, move it aside with your own"
        f" hands, or `tidegate restore` a backup"
    )


class _Rescue:
    """The copying of one log and the mending of the copy."""

    def __init__(self, damaged: Damaged, fresh: sqlite3.Connection, now: int, progress: Progress) -> None:
        self.report: list[str] = []
        self._from = damaged
        self._db = fresh
        self._now = now
        self._progress = progress
        self._latest = 0
        self._runs: set[int] | None = None
        self._names: list[int] = []

    def copy(self) -> None:
        """Raises StoreError when there is not a row that only a log has."""
        tables = {table.name: table for table in tables_of(self._db)}
        for name in FIRST:
            if name == "entry":
                self._learn()
            self._copy_table(tables[name])
        if lost := self._lost_entries():
            rows = entries_of(self._from.path, lost, lambda row: self._is_entry(tables["entry"], row))
            self._insert_rows(tables["entry"], rows)
        if self._one("SELECT (SELECT count(*) FROM run) + (SELECT count(*) FROM entry)") == (0,):
            raise StoreError(_nothing(self._from.path, "neither its runs nor its entries"))
        for name, table in tables.items():
            if name not in FIRST:
                self._copy_table(table)

    def _learn(self) -> None:
        """What an entry can hold."""
        for table, column in NAMES:
            if table in self._from.lost:
                self._insert(f"INSERT OR IGNORE INTO {table} (id, {column}) VALUES (?,?)", self._from.names(table, column))
        (latest,) = self._one("SELECT max(max(started_at), max(alive_at)) FROM run")
        self._latest = max(self._now, latest or 0) + YEAR
        if self._latest < SET_CLOCK:  # neither our clock nor theirs tells what is too late
            self._latest = 62**TIME_WIDTH
        lost = self._from.lost
        self._runs = None if "run" in lost else {number for (number,) in self._db.execute("SELECT id FROM run")}
        self._names = [
            1 << 62 if table in lost else self._one(f"SELECT ifnull(max(id), 0) FROM {table}")[0] for table, _ in NAMES
        ]

    def mend(self) -> None:
        """Clear what leads nowhere, and write down who we are and what is lost."""
        lost = self._lost_entries()
        self._tell_tables(lost)
        self._clear()
        self._name_the_nameless()
        self._end_with_a_run(lost)

    # -- copying ---------------------------------------------------------------------------------------------------

    def _copy_table(self, table: Table) -> None:
        if table.key:
            hint, sane = (self._known_top(), self._sane_entry) if table.name == "entry" else (0, _any)
            rows = self._from.rows(table, hint, sane)
        else:
            rows = self._from.rows_without_rowid(
                table, [client for (client,) in self._db.execute("SELECT client FROM session")]
            )
        self._insert_rows(table, rows)

    def _insert_rows(self, table: Table, rows: Iterator[Row]) -> None:
        marks = ",".join("?" * len(table.columns))
        self._insert(f"INSERT OR IGNORE INTO {table.name} ({', '.join(table.columns)}) VALUES ({marks})", rows, table.name)

    def _insert(self, sql: str, rows: Iterator[Row] | Iterator[tuple[int, str]], name: str = "") -> None:
        self._db.execute("BEGIN")
        count = 0
        while chunk := list(islice(rows, CHUNK)):
            self._db.executemany(sql, chunk)
            count += len(chunk)
            if name:
                self._progress(name, count)
        self._db.execute("COMMIT")

    def _known_top(self) -> int:
        return max(self._one(sql)[0] or 0 for sql in _TOPS)

    def _is_entry(self, table: Table, row: Row) -> bool:
        return len(row) == len(table.columns) and table.fits(row) and self._sane_entry(row)

    def _sane_entry(self, row: Row) -> bool:
        seq, at, _, run, kind, client, topic = row[:7]
        return (
            seq > 0
            and 0 <= at <= self._latest
            and 0 < kind < 256
            and (self._runs is None or run in self._runs)
            and 0 <= (client or 0) <= self._names[0]
            and 0 <= (topic or 0) <= self._names[1]
        )

    # -- mending ---------------------------------------------------------------------------------------------------

    def _tell_tables(self, lost_entries: list[tuple[int, int]]) -> None:
        whole = []
        for table in tables_of(self._db):
            (saved,) = self._one(f"SELECT count(*) FROM {table.name}")
            lost = (lost_entries or None) if table.name == "entry" else self._from.lost.get(table.name)
            what = _WHAT.get(table.name, table.name)
            if lost or (lost is not None and (not table.key or table.name in self._from.open_end)):
                self.report.append(f"{what}: {saved} saved, {self._say_lost(table, lost)}")
            elif saved:
                whole.append(f"{what} ({saved})")
        if whole:
            self.report.append(f"saved without loss: {', '.join(whole)}")

    def _say_lost(self, table: Table, lost: list[tuple[int, int]]) -> str:
        if not table.key:
            return "some are lost"
        if table.name in self._from.open_end - {"entry"}:
            return f"lost are the numbers {_say(lost)} and what came after"
        count = sum(last - first + 1 for first, last in lost)
        told = ", as gap records tell far ends" if table.name == "entry" else ""
        return f"at most {count} are lost, with the numbers {_say(lost)}{told}"

    def _clear(self) -> None:
        known = {table.name for table in tables_of(self._db)}  # an older log has fewer, until it is moved forward
        for table, orphaned in (row for row in _CLEAR if row[0] in known):
            gone = self._db.execute(f"DELETE FROM {table} WHERE {orphaned}").rowcount
            if gone:
                self.report.append(f"{_WHAT[table]}: {gone} dropped, because what they belong to is lost")

    def _name_the_nameless(self) -> None:
        """An entry whose client's or topic's name is lost keeps its payload under a name that nobody subscribes to."""
        for table, column in NAMES:
            named = self._db.execute(
                f"INSERT OR IGNORE INTO {table} (id, {column}) SELECT DISTINCT {table}, '$lost/{table}/' || {table} FROM entry"
                f" WHERE {table} IS NOT NULL AND {table} NOT IN (SELECT id FROM {table})"
            ).rowcount
            if named:
                instead = f"entries stand under $lost/{table}/NUMBER instead"
                self.report.append(f"{_WHAT[table]}: the names of {named} that entries have are lost; {instead}")

    def _lost_entries(self) -> list[tuple[int, int]]:
        """The ranges of seqs that are lost: those that could not be read, and those that SQLite passed over.

        A range whose end is unknown reaches as far as the file could have held entries.
        """
        top, bottom = self._one("SELECT ifnull(max(seq), 0), ifnull(min(seq), 0) FROM entry")
        lost = [missing for ends in self._from.lost.get("entry", ()) for missing in self._missing(*ends)]
        if bottom and "entry" in self._from.open_start:
            before = [(max(1, bottom - TAIL), bottom - 1)] if bottom > 1 else []
            lost = before + [ends for ends in lost if ends[0] > bottom]
        if "entry" in self._from.open_end:
            first, last = lost.pop() if lost and lost[-1][1] > top else (top + 1, top + 1)
            lost.append((first, max(last, first + self._from.pages * ROWS_A_PAGE)))
        lost += self._holes(max([top, self._known_top(), *(last for _, last in lost)]))
        return _merged(lost)

    def _missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """What is not there of a range."""
        found = self._db.execute("SELECT seq FROM entry WHERE seq BETWEEN ? AND ? ORDER BY seq", (first, last))
        missing = []
        for (seq,) in found:
            if seq > first:
                missing.append((first, seq - 1))
            first = seq + 1
        return [*missing, (first, last)] if first <= last else missing

    def _holes(self, top: int) -> list[tuple[int, int]]:
        """Numbers between the entries that the trim has not taken: it takes the oldest, and says what it took from the middle.

        It leaves gap records and retained messages behind; the first two ordinary entries in a row are above it.
        """
        ordinary = f"kind <> {GAP} AND seq NOT IN (SELECT seq FROM retained)"
        (floor,) = self._one(
            f"SELECT min(seq) FROM entry e WHERE {ordinary}"
            f" AND EXISTS (SELECT 1 FROM entry n WHERE n.seq = e.seq + 1 AND n.kind <> {GAP})"
        )
        if floor is None:
            return []
        holes = self._db.execute(
            "SELECT seq + 1, ifnull(next, :top + 1) - 1 FROM"
            " (SELECT seq, lead(seq) OVER (ORDER BY seq) AS next FROM entry WHERE seq >= :floor)"
            " WHERE ifnull(next, :top + 1) > seq + 1",
            {"top": top, "floor": floor},
        ).fetchall()
        taken = _merged(self._taken())
        return [(first, last) for first, last in holes if not any(first >= begin and last <= end for begin, end in taken)]

    def _taken(self) -> list[tuple[int, int]]:
        """The ranges that gap records name already, or will name when they are written."""
        found = []
        (open_records,) = self._one("SELECT (SELECT value FROM meta WHERE key = 'gaps')")
        with suppress(ValueError, TypeError):
            found += [(int(first), int(last)) for _, _, _, _, first, last, *_ in json.loads(open_records or "[]")]
        for (payload,) in self._db.execute(f"SELECT payload FROM entry WHERE kind = {GAP}"):
            with suppress(ValueError, KeyError, TypeError):
                gap = json.loads(payload)
                found.append((int(gap["first_seq"]), int(gap["last_seq"])))
        return found

    def _end_with_a_run(self, lost: list[tuple[int, int]]) -> None:
        db = self._db
        meta = dict(db.execute("SELECT key, value FROM meta"))
        last = db.execute("SELECT gateway, node, alive_at FROM run ORDER BY id DESC LIMIT 1").fetchone()
        gateway, node, alive = last or ("", os.uname().nodename, 0)
        gateway = str(meta.get("gateway") or gateway)
        if not gateway:
            gateway = uuid.uuid4().hex[:16]
            self.report.append("the gateway's id is lost: it is another gateway for its far ends from now on")
        (known, top, at) = self._one(
            "SELECT (SELECT ifnull(max(epoch), 0) FROM run), (SELECT ifnull(max(seq), 0) FROM entry),"
            " (SELECT ifnull(max(at), 0) FROM entry)"
        )
        known += UNKNOWN_EPOCHS if "run" in self._from.lost else 0
        epoch = next_epoch(known, self._now, time.monotonic_ns(), this_boot())
        top, at = max(top, self._known_top(), *(last for _, last in lost), 0), max(at, alive)
        (run,) = self._one("SELECT 1 + max((SELECT ifnull(max(id), 0) FROM run), (SELECT ifnull(max(run), 0) FROM entry))")
        moved = db.execute("UPDATE entry SET run = ? WHERE run NOT IN (SELECT id FROM run)", (run,)).rowcount
        (first,) = db.execute("SELECT min(seq) FROM entry WHERE run = ?", (run,)).fetchone()
        if moved:
            self.report.append(
                f"{moved} entries are named anew, because what is known of their start is lost: far ends may get them twice"
            )
        db.execute(
            "INSERT INTO run (id, gateway, code, epoch, node, boot, first_seq, started_at, alive_at)"
            " VALUES (?,?,?,?,?,?,?,?,?)",
            (run, gateway, gateway_code(gateway), epoch, node, this_boot(), first or top + 1, at, at),
        )
        for seq, (begin, end) in enumerate(lost, top + 1):
            db.execute(
                "INSERT INTO entry (seq, at, mono, run, kind, flags, payload) VALUES (?,?,0,?,?,0,?)",
                (seq, at, run, GAP, self._gap(begin, end, at)),
            )
        for key, value in (("gateway", gateway), ("seq", top + len(lost))):
            db.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (key, value))

    def _gap(self, first: int, last: int, at: int) -> bytes:
        """What is lost, between the times of what was saved before and after it; `count` is the most it can be."""
        before = self._db.execute("SELECT at FROM entry WHERE seq < ? ORDER BY seq DESC LIMIT 1", (first,)).fetchone()
        after = self._db.execute("SELECT at FROM entry WHERE seq > ? ORDER BY seq LIMIT 1", (last,)).fetchone()
        fields = {"first_seq": first, "last_seq": last, "topic": "#", "reason": "damaged", "count": last - first + 1}
        times = {"first_at": (before or after or (at,))[0], "last_at": (after or before or (at,))[0]}
        return json.dumps(fields | times).encode()

    def _one(self, sql: str) -> Row:
        row: Row = self._db.execute(sql).fetchone()
        return row


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in as few ranges as can be."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _any(_: Row) -> bool:
    return True


def _say(ranges: list[tuple[int, int]]) -> str:
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in ranges[:8]]
    return ", ".join(texts) + (f" and {len(ranges) - 8} more ranges" if len(ranges) > 8 else "")
