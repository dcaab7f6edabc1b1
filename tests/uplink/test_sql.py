"""What arrives in PostgreSQL and MariaDB, table by table, on real servers: one contract for both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sql_servers import SqlServer

from .logfile import START
from .rig import Rig
from .sql_rig import SERVERS, assert_holds_everything, mark, messages, rig, tables, utc

NOW = utc(START)


@pytest.fixture(scope="module", params=list(SERVERS))
def running(request: pytest.FixtureRequest) -> Iterator[SqlServer]:
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture
def server(running: SqlServer) -> SqlServer:
    running.recreate()
    tables(running)
    return running


@pytest.fixture
def gate(tmp_path: Path, server: SqlServer) -> Iterator[Rig]:
    with rig(tmp_path, server) as gate:
        yield gate


def test_a_message_is_a_row_of_mqtt_msg(gate: Rig, server: SqlServer) -> None:
    gate.log.publish("a/b c", b"with 'quotes', \\ and %s", qos=2, client="me", at=START)
    gate.drain()
    (msgid,) = gate.published()
    assert messages(server) == [(msgid, "a/b c", "me", 2, 0, b"with 'quotes', \\ and %s", NOW)]
    assert server.rows("SELECT msgid FROM list") == [(msgid,)]
    assert mark(server) == [1]


def test_a_lot_arrives_once_and_in_order(gate: Rig, server: SqlServer) -> None:
    gate.log.publish_many(3000)
    gate.drain()
    assert_holds_everything(gate, server)
    assert mark(server) == [3000]
