"""What many messages at once become in PostgreSQL: the same rows as one by one, whatever the columns; in one query with the end
of their transaction."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tidegate.uplink.pgsql_copy import LARGEST, ROWS
from tidegate.uplink.to_pgsql import COPY_FROM

from tests.support.sql_servers import Postgres, SqlServer

from .rig import Rig
from .sql_rig import function_rule, mark, rig, settings, tables, utc

PAYLOADS = (
    b"plain", b"", b"tab\tline\nback\\slash \\N \\.", "ü 漢 🜁".encode(), b"a\0b", b"\xff\xfe", b"\x80" * 70,
    b"x" * (2 * LARGEST), "é".encode() * LARGEST, b"\xff" * LARGEST,
)  # fmt: skip
TIMES = (-1, 1_700_000_000_000, 946_684_799_999, 4_102_444_800_000, 1)
STORE = function_rule("pgsql", "message.publish.1", "on_message_publish")
COLUMNS = "msgid, topic, sender, qos, retain, payload, arrived"


@pytest.fixture(scope="module")
def postgres() -> Iterator[SqlServer]:
    with Postgres() as server:
        yield server


@pytest.fixture
def server(postgres: SqlServer) -> SqlServer:
    postgres.recreate()
    tables(postgres)
    return postgres


def gate_of(directory: Path, server: SqlServer, text: str = STORE) -> Rig:
    return Rig(directory, server.port, text, settings(server), "pgsql")


def found(server: SqlServer) -> list[tuple[object, ...]]:
    """With payloads as bytes, and times in UTC without a zone, whatever the columns are."""
    rows = server.rows(f"SELECT {COLUMNS} FROM mqtt_msg ORDER BY id")
    return [(*row[:3], int(row[3]), int(row[4]), _bytes(row[5]), _plain(row[6])) for row in rows]


def _bytes(payload: str | bytes) -> bytes:
    return payload.encode() if isinstance(payload, str) else payload


def _plain(when: datetime) -> datetime:
    return when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when


def _held(payload: bytes, raw: bool) -> bytes:
    """As a text column holds it: in hex what is no text."""
    try:
        is_text = "\0" not in payload.decode()
    except UnicodeDecodeError:
        is_text = False
    return payload if raw or is_text else payload.hex().encode()


@pytest.mark.parametrize(
    "columns",
    [
        "",
        "payload TYPE bytea USING ''",
        "qos TYPE smallint, ALTER COLUMN retain TYPE bigint, ALTER COLUMN topic TYPE text, ALTER COLUMN payload TYPE varchar",
        "arrived TYPE timestamptz",
        "qos TYPE text",
    ],
    ids=["as shipped", "payload in bytes", "other widths", "time with a zone", "a number in a text column"],
)
def test_every_message_is_the_row_that_it_is_alone(tmp_path: Path, server: SqlServer, columns: str) -> None:
    if columns:
        server.run(f"ALTER TABLE mqtt_msg ALTER COLUMN {columns}")
    with gate_of(tmp_path, server) as gate:
        gate.log.publish_many(2 * COPY_FROM, payload=b"until batches are large")
        gate.drain()
        for number in range(2 * ROWS + 7):
            client, payload = ("é漢🜁", "c1")[number % 2], PAYLOADS[number % 7]
            gate.log.publish(f"t/{number % 3}/ü", payload, 1 + number % 2, False, client, TIMES[number % len(TIMES)])
            if number < len(PAYLOADS):
                gate.log.publish("large", PAYLOADS[number])
        gate.drain()
        assert found(server) == [
            (e.msgid, e.topic, e.clientid, e.qos, 0, _held(e.payload, "bytea" in columns), utc(e.when))
            for e in gate.log.entries()
        ]
        assert not gate.quarantine()
        assert mark(server) == [gate.log.seq]


def test_what_the_end_of_the_transaction_refuses_is_found(tmp_path: Path, server: SqlServer) -> None:
    server.run(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE 'not this' USING ERRCODE = '23514'; END $$",
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON mqtt_msg DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " WHEN (NEW.payload = 'bad') EXECUTE FUNCTION refuse()",
    )
    with gate_of(tmp_path, server) as gate:
        gate.log.publish_many(COPY_FROM)
        gate.drain()
        gate.log.publish_many(COPY_FROM)
        bad = gate.log.publish("t", b"bad")
        gate.log.publish_many(COPY_FROM)
        gate.drain()
        assert [(row.seq, "not this" in row.reason) for row in gate.quarantine()] == [(bad, True)]
        assert [row[0] for row in found(server)] == [e.msgid for e in gate.log.entries() if e.seq != bad]
        assert mark(server) == [gate.log.seq]


def test_messages_with_presence_and_statements_between_and_after_them_are_one_transaction(
    tmp_path: Path, server: SqlServer
) -> None:
    with rig(tmp_path, server) as gate:
        gate.log.publish_many(COPY_FROM)
        gate.drain()
        gate.log.connected("c")
        gate.log.publish_many(COPY_FROM)
        gate.log.publish("r", b"1", retain=True)
        gate.log.publish_many(COPY_FROM)
        gate.drain()
        assert [row[0] for row in found(server)] == gate.published()
        assert server.rows("SELECT msgid FROM list ORDER BY n") == [(msgid,) for msgid in gate.published()]
        assert server.rows("SELECT clientid, state FROM mqtt_client") == [("c", 1)]
        assert server.rows("SELECT topic, payload FROM mqtt_retain") == [("r", "1")]
        assert mark(server) == [gate.log.seq]


def test_a_mark_that_moved_while_a_batch_was_made_ready_counts(tmp_path: Path, server: SqlServer) -> None:
    with gate_of(tmp_path, server) as gate:
        gate.log.publish_many(3 * COPY_FROM)
        gate.drain()
        gate.log.publish_many(3 * COPY_FROM)
        there = 3 * COPY_FROM + 50
        server.run(f"UPDATE tidegate_ledger SET seq = {there}")
        gate.drain()
        assert [row[0] for row in found(server)] == gate.published()[: 3 * COPY_FROM] + gate.published()[there:]
        assert mark(server) == [gate.log.seq]
