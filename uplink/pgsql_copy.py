"""COPY in binary form: messages as the bytes that the server reads, and the way they take.

A row is the number of its fields, then each field's length and bytes, numbers most significant byte first. What repeats from
message to message is remembered as bytes. The driver's own COPY makes an object of every value, and waits for the end of the
COPY and for that of the transaction one after the other; here what ends the transaction is in the same query.

Invariant: a table gets what the driver's COPY would have written.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from psycopg.abc import PQGen
from psycopg.errors import error_from_result
from psycopg.generators import copy_to, execute, fetch_many, send
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.waiting import Wait

from .backend import Meanwhile
from .pgsql_session import Connection
from .sql_limits import NO_COLUMN, Column
from .sql_rows import Message

MESSAGE = ("msgid", "topic", "sender", "qos", "retain", "arrived", "payload")
COPY = f"COPY mqtt_msg ({', '.join(MESSAGE)}) FROM STDIN"
ROWS = 250
"""So many go at once: while the server takes them in the next ones are made."""
LARGEST = 1 << 17
"""Bytes that libpq takes at once without growing slow."""
_BEGINNING, _END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
_TEXT = {"varchar", "text"}
_PAYLOAD = _TEXT | {"bytea"}
_INTEGERS = {"int2": struct.Struct(">ih"), "int4": struct.Struct(">ii"), "int8": struct.Struct(">iq")}
_TIME = struct.Struct(">iq")
_YEAR_2000 = 946_684_800
_SIZE = 4
_size = struct.Struct(">i").pack


class Encoder:
    """Makes rows for a table with these columns; `column` makes of a payload what its column holds."""

    def __init__(self, columns: Mapping[str, Column], column: Callable[[bytes], bytes]) -> None:
        self._column = column
        self._qos, self._retain = (_INTEGERS[columns[name].type] for name in ("qos", "retain"))
        self._origin = functools.lru_cache(maxsize=2048)(self._encode_origin)

    def rows(self, messages: Sequence[Message]) -> Iterator[bytes]:
        """Everything that the server is to get, piece by piece."""
        yield _BEGINNING
        for start in range(0, len(messages), ROWS):
            yield self._encode(messages[start : start + ROWS])
        yield _END

    def _encode(self, messages: Sequence[Message]) -> bytes:
        column, origin = self._column, self._origin
        parts: list[bytes] = []
        known, arrived = None, b""
        for msgid, topic, sender, _, qos, retain, payload, when in messages:
            second = when // 1000
            if second != known:
                known, arrived = second, _TIME.pack(8, (second - _YEAR_2000) * 1_000_000)
            name = msgid.encode()
            # Most are plain text, which any column takes as it is.
            content = payload if payload.isascii() and b"\0" not in payload else column(payload)
            parts += (_first(len(name)), name, origin(topic, sender, qos, retain), arrived, _size(len(content)), content)
        return b"".join(parts)

    def _encode_origin(self, topic: str, sender: str, qos: int, retain: int) -> bytes:
        names = [_size(len(name)) + name for name in (topic.encode(), sender.encode())]
        numbers = [kind.pack(kind.size - _SIZE, number) for kind, number in ((self._qos, qos), (self._retain, retain))]
        return b"".join(names + numbers)


def can_encode(columns: Mapping[str, Column]) -> bool:
    """Whether the table's columns are of types that an encoder knows; with others the server converts from text."""
    types = {name: columns.get(name, NO_COLUMN).type for name in MESSAGE}
    texts = {types[name] for name in ("msgid", "topic", "sender")}
    integers = {types["qos"], types["retain"]}
    return texts <= _TEXT and integers <= _INTEGERS.keys() and types["arrived"] == "timestamp" and types["payload"] in _PAYLOAD


def copy(db: Connection, first: str, pieces: Iterable[bytes], then: str, meanwhile: Meanwhile) -> None:
    """COPY the pieces between two other statements in the same query; `meanwhile` when all of it is on its way."""
    connection = db.pgconn
    connection.send_query(f"{first}; {COPY} (FORMAT BINARY); {then}".encode())
    _check(db.wait(execute(connection)))
    for piece in pieces:
        for start in range(0, len(piece), LARGEST):
            db.wait(copy_to(connection, piece[start : start + LARGEST]))
    db.wait(_end(connection))
    meanwhile()
    _check(db.wait(fetch_many(connection)))


def _end(connection: PGconn) -> PQGen[None]:
    while connection.put_copy_end() == 0:
        yield Wait.W
    yield from send(connection)


def _check(results: Iterable[PGresult]) -> None:
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            raise error_from_result(result)


@functools.lru_cache(maxsize=64)
def _first(size: int) -> bytes:
    return struct.pack(">hi", len(MESSAGE), size)
