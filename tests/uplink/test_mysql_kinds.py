"""MySQL and MariaDB as people set them up: modes and defaults of their own, logged by statement, offline, closed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sql_servers import PASSWORD, USER, SqlServer

from .lane_rig import LaneRig
from .logfile import START
from .rig import Rig
from .sql_rig import NEEDS_MYSQL, SERVERS, assert_holds_everything, function_rule, rig, settings, tables

BOTH = ("mysql", pytest.param("mysql-9", marks=NEEDS_MYSQL))
ACCOUNT = f"{USER}@'127.0.0.1'"


@pytest.fixture(scope="module", params=BOTH)
def running(request: pytest.FixtureRequest) -> Iterator[SqlServer]:
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture
def gate(tmp_path: Path, server: SqlServer) -> Iterator[Rig]:
    with rig(tmp_path, server) as gate:
        yield gate


def send_away(server: SqlServer) -> None:
    for (thread,) in server.rows(f"SELECT id FROM information_schema.processlist WHERE user = '{USER}'"):
        server.run(f"KILL {thread}")


@pytest.mark.parametrize("name", BOTH)
def test_modes_and_defaults_of_the_server_change_nothing(tmp_path: Path, name: str) -> None:
    options = [
        "--sql-mode=ANSI,NO_BACKSLASH_ESCAPES,PAD_CHAR_TO_FULL_LENGTH,NO_UNSIGNED_SUBTRACTION", "--autocommit=0",
        "--transaction-isolation=SERIALIZABLE", "--default-time-zone=+05:30", "--character-set-server=latin1",
        "--explicit-defaults-for-timestamp=ON", "--innodb-autoinc-lock-mode=2", "--log-bin", "--binlog-format=ROW",
        "--server-id=7",
    ]  # fmt: skip
    options += ["--sql-require-primary-key=ON"] if name == "mysql-9" else []
    with SERVERS[name](*options) as server:
        tables(server)
        with rig(tmp_path, server) as gate:
            gate.log.publish_many(50)
            gate.log.publish("t'\\x", "a'\\\" ü😀\\".encode(), retain=True)
            gate.log.connected("c", START)
            gate.drain()
            assert_holds_everything(gate, server)
            assert (gate.standing().warning, gate.quarantine()) == ("", [])
        assert server.rows("SELECT topic, payload FROM mqtt_retain") == [("t'\\x", "a'\\\" ü😀\\".encode())]
        assert server.rows("SELECT online_at = '2023-11-14 22:13:20' FROM mqtt_client") == [(1,)]


@pytest.mark.parametrize("name", BOTH)
def test_a_server_that_logs_by_statement_is_named(tmp_path: Path, name: str) -> None:
    with SERVERS[name]("--log-bin", "--binlog-format=STATEMENT", "--server-id=7") as server:
        tables(server)
        with rig(tmp_path, server) as gate:
            gate.log.publish_many(5)
            gate.step_until(lambda: gate.standing().state == "misconfigured", 5)
            assert "binlog_format = ROW" in gate.standing().hint
            server.run("SET GLOBAL binlog_format = ROW", database="")
            gate.drain()
            assert_holds_everything(gate, server)


@pytest.mark.parametrize(
    ("on", "off", "state", "says"),
    [
        ("SET GLOBAL offline_mode = ON", "SET GLOBAL offline_mode = OFF", "unreachable", "offline mode"),
        (
            "SET GLOBAL super_read_only = ON", "SET GLOBAL super_read_only = OFF, GLOBAL read_only = OFF", "unreachable",
            "read-only",
        ),
        (f"ALTER USER {ACCOUNT} ACCOUNT LOCK", f"ALTER USER {ACCOUNT} ACCOUNT UNLOCK", "misconfigured", "is locked"),
        (
            f"ALTER USER {ACCOUNT} PASSWORD EXPIRE", f"ALTER USER {ACCOUNT} IDENTIFIED BY '{PASSWORD}'", "misconfigured",
            "password has expired",
        ),
        (
            "SET GLOBAL require_secure_transport = ON", "SET GLOBAL require_secure_transport = OFF", "misconfigured",
            "ssl = true",
        ),
    ],
    ids=["offline", "read-only", "locked", "expired", "secure"],
)  # fmt: skip
@pytest.mark.parametrize("running", ["mysql-9"], indirect=True)
@NEEDS_MYSQL
def test_what_only_mysql_says(gate: Rig, server: SqlServer, on: str, off: str, state: str, says: str) -> None:
    gate.log.publish_many(5)
    gate.drain()
    server.run(on, database="")
    try:
        send_away(server)
        gate.log.publish_many(5)
        for _ in range(4):
            gate.step()
        gate.clock.now += 2
        gate.step_until(lambda: gate.standing().state == state, 5)
        assert says in gate.standing().error + gate.standing().hint
    finally:
        server.run(off, database="")
    gate.drain()
    assert_holds_everything(gate, server)


def test_an_error_that_nobody_knows_when_we_connect_is_waited_out(tmp_path: Path, gate: Rig, server: SqlServer) -> None:
    """The server breaks off whoever connects, with a number (1184) that is none of a record."""
    lookup = function_rule(server.backend, "client.connected.5", "on_subscribe_lookup").replace('"topic": "#", ', "")
    server.run("SET GLOBAL init_connect = 'nonsense'", "INSERT INTO mqtt_sub (clientid, topic, qos) VALUES ('c', 't', 1)")
    (tmp_path / "asks").mkdir()
    with LaneRig(tmp_path / "asks", server.port, lookup, settings(server), server.backend) as lane:
        try:
            gate.log.publish_many(5)
            gate.step()
            assert gate.standing().state == "unreachable"
            lane.log.arrive("c")
            lane.step_until(lambda _: any(line.startswith("lookup_unreachable") for line in lane.said), 5)
        finally:
            server.run("SET GLOBAL init_connect = ''")
        gate.drain()
        assert_holds_everything(gate, server)
        lane.ask()
        assert [answer.filters for answer in lane.answers()] == ['[["t", 1]]']
