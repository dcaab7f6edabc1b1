"""Reading on from the log for sessions that fell behind: many rows in one SQLite step.

`sqlite3` gives the interpreter lock away at every step and wins it back late while the event loop is busy. So one query
gathers a whole piece of the log into one row of joined columns, which is cut up again here. A piece is bounded in rows, in
payload bytes and in the stretch of log looked through, which also bounds how long the read transaction lasts.

Invariant: the rows are in order of seq and complete up to `through`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .entry import PUBLISH, QOS_MASK
from .schema import open_reader
from .topic import matches

ROWS = 4_000
BYTES = 1 << 20
STRETCH = 50_000
MAX_TOPICS_IN_QUERY = 500


class Stored(NamedTuple):
    """A message read back from the log."""

    seq: int
    topic: bytes
    flags: int
    payload: bytes
    properties: bytes
    client: int
    at: int
    run: int


class Piece(NamedTuple):
    """A part of the log: the messages found, and the seq through which it was looked through."""

    messages: list[Stored]
    through: int


_COLUMNS = (
    "group_concat(seq), group_concat(topic), group_concat(flags), group_concat(length(payload)),"
    " group_concat(hex(payload), ''), group_concat(ifnull(hex(properties), '')), group_concat(client),"
    " group_concat(at), group_concat(run)"
)


class CatchUp:
    """Reads pieces of the log; used by one thread only."""

    def __init__(self, path: Path) -> None:
        self._db = open_reader(path)
        self._names: dict[int, bytes] = {}

    def close(self) -> None:
        self._db.close()

    def read(self, first: int, filters: Sequence[str]) -> Piece:
        """Messages with QoS > 0 from seq `first` on whose topic is matched by one of `filters`."""
        last = first + STRETCH - 1
        self._db.execute("BEGIN")
        try:
            (top,) = self._db.execute("SELECT ifnull(max(seq), 0) FROM entry").fetchone()
            last = min(last, top)
            choice = self._topic_choice(filters)
            sizes = (
                f"SELECT seq, length(payload) AS size, sum(length(payload)) OVER (ORDER BY seq) AS total FROM entry"
                f" WHERE seq BETWEEN {first} AND {last} AND kind = {PUBLISH} AND flags & {QOS_MASK} > 0 {choice}"
                f" ORDER BY seq LIMIT {ROWS}"
            )
            messages = self._fetch(f"SELECT seq FROM ({sizes}) WHERE total - size < {BYTES}")
        finally:
            self._db.execute("COMMIT")
        if not messages:
            return Piece([], last)
        whole = len(messages) < ROWS and sum(len(m.payload) for m in messages) < BYTES
        return Piece(messages, last if whole else messages[-1].seq)

    def fetch(self, seqs: Sequence[int]) -> list[Stored]:
        """The messages with these numbers, in order of seq; those that are gone are left out."""
        found: list[Stored] = []
        for start in range(0, len(seqs), ROWS):
            wanted = ",".join(str(int(seq)) for seq in seqs[start : start + ROWS])
            found += self._fetch(wanted)
        return found

    def _fetch(self, seqs: str) -> list[Stored]:
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM (SELECT * FROM entry WHERE kind = {PUBLISH} AND seq IN ({seqs}) ORDER BY seq)"
        ).fetchone()
        if row[0] is None:
            return []
        numbers = [list(map(int, row[n].split(","))) for n in (0, 1, 2, 3, 6, 7, 8)]
        seq, topic, flags, length, client, at, run = numbers
        payloads = bytes.fromhex(row[4])
        properties = [bytes.fromhex(text) for text in row[5].split(",")] if row[5].strip(",") else [b""] * len(seq)
        cut: list[bytes] = []
        position = 0
        for size in length:
            cut.append(payloads[position : position + size])
            position += size
        names = [self._names.get(number) or self._name(number) for number in topic]
        return list(map(Stored, seq, names, flags, cut, properties, client, at, run))

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
            for number, name in self._db.execute("SELECT id, name FROM topic").fetchall():
                if any(matches(text, name) for text in wild):
                    numbers.append(number)
        if len(numbers) > MAX_TOPICS_IN_QUERY:
            return ""
        return f"AND topic IN ({','.join(map(str, numbers))})"

    def _name(self, number: int) -> bytes:
        (text,) = self._db.execute("SELECT name FROM topic WHERE id = ?", (number,)).fetchone()
        if len(self._names) >= 20_000:
            self._names.clear()
        raw = self._names[number] = str(text).encode()
        return raw
