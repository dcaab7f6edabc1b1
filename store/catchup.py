"""Reading on from the log for sessions that fell behind: many rows in one SQLite step, and once for all of them.

`sqlite3` gives the interpreter lock away at every step and wins it back late while the event loop is busy. So one query
gathers a whole piece of the log into one row of joined columns, which is cut up again here. A piece is bounded in rows, in
payload bytes and in the stretch of log looked through, which also bounds how long the read transaction lasts.

Sessions that come back together walk together: a piece is read for the filters of all who are near its place, and the last
pieces are kept, in bounded memory, for those who come by a little later. Where none of their topics is, the log is passed
over by `summary` without being read.

Invariant: the rows are in order of seq and complete up to `through`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence, Set
from itertools import accumulate, takewhile
from pathlib import Path
from typing import NamedTuple

from .entry import ADDRESSED, KEPT_THERE, PUBLISH, QOS_MASK
from .piece import Piece, Stored
from .schema import know_topics, open_reader
from .summary import STRETCH, Summary
from .topic import matches

ROWS = 4_000
BYTES = 1 << 20
KEPT = 16 << 20
"""Memory for pieces that others may come by for."""
NAMES = 4 << 20
"""Bytes of topic names that a piece may hold, and of those that are remembered: one may have 65,535."""
LONG_NAME = 256
"""Below this a topic name is a part of what a message costs anyway."""


class Fetched(NamedTuple):
    """Messages asked for by number; of those asked for, all through seq `through` are here or gone."""

    messages: list[Stored]
    through: int


class Counted(NamedTuple):
    """How many messages there are through seq `through`, and their bytes."""

    messages: int
    bytes: int
    through: int


FOR_SESSIONS = f"kind IN ({PUBLISH}, {ADDRESSED}) AND flags & {QOS_MASK} > 0"
"""What a session reads on from the log; of the addressed it passes over what is for others."""
RETAINED = (
    "SELECT t.name, r.seq, ifnull(length(e.payload) + ifnull(length(e.properties), 0), 0)"
    " FROM retained r JOIN topic t ON t.id = r.topic LEFT JOIN entry e ON e.seq = r.seq"
)
"""Topic, seq and bytes of every retained message."""
_SIZE = "length(payload) + 2 * ifnull(length(properties), 0)"
_COLUMNS = (
    "count(*), group_concat(seq), group_concat(topic), group_concat(flags), group_concat(length(payload)),"
    " group_concat(client), group_concat(at), group_concat(run), CAST(group_concat(payload, '') AS BLOB),"
    " CASE WHEN count(properties) > 0 THEN group_concat(ifnull(hex(properties), '')) END,"
    " CASE WHEN count(properties) > 0 THEN group_concat(mono) END"
)
"""Joining the payloads as text and casting back keeps every byte, NUL included."""


class CatchUp:
    """Reads pieces of the log; used by one thread only."""

    def __init__(self, path: Path) -> None:
        self._db = open_reader(path)
        know_topics(self._db)
        self._names: dict[int, bytes] = {}
        self._names_size = 0
        self._plain = -1
        self._pieces: list[Piece] = []
        self._summary = Summary(self._db)
        self.pieces_read = 0
        """How often the log itself was asked."""

    @property
    def db(self) -> sqlite3.Connection:
        """For other questions to the log, in this thread and within 20 ms."""
        return self._db

    def close(self) -> None:
        self._db.close()

    def rest(self) -> None:
        """Called when nobody has read for a while: give the memory back."""
        self._pieces.clear()

    def read(self, first: int, live: int, filters: Set[str], near: Set[str] = frozenset(), rows: int = ROWS) -> Piece:
        """Messages with QoS > 0 from seq `first` on, through `live` at most, whose topic is matched by one of `filters`.

        What the filters of others who are `near` match is in it too, and maybe more; `rows` bounds a new piece.
        """
        for piece in self._pieces:
            if piece.serves(first, filters):
                self._pieces.remove(piece)
                break
        else:
            self.pieces_read += 1
            piece = self._read(first, live, frozenset(filters | near), min(rows, ROWS))
        self._pieces.append(piece)
        while len(self._pieces) > 1 and sum(kept.size for kept in self._pieces) > KEPT:
            del self._pieces[0]
        return piece

    def _read(self, first: int, live: int, filters: frozenset[str], rows: int) -> Piece:
        self._db.execute("BEGIN")
        try:
            run = self._summary.run(first, live, filters, rows)
            if run.first > run.last:
                return Piece(first, run.last, [], filters)
            topics = "" if run.topics is None else f"AND topic IN ({','.join(map(str, run.topics))})"
            where = f"seq BETWEEN {run.first} AND {run.last} AND {FOR_SESSIONS} {topics}"
            messages, whole = self.fetch_within(f"{where} ORDER BY seq LIMIT {rows}")
        finally:
            self._db.execute("COMMIT")
        through = run.last if not messages or (whole and len(messages) < rows) else messages[-1][0]
        return Piece(first, through, messages, None if run.topics is None else filters, self._plain if messages else -1)

    def fetch_within(self, chosen: str, most: int = BYTES) -> tuple[list[Stored], bool]:
        """The first of the chosen rows (what follows WHERE), as many as `most` bytes hold, at least one; whether these are all.

        The sizes are looked at first and by themselves: SQLite then reads no payload for them.
        """
        sizes = f"SELECT seq, {_SIZE} AS size FROM entry WHERE {chosen}"
        (size,) = self._db.execute(f"SELECT ifnull(sum(size), 0) FROM ({sizes})").fetchone()
        if size <= most:
            return self._fetch(f"SELECT * FROM entry WHERE {chosen}")
        sums = f"SELECT seq, size, sum(size) OVER (ORDER BY seq) AS total FROM ({sizes})"
        fitting = f"SELECT seq FROM ({sums}) WHERE total - size < {most}"
        return self._fetch(f"SELECT * FROM entry WHERE seq IN ({fitting}) ORDER BY seq")[0], False

    def fetch(self, seqs: Sequence[int], most: int = BYTES) -> Fetched:
        """The first of these messages, in order of seq, as many as one read holds; those that are gone are left out."""
        ordered = sorted(seqs)[:ROWS]
        wanted = ",".join(str(int(seq)) for seq in ordered)
        self._db.execute("BEGIN")
        try:
            known = f"kind IN ({PUBLISH}, {ADDRESSED}, {KEPT_THERE})"
            messages, whole = self.fetch_within(f"{known} AND seq IN ({wanted}) ORDER BY seq", most)
        finally:
            self._db.execute("COMMIT")
        return Fetched(messages, ordered[-1] if whole else messages[-1][0])

    def count(
        self, first: int, last: int, filters: Sequence[str], messages: int = 1 << 62, size: int = 1 << 62, client: int = 0
    ) -> Counted:
        """Of those from seq `first` on whose topic is matched, none addressed to other clients: all of a stretch, or the first
        that make up so many or so many bytes, whichever needs more."""
        last = min(last, first + STRETCH - 1)
        self._db.execute("BEGIN")
        try:
            where = f"seq BETWEEN {first} AND {last} AND {FOR_SESSIONS} AND (kind = {PUBLISH} OR client = {client})"
            groups = self._db.execute(
                f"SELECT topic, count(*), sum({_SIZE}) FROM entry WHERE {where} GROUP BY topic"
            ).fetchall()
            found = [group for group in groups if any(matches(text, self._text(group[0])) for text in filters)]
            count, total = sum(group[1] for group in found), sum(group[2] for group in found)
            if count <= messages or 0 < size >= total:
                return Counted(count, total, last)
            chosen = f"{where} AND topic IN (SELECT value FROM json_each('{json.dumps([group[0] for group in found])}'))"
            row = self._db.execute(
                "SELECT count(*), sum(size), max(seq) FROM (SELECT seq, size, row_number() OVER w AS number,"
                f" sum(size) OVER w - size AS before FROM (SELECT seq, {_SIZE} AS size FROM entry WHERE {chosen})"
                f" WINDOW w AS (ORDER BY seq)) WHERE number <= {messages} OR before < {size}"
            ).fetchone()
            return Counted(*row)
        finally:
            self._db.execute("COMMIT")

    def last_before(self, is_old: Callable[[int, int, int], bool]) -> int:
        """The last seq of what `is_old(at, mono, run)` says so of, 0 if of nothing; what came before an old one is old."""
        low, high = self._db.execute("SELECT (SELECT min(seq) FROM entry) - 1, (SELECT max(seq) FROM entry)").fetchone()
        if high is None:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            seq, *born = self._db.execute(
                "SELECT seq, at, mono, run FROM entry WHERE seq <= ? ORDER BY seq DESC LIMIT 1", (middle,)
            ).fetchone()
            if is_old(*born):
                low = middle
            else:
                high = seq - 1
        return max(0, int(low))

    def _text(self, topic: int) -> str:
        return (self._names.get(topic) or self._name(topic)).decode()

    def retained(self, topic: str) -> tuple[int, int] | None:
        """Seq and bytes of the topic's retained message."""
        row: tuple[str, int, int] | None = self._db.execute(f"{RETAINED} WHERE t.name = ?", (topic,)).fetchone()
        return row[1:] if row else None

    def _fetch(self, rows: str) -> tuple[list[Stored], bool]:
        """The first of these rows, as many as NAMES bytes of topic names hold, at least one; whether these are all."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM ({rows})").fetchone()
        count = row[0]
        if not count:
            return [], True
        seq, flags, length, client, at, run = (_numbers(row[column], count) for column in (1, 3, 4, 5, 6, 7))
        payloads: bytes = row[8]
        if row[9] is None and row[3] == ",".join(["1"] * count) and length.count(length[0]) == count:
            size = self._plain = length[0]
            cut = [payloads[end - size : end] for end in range(size, size * count + 1, size)] if size else [b""] * count
        else:
            self._plain = -1
            cut = [payloads[end - size : end] for end, size in zip(accumulate(length), length, strict=True)]
        properties = [b""] * count if row[9] is None else [bytes.fromhex(text) for text in row[9].split(",")]
        mono = [0] * count if row[10] is None else _numbers(row[10], count)
        names = self._names_of(row[2].split(","))
        return list(zip(seq, names, flags, cut, properties, client, at, mono, run, strict=False)), len(names) == count

    def _names_of(self, topics: list[str]) -> list[bytes]:
        """The names of the first of these topics, as many as NAMES bytes hold, at least one."""
        known: dict[str, bytes] = {}
        size = 0
        for number in dict.fromkeys(topics):
            raw = known[number] = self._names.get(int(number)) or self._name(int(number))
            size += len(raw)
            if size > NAMES:
                break
        if size > LONG_NAME * len(known):
            self._plain = -1
        if size > NAMES:
            return [known[number] for number in takewhile(known.__contains__, topics)]
        return [known[number] for number in topics]

    def _name(self, number: int) -> bytes:
        (text,) = self._db.execute("SELECT name FROM topic WHERE id = ?", (number,)).fetchone()
        if len(self._names) >= 20_000 or self._names_size > NAMES:
            self._names.clear()
            self._names_size = 0
        raw = self._names[number] = str(text).encode()
        self._names_size += len(raw)
        return raw


def _numbers(text: str, count: int) -> Sequence[int]:
    """The joined column as integers; most columns hold one value all along, or count up, which is cheaper to see."""
    head = text[: text.find(",")] if count > 1 else text
    if len(text) == (len(head) + 1) * count - 1 and text.count(head) == count:
        return [int(head)] * count
    first, last = int(head), int(text[text.rfind(",") + 1 :])
    if last - first + 1 == count and text.count(f",{first + 1},"):
        numbers = range(first, last + 1)
        if text == ",".join(map(str, numbers)):
            return numbers
    return list(map(int, text.split(",")))
