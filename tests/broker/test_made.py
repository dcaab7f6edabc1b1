"""Subscriptions made for clients: from the table at a connect, live by an operator, durable, checked like a SUBSCRIBE."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.made import fault
from tidegate.gateway.mqtt.packets import ConnAck, SubAck
from tidegate.store.entry import PUBLISH, SESSION_CREATED, SUBSCRIBED, UNSUBSCRIBED, Want
from tidegate.store.local import LocalRules
from tidegate.store.reader import LogReader

from tests.broker.world import World

WANTS = [Want(PUBLISH, "#", 1, False), Want(SUBSCRIBED, "#", 0, False), Want(UNSUBSCRIBED, "#", 0, False)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def open_world(path: Path, rules: LocalRules | None = None) -> World:
    world = World(path)
    world.broker.router.set_wants(WANTS, rules or LocalRules(lookup_new=True))
    return world


def add(world: World, clientid: str, topic_filter: str, qos: int = 1) -> list[bool]:
    done: list[bool] = []
    world.broker.made.add(clientid, topic_filter, qos, lambda: done.append(True))
    world.settle()
    return done


def remove(world: World, clientid: str, topic_filter: str) -> bool:
    found = world.broker.made.remove(clientid, topic_filter, lambda: None)
    world.settle()
    return found


def payloads(device: Any) -> list[bytes]:
    return [message[3] for message in device.messages()]


def entries(path: Path, kind: int) -> list[tuple[str, str, int]]:
    return [(e.clientid, e.topic, e.qos) for e in LogReader(path).read(0, 100)[0] if e.kind == kind]


@pytest.mark.parametrize("clean", [True, False])
def test_at_a_connect_the_rows_become_subscriptions_without_suback(path: Path, clean: bool) -> None:
    world = open_world(path)
    assert add(world, "s", "made/+", 1) and add(world, "s", "low", 0) and add(world, "other", "#", 2)
    world.device("p").publish("made/kept", b"retained", retain=True)
    subscriber = world.device("s", clean=clean)
    assert isinstance(subscriber.got[0], ConnAck) and not any(isinstance(e, SubAck) for e in subscriber.got)
    assert payloads(subscriber) == [b"retained"]
    world.device("p2").publish("made/x", b"live", qos=2)
    world.device("p3").publish("low", b"qos0", qos=2)
    assert [(m[1] >> 1 & 3, m[3]) for m in subscriber.messages()] == [(1, b"live"), (0, b"qos0")]
    assert entries(path, SUBSCRIBED) == [("s", "made/+", 1), ("s", "low", 0)]


def test_they_are_in_one_commit_with_the_session(path: Path) -> None:
    world = open_world(path)
    add(world, "s", "made", 1)
    world.device("s", clean=False)
    world.kill()
    world = open_world(path)
    world.device("p").publish("made", b"while away")
    assert payloads(world.device("s", clean=False)) == [b"while away"], "the session was resumed, not created"


def test_lookup_at_every_connect_adds_what_is_missing(path: Path) -> None:
    world = open_world(path, LocalRules())
    subscriber = world.device("s", clean=False)
    subscriber.disconnect()
    add(world, "s", "made", 1)
    world.broker.router.set_wants(WANTS, LocalRules(lookup_always=True))
    subscriber = world.device("s", clean=False)
    world.device("p").publish("made", b"m")
    assert payloads(subscriber) == [b"m"]


def test_without_the_rule_a_row_has_no_effect(path: Path) -> None:
    world = open_world(path, LocalRules())
    subscriber = world.device("s")
    add(world, "s", "made", 1)
    world.device("p").publish("made", b"m")
    assert payloads(subscriber) == [] and world.device("s").messages() == []


def test_a_connected_client_gets_and_loses_a_subscription_at_once(path: Path) -> None:
    world = open_world(path)
    subscriber = world.device("s")
    assert add(world, "s", "made", 1) == [True]
    world.device("p").publish("made", b"one")
    assert payloads(subscriber) == [b"one"]
    assert remove(world, "s", "made")
    world.device("p").publish("made", b"two")
    assert payloads(subscriber) == []
    assert not remove(world, "s", "made")
    assert entries(path, UNSUBSCRIBED) == [("s", "made", 0)]


def test_a_sleeping_session_has_them_too(path: Path) -> None:
    world = open_world(path)
    world.device("s", clean=False).disconnect()
    add(world, "s", "made", 1)
    world.device("p").publish("made", b"one")
    assert payloads(world.device("s", clean=False)) == [b"one"]


def test_a_change_is_answered_when_it_is_durable_and_stands_in_the_view(path: Path) -> None:
    world = open_world(path)
    done: list[bool] = []
    world.broker.made.add("s", "made/#", 2, lambda: done.append(True))
    assert not done
    world.commit()
    assert done
    world.kill()
    world = open_world(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT clientid, topic, qos FROM mqtt_sub").fetchall() == [("s", "made/#", 2)]
    subscriber = world.device("s")
    world.device("p").publish("made/x", b"m", qos=2)
    assert [m[1] >> 1 & 3 for m in subscriber.messages()] == [2]
    remove(world, "s", "made/#")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM mqtt_sub").fetchone() == (0,)


def test_rows_that_may_not_be_subscriptions_are_refused_and_counted(path: Path) -> None:
    world = open_world(path)
    world.kill()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        rows = [("a", 3), ("b", -1), ("a/#/b", 1), ("$share/g/t", 1), ("good", 1)]
        db.executemany("INSERT INTO proxy_subscription (clientid, topic, qos, created) VALUES ('s', ?, ?, 0)", rows)
    world = open_world(path)
    subscriber = world.device("s")
    assert world.broker.counters["lookup_refused"] == 4
    world.device("p").publish("good", b"m")
    assert payloads(subscriber) == [b"m"]


@pytest.mark.parametrize(("clientid", "topic_filter"), [("a\udcff", "t"), ("a", "t/\udcff"), ("", "t"), ("a", "#/t")])
def test_what_can_be_no_subscription_is_said_before_anything_is_changed(clientid: str, topic_filter: str) -> None:
    assert fault(clientid, topic_filter, 1)
    assert not fault("ä", "t/ä", 1)


def test_a_client_that_subscribes_itself_keeps_its_own_qos(path: Path) -> None:
    world = open_world(path, LocalRules(lookup_always=True))
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("made", 2)
    subscriber.disconnect()
    world.kill()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("INSERT INTO proxy_subscription (clientid, topic, qos, created) VALUES ('s', 'made', 0, 0)")
    world = open_world(path, LocalRules(lookup_always=True))
    subscriber = world.device("s", clean=False)
    world.device("p").publish("made", b"m", qos=2)
    assert [m[1] >> 1 & 3 for m in subscriber.messages()] == [2]


def test_session_created_is_logged_before_what_it_brings(path: Path) -> None:
    world = open_world(path)
    world.broker.router.set_wants([*WANTS, Want(SESSION_CREATED, "#", 0, False)], LocalRules(lookup_new=True))
    add(world, "s", "made", 1)
    world.device("s")
    assert [e.kind for e in LogReader(path).read(0, 100)[0]] == [SESSION_CREATED, SUBSCRIBED]
