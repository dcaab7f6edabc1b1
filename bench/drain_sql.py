"""How fast a backlog drains into PostgreSQL and MariaDB, against the driver's own bulk path into the same table.

Rules: as for Redis (`drain.py`): the backlog is stored while the server is stopped; it starts, and the time runs from the first
mark seen in the ledger to the last. The peers make their rows from the same messages: psycopg's binary COPY, and PyMySQL's
`executemany`; thousands of rows a transaction, nothing that makes a repetition harmless.

Invariant: every message is a row, in the order of its publisher, with its payload, before a rate is reported.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import wire
from brokers import Broker, BrokerError
from load import WrongAnswer

from tests.support.sql_servers import SqlServer

BATCH = {"pgsql": 5000, "mysql": 1000}
"""Rows a transaction with which each driver is fastest."""
DEADLINE = 120.0
POLL = 0.02
"""Seconds; each look takes its share of the cores that gateway and server need, and the peer is not looked at."""
COLUMNS = "msgid, topic, sender, qos, retain, payload, arrived"
TYPES = ("varchar", "varchar", "varchar", "int4", "int4", "text", "timestamp")


def drain_rate(broker: Broker, publishers: int, messages: int, server: SqlServer) -> float:
    """Messages/s from the gateway's log into the server that starts now."""
    server.start()
    deadline = time.perf_counter() + DEADLINE
    first = began = 0.0
    with closing(server.connect()) as far, closing(far.cursor()) as cursor:
        while (arrived := _arrived(cursor)) < messages:
            now = time.perf_counter()
            if now > deadline:
                raise WrongAnswer(f"{arrived} of {messages} rows after {DEADLINE:.0f} s:\n{broker.log()}")
            if arrived and not began:
                first, began = arrived, now
            time.sleep(POLL)
        seconds = time.perf_counter() - began
        _check(cursor, server.backend, publishers, messages // publishers)
    if not began:
        raise BrokerError("all arrived before anybody looked: take more messages")
    return (messages - first) / seconds


def raw_rate(publishers: int, messages: int, server: SqlServer) -> float:
    """Messages/s of the driver alone."""
    server.run("TRUNCATE TABLE mqtt_msg")
    batch = BATCH[server.backend]
    put = _copy if server.backend == "pgsql" else _many
    with closing(server.connect()) as far:
        began = time.perf_counter()
        for start in range(0, messages, batch):
            put(far, _rows(server.backend, publishers, start, min(start + batch, messages)))
        return messages / (time.perf_counter() - began)


def _copy(far: Any, rows: Iterator[tuple[object, ...]]) -> None:
    with far.cursor() as cursor, cursor.copy(f"COPY mqtt_msg ({COLUMNS}) FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(TYPES)
        for row in rows:
            copy.write_row(row)


def _many(far: Any, rows: Iterator[tuple[object, ...]]) -> None:
    far.begin()
    with far.cursor() as cursor:
        cursor.executemany(f"INSERT INTO mqtt_msg ({COLUMNS}) VALUES (%s,%s,%s,%s,%s,%s,%s)", list(rows))
    far.commit()


def _rows(backend: str, publishers: int, start: int, end: int) -> Iterator[tuple[object, ...]]:
    arrived = datetime.fromtimestamp(1_700_000_000, UTC).replace(tzinfo=None)
    for number in range(start, end):
        publisher = number % publishers
        payload = _column(backend, wire.NAME.pack(publisher, number) + wire.FILLER)
        yield f"{number:020}", wire.topic_of(publisher).decode(), f"publisher-{publisher}", 1, 0, payload, arrived


def _column(backend: str, payload: bytes) -> str | bytes:
    """As the tables hold it: these payloads are no text."""
    return payload.hex() if backend == "pgsql" else payload


def _arrived(cursor: Any) -> int:
    # Counting would read the whole table each time.
    cursor.execute("SELECT coalesce(max(id), 0) FROM mqtt_msg")
    return int(cursor.fetchone()[0])


def _check(cursor: Any, backend: str, publishers: int, each: int) -> None:
    """Each publisher's messages in their order."""
    for publisher in range(publishers):
        cursor.execute("SELECT payload FROM mqtt_msg WHERE topic = %s ORDER BY id", (wire.topic_of(publisher).decode(),))
        wanted = [(_column(backend, wire.NAME.pack(publisher, index) + wire.FILLER),) for index in range(each)]
        if list(cursor.fetchall()) != wanted:
            raise WrongAnswer(f"the table does not hold the messages of publisher {publisher} as they were published")
