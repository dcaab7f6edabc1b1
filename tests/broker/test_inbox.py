"""What far ends know becomes subscriptions of devices: once, durable, and only of the pool that says so."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.inbox import Inbox
from tidegate.store.entry import PUBLISH, SUBSCRIBED, UNSUBSCRIBED, Want
from tidegate.store.inbox import SUBSCRIBE, SUBSCRIPTIONS, UNSUBSCRIBE
from tidegate.store.local import LocalRules
from tidegate.store.reader import LogReader

from tests.broker.inbox_file import answer, make_inbox, put
from tests.broker.world import World

WANTS = [Want(PUBLISH, "#", 1, False), Want(SUBSCRIBED, "#", 0, False), Want(UNSUBSCRIBED, "#", 0, False)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_inbox(tmp_path / "uplink.db")
    return tmp_path / "log.db"


def open_world(path: Path) -> tuple[World, Inbox]:
    world = World(path)
    world.broker.router.set_wants(WANTS, LocalRules(pools_new=frozenset({"redis.pool1", "pgsql.pool1"})))
    return world, Inbox(world.broker, path.with_name("uplink.db"))


def tell(world: World, inbox: Inbox, *answers: Any) -> None:
    put(world.store.path.with_name("uplink.db"), *answers)
    inbox.look()
    world.settle()


def payloads(device: Any) -> list[bytes]:
    return [message[3] for message in device.messages()]


def rows(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def fired(path: Path) -> list[tuple[int, str]]:
    return [(e.kind, e.topic) for e in LogReader(path).read(0, 1000)[0] if e.kind in (SUBSCRIBED, UNSUBSCRIBED)]


def test_an_answer_becomes_a_subscription_of_a_connected_client_once(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    world.device("p").publish("far/kept", b"retained", retain=True)
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("far/+", 1)))
    world.device("p").publish("far/x", b"live", qos=2)
    assert payloads(device) == [b"retained", b"live"]
    assert fired(path) == [(SUBSCRIBED, "far/+")]
    world.kill()
    world, inbox = open_world(path)
    inbox.look()
    world.settle()
    assert fired(path) == [(SUBSCRIBED, "far/+")], "it is not applied a second time"
    assert rows(path, "SELECT clientid, topic, qos, source FROM proxy_subscription") == [("s", "far/+", 1, "redis.pool1")]
    device = world.device("s")
    assert fired(path) == [(SUBSCRIBED, "far/+")] * 2, "of a new session, from what is known here"
    world.device("p").publish("far/x", b"again")
    assert payloads(device) == [b"retained", b"again"]


@pytest.mark.parametrize("commits", range(3))
def test_killed_at_any_commit_it_takes_effect_once(path: Path, commits: int) -> None:
    world, inbox = open_world(path)
    world.device("s", clean=False)
    world.auto = False
    put(path.with_name("uplink.db"), answer(SUBSCRIPTIONS, "s", ("far/a", 1)), answer(SUBSCRIBE, "s", ("far/b", 1)))
    inbox.look()
    world.read()
    for _ in range(commits):
        if world.commits:
            world.commit()
    world.kill()
    world, inbox = open_world(path)
    inbox.look()
    world.settle()
    device = world.device("s", clean=False)
    for topic in ("far/a", "far/b"):
        world.device("p").publish(topic, topic.encode())
    assert payloads(device) == [b"far/a", b"far/b"]
    assert fired(path) == [(SUBSCRIBED, "far/a"), (SUBSCRIBED, "far/b")]


def test_the_difference_is_applied_to_rows_of_that_pool_only(path: Path) -> None:
    world, inbox = open_world(path)
    world.broker.router.set_wants(WANTS, LocalRules(lookup_new=True, pools_new=frozenset({"redis.pool1", "pgsql.pool1"})))
    world.broker.made.add("s", "mine", 1, lambda: None)
    device = world.device("s")
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 1), ("b", 1), ("mine", 1)))
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("b", 1), ("c", 1), pool="pgsql.pool1"))
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("d", 1)))
    for topic in ("mine", "a", "b", "c", "d"):
        world.device("p").publish(topic, topic.encode())
    assert payloads(device) == [b"mine", b"b", b"c", b"d"], "b stands in PostgreSQL too"
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", pool="pgsql.pool1"), answer(SUBSCRIPTIONS, "s"))
    assert [row[0] for row in rows(path, "SELECT topic FROM mqtt_sub")] == ["mine"]


def test_a_channel_adds_and_takes_away(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    tell(world, inbox, answer(SUBSCRIBE, "s", ("a", 0)), answer(SUBSCRIBE, "s", ("b", 1)), answer(UNSUBSCRIBE, "s", ("a", 0)))
    for topic in ("a", "b"):
        world.device("p").publish(topic, topic.encode())
    assert payloads(device) == [b"b"]


def test_another_qos_at_the_far_end_is_taken_over(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    for qos in (0, 2):
        tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", qos)))
        world.device("p").publish("a", b"m", qos=2)
        assert [message[1] >> 1 & 3 for message in device.messages()] == [qos]


def test_who_subscribed_itself_keeps_its_own_options(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    device.subscribe("a", 2)
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 0)))
    world.device("p").publish("a", b"m", qos=2)
    assert [message[1] >> 1 & 3 for message in device.messages()] == [2]


def test_what_can_be_no_subscription_is_refused_counted_and_holds_nothing_up(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 3), ("a/#/b", 1), ("$share/g/t", 1), ("good", 1)))
    world.device("p").publish("good", b"m")
    assert payloads(device) == [b"m"]
    assert world.broker.counters["lookup_refused"] == 3


def test_many_answers_come_in_pieces(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    tell(world, inbox, *[answer(SUBSCRIBE, "s", (f"t/{number}", 1)) for number in range(500)])
    assert len(fired(path)) == 500
    world.device("p").publish("t/499", b"m")
    assert payloads(device) == [b"m"]


def test_another_file_begins_at_its_beginning(path: Path) -> None:
    world, inbox = open_world(path)
    tell(world, inbox, answer(SUBSCRIBE, "s", ("a", 1)), answer(SUBSCRIBE, "s", ("b", 1)))
    path.with_name("uplink.db").unlink()
    inbox.look()
    world.settle()
    make_inbox(path.with_name("uplink.db"), "another")
    tell(world, inbox, answer(SUBSCRIBE, "s", ("c", 1)))
    assert [row[0] for row in rows(path, "SELECT topic FROM mqtt_sub")] == ["a", "b", "c"]
    assert rows(path, "SELECT * FROM cursor") == [("inbox:another", 1)]


def test_a_file_that_cannot_be_read_is_read_later(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    uplink = path.with_name("uplink.db")
    whole = uplink.read_bytes()
    uplink.write_bytes(b"no database" * 1000)
    inbox.look()
    world.settle()
    assert any(line.startswith("inbox_unreadable") for line in world.said)
    uplink.write_bytes(whole)
    put(uplink, answer(SUBSCRIPTIONS, "s", ("a", 1)))
    world.wait(6)
    inbox.tick()
    world.settle()
    world.device("p").publish("a", b"m")
    assert payloads(device) == [b"m"]


def test_a_pool_whose_rule_is_gone_makes_no_subscriptions(path: Path) -> None:
    world, inbox = open_world(path)
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 1), pool="mysql.pool1"))
    device = world.device("s")
    world.device("p").publish("a", b"m")
    assert payloads(device) == []
