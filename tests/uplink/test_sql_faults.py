"""What a SQL far end and the link to it can do to a batch, with real servers: nothing is lost, nothing is doubled."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pymysql
import pytest

from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.sql_servers import DATABASE, PASSWORD, USER, SqlServer
from tests.support.waiting import wait_until

from .logfile import GATEWAY, START
from .rig import Rig
from .sql_rig import SERVERS, assert_holds_everything, mark, messages, rig, rules, settings, tables

CUTS = int(os.environ.get("TIDEGATE_CUTS", "6"))
"""The whole campaign: TIDEGATE_CUTS=50."""


@pytest.fixture
def proxy(server: SqlServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def gate(tmp_path: Path, server: SqlServer, proxy: Proxy) -> Iterator[Rig]:
    with rig(tmp_path, server, proxy.port) as gate:
        gate.log.publish_many(300)
        yield gate


def stands_at(server: SqlServer, seq: int) -> bool:
    return mark(server) == [seq]


def test_late_tail_before_the_worker_writes_again_is_not_applied_twice(gate: Rig, server: SqlServer, proxy: Proxy) -> None:
    gate.step_until(lambda: stands_at(server, 100))
    proxy.hold_up()
    gate.step()
    assert proxy.held.is_set()
    assert gate.standing().state == "unreachable"
    proxy.release()
    gate.drain()
    assert_holds_everything(gate, server)
    assert gate.standing().delivered == 300


def test_a_batch_whose_answer_is_lost_counts_once(gate: Rig, server: SqlServer, proxy: Proxy) -> None:
    """Each answer of the transaction in turn is the one that cuts the line, the commit's among them."""
    gate.drain()
    committed = 0
    for cut in range(CUTS):
        gate.log.publish_many(20)
        before = mark(server)
        proxy.set("cut_down", after=cut % 6)
        gate.step()
        proxy.set("pass")
        assert not gate.standing().error.endswith(": "), "no reason is told"
        committed += proxy_cut(gate) and mark(server) != before
        gate.drain()
    assert_holds_everything(gate, server)
    assert gate.standing().delivered == 300 + 20 * CUTS
    assert committed, "no cut came between a commit and its answer"


def proxy_cut(gate: Rig) -> bool:
    return gate.standing().state == "unreachable"


@pytest.mark.parametrize("mode", ["refuse", "reset", "hold_down"])
def test_a_link_that_fails_and_comes_back_loses_nothing(gate: Rig, server: SqlServer, proxy: Proxy, mode: str) -> None:
    gate.step_until(lambda: stands_at(server, 100))
    proxy.set(mode)
    gate.step()
    gate.step()
    assert gate.standing().state == "unreachable"
    assert f"127.0.0.1:{proxy.port}" in gate.standing().error
    proxy.set("pass")
    gate.drain()
    assert_holds_everything(gate, server)
    assert gate.standing().state == "connected"


def test_a_frozen_server_applies_each_batch_once_when_it_thaws(gate: Rig, server: SqlServer) -> None:
    gate.step_until(lambda: stands_at(server, 100))
    server.freeze()
    try:
        gate.step()
        assert gate.standing().state == "unreachable"
        assert re.search("no answer|timed out", gate.standing().error)
        gate.step()
    finally:
        server.thaw()
    gate.drain()
    assert_holds_everything(gate, server)


def test_a_server_that_is_killed_and_one_that_is_stopped_get_the_rest_when_they_are_back(gate: Rig, server: SqlServer) -> None:
    gate.step_until(lambda: stands_at(server, 100))
    for end in (server.kill, server.stop):
        end()
        gate.log.publish_many(50)
        gate.step()
        gate.step()
        assert gate.standing().state == "unreachable"
        server.start()
        gate.drain()
    assert_holds_everything(gate, server)


def test_a_server_restored_from_an_older_dump_gets_what_it_lost(gate: Rig, server: SqlServer) -> None:
    gate.step_until(lambda: stands_at(server, 100))
    server.dump()
    gate.drain()
    gate.log.publish("t/1", b"after")
    gate.drain()
    server.restore()
    assert stands_at(server, 100)
    gate.drain()
    assert_holds_everything(gate, server)
    assert "stands=100 confirmed=301" in "".join(gate.said)


def test_a_lost_uplink_db_repeats_nothing(gate: Rig, server: SqlServer) -> None:
    gate.drain()
    gate.worker.stop()
    gate.progress.keep_only([])
    gate.restart()
    gate.drain()
    assert_holds_everything(gate, server)


def test_a_batch_ends_where_an_epoch_ends(gate: Rig, server: SqlServer) -> None:
    gate.log.new_run(2)
    gate.log.publish("t/1", b"of the second epoch")
    gate.log.new_run(3, gateway="another")
    gate.log.publish("t/1", b"of another gateway")
    gate.drain()
    assert_holds_everything(gate, server)
    assert mark(server) == [300, 301, 302]


def test_a_gateway_that_was_away_for_a_week_overwrites_nothing_newer(tmp_path: Path, server: SqlServer) -> None:
    week = 7 * 86_400_000
    (tmp_path / "here").mkdir()
    (tmp_path / "away").mkdir()
    with rig(tmp_path / "here", server) as here, rig(tmp_path / "away", server) as away:
        away.log.new_run(1, gateway="a week away")
        for log, at, payload in ((away.log, START, b"old"), (here.log, START + week, b"new")):
            log.connected("moved", at)
            log.publish("both", payload, retain=True, at=at + 1)
            log.publish("deleted", payload, retain=True, at=at + 2)
            log.publish(f"only/{payload.decode()}", payload, retain=True, at=at + 3)
        away.log.disconnected("moved", START + 4)
        here.log.publish("deleted", b"", retain=True, at=START + week + 5)
        here.drain()
        away.drain()
        assert [int(state) for (state,) in server.rows("SELECT state FROM mqtt_client")] == [1]
        found = {
            topic: bytes(p, "ascii") if isinstance(p, str) else p
            for topic, p in server.rows("SELECT topic, payload FROM mqtt_retain")
        }
        assert found == {"both": b"new", "only/old": b"old", "only/new": b"new"}
        assert len(messages(server)) == 6
        assert server.rows("SELECT gateway, seq FROM tidegate_ledger ORDER BY gateway") == [(GATEWAY, 5), ("a week away", 5)]


def test_a_read_only_server_applies_nothing_and_then_all(gate: Rig, server: SqlServer) -> None:
    gate.step_until(lambda: stands_at(server, 100))
    server.read_only(True)
    try:
        gate.step_until(lambda: gate.standing().state == "unreachable", 5)
        assert "read" in gate.standing().error
        assert stands_at(server, 100)
    finally:
        server.read_only(False)
    gate.drain()
    assert_holds_everything(gate, server)


def test_a_row_that_somebody_locks_is_waited_for(gate: Rig, server: SqlServer) -> None:
    gate.step_until(lambda: stands_at(server, 100))
    with closing(server.connect()) as other, closing(other.cursor()) as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM tidegate_ledger FOR UPDATE")
        gate.step_until(lambda: gate.standing().state == "unreachable", 5)
        cursor.execute("ROLLBACK")
    gate.drain()
    assert_holds_everything(gate, server)


def test_two_gateways_that_deadlock_both_arrive(tmp_path: Path, server: SqlServer) -> None:
    server.run("CREATE TABLE pair (name varchar(9) PRIMARY KEY, n int)", "INSERT INTO pair VALUES ('a', 0), ('b', 0)")
    update = "\"update pair set n = n + 1 where name = '{}'\""
    line = 'backend.{}.hook.message.publish.1 = {{"action": {{"sql": [{}, {}]}}, "pool": "pool1"}}\n'
    text = line.format(server.backend, update.format("a"), update.format("b"))
    with Rig(tmp_path, server.port, text, settings(server), server.backend) as gate:
        gate.log.publish("t", b"x")
        gate.step()
        with closing(server.connect()) as other, closing(other.cursor()) as cursor:
            cursor.execute("BEGIN")
            cursor.execute("UPDATE pair SET n = n + 100 WHERE name = 'b'")
            gate.step_until(lambda: gate.standing().state == "unreachable", 5)
            try:
                cursor.execute("UPDATE pair SET n = n + 100 WHERE name = 'a'")
            except pymysql.err.OperationalError:
                # The server chose this one of the two; it does it all again.
                cursor.execute("UPDATE pair SET n = n + 100")
            cursor.execute("COMMIT")
        gate.drain()
        assert server.rows("SELECT n FROM pair") == [(101,), (101,)]


def test_a_connection_limit_is_waited_out(gate: Rig, server: SqlServer) -> None:
    first = server.first_database
    if server.backend == "pgsql":
        server.run(f"ALTER ROLE {USER} CONNECTION LIMIT 0", database=first)
    else:
        server.run(f"ALTER USER {USER}@'127.0.0.1' WITH MAX_USER_CONNECTIONS 1", database=first)
    try:
        with closing(server.connect_as_user() if server.backend == "mysql" else server.connect()):
            gate.step()
            assert gate.standing().state == "unreachable"
    finally:
        if server.backend == "pgsql":
            server.run(f"ALTER ROLE {USER} CONNECTION LIMIT -1", database=first)
        else:
            server.run(f"ALTER USER {USER}@'127.0.0.1' WITH MAX_USER_CONNECTIONS 0", database=first)
    gate.drain()
    assert_holds_everything(gate, server)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [("password", "wrong", ".password"), ("database", "nowhere", ".database"), ("user", "nobody", ".user")],
)
def test_wrong_settings_stop_the_pool_with_a_hint_and_mended_ones_go_on(
    tmp_path: Path, server: SqlServer, name: str, value: str, hint: str
) -> None:
    key = {"user": "username"}.get(name, name) if server.backend == "pgsql" else name
    with rig(tmp_path, server, more=f"{key} = {value}") as gate:
        gate.log.publish_many(10)
        wait = gate.step()
        assert (wait.seconds, wait.for_news) == (60.0, False)
        assert gate.standing().state == "misconfigured"
        assert f"backend.{server.backend}.pool1" in gate.standing().hint
        assert hint in gate.standing().hint
        assert PASSWORD not in gate.standing().error + gate.standing().hint
        gate.configure(server.port, rules(server.backend), settings(server))
        gate.drain()
        assert_holds_everything(gate, server)


def test_of_several_servers_the_first_that_can_be_written_to_is_taken(tmp_path: Path, server: SqlServer) -> None:
    with SERVERS[server_name(server)]() as standby:
        tables(standby)
        standby.read_only(True)
        several = ", ".join(f"127.0.0.1:{port}" for port in (free_port(), standby.port, server.port))
        with rig(tmp_path, server, more=f"server = {several}") as gate:
            gate.log.publish_many(20)
            gate.drain()
            assert_holds_everything(gate, server)


def test_a_right_that_is_missing_stops_the_pool_and_is_named(gate: Rig, server: SqlServer) -> None:
    account = USER if server.backend == "pgsql" else f"{USER}@'127.0.0.1'"
    if server.backend == "pgsql":
        server.run(f"REVOKE INSERT ON mqtt_msg FROM {account}")
    else:
        server.run(f"REVOKE INSERT ON {DATABASE}.* FROM {account}", database="")
    gate.step_until(lambda: gate.standing().state == "misconfigured", 5)
    assert "grant the user of" in gate.standing().hint
    if server.backend == "pgsql":
        server.run(f"GRANT INSERT ON mqtt_msg TO {account}")
    else:
        server.run(f"GRANT INSERT ON {DATABASE}.* TO {account}", database="")
    gate.drain()
    assert_holds_everything(gate, server)


def test_a_statement_that_the_server_does_not_understand_stops_the_pool(tmp_path: Path, server: SqlServer) -> None:
    text = rules(server.backend).replace("insert into list", "inzert into list")
    with Rig(tmp_path, server.port, text, settings(server), server.backend) as gate:
        gate.log.publish_many(10)
        gate.step_until(lambda: gate.standing().state == "misconfigured", 5)
        assert "correct the sql of the rule" in gate.standing().hint
        assert (messages(server), gate.quarantine()) == ([], [])


def test_a_far_end_that_goes_away_while_idle_is_noticed(gate: Rig, server: SqlServer) -> None:
    gate.drain()
    if server.backend == "pgsql":
        server.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{USER}'", database="postgres")
    else:
        for (thread,) in server.rows(f"SELECT id FROM information_schema.processlist WHERE user = '{USER}'"):
            server.run(f"KILL {thread}")
    wait_until(lambda: gate.worker.fileno >= 0 and readable(gate.worker.fileno))
    gate.step()
    assert gate.standing().state == "unreachable"
    gate.log.publish("t/1", b"x")
    gate.drain()
    assert_holds_everything(gate, server)


def server_name(server: SqlServer) -> str:
    return next(name for name, kind in SERVERS.items() if kind is type(server))


def readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])
