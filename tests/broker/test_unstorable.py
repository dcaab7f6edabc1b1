"""What the database can never take: it is put aside, its sender is told, and everybody else goes on.

The refusals are the database's own: a trigger, or a limit on the size of a value.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.mqtt.packets import Disconnect, PubAck, PubComp, PubRec, PubRel, SubAck
from tidegate.gateway.mqtt.reasons import ReasonCode
from tidegate.store.entry import PUBLISH, Want
from tidegate.store.trim import Plan

from tests.broker.world import Device, World

PERSISTENT: dict[str, Any] = {"version": 5, "clean": False, "properties": {17: 0xFFFFFFFF}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def world(path: Path) -> World:
    """Everything is stored, except what says `bad`, wherever it says so."""
    world = World(path)
    world.broker.router.set_wants(iter([Want(PUBLISH, "#", 0, False)]))
    for table, column in (("entry", "payload"), ("topic", "name"), ("subscription", "filter"), ("client", "clientid")):
        world.store.connection.execute(
            f"CREATE TRIGGER no_bad_{table} BEFORE INSERT ON {table} WHEN instr(CAST(new.{column} AS TEXT), 'bad')"
            f" BEGIN SELECT RAISE(ABORT, 'bad {column}'); END"
        )
    return world


def together(world: World) -> None:
    """From here on everything goes into one batch, until `world.settle()`."""
    world.auto = False
    world.device("opens the first batch", clean=False)


def settle(world: World) -> None:
    world.settle()
    world.auto = True


def stored(world: World) -> list[bytes]:
    return [row[0] for row in world.store.connection.execute(f"SELECT payload FROM entry WHERE kind = {PUBLISH} ORDER BY seq")]


def is_sent_away(device: Device) -> bool:
    return device.closed and device.take(Disconnect).reason == ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR


def test_one_bad_message_among_many_is_put_aside_and_all_others_are_stored_and_delivered(world: World) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("#")
    good, bad = world.device("good"), world.device("sinner", 5)
    together(world)
    for number in range(100):
        good.publish("t", b"%d" % number, packet_id=number + 1)
        if number == 40:
            bad.publish("t", b"bad")
    settle(world)
    wanted = [b"%d" % number for number in range(100)]
    assert [message[3] for message in subscriber.ack_all()] == wanted == stored(world)
    assert [good.take(PubAck).packet_id for _ in wanted] == list(range(1, 101))
    assert is_sent_away(bad)
    assert not [packet for packet in bad.got if isinstance(packet, PubAck)]
    assert world.broker.store_fault == ""
    assert world.broker.delivery.dropped["cannot_be_stored"] == 1
    assert world.broker.stored == 100
    (line,) = (text for text in world.said if "can never take" in text)
    assert line.endswith("reason=bad payload clients=sinner messages=1 changes=0")
    (refusal,) = world.broker.connecting.refusals.as_dict()["refusals"]
    assert (refusal["client_id"], refusal["reason"]) == ("sinner", "cannot be stored: bad payload")


@pytest.mark.parametrize("place", ["first", "last"])
def test_what_follows_in_the_next_batches_is_delivered_in_order(world: World, place: str) -> None:
    subscriber, away = world.device("s", clean=False), world.device("a", clean=False)
    subscriber.subscribe("#")
    away.subscribe("#")
    away.disconnect()
    good, bad = world.device("good"), world.device("sinner", 5)
    together(world)
    for sender in (bad, good) if place == "first" else (good, bad):
        sender.publish("t", b"bad" if sender is bad else b"1")
    settle(world)
    for number in (2, 3):
        good.publish("t", b"%d" % number)
    assert [message[3] for message in subscriber.ack_all()] == [b"1", b"2", b"3"]
    assert [message[3] for message in world.device("a", clean=False).ack_all()] == [b"1", b"2", b"3"]


def test_a_qos_2_message_put_aside_with_its_guard_is_taken_when_it_comes_again(world: World) -> None:
    subscriber, sender = world.device("s"), world.device("sinner", **PERSISTENT)
    subscriber.subscribe("#", 2)
    together(world)
    sender.publish("t", b"fine", 2, packet_id=1)
    sender.publish("t", b"bad", 2, packet_id=2)
    settle(world)
    assert is_sent_away(sender)
    assert subscriber.messages() == []
    assert world.store.connection.execute("SELECT count(*) FROM received").fetchone() == (0,)
    again = world.device("sinner", **PERSISTENT)
    again.publish("t", b"fine", 2, packet_id=1)
    assert again.take(PubRec).packet_id == 1
    again.send(PubRel(1))
    assert again.take(PubComp).packet_id == 1
    assert [message[3] for message in subscriber.messages()] == [b"fine"]


def test_the_retained_message_before_a_bad_one_stays(world: World) -> None:
    keeper = world.device("keeper")
    keeper.publish("known", b"old", retain=True)
    together(world)
    world.device("sinner", 5).publish("known", b"bad", retain=True)
    world.device("sinner 2", 5).publish("unknown", b"bad", retain=True)
    settle(world)
    keeper.publish("t", b"a batch after it")
    reader = world.device("reader")
    reader.subscribe("#")
    assert [(message[0], message[3]) for message in reader.ack_all()] == [("known", b"old")]
    assert len(world.broker.retained) == 1


def test_a_value_above_sqlites_own_limit(world: World) -> None:
    world.store.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 5_000)
    large, small = world.device("large", 5), world.device("small")
    together(world)
    large.publish("t", bytes(6_000))
    small.publish("t", b"small")
    settle(world)
    assert is_sent_away(large)
    assert small.take(PubAck).packet_id == 1
    assert stored(world) == [b"small"]


def test_a_topic_that_cannot_be_stored(world: World) -> None:
    sinner, good = world.device("sinner", 5), world.device("good")
    together(world)
    sinner.publish("bad/topic", b"x")
    good.publish("topic", b"y")
    settle(world)
    assert is_sent_away(sinner)
    assert good.take(PubAck).packet_id == 1
    assert stored(world) == [b"y"]


def test_a_subscription_that_cannot_be_kept_ends_the_session(world: World) -> None:
    sinner, good = world.device("sinner", **PERSISTENT), world.device("good", **PERSISTENT)
    sinner.subscribe("fine")
    assert sinner.take(SubAck)
    together(world)
    sinner.subscribe("bad")
    good.subscribe("fine")
    settle(world)
    assert is_sent_away(sinner)
    assert good.take(SubAck).packet_id == 77
    again = world.device("sinner", **PERSISTENT)
    assert not again.got[0].session_present
    assert world.store.connection.execute("SELECT count(*) FROM subscription").fetchone() == (1,)


def test_a_client_whose_session_cannot_be_kept_gets_no_connack(world: World) -> None:
    sinner = world.device("bad id", **PERSISTENT)
    assert sinner.closed
    assert sinner.got == []
    assert len(world.broker.sessions) == 0


def test_a_change_of_our_own_is_not_tried_again_at_once(world: World) -> None:
    """What asks for the next step when one is durable must not spin."""
    good = world.device("good")
    together(world)
    world.broker.log.change("INSERT INTO meta (key, value) VALUES ('machine', 'there already')")
    good.publish("t", b"fine")
    settle(world)
    assert not good.closed
    assert stored(world) == []
    (again,) = world.timers
    again()
    world.settle()
    assert stored(world) == [b"fine"]
    assert good.take(PubAck).packet_id == 1


def test_a_disk_that_fails_while_the_bad_row_is_looked_for_is_a_disk_that_fails(world: World) -> None:
    (pages,) = world.store.connection.execute("PRAGMA max_page_count = 1").fetchone()  # no more than there are
    sinner, good = world.device("sinner", 5), world.device("good")
    together(world)
    sinner.publish("t", b"bad")
    good.publish("t", bytes(4096 * pages))
    with pytest.raises(sqlite3.OperationalError, match="full"):
        world.settle()
    assert not sinner.closed
    assert stored(world) == []


def test_a_step_of_the_trim_is_made_whole_or_not_at_all(world: World) -> None:
    """Half of one would remove entries that the other half was to keep."""
    for number in range(3):
        world.device("p").publish("t", b"%d" % number)
    before = stored(world)
    together(world)
    bad = "INSERT INTO entry (seq, at, mono, run, kind, payload) VALUES (1, 0, 0, 1, 6, ?)"
    world.broker.trim(Plan((("DELETE FROM entry", ()), (bad, (b"bad",)), ("DELETE FROM retained", ()))))
    world.device("q").publish("t", b"more")
    settle(world)
    while world.timers:  # what is one of our own is put aside with a pause
        world.timers.pop(0)()
        world.settle()
    assert stored(world) == [*before, b"more"]
