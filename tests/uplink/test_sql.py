"""What arrives in PostgreSQL, MariaDB and MySQL, table by table, on real servers: one contract for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.store.entry import SUBSCRIBED
from tidegate.uplink.backend import Batch, Mark
from tidegate.uplink.progress import read_dead
from tidegate.uplink.rule import SHIPPED

from tests.support.sql_servers import Postgres, SqlServer

from .logfile import GATEWAY, START
from .rig import Rig
from .sql_rig import (
    NEEDS_MYSQL,
    SERVERS,
    assert_holds_everything,
    function_rule,
    mark,
    messages,
    rig,
    rules,
    settings,
    sql_rule,
    tables,
    utc,
)

NOW = utc(START)
MINUTE = 60_000
DROPPED = '{"first_seq": 7, "last_seq": 9, "topic": "t", "reason": "disk_budget", "count": 3}'


@pytest.fixture(scope="module")
def postgres() -> Iterator[SqlServer]:
    with Postgres() as server:
        yield server


@pytest.fixture
def gate(tmp_path: Path, server: SqlServer) -> Iterator[Rig]:
    with rig(tmp_path, server) as gate:
        yield gate


def stamp(server: SqlServer, target: str, name: str, ms: int, gone_at: str = "NULL") -> None:
    """As another gateway left it."""
    server.run(f"INSERT INTO tidegate_stamp VALUES ('{target}', '{name}', {ms}, 'ffff', 7, 9, {gone_at})")


def client(server: SqlServer, name: str = "c") -> tuple[object, ...]:
    """state, node, online_at, offline_at, created"""
    (row,) = server.rows(f"SELECT state, node, online_at, offline_at, created FROM mqtt_client WHERE clientid = '{name}'")
    return (int(row[0]), *row[1:])


def retained(server: SqlServer) -> dict[str, bytes]:
    found = server.rows("SELECT topic, payload FROM mqtt_retain")
    return {topic: payload.encode() if isinstance(payload, str) else payload for topic, payload in found}


def test_a_message_is_a_row_of_mqtt_msg(gate: Rig, server: SqlServer) -> None:
    gate.log.publish("a/b c", b"with 'quotes', \\ and %s", qos=2, client="me", at=START)
    gate.drain()
    (msgid,) = gate.published()
    assert messages(server) == [(msgid, "a/b c", "me", 2, 0, b"with 'quotes', \\ and %s", NOW)]
    assert server.rows("SELECT msgid FROM list") == [(msgid,)]
    assert mark(server) == [1]
    if server.backend == "mysql":
        assert server.rows("SELECT node FROM mqtt_msg") == [("barn",)]


def test_a_lot_arrives_once_and_in_order(gate: Rig, server: SqlServer) -> None:
    gate.log.publish_many(3000)
    gate.drain()
    assert_holds_everything(gate, server)
    assert mark(server) == [3000]


def test_qos_0_and_retain_clears_are_not_stored_as_messages(gate: Rig, server: SqlServer) -> None:
    gate.log.publish("a", b"x", qos=0)
    gate.log.publish("a", b"", qos=1, retain=True)
    gate.drain()
    assert messages(server) == []
    assert len(server.rows("SELECT msgid FROM list")) == 2, "statements see every message"


def test_on_message_store_stores_every_qos_and_nothing_twice(tmp_path: Path, server: SqlServer) -> None:
    text = rules(server.backend) + function_rule(server.backend, "message.publish.4", "on_message_store")
    with Rig(tmp_path, server.port, text, settings(server), server.backend) as gate:
        for qos in (0, 1, 2):
            gate.log.publish("a", b"%d" % qos, qos=qos)
        gate.drain()
        assert [row[5] for row in messages(server)] == [b"0", b"1", b"2"]


def test_presence_follows_the_events_not_the_sync(gate: Rig, server: SqlServer) -> None:
    gate.log.connected("c", START)
    gate.drain()
    assert client(server) == (1, "barn", NOW, None, NOW)
    gate.log.disconnected("c", START + 5000)
    gate.drain()
    assert client(server) == (0, "barn", NOW, utc(START + 5000), NOW)
    gate.log.connected("c", START + 9000)
    gate.drain()
    assert client(server) == (1, "barn", utc(START + 9000), None, NOW)


def test_a_week_of_flapping_becomes_one_row_with_the_last_true_times_and_few_statements(gate: Rig, server: SqlServer) -> None:
    before = statements(server)
    last = gate.log.flap("c", 5000, MINUTE)
    gate.drain()
    assert client(server) == (0, "barn", utc(last - MINUTE), utc(last), NOW)
    assert server.rows("SELECT count(*) FROM mqtt_client") == [(1,)]
    assert statements(server) - before < 100


def statements(server: SqlServer) -> int:
    """A number that rises with what is written."""
    if server.backend == "pgsql":
        ((transactions,),) = server.rows("SELECT txid_current()")
        return int(str(transactions))
    ((_, inserts),) = server.rows("SHOW GLOBAL STATUS LIKE 'Com_insert'")
    return int(str(inserts))


def test_a_late_presence_does_not_overwrite_a_newer_one_of_another_gateway(gate: Rig, server: SqlServer) -> None:
    server.run(f"INSERT INTO mqtt_client (clientid, state, online_at) VALUES ('c', 1, '{utc(START + MINUTE)}')")
    stamp(server, "client", "c", START + MINUTE)
    gate.log.connected("c", START)
    gate.log.disconnected("c", START + MINUTE // 2)
    gate.drain()
    assert client(server)[:3] == (1, None, utc(START + MINUTE))
    gate.log.disconnected("c", START + MINUTE + 1)
    gate.drain()
    assert client(server)[:3] == (1, None, utc(START + MINUTE)), "it had gone to the other one when this one noticed"
    gate.log.connected("c", START + MINUTE + 2)
    gate.log.disconnected("c", START + MINUTE + 3)
    gate.drain()
    assert client(server)[:2] == (0, "barn")


def test_without_a_stamp_the_specification_s_time_decides(gate: Rig, server: SqlServer) -> None:
    later = utc(START + MINUTE)
    server.run(f"INSERT INTO mqtt_client (clientid, state, online_at) VALUES ('c', 1, '{later}')")
    server.run(f"INSERT INTO mqtt_retain (topic, payload, arrived) VALUES ('r', 'newer', '{later}')")
    gate.log.connected("c", START)
    gate.log.publish("r", b"older", retain=True, at=START)
    gate.log.publish("s", b"first", retain=True, at=START)
    gate.drain()
    assert client(server)[2] == later
    assert retained(server) == {"r": b"newer", "s": b"first"}


def test_one_gateway_s_own_order_counts_even_when_its_clock_was_set_back(gate: Rig, server: SqlServer) -> None:
    gate.log.publish("r", b"before", retain=True, at=START + 90_000)
    gate.log.new_run(2)
    gate.log.publish("r", b"after", retain=True, at=START)
    gate.log.publish("r", b"last", retain=True, at=START)
    gate.drain()
    assert retained(server) == {"r": b"last"}
    assert server.rows("SELECT name, ms, gateway, epoch, seq FROM tidegate_stamp") == [("r", START, GATEWAY, 2, 3)]


def test_a_retained_message_and_its_deletion(gate: Rig, server: SqlServer) -> None:
    gate.log.publish("r", b"keep", qos=0, retain=True, at=START)
    gate.drain()
    (msgid,) = gate.published()
    assert server.rows("SELECT topic, msgid, sender, qos, arrived FROM mqtt_retain") == [("r", msgid, "c1", 0, NOW)]
    gate.log.publish("r", b"", retain=True, at=START + 10_000)
    gate.drain()
    assert retained(server) == {}
    assert server.rows("SELECT name, ms FROM tidegate_stamp WHERE gone_at IS NOT NULL") == [("r", START + 10_000)]


def test_a_deleted_retained_message_does_not_come_back_from_the_dead(gate: Rig, server: SqlServer) -> None:
    stamp(server, "retain", "r", START + MINUTE, "now()")
    gate.log.publish("r", b"a week old", retain=True, at=START)
    gate.drain()
    assert retained(server) == {}
    gate.log.publish("r", b"today", retain=True, at=START + MINUTE + 1)
    gate.drain()
    assert retained(server) == {"r": b"today"}


def test_a_late_deletion_leaves_a_newer_value(gate: Rig, server: SqlServer) -> None:
    server.run(f"INSERT INTO mqtt_retain (topic, payload, arrived) VALUES ('r', 'newer', '{utc(START + MINUTE)}')")
    stamp(server, "retain", "r", START + MINUTE)
    gate.log.publish("r", b"", retain=True, at=START)
    gate.drain()
    assert retained(server) == {"r": b"newer"}


def test_tombstones_go_after_thirty_days(gate: Rig, server: SqlServer) -> None:
    stamp(server, "retain", "old", START, "now() - INTERVAL '31' DAY")
    stamp(server, "retain", "gone", START, "now() - INTERVAL '29' DAY")
    stamp(server, "retain", "kept", START)
    gate.drain()
    assert sorted(server.rows("SELECT name FROM tidegate_stamp")) == [("gone",), ("kept",)]


def test_topics_that_differ_in_case_are_two(gate: Rig, server: SqlServer) -> None:
    gate.log.publish("A/x", b"1", retain=True)
    gate.log.publish("a/x", b"2", retain=True)
    gate.drain()
    assert retained(server) == {"A/x": b"1", "a/x": b"2"}


def test_every_value_of_a_statement_is_bound(tmp_path: Path, server: SqlServer) -> None:
    server.run("CREATE TABLE own (a varchar(99), b int, c int, d varchar(99), e bigint, f varchar(99))")
    values = "${topic}, ${qos}, ${retain}, ${payload}, ${timestamp}, concat('1%', cast(${clientid} as char(3)))"
    text = sql_rule(server.backend, "message.publish.1", f"insert into own values ({values})") + sql_rule(
        server.backend, "client.connected.1", "update own set f = ${clientid} where f like '1%'"
    )
    with Rig(tmp_path, server.port, text, settings(server), server.backend) as gate:
        payload = "'); drop table own; -- ü %s \\"
        gate.log.publish("a'b", payload.encode(), qos=1, client='"x"', at=START)
        gate.drain()
        assert server.rows("SELECT * FROM own") == [("a'b", 1, 0, payload, START // 1000, '1%"x"')]
        gate.log.connected("me")
        gate.drain()
        assert server.rows("SELECT f FROM own") == [("me",)]


def test_a_statement_on_our_tables_stands_between_what_came_before_and_after(tmp_path: Path, server: SqlServer) -> None:
    text = rules(server.backend) + sql_rule(
        server.backend, "message.publish.5", "update mqtt_retain set sender = ${msgid} where topic = ${topic}"
    )
    with Rig(tmp_path, server.port, text, settings(server), server.backend) as gate:
        gate.log.publish("r", b"1", retain=True)
        gate.log.publish("s", b"2", retain=True)
        gate.log.publish("r", b"3", qos=0)
        gate.log.publish("s", b"", qos=0, retain=True)
        gate.drain()
        assert server.rows("SELECT topic, sender FROM mqtt_retain") == [("r", gate.published()[2])]


@pytest.mark.parametrize("count", [40, 600])
def test_exactly_what_is_refused_goes_to_quarantine(tmp_path: Path, server: SqlServer, count: int) -> None:
    server.run("CREATE TABLE number (n int)")
    text = rules(server.backend) + sql_rule(server.backend, "message.publish.7", "insert into number values (${payload})")
    long = "t" * 300
    with Rig(tmp_path, server.port, text, settings(server), server.backend) as gate:
        for number in range(count):
            gate.log.publish("t/1", b"%d" % number)
        bad_number = gate.log.publish("t/2", b"seven")
        bad_topic = gate.log.publish(long, b"8", retain=True)
        gate.log.publish("t/3", b"9")
        bad_client = gate.log.connected("c" * 70)
        gate.drain()
        assert [(row.seq, row.target.split()[0]) for row in gate.quarantine()] == [
            (bad_number, "message.publish.7"),
            (bad_topic, "message.publish.1"),
            (bad_topic, "message.publish.2"),
            (bad_client, "client.connected.1"),
        ]
        assert f"300 characters do not fit mqtt_msg.topic ({180 if server.backend == 'mysql' else 255}): ALTER TABLE" in (
            gate.quarantine()[1].reason
        )
        assert [row[1] for row in messages(server)] == ["t/1"] * count + ["t/2", "t/3"]
        assert server.rows("SELECT n FROM number ORDER BY n") == [(n,) for n in sorted([*range(count), 8, 9])]
        assert [msgid for (msgid,) in server.rows("SELECT msgid FROM list ORDER BY n")] == gate.published()
        assert gate.standing().refused == 4
        assert mark(server) == [gate.log.seq]
        reasons = [row.reason for row in read_dead(gate.data)]
        gate.progress.apply("again", "retry", [row.id for row in read_dead(gate.data)], b"")
        gate.drain()
        assert [row.reason for row in read_dead(gate.data) if not row.due] == reasons, "and what would help is still told"


def test_a_refused_statement_in_the_middle_of_a_batch_is_found(tmp_path: Path, server: SqlServer) -> None:
    server.run("CREATE TABLE small (n smallint)")
    sql = "insert into small select ${timestamp} from mqtt_retain where topic = ${topic}"
    text = rules(server.backend) + sql_rule(server.backend, "message.publish.5", sql, "bad")
    with Rig(tmp_path, server.port, text, settings(server), server.backend) as gate:
        for _ in range(3):
            gate.log.publish("r", b"1", retain=True)
            gate.log.connected("c")
            bad = gate.log.publish("bad", b"2", retain=True)
            gate.log.disconnected("c")
        gate.drain(100)
        assert [row.seq for row in gate.quarantine()] == [bad - 8, bad - 4, bad]
        assert {row.target.split()[0] for row in gate.quarantine()} == {"message.publish.5"}
        assert retained(server) == {"r": b"1", "bad": b"2"}
        assert_holds_everything(gate, server)


def test_a_payload_that_is_too_large_is_refused_alone(tmp_path: Path, server: SqlServer) -> None:
    if server.backend == "pgsql":
        server.run("ALTER TABLE mqtt_msg ALTER COLUMN payload TYPE varchar(65535)")
    with rig(tmp_path, server) as gate:
        gate.log.publish("t", b"x" * 65_535)
        large = gate.log.publish("t", b"x" * 65_536)
        huge = gate.log.publish("t", b"x" * 20_000_000)
        gate.log.publish("t", b"small")
        gate.drain()
        assert {row.seq for row in gate.quarantine()} == {large, huge}
        assert server.rows("SELECT length(payload) FROM mqtt_msg ORDER BY id") == [(65_535,), (5,)]


def test_there_is_time_for_something_else_while_the_server_works(gate: Rig, server: SqlServer) -> None:
    gate.configure(server.port, function_rule(server.backend, "message.publish.1", "on_message_publish"), settings(server))
    gate.log.publish_many(500)
    there: list[int] = []
    with closing(gate.connect()) as link:
        batch = Batch(GATEWAY, 1, Mark(), 500, gate.plan.ask(gate.log.entries()).operations)
        assert link.write(batch, lambda: there.append(gate.log.publish("t"))) == []
        assert there == [501]
        assert [row[0] for row in messages(server)] == gate.published()[:500]
        assert link.write(Batch(GATEWAY, 1, Mark(500), 501, ())) == []
        assert there == [501]


def test_a_mark_that_moved_meanwhile_stops_the_batch(gate: Rig, server: SqlServer) -> None:
    gate.log.publish_many(50)
    gate.step()
    server.run(f"INSERT INTO tidegate_ledger VALUES ('{GATEWAY}', 1, 'pool1', 20, '{NOW}')")
    gate.drain()
    assert [row[0] for row in messages(server)] == gate.published()[20:]


def test_a_gap_is_told_once(gate: Rig, server: SqlServer) -> None:
    times = f'"first_at": {START}, "last_at": {START + MINUTE}'
    gate.log.gap(f'{{"first_seq": 7, "last_seq": 9, {times}, "topic": "t", "reason": "disk_budget", "count": 3}}')
    gate.drain()
    columns = "gateway, first_seq, last_seq, first_at, last_at, topic, reason, count"
    assert server.rows(f"SELECT {columns} FROM tidegate_gap") == [
        (GATEWAY, 7, 9, NOW, utc(START + MINUTE), "t", "disk_budget", 3)
    ]


def test_a_missing_table_stops_the_pool_and_names_the_command(gate: Rig, server: SqlServer) -> None:
    server.run("DROP TABLE mqtt_msg")
    gate.log.publish_many(5)
    gate.step_until(lambda: gate.standing().state == "misconfigured", 5)
    assert "mqtt_msg" in gate.standing().error
    assert f"`tidegate uplink init {server.backend}.pool1`" in gate.standing().hint
    server.recreate()
    tables(server)
    gate.drain()
    assert_holds_everything(gate, server)


def test_without_our_tables_a_pool_works_says_so_and_goes_on_when_they_come(gate: Rig, server: SqlServer) -> None:
    for table in ("ledger", "stamp", "gap"):
        server.run(f"DROP TABLE tidegate_{table}")
    gate.log.publish_many(50)
    gate.log.connected("c")
    gate.log.publish("r", b"x", retain=True)
    gate.log.gap(DROPPED)
    gate.drain()
    gate.log.append(SUBSCRIBED, "c", "t/#", 1, None)  # nothing of the pool's, so nothing is written
    gate.drain()
    assert_holds_everything(gate, server)
    assert "without tidegate_ledger, tidegate_stamp, tidegate_gap what is sent again" in gate.standing().warning
    assert gate.said == [f"pool_warning: {gate.standing().warning}"]
    text = (SHIPPED / f"emqx_backend_{server.backend}.sql").read_text()
    statements = [part[part.index("CREATE") :] for part in text.split(";\n") if "CREATE TABLE IF NOT EXISTS" in part]
    server.run(*[statement for statement in statements if "tidegate_" in statement.split("(")[0]])
    gate.worker.stop()
    gate.restart()
    gate.log.publish("t/1", b"after")
    gate.drain()
    assert_holds_everything(gate, server)
    assert (gate.standing().warning, mark(server)) == ("", [gate.log.seq])


def test_a_ledger_that_is_lost_and_made_anew_is_not_taken_for_an_older_state(gate: Rig, server: SqlServer) -> None:
    gate.log.publish_many(50)
    gate.drain()
    server.run("DROP TABLE tidegate_ledger")
    gate.worker.stop()
    gate.restart()
    gate.log.publish_many(20)
    gate.drain()
    text = (SHIPPED / f"emqx_backend_{server.backend}.sql").read_text()
    server.run(*[part[part.index("CREATE") :] for part in text.split(";\n") if "tidegate_ledger (" in part])
    gate.worker.stop()
    gate.restart()
    gate.log.publish("t/1", b"after")
    gate.drain()
    assert_holds_everything(gate, server)


def test_rows_come_back_from_quarantine_as_they_were(gate: Rig, server: SqlServer) -> None:
    from tidegate.uplink import sql_actions, sql_record
    from tidegate.uplink.sql_rows import decode

    gate.log.connected("c")
    gate.log.publish("r", b"bytes \xff and \x00", retain=True)
    gate.log.gap(DROPPED)
    seen = set()
    for entry in gate.log.entries():
        for operation in gate.plan.operations(entry):
            seen.add(sql_record.describe(operation.packed.data)[0])
            assert decode(operation.packed.data) == operation.packed
            assert sql_record.change(operation.packed.data, {}) == operation.packed.data
    assert seen == {"presence", "message", "retained", "sql", "gap"}
    assert sql_actions.ACTIONS.keys() >= {rule.function for rule in gate.rules if rule.function}


@pytest.mark.parametrize(("way", "found"), [("hex", b"ff00"), ("base64", b"/wA="), ("quarantine", None)])
def test_bytes_in_a_text_column(tmp_path: Path, postgres: SqlServer, way: str, found: bytes | None) -> None:
    postgres.recreate()
    tables(postgres)
    postgres.run("CREATE TABLE own (t text, b bytea)")
    own = sql_rule("pgsql", "message.publish.7", "insert into own values (${payload}, ${payload})")
    text = rules("pgsql") + own
    with Rig(tmp_path, postgres.port, text, settings(postgres) + f"\nbinary_payload = {way}", "pgsql") as gate:
        bad = gate.log.publish("t", b"\xff\x00", retain=True)
        gate.log.publish("u", b"text")
        gate.drain()
        assert [row[5] for row in messages(postgres)] == [*([found] if found else []), b"text"]
        assert retained(postgres) == ({"t": found} if found else {})
        binary = [(found.decode(), b"\xff\x00")] if found else []
        assert postgres.rows("SELECT t, b FROM own ORDER BY t") == sorted([*binary, ("text", b"text")])
        assert [row.seq for row in gate.quarantine()] == ([] if found else [bad] * 3)


def test_on_message_store_stores_every_qos(tmp_path: Path, server: SqlServer) -> None:
    text = function_rule(server.backend, "message.publish.1", "on_message_store")
    with Rig(tmp_path, server.port, text, settings(server), server.backend) as gate:
        for qos in range(3):
            gate.log.publish("t", b"%d" % qos, qos=qos)
        gate.drain()
        assert [(row[3], row[5]) for row in messages(server)] == [(0, b"0"), (1, b"1"), (2, b"2")]


@pytest.mark.parametrize(
    ("name", "collation"),
    [("mysql", "utf8mb4_general_ci"), pytest.param("mysql-9", "utf8mb4_0900_ai_ci", marks=NEEDS_MYSQL)],
)
def test_a_collation_without_case_is_named_with_the_alter(tmp_path: Path, name: str, collation: str) -> None:
    with SERVERS[name]() as server:
        tables(server)
        server.run(f"ALTER TABLE mqtt_msg CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
        with rig(tmp_path, server) as gate:
            gate.log.publish("t", b"x")
            gate.drain()
            assert "in mqtt_msg A/x and a/x are one topic" in gate.standing().warning
            assert "ALTER TABLE mqtt_msg CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" in gate.standing().warning


@pytest.mark.parametrize("name", ["mysql", pytest.param("mysql-9", marks=NEEDS_MYSQL)])
def test_what_has_several_bytes_a_character_fits_the_packet(tmp_path: Path, name: str) -> None:
    """A packet that is too large ends the line instead of being refused."""
    with SERVERS[name]() as server:
        tables(server)
        server.run("SET GLOBAL max_allowed_packet = 65536")
        with rig(tmp_path, server, own=False) as gate:
            for _ in range(60):
                gate.log.publish("t", "水".encode() * 2_000)
            gate.drain()
            assert server.rows("SELECT count(*), min(length(payload)) FROM mqtt_msg") == [(60, 6_000)]
            assert not any(said.startswith("pool_unreachable") for said in gate.said)
