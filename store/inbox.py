"""The inbox: what the uplink learned at far ends for devices of this gateway, a table of `uplink.db`.

The uplink writes answers, durable before it forgets the question; the broker reads them in order of `id` and keeps how far it
is in `log.db`, in the transaction of an answer's effect, so each takes effect once whatever is killed. The uplink deletes what
the broker is done with, and tells it of new answers by a byte on its standard output. `identity` (in `meta`) names the file:
the broker's place in one inbox means nothing in another.

Invariant: ids rise for ever, also when all rows were deleted.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

SUBSCRIPTIONS = 1
"""All that the far end has for the client (`filters`); what it had from this pool and is not there is taken away."""
SUBSCRIBE = 2
"""One more (`filters` has it), from a channel."""
UNSUBSCRIBE = 3
"""One that goes (`filters` has it)."""
MESSAGE = 4
"""A stored message for the client, found for its subscription `filter`; answers of one question are oldest first."""
RETAINED = 5
"""The retained message of `topic`, found for the client's subscription `filter`."""
POSITION = 6
"""How far the client has read `topic` of messages of this gateway, elsewhere too: `epoch` and `seq`."""

SCHEMA = """
CREATE TABLE inbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT, pool TEXT NOT NULL, kind INTEGER NOT NULL, client TEXT NOT NULL,
  filter TEXT NOT NULL DEFAULT '', topic TEXT NOT NULL DEFAULT '', filters TEXT NOT NULL DEFAULT '[]',
  msgid TEXT NOT NULL DEFAULT '', sender TEXT NOT NULL DEFAULT '', qos INTEGER NOT NULL DEFAULT 0,
  at INTEGER NOT NULL DEFAULT 0, payload BLOB NOT NULL DEFAULT x'', queue INTEGER NOT NULL DEFAULT 0,
  epoch INTEGER NOT NULL DEFAULT 0, seq INTEGER NOT NULL DEFAULT 0)
"""
IDENTITY = "SELECT value FROM meta WHERE key = 'identity'"
COLUMNS = "id, pool, kind, client, filter, topic, filters, msgid, sender, qos, at, payload, queue, epoch, seq"


class Answer(NamedTuple):
    """A row; what a kind has no use for is empty. `at`: ms since 1970. `filters`: JSON, [[filter, qos], …]."""

    id: int
    pool: str
    kind: int
    client: str
    filter: str = ""
    topic: str = ""
    filters: str = "[]"
    msgid: str = ""
    sender: str = ""
    qos: int = 0
    at: int = 0
    payload: bytes = b""
    queue: bool = False
    """A message of one to one: an acknowledgement takes it away for everybody."""
    epoch: int = 0
    seq: int = 0


def read(db: sqlite3.Connection, after: int, limit: int, size: int = 1 << 20) -> list[Answer]:
    """The next answers: at most `limit`, and none more once they have `size` bytes."""
    found = []
    for row in db.execute(f"SELECT {COLUMNS} FROM inbox WHERE id > ? ORDER BY id LIMIT ?", (after, limit)):
        answer = Answer(*row)
        found.append(answer)
        size -= len(answer.payload) + len(answer.filters)
        if size <= 0:
            break
    return found


def cursor_name(identity: str) -> str:
    """Of the row of `log.db`'s table `cursor` that says how far the broker is: `seq` is the last id it is done with."""
    return f"inbox:{identity}"
