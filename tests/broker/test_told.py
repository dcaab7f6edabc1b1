"""What far ends are told of how far clients have read: positions in the log, over the contiguous acknowledged prefix only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.gateway.inbox import Inbox
from tidegate.gateway.mqtt.packets import PubAck, PubRec, Unsubscribe
from tidegate.store.entry import POSITION, PUBLISH, UNSUBSCRIBED, Entry, Want, forgotten
from tidegate.store.inbox import MESSAGE, Answer
from tidegate.store.local import PUBSUB, Keep, LocalRules
from tidegate.store.msgid import message_id
from tidegate.store.reader import LogReader

from tests.broker.inbox_file import make_inbox, put
from tests.broker.world import NOW, World

WANTS = [Want(PUBLISH, "#", 1, False), Want(POSITION, "read/#", 0, False), Want(UNSUBSCRIBED, "#", 0, False)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def world(path: Path) -> Iterator[World]:
    world = open_world(path)
    yield world
    world.kill()


def open_world(path: Path) -> World:
    world = World(path)
    world.broker.router.set_wants(WANTS)
    return world


def entries(path: Path) -> list[Entry]:
    with closing(LogReader(path)) as reader:
        return reader.read(0, 10_000)[0]


def told(path: Path) -> list[tuple[str, str, bytes]]:
    """Client, topic and the payload of the message that each position names, in the order of the log."""
    found = entries(path)
    payloads = {entry.msgid: entry.payload for entry in found if entry.kind == PUBLISH}
    return [(e.clientid, e.topic, payloads[e.payload.decode()]) for e in found if e.kind == POSITION]


def publish(world: World, topic: str, *payloads: bytes, qos: int = 1) -> None:
    publisher = world.device("publisher")
    for number, payload in enumerate(payloads, 1):
        publisher.publish(topic, payload, qos, packet_id=number)
    publisher.disconnect()
    world.settle()


def test_a_position_is_told_once_for_all_that_was_acknowledged(world: World, path: Path) -> None:
    reader = world.device("r")
    reader.subscribe("read/#")
    publish(world, "read/a", b"1", b"2", b"3")
    reader.ack_all()
    world.wait(1)
    assert told(path) == [("r", "read/a", b"3")]
    world.wait(1)
    assert len(told(path)) == 1, "nothing moved since"


def test_acknowledgements_out_of_order_never_skip_a_gap(world: World, path: Path) -> None:
    reader = world.device("r")
    reader.subscribe("read/#")
    publish(world, "read/a", b"1", b"2", b"3", b"4")
    first, second, third, fourth = [packet_id for _, _, packet_id, _ in reader.messages()]
    reader.send(PubAck(third))
    reader.send(PubAck(second))
    world.wait(1)
    assert told(path) == []
    reader.send(PubAck(first))
    world.wait(1)
    assert told(path) == [("r", "read/a", b"3")]
    reader.send(PubAck(fourth))
    world.wait(1)
    assert told(path)[1:] == [("r", "read/a", b"4")]


def test_topics_that_no_rule_names_and_qos_0_are_not_told(world: World, path: Path) -> None:
    reader = world.device("r")
    reader.subscribe("#")
    publish(world, "other", b"1")
    publish(world, "read/a", b"2", qos=0)
    reader.ack_all()
    world.wait(1)
    assert told(path) == []


def test_a_pubrec_counts_and_is_in_its_commit(world: World, path: Path) -> None:
    reader = world.device("r", clean=False)
    reader.subscribe("read/#", 2)
    publish(world, "read/a", b"1", qos=2)
    (_, _, packet_id, _), *_ = reader.messages()
    reader.send(PubRec(packet_id))
    assert told(path) == [("r", "read/a", b"1")]


def test_what_was_acknowledged_is_told_before_the_unsubscribe_and_nothing_after_it(world: World, path: Path) -> None:
    reader = world.device("r")
    reader.subscribe("read/a")
    publish(world, "read/a", b"1", b"2")
    (_, _, first, _), (_, _, second, _) = reader.messages()
    reader.send(PubAck(first))
    reader.send(Unsubscribe(9, ("read/a",)))
    reader.send(PubAck(second))
    world.wait(1)
    kinds = [entry.kind for entry in entries(path) if entry.kind != PUBLISH]
    assert kinds == [POSITION, UNSUBSCRIBED]
    assert told(path) == [("r", "read/a", b"1")]


def test_a_wildcard_unsubscribe_names_the_topics_whose_positions_go(world: World, path: Path) -> None:
    acks = (("read/#", PUBSUB),)
    world.broker.router.set_wants(WANTS, LocalRules(acks=acks, forgets=("read/#",), keeps=(Keep("#", 3_600_000),)))
    reader = world.device("r", clean=False)
    reader.subscribe("read/#")
    reader.subscribe("read/held")
    other = world.device("other")
    other.subscribe("read/#")
    for topic in ("read/old", "read/held", "read/new"):
        publish(world, topic, b"1")
        reader.ack_all()
        other.ack_all()
        if topic != "read/new":
            world.wait(1)
    reader.send(Unsubscribe(9, ("read/#",)))
    world.settle()
    (gone,) = [entry for entry in entries(path) if entry.kind == UNSUBSCRIBED]
    assert forgotten(gone) == ["read/new", "read/old"], "also what was acknowledged just now"
    world.wait(1)
    with closing(sqlite3.connect(path)) as db:
        found = db.execute(
            "SELECT c.clientid, t.name FROM position p JOIN client c ON c.id = client JOIN topic t ON t.id = topic"
        )
        assert sorted(found) == [("other", "read/held"), ("other", "read/new"), ("other", "read/old"), ("r", "read/held")]


def test_without_a_rule_that_drops_positions_a_wildcard_unsubscribe_names_none(world: World, path: Path) -> None:
    reader = world.device("r")
    reader.subscribe("read/#")
    publish(world, "read/a", b"1")
    reader.ack_all()
    reader.send(Unsubscribe(9, ("read/#",)))
    world.settle()
    (gone,) = [entry for entry in entries(path) if entry.kind == UNSUBSCRIBED]
    assert (gone.payload, forgotten(gone)) == (b"", [])


def test_a_session_that_ends_leaves_its_position(world: World, path: Path) -> None:
    reader = world.device("r")
    reader.subscribe("read/#")
    publish(world, "read/a", b"1", b"2")
    (_, _, first, _), _ = reader.messages()
    reader.send(PubAck(first))
    reader.disconnect()
    world.settle()
    world.wait(1)
    assert told(path) == [("r", "read/a", b"1")]


@pytest.mark.parametrize("clean_stop", [True, False])
def test_what_was_in_flight_at_a_restart_still_holds_the_position(path: Path, clean_stop: bool) -> None:
    world = open_world(path)
    reader = world.device("r", clean=False)
    reader.subscribe("read/#")
    publish(world, "read/a", b"1", b"2", b"3")
    _, second, _ = [packet_id for _, _, packet_id, _ in reader.messages()]
    reader.send(PubAck(second))
    world.wait(1)
    world.stop() if clean_stop else world.kill()
    world = open_world(path)
    reader = world.device("r", clean=False)
    assert told(path) == []
    for _, _, packet_id, _ in reversed(reader.messages()):
        reader.send(PubAck(packet_id))
    world.wait(1)
    assert told(path) == [("r", "read/a", b"3")]
    world.kill()


def test_a_sleeper_s_position_goes_on_where_it_came_back(path: Path, world: World) -> None:
    reader = world.device("r", clean=False)
    reader.subscribe("read/#")
    reader.disconnect()
    publish(world, "read/a", b"1", b"2")
    world.broker.delivery.forget_tail()
    reader = world.device("r", clean=False)
    world.settle()
    assert len(reader.ack_all()) == 2
    world.wait(1)
    assert told(path) == [("r", "read/a", b"2")]


@pytest.mark.parametrize("restart", [False, True])
def test_of_a_far_end_s_messages_its_own_ids_are_told_those_of_each_gateway_by_themselves(path: Path, restart: bool) -> None:
    make_inbox(path.with_name("uplink.db"))
    world = open_world(path)
    reader = world.device("r", clean=False)
    reader.subscribe("read/a")
    theirs = [message_id(NOW, code, 1, seq) for code in ("AAAA", "BBBB") for seq in (1, 2)]
    put(path.with_name("uplink.db"), *[found(msgid) for msgid in ["of-a-business-system", *theirs]])
    Inbox(world.broker, path.with_name("uplink.db")).look()
    world.settle()
    if restart:
        world.stop()
        world = open_world(path)
        reader = world.device("r", clean=False)
    assert len(reader.ack_all()) == 5
    world.wait(1)
    names = [entry.payload.decode() for entry in entries(path) if entry.kind == POSITION]
    assert names[-3:] == ["of-a-business-system", theirs[1], theirs[3]]
    world.kill()


def test_what_was_lost_on_its_way_with_its_subscription_comes_with_the_next_and_is_not_passed_over(path: Path) -> None:
    make_inbox(path.with_name("uplink.db"))
    world = open_world(path)
    reader = world.device("r", clean=False)
    reader.subscribe("read/a", 2)
    for one in (found("one"), found("two", qos=2)):
        put(path.with_name("uplink.db"), one)
    Inbox(world.broker, path.with_name("uplink.db")).look()
    world.settle()
    assert len(reader.messages()) == 2
    reader.send(Unsubscribe(9, ("read/a",)))
    world.kill()  # what went with QoS 1 is forgotten, what went with QoS 2 is sent again
    world = open_world(path)
    reader = world.device("r", clean=False)
    reader.subscribe("read/a", 2)
    for _, flags, packet_id, _ in reader.messages():
        assert flags >> 1 & 3 == 2
        reader.send(PubRec(packet_id))
    world.wait(1)
    assert [entry for entry in entries(path) if entry.kind == POSITION] == [], "one is before it and has not been read"
    put(path.with_name("uplink.db"), found("one"), found("two", qos=2))
    Inbox(world.broker, path.with_name("uplink.db")).look()
    world.settle()
    assert [flags >> 1 & 3 for _, flags, _, _ in reader.ack_all()] == [1]
    world.wait(1)
    assert [entry.payload for entry in entries(path) if entry.kind == POSITION] == [b"one"]
    world.kill()


def test_what_a_crash_loses_on_its_way_for_a_subscription_that_was_made_anew_comes_again(path: Path) -> None:
    """The far end would not name it again: the position has passed it."""
    make_inbox(path.with_name("uplink.db"))
    world = open_world(path)
    reader = world.device("r", clean=False)
    reader.subscribe("read/a")
    put(path.with_name("uplink.db"), found("one"))
    Inbox(world.broker, path.with_name("uplink.db")).look()
    world.settle()
    assert len(reader.messages()) == 1
    reader.send(Unsubscribe(9, ("read/a",)))
    reader.subscribe("read/a")
    put(path.with_name("uplink.db"), found("one"), found("two")._replace(payload=b"two"))
    Inbox(world.broker, path.with_name("uplink.db")).look()
    world.settle()
    assert len(reader.ack_all()) == 1, "one is on its way"
    world.wait(1)
    world.kill()
    world = open_world(path)
    reader = world.device("r", clean=False)
    world.settle()
    assert [payload for *_, payload in reader.ack_all() if payload != b"two"] == [b"x"]
    world.wait(1)
    world.kill()
    world = open_world(path)
    assert world.device("r", clean=False).messages() == [], "and once"
    world.kill()


def found(msgid: str, qos: int = 1) -> Answer:
    return Answer(0, "redis.pool1", MESSAGE, "r", "read/a", "read/a", "[]", msgid, "elsewhere", qos, NOW, b"x")
