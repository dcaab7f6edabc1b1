"""A `log.db` for uplink tests, written row by row as the broker writes it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from tidegate.store.entry import ACKED, CONNECTED, DISCONNECTED, GAP, POSITION, PUBLISH, RETAIN, Entry
from tidegate.store.msgid import gateway_code
from tidegate.store.reader import LogReader
from tidegate.store.schema import LOG, open_writer

GATEWAY = "00ff00ff00ff00ff"
START = 1_700_000_000_000


class LogFile:
    """Appends entries; each call is one commit. `seq` is the last number given out."""

    def __init__(self, data: Path, node: str = "barn", gateway: str = GATEWAY) -> None:
        self.path = data / "log.db"
        self.seq = 0
        self.at = START
        self._db = open_writer(self.path, LOG, "OFF")
        self._names: dict[tuple[str, str], int] = {}
        self._node = node
        self._run = 0
        self.new_run(1, gateway)

    def close(self) -> None:
        self._db.close()

    def new_run(self, epoch: int, gateway: str = GATEWAY, clock_offset: int | None = None) -> None:
        """As a start of the gateway does."""
        self._run += 1
        self._db.execute(
            "INSERT INTO run VALUES (?,?,?,?,?,?,?,?,?,?,0,2)",
            (
                *(self._run, gateway, gateway_code(gateway), epoch, self._node, "boot", clock_offset),
                *(self.seq + 1, self.at, self.at),
            ),
        )

    def publish(
        self, topic: str, payload: bytes = b"x", qos: int = 1, retain: bool = False, client: str = "c1", at: int | None = None
    ) -> int:
        return self.append(PUBLISH, client, topic, qos | (RETAIN if retain else 0), payload, at)

    def publish_many(self, count: int, topics: int = 20, payload: bytes = b"p" * 64) -> None:
        """`count` messages of QoS 1 over some topics, payload numbered, in one commit."""
        self._db.execute("BEGIN")
        for number in range(count):
            self.publish(f"t/{number % topics}", b"%d:%b" % (number, payload), client=f"c{number % topics}")
        self._db.execute("COMMIT")

    def flap(self, client: str, count: int, pause: int, at: int = START) -> int:
        """The client comes and goes so many times, in one commit; the time of its last going."""
        self._db.execute("BEGIN")
        for number in range(count):
            self.connected(client, at + 2 * number * pause)
            self.disconnected(client, at + (2 * number + 1) * pause)
        self._db.execute("COMMIT")
        return self.at

    def connected(self, client: str, at: int | None = None) -> int:
        return self.append(CONNECTED, client, None, 0, None, at)

    def disconnected(self, client: str, at: int | None = None) -> int:
        return self.append(DISCONNECTED, client, None, 0, None, at)

    def position(self, client: str, topic: str, msgid: str, at: int | None = None) -> int:
        """The client has read the topic through this message."""
        return self.append(POSITION, client, topic, 0, msgid.encode(), at)

    def acked(self, client: str, topic: str, seq: int) -> int:
        """A message of a queue was acknowledged, as the broker writes it down."""
        (msgid,) = [entry.msgid for entry in self.entries() if entry.seq == seq]
        self._db.execute("INSERT OR IGNORE INTO taken VALUES (?)", (seq,))
        return self.append(ACKED, client, topic, 0, msgid.encode())

    def gap(self, text: str) -> int:
        return self.append(GAP, None, None, 0, text.encode(), None)

    def append(
        self, kind: int, client: str | None, topic: str | None, flags: int, payload: bytes | None, at: int | None = None
    ) -> int:
        self.seq += 1
        self.at = self.at + 1 if at is None else at
        self._db.execute(
            "INSERT INTO entry VALUES (?,?,?,?,?,?,?,?,?,NULL)",
            (
                *(self.seq, self.at, 0, self._run, kind, self._name("client", "clientid", client)),
                *(self._name("topic", "name", topic), flags, payload),
            ),
        )
        return self.seq

    def trim(self, last: int) -> None:
        """Forget everything at or below `last`."""
        self._db.execute("DELETE FROM entry WHERE seq <= ?", (last,))

    def lose_tail(self, after: int) -> None:
        """As a power cut on a lying card: what came after is gone, and the numbers are used again."""
        self._db.execute("DELETE FROM entry WHERE seq > ?", (after,))
        self.seq = after

    def entries(self) -> list[Entry]:
        """Everything, as readers see it."""
        with closing(LogReader(self.path)) as reader:
            entries: list[Entry] = []
            while True:
                found, _ = reader.read(entries[-1].seq if entries else 0, 10_000)
                if not found:
                    return entries
                entries += found

    def _name(self, table: str, column: str, text: str | None) -> int | None:
        if text is None:
            return None
        if (table, text) not in self._names:
            cursor: sqlite3.Cursor = self._db.execute(f"INSERT INTO {table} ({column}) VALUES (?)", (text,))
            assert cursor.lastrowid is not None
            self._names[table, text] = cursor.lastrowid
        return self._names[table, text]
