"""Reading on from the log for sessions that fell behind: many rows in one SQLite step.

`sqlite3` gives the interpreter lock away at every step and wins it back late while the event loop is busy. So one query
gathers a whole piece of the log into one row of joined columns, which is cut up again here. A piece is bounded in rows, in
payload bytes and in the stretch of log looked through, which also bounds how long the read transaction lasts.

Sessions that went away together come back to the same place: the last few pieces are kept, for them to share one reading. A
piece is never out of date, because entries do not change; one that could be longer by now is only followed by another.

Invariant: the rows are in order of seq and complete up to `through`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from .entry import PUBLISH, QOS_MASK
from .schema import open_reader
from .topic import FilterTree

ROWS = 4_000
BYTES = 1 << 20
STRETCH = 50_000
MAX_TOPICS_IN_QUERY = 500
SHARED = 3


Stored = tuple[int, bytes, int, bytes, bytes, int, int, int]
"""A message read back: (seq, raw topic, flags, payload, properties, client, at, run). A plain tuple: made by the thousand."""


class Piece(NamedTuple):
    """A part of the log: the messages found, and the seq through which it was looked through."""

    messages: list[Stored]
    through: int
    plain: int = -1
    """Payload size if every message has QoS 1, is not retained and has no properties and this size; else -1."""


class Fetched(NamedTuple):
    """Messages asked for by number; of those asked for, all through seq `through` are here or gone."""

    messages: list[Stored]
    through: int


_SIZE = "length(payload) + 2 * ifnull(length(properties), 0)"
_COLUMNS = (
    "count(*), group_concat(seq), group_concat(topic), group_concat(flags), group_concat(length(payload)),"
    " group_concat(client), group_concat(at), group_concat(run), CAST(group_concat(payload, '') AS BLOB),"
    " CASE WHEN count(properties) > 0 THEN group_concat(ifnull(hex(properties), '')) END"
)
"""Joining the payloads as text and casting back keeps every byte, NUL included."""


class CatchUp:
    """Reads pieces of the log; used by one thread only."""

    def __init__(self, path: Path) -> None:
        self._db = open_reader(path)
        self._names: dict[int, bytes] = {}
        self._plain = -1
        self._shared: dict[tuple[int, tuple[str, ...]], Piece] = {}

    def close(self) -> None:
        self._db.close()

    def read(self, first: int, live: int, filters: Sequence[str]) -> Piece:
        """Messages with QoS > 0 from seq `first` through `live` at most, whose topic is matched by one of `filters`."""
        key = first, tuple(filters)
        piece = self._shared.get(key)
        if piece is None:
            while len(self._shared) >= SHARED:
                del self._shared[next(iter(self._shared))]
            piece = self._shared[key] = self._read(first, min(first + STRETCH - 1, live), filters)
        return piece

    def _read(self, first: int, last: int, filters: Sequence[str]) -> Piece:
        self._db.execute("BEGIN")
        try:
            choice = self._topic_choice(filters)
            where = f"seq BETWEEN {first} AND {last} AND kind = {PUBLISH} AND flags & {QOS_MASK} > 0 {choice}"
            messages, whole = self._fetch_within(f"{where} ORDER BY seq LIMIT {ROWS}")
        finally:
            self._db.execute("COMMIT")
        if not messages:
            return Piece([], last)
        through = last if whole and len(messages) < ROWS else messages[-1][0]
        return Piece(messages, through, self._plain)

    def _fetch_within(self, chosen: str) -> tuple[list[Stored], bool]:
        """The first of the chosen rows (what follows WHERE), as many as BYTES hold, at least one; whether these are all.

        The sizes are looked at first and by themselves: SQLite then reads no payload for them.
        """
        sizes = f"SELECT seq, {_SIZE} AS size FROM entry WHERE {chosen}"
        (size,) = self._db.execute(f"SELECT ifnull(sum(size), 0) FROM ({sizes})").fetchone()
        if size <= BYTES:
            return self._fetch(f"SELECT * FROM entry WHERE {chosen}"), True
        sums = f"SELECT seq, size, sum(size) OVER (ORDER BY seq) AS total FROM ({sizes})"
        fitting = f"SELECT seq FROM ({sums}) WHERE total - size < {BYTES}"
        return self._fetch(f"SELECT * FROM entry WHERE seq IN ({fitting}) ORDER BY seq"), False

    def fetch(self, seqs: Sequence[int]) -> Fetched:
        """The first of these messages, in order of seq, as many as one read holds; those that are gone are left out."""
        ordered = sorted(seqs)[:ROWS]
        wanted = ",".join(str(int(seq)) for seq in ordered)
        self._db.execute("BEGIN")
        try:
            messages, whole = self._fetch_within(f"kind = {PUBLISH} AND seq IN ({wanted}) ORDER BY seq")
        finally:
            self._db.execute("COMMIT")
        return Fetched(messages, ordered[-1] if whole else messages[-1][0])

    def retained(self, topic: str) -> int | None:
        """The seq of the topic's retained message."""
        sql = "SELECT r.seq FROM retained r JOIN topic t ON t.id = r.topic WHERE t.name = ?"
        row: tuple[int] | None = self._db.execute(sql, (topic,)).fetchone()
        return row[0] if row else None

    def _fetch(self, rows: str) -> list[Stored]:
        row = self._db.execute(f"SELECT {_COLUMNS} FROM ({rows})").fetchone()
        count = row[0]
        if not count:
            return []
        seq, flags, length, client, at, run = (_numbers(row[column], count) for column in (1, 3, 4, 5, 6, 7))
        payloads: bytes = row[8]
        if row[9] is None and row[3] == ",".join(["1"] * count) and length.count(length[0]) == count:
            size = self._plain = length[0]
            cut = [payloads[end - size : end] for end in range(size, size * count + 1, size)] if size else [b""] * count
        else:
            self._plain = -1
            cut = [payloads[end - size : end] for end, size in zip(accumulate(length), length, strict=True)]
        properties = [b""] * count if row[9] is None else [bytes.fromhex(text) for text in row[9].split(",")]
        topic = row[2].split(",")
        known = {text: self._names.get(int(text)) or self._name(int(text)) for text in set(topic)}
        names = [known[text] for text in topic]
        return list(zip(seq, names, flags, cut, properties, client, at, run, strict=True))

    def _topic_choice(self, filters: Sequence[str]) -> str:
        """A condition that lets SQLite pass over other topics; none when too many match."""
        if any(text == "#" for text in filters):
            return ""
        exact = [text for text in filters if "+" not in text and "#" not in text]
        wild = [text for text in filters if text not in exact]
        numbers: list[int] = []
        for text in exact:
            numbers += [n for (n,) in self._db.execute("SELECT id FROM topic WHERE name = ?", (text,))]
        if wild:
            tree: FilterTree[None, None] = FilterTree()
            for text in wild:
                tree.put(text, None, None)
            topics = self._db.execute("SELECT id, name FROM topic").fetchall()
            numbers += [number for number, name in topics if any(True for _ in tree.find(name))]
        if len(numbers) > MAX_TOPICS_IN_QUERY:
            return ""
        return f"AND topic IN ({','.join(map(str, numbers))})"

    def _name(self, number: int) -> bytes:
        (text,) = self._db.execute("SELECT name FROM topic WHERE id = ?", (number,)).fetchone()
        if len(self._names) >= 20_000:
            self._names.clear()
        raw = self._names[number] = str(text).encode()
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
