"""Acknowledgements in PostgreSQL, MariaDB and MySQL: the vector, the specification's mqtt_acked, what a queue gave away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate.store.entry import ACKED, UNSUBSCRIBED
from tidegate.store.msgid import gateway_code, message_id

from tests.support.sql_servers import SqlServer

from .logfile import GATEWAY, START
from .rig import Rig
from .sql_rig import function_rule, mark, messages, rules, settings, utc

OTHER = "1111111111111111"
CODE, OTHERS = gateway_code(GATEWAY), gateway_code(OTHER)
MINUTE = 60_000


@pytest.fixture
def gate(tmp_path: Path, server: SqlServer) -> Iterator[Rig]:
    with Rig(tmp_path, server.port, all_rules(server.backend), settings(server), server.backend) as gate:
        yield gate


def all_rules(backend: str) -> str:
    return rules(backend, own=False) + "".join(
        function_rule(backend, hook, function, topic)
        for hook, topic, function in (
            ("message.acked.1", "queue/#", "on_message_acked_for_queue"),
            ("message.acked.2", "a/#", "on_message_acked"),
            ("session.unsubscribed.1", "a/#", "on_acked_delete"),
        )
    )


def publish(gate: Rig, count: int, topic: str = "a/b") -> list[str]:
    first = gate.log.seq + 1
    for _ in range(count):
        gate.log.publish(topic)
    return [entry.msgid for entry in gate.log.entries() if entry.seq >= first]


def vector(server: SqlServer) -> list[tuple[object, ...]]:
    return server.rows("SELECT gateway, epoch, seq FROM tidegate_position WHERE gateway <> '' ORDER BY gateway")


def acked(server: SqlServer) -> list[tuple[object, ...]]:
    """Client, topic and the message that `mid` names."""
    sql = "SELECT a.clientid, a.topic, m.msgid FROM mqtt_acked a JOIN mqtt_msg m ON m.id = a.mid ORDER BY a.clientid, a.topic"
    return server.rows(sql)


def drop(gate: Rig, at: int) -> None:
    gate.log.append(UNSUBSCRIBED, "c", "a/b", 0, None, at)


def test_a_position_names_a_message_of_its_own_batch_by_the_row_there(gate: Rig, server: SqlServer) -> None:
    _, two, three = publish(gate, 3)
    gate.log.position("c", "a/b", two)
    gate.drain()
    assert (vector(server), acked(server)) == ([(CODE, 1, 2)], [("c", "a/b", two)])
    at = gate.log.position("c", "a/b", three)
    gate.drain()
    assert (vector(server), acked(server)) == ([(CODE, 1, 3)], [("c", "a/b", three)])
    assert server.rows("SELECT created FROM mqtt_acked") == [(utc(gate.log.at),)]
    assert (mark(server), gate.quarantine()) == ([at], [])


@pytest.mark.parametrize("in_one_batch", [True, False])
def test_a_position_never_goes_back(gate: Rig, server: SqlServer, in_one_batch: bool) -> None:
    one, two = publish(gate, 2)
    gate.log.position("c", "a/b", two)
    if not in_one_batch:
        gate.drain()
    gate.log.position("c", "a/b", one)
    gate.drain()
    assert (vector(server), acked(server)) == ([(CODE, 1, 2)], [("c", "a/b", two)])


@pytest.mark.parametrize("in_one_batch", [True, False])
def test_each_gateway_s_messages_count_by_themselves_and_the_newest_is_in_mqtt_acked(
    gate: Rig, server: SqlServer, in_one_batch: bool
) -> None:
    old, new = message_id(START - MINUTE, OTHERS, 4, 70), message_id(START + MINUTE, OTHERS, 4, 90)
    (mine,) = publish(gate, 1)
    gate.drain()
    for msgid in (old, new):
        server.run(f"INSERT INTO mqtt_msg (msgid, topic, qos, arrived) VALUES ('{msgid}', 'a/b', 1, '{utc(START)}')")
    gate.log.position("c", "a/b", mine)
    if not in_one_batch:
        gate.drain()
    gate.log.position("c", "a/b", old)
    gate.drain()
    assert vector(server) == sorted([(CODE, 1, 1), (OTHERS, 4, 70)])
    assert acked(server) == [("c", "a/b", mine)], "though its row came earlier"
    gate.log.position("c", "a/b", new)
    gate.drain()
    assert vector(server) == sorted([(CODE, 1, 1), (OTHERS, 4, 90)])
    assert acked(server) == [("c", "a/b", new)]


def test_a_log_that_was_laid_back_goes_on_with_lower_numbers(gate: Rig, server: SqlServer) -> None:
    gate.log.position("c", "a/b", message_id(START, CODE, 1, 500))
    gate.drain()
    gate.log.position("c", "a/b", message_id(START + MINUTE, CODE, 2, 20))
    gate.drain()
    assert vector(server) == [(CODE, 2, 20)]


def test_ids_that_others_made_move_mqtt_acked_alone(gate: Rig, server: SqlServer) -> None:
    values = f"'a/b', 1, '{utc(START)}'"
    server.run(f"INSERT INTO mqtt_msg (msgid, topic, qos, arrived) VALUES ('theirs', {values})")
    gate.log.position("c", "a/b", "theirs")
    gate.log.position("c", "a/b", "nobody knows it")
    gate.drain()
    assert (vector(server), acked(server)) == ([], [("c", "a/b", "theirs")])


@pytest.mark.parametrize("in_one_batch", [True, False])
def test_an_unsubscribe_drops_the_position_and_what_is_older_does_not_bring_it_back(
    gate: Rig, server: SqlServer, in_one_batch: bool
) -> None:
    one, two = publish(gate, 2)
    gate.log.position("c", "a/b", one, START)
    gate.log.position("other", "a/b", one, START)
    if not in_one_batch:
        gate.drain()
    drop(gate, START + MINUTE)
    if not in_one_batch:
        gate.drain()
    gate.log.position("c", "a/b", two, START + 1000)  # as of a gateway that was away
    gate.drain()
    assert acked(server) == [("other", "a/b", one)]
    assert server.rows("SELECT clientid, gateway FROM tidegate_position ORDER BY clientid") == [("c", ""), ("other", CODE)]
    gate.log.position("c", "a/b", two, START + MINUTE + 1000)
    gate.drain()
    assert acked(server) == [("c", "a/b", two), ("other", "a/b", one)]


def test_an_unsubscribe_with_wildcards_drops_the_positions_that_it_names(gate: Rig, server: SqlServer) -> None:
    found = {topic: publish(gate, 1, topic)[0] for topic in ("a/b", "a/c", "a/d")}
    for topic, msgid in found.items():
        gate.log.position("c", topic, msgid, START)
    gate.log.append(UNSUBSCRIBED, "c", "a/+", 0, b'["a/b", "a/c"]', START + MINUTE)
    gate.log.append(UNSUBSCRIBED, "c", "a/#", 0, None, START + MINUTE)
    gate.drain()
    assert acked(server) == [("c", "a/d", found["a/d"])]
    dropped = server.rows("SELECT topic FROM tidegate_position WHERE gateway = '' ORDER BY topic")
    assert dropped == [("a/b",), ("a/c",)]


def test_a_late_unsubscribe_leaves_a_newer_position(gate: Rig, server: SqlServer) -> None:
    (one,) = publish(gate, 1)
    gate.log.position("c", "a/b", one, START + MINUTE)
    gate.drain()
    drop(gate, START)
    gate.drain()
    assert (vector(server), acked(server)) == ([(CODE, 1, 1)], [("c", "a/b", one)])


def test_what_an_unsubscribe_left_goes_after_thirty_days(gate: Rig, server: SqlServer) -> None:
    now = "extract(epoch FROM now())" if server.backend == "pgsql" else "unix_timestamp()"
    for client, days in (("old", 31), ("young", 29)):
        server.run(f"INSERT INTO tidegate_position VALUES ('{client}', 't', '', {now} - {days} * 86400, 0, '{utc(START)}')")
    server.run(f"INSERT INTO tidegate_position VALUES ('old', 't', '{CODE}', 1, 1, now() - INTERVAL '99' DAY)")
    gate.drain()
    found = server.rows("SELECT clientid, gateway FROM tidegate_position ORDER BY clientid, gateway")
    assert found == [("old", CODE), ("young", "")]


def test_a_queue_s_message_goes_for_everybody_when_it_is_acknowledged(gate: Rig, server: SqlServer) -> None:
    first, second = publish(gate, 2, "queue/1")
    gate.drain()
    for _ in range(2):
        gate.log.append(ACKED, "c", "queue/1", 0, first.encode())
        gate.drain()
    assert [row[0] for row in messages(server)] == [second]


def test_without_the_vector_s_table_mqtt_acked_is_written_and_it_is_said(gate: Rig, server: SqlServer) -> None:
    server.run("DROP TABLE tidegate_position")
    one, two = publish(gate, 2)
    gate.log.position("c", "a/b", two)
    gate.log.position("c", "a/b", one)
    gate.drain()
    assert acked(server) == [("c", "a/b", two)]
    assert gate.standing().warning.startswith("without tidegate_position a client that reads messages of several gateways")
    drop(gate, gate.log.at + MINUTE)
    gate.drain()
    assert acked(server) == []


def test_what_does_not_fit_goes_to_quarantine_alone(gate: Rig, server: SqlServer) -> None:
    (one,) = publish(gate, 1)
    bad = gate.log.position("c" * 70, "a/b", one)
    gate.log.position("c", "a/b", one)
    gate.drain()
    (kept,) = gate.quarantine()
    assert kept.seq == bad
    assert kept.reason.startswith("70 characters do not fit mqtt_acked.clientid (64): ALTER TABLE")
    assert acked(server) == [("c", "a/b", one)]
