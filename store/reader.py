"""Reading the log from outside the committer: the uplink's view, entry by entry in order of seq.

A reader has its own read-only connection and holds a transaction only for one `read`, which is bounded in rows and bytes.
It sees whole commits only. Names are read in the entries' transaction, before they may be collected, and cached: a number
is never given to another name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from .clock import UNKNOWN
from .entry import GAP, QOS_MASK, RETAIN, Entry
from .msgid import message_id
from .schema import WHEN, open_reader

MAX_CACHED_NAMES = 20_000
READ_BYTES = 1 << 20
_RUN = "gateway, code, epoch, node, clock_offset, boot, clock FROM run"


class Run(NamedTuple):
    """One start of the gateway. `clock_offset` is wall minus CLOCK_BOOTTIME in ms, None if never known."""

    gateway: str
    code: str
    epoch: int
    node: str
    clock_offset: int | None
    boot: str
    clock: int
    """Level of the clock (`store.clock`)."""


class LogReader:
    """A cursor's eye on `log.db`; one per thread.

    `waits` for the clock: rows of this boot of the machine are not read before their time is known, because what a far end has
    got cannot be put right (how long at most is the broker's to say).
    """

    def __init__(self, path: Path, waits: bool = False) -> None:
        self._db = open_reader(path)
        self._waits = waits
        self._clients: dict[int, str] = {}
        self._topics: dict[int, str] = {}

    def close(self) -> None:
        self._db.close()

    def bounds(self) -> tuple[int, int]:
        """(lowest, highest) seq in the log; (0, 0) when it is empty."""
        low, high = self._db.execute("SELECT (SELECT min(seq) FROM entry), (SELECT max(seq) FROM entry)").fetchone()
        return low or 0, high or 0

    def beginning(self) -> int:
        """The last number before the oldest entry, those aside that outlive the trim (retained messages, gap records)."""
        first, top, kept = self._db.execute(
            "SELECT (SELECT seq FROM entry WHERE kind <> ? AND seq NOT IN (SELECT seq FROM retained) ORDER BY seq LIMIT 1),"
            " (SELECT max(seq) FROM entry), (SELECT value FROM meta WHERE key = 'seq')",
            (GAP,),
        ).fetchone()
        return int(first - 1 if first else max(top or 0, int(kept or 0)))

    def run(self) -> Run:
        """The newest run: this gateway's id, epoch and node name as of now."""
        return Run(*self._db.execute(f"SELECT {_RUN} ORDER BY id DESC LIMIT 1").fetchone())

    def births(self) -> list[tuple[str, int, int]]:
        """(gateway, epoch, first seq) of every run, oldest first: which entries an epoch can hold."""
        return self._db.execute("SELECT gateway, epoch, first_seq FROM run ORDER BY id").fetchall()

    def taken(self, first: int, last: int) -> set[int]:
        """Messages from `first` through `last` that a queue has given away."""
        return {seq for (seq,) in self._db.execute("SELECT seq FROM taken WHERE seq BETWEEN ? AND ?", (first, last))}

    def at(self, seq: int) -> int | None:
        """Time (ms) of the first entry after `seq`, None when there is none: the age of what waits."""
        row = self._db.execute(
            f"SELECT {WHEN} FROM entry e LEFT JOIN run r ON r.id = e.run WHERE e.seq > ? ORDER BY e.seq LIMIT 1", (seq,)
        ).fetchone()
        return row[0] if row else None

    def read(self, after: int, limit: int, kinds: Collection[int] | None = None) -> tuple[list[Entry], int]:
        """Entries with seq > `after` in order, at most `limit`, and the seq up to which the log was looked through.

        Only `kinds` are returned when given; the second value also covers what was passed over.
        """
        self._db.execute("BEGIN")
        try:
            return self._read(after, limit, kinds)
        finally:
            self._db.execute("COMMIT")

    def _read(self, after: int, limit: int, kinds: Collection[int] | None) -> tuple[list[Entry], int]:
        entries: list[Entry] = []
        through = after
        size = 0
        boot = self.run().boot if self._waits else ""
        clients, topics, known = self._clients, self._topics, None
        # SQLite reads no payload that is not asked for.
        payload_of = "payload" if kinds is None else f"CASE WHEN kind IN ({','.join(map(str, kinds))}) THEN payload END"
        cursor = self._db.execute(
            f"SELECT seq, at, mono, run, kind, client, topic, flags, {payload_of}, properties FROM entry"
            " WHERE seq > ? ORDER BY seq LIMIT ?",
            (after, limit),
        )
        # An outage's backlog comes through here by the million: no call for a row whose names are known.
        for seq, at, mono, run_id, kind, client, topic, flags, payload, properties in cursor:
            if run_id != known:
                run, known = self._run(run_id), run_id
                if boot and run.clock == UNKNOWN and run.boot == boot:
                    break
                gateway, code, epoch, _, offset, _, _ = run
            through = seq
            if kinds is None or kind in kinds:
                # As Entry(...), in a third of the time.
                entries.append(tuple.__new__(Entry, (
                    seq, at, mono + offset if mono and offset is not None else at, kind,
                    clients.get(client) or self._name(clients, "SELECT clientid FROM client WHERE id = ?", client),
                    topics.get(topic) or self._name(topics, "SELECT name FROM topic WHERE id = ?", topic),
                    flags & QOS_MASK if flags else 0, bool(flags and flags & RETAIN), payload or b"", properties or b"",
                    gateway, epoch, message_id(at, code, epoch, seq),
                )))  # fmt: skip
            if payload:
                size += len(payload)
                if size > READ_BYTES:
                    break
        cursor.close()
        return entries, through

    def _run(self, run_id: int) -> Run:
        return Run(*self._db.execute(f"SELECT {_RUN} WHERE id = ?", (run_id,)).fetchone())

    def _name(self, cache: dict[int, str], sql: str, number: int | None) -> str:
        if number is None:
            return ""
        name = cache.get(number)
        if name is None:
            row: tuple[str] | None = self._db.execute(sql, (number,)).fetchone()
            if row is None:
                raise sqlite3.DatabaseError(f"no name for id {number}")
            name = row[0]
            if len(cache) >= MAX_CACHED_NAMES:
                cache.clear()
            cache[number] = name
        return name
