"""What the simulation found, each as the shortest story that shows it: a seed means nothing once the simulation has changed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tidegate.gateway.mqtt.packets import ConnAck, PubAck, PubComp, Publish, PubRec, PubRel, Unsubscribe
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.trimming import reach
from tidegate.store.entry import ACKED, DISCONNECTED, PUBLISH, Want
from tidegate.store.local import QUEUE, FetchRule, Keep, LocalRules
from tidegate.store.store import Store

from tests.broker.world import NOW, World

FETCHING = LocalRules(
    fetches=(FetchRule("queue", True, 0, 0, True), FetchRule("", False, 0, 0, True)),
    acks=(("queue", QUEUE),),
    keeps=(Keep("#", 3_600_000),),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def world(path: Path) -> World:
    return _world(path)


def _world(path: Path) -> World:
    world = World(path)
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)])
    return world


def test_a_packet_id_kept_over_a_clean_stop_is_free_again_after_its_acknowledgement(world: World, path: Path) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("#", 2)
    world.device("p").publish("t", b"one")
    (message,) = subscriber.messages()
    world.stop()

    world = _world(path)
    subscriber = world.device("s", clean=False)
    assert [m[2] for m in subscriber.messages()] == [message[2]]
    subscriber.send(PubAck(message[2]))
    session = world.broker.sessions.get("s")
    assert session is not None
    session.next_id = message[2]
    world.device("p").publish("t", b"two", qos=2)
    assert [m[2] for m in subscriber.messages()] == [message[2]]
    world.kill()

    world = _world(path)
    subscriber = world.device("s", clean=False)
    assert [(m[3], m[2]) for m in subscriber.messages()] == [(b"two", message[2])]


def test_a_message_sent_again_has_its_retain_flag_and_holds_no_position(world: World, path: Path) -> None:
    world.device("p").publish("t", b"old", qos=2, retain=True)
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 2)
    assert [m[1] for m in subscriber.messages()] == [2 << 1 | 1]
    world.wait(1)
    session = world.broker.sessions.get("s")
    assert session is not None and session.stored_cursor == world.broker.delivery.live
    world.kill()
    subscriber = _world(path).device("s", clean=False)
    assert [(m[3], m[1]) for m in subscriber.messages()] == [(b"old", 8 | 2 << 1 | 1)]


def test_a_live_message_is_not_taken_for_its_retained_copy(world: World, path: Path) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 1)
    subscriber.cut()
    world.device("p").publish("t", b"x", qos=2, retain=True)
    world.auto = False
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("#", 2)
    world.commit()
    while world.reads:
        world.read()
    world.kill()
    subscriber = _world(path).device("s", clean=False)
    assert (b"x", 0) in [(m[3], m[1] & 1) for m in subscriber.messages()]


def test_dup_is_not_forgotten_over_a_clean_stop(world: World, path: Path) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 1)
    world.device("p").publish("t", b"x")
    assert [m[1] & 8 for m in subscriber.messages()] == [0]
    world.kill()
    _world(path).stop()
    subscriber = _world(path).device("s", clean=False)
    assert [m[1] & 8 for m in subscriber.messages()] == [8]


def test_a_repeated_pubrec_waits_for_the_commit_of_the_first(world: World) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 2)
    world.device("p").publish("t", b"x", qos=2)
    (message,) = subscriber.messages()
    subscriber.got.clear()
    world.auto = False
    subscriber.send(PubRec(message[2]))
    subscriber.send(PubRec(message[2]))
    assert subscriber.got == []
    world.settle()
    assert PubRel(message[2]) in subscriber.got


@pytest.mark.parametrize("version", [4, 5])
def test_a_repeated_pubrel_waits_for_the_commit_of_the_first(world: World, version: int) -> None:
    publisher = world.device(
        "p", version, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 60} if version == 5 else {}
    )
    publisher.publish("t", b"x", qos=2, packet_id=9)
    assert publisher.take(PubRec) == PubRec(9)
    publisher.got.clear()
    world.auto = False
    publisher.send(PubRel(9))
    publisher.send(PubRel(9))
    assert publisher.got == []
    world.settle()
    assert [packet.packet_id for packet in publisher.got] == [9, 9]
    assert all(isinstance(packet, PubComp) for packet in publisher.got)


def test_a_resumed_session_waits_until_what_its_last_connection_began_is_durable(world: World) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 2)
    watcher = world.device("w")
    watcher.subscribe("t", 0)
    publisher = world.device("p")
    world.auto = False
    publisher.publish("t", b"x", qos=2)
    world.commit()  # the message; its delivery's packet id is in the next one
    subscriber.cut()
    subscriber = world.device("s", clean=False)
    publisher.publish("t", b"y", qos=0)
    assert subscriber.got == [], "neither CONNACK nor anything before it"
    world.settle()
    assert isinstance(subscriber.got[0], ConnAck)
    assert [m[3] for m in subscriber.messages()].count(b"x") == 1


def test_a_session_taken_over_before_it_was_durable_is_not_called_present(world: World, path: Path) -> None:
    world.auto = False
    world.device("s", clean=False)
    again = world.device("s", clean=False)
    assert again.got == []
    world.settle()
    assert again.take(ConnAck).session_present
    world.kill()
    assert _world(path).device("s", clean=False).take(ConnAck).session_present


def test_a_message_is_matched_with_the_subscriptions_of_its_time(world: World, path: Path) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 0)
    world.device("w", clean=False).subscribe("t", 1)
    world.device("p").publish("t", b"x")
    assert [m[1] >> 1 & 3 for m in subscriber.messages()] == [0]
    subscriber.subscribe("#", 2)
    world.kill()
    assert _world(path).device("s", clean=False).messages() == []


def test_two_lives_of_one_log_have_different_epochs(path: Path) -> None:
    World(path).kill()
    image = path.read_bytes()
    epochs = set()
    for life in range(3):
        path.write_bytes(image)
        store = Store.open(path, "barn", "full", NOW + life, 1000 + life)
        epochs.add(store.identity.epoch)
        store.abandon()
    assert len(epochs) == 3


def test_an_epoch_depends_on_the_boot_that_it_is_begun_in_and_on_no_other(tmp_path: Path) -> None:
    """Where the clock is behind; a seed of the simulation names its boots, so it has the same epochs on every machine."""
    epochs = []
    for copy, boot in (("first.db", "one"), ("second.db", "one"), ("third.db", "another")):
        Store.open(tmp_path / copy, "barn", "full", NOW, 1000, boot="before").close(NOW)
        store = Store.open(tmp_path / copy, "barn", "full", 1000, 1000, boot=boot)
        epochs.append(store.identity.epoch)
        store.close(1000)
    assert epochs[0] == epochs[1] != epochs[2]


def test_a_delivery_whose_message_is_gone_is_released_before_its_packet_id_is_used_again(world: World) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 2)
    world.device("p").publish("t", b"x", qos=2)
    (message,) = subscriber.messages()
    subscriber.cut()
    world.broker.log.change("DELETE FROM entry WHERE kind = ?", PUBLISH)
    world.broker.tick()
    world.settle()
    world.broker.delivery.shrink_tail()
    subscriber = world.device("s", clean=False)
    assert subscriber.messages() == []
    assert subscriber.take(PubRel) == PubRel(message[2])


def test_a_trim_waits_for_what_a_clean_stop_left_unacknowledged(world: World, path: Path) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 2)
    publisher = world.device("p")
    for number in range(3):
        publisher.publish("t", b"%d" % number, qos=1 + number % 2, packet_id=number + 1)
    first = min(seq for seq in world.broker.sessions.get("s").inflight.values())  # type: ignore[union-attr]
    world.stop()
    world = _world(path)
    assert reach(world.broker, ()).floor < first


def test_a_message_that_expired_while_the_disk_was_full_is_not_delivered(world: World) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 1)
    publisher = world.device("p", version=5)
    world.auto = False
    for number, expiry in enumerate((10, 60), 1):
        publisher.send(Publish("t", b"%d" % expiry, 1, False, False, number, {Property.MESSAGE_EXPIRY_INTERVAL: expiry}))
    world.wait(30)
    world.settle()
    assert [m[3] for m in subscriber.messages()] == [b"60"]
    assert world.broker.delivery.dropped["expired"] == 1


def test_connections_end_in_the_order_in_which_they_came(world: World) -> None:
    world.broker.router.set_wants([Want(DISCONNECTED, "#", 0, False)])
    names = [f"c{number}" for number in range(50)]
    for name in names:
        world.device(name)
    world.auto = False
    world.broker.stop()
    batches = [batch for batch, _ in world.commits]
    assert [row[5].text for batch in batches for row in batch.rows if row[4] == DISCONNECTED] == names


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_retained_copy_with_its_message_s_packet_id_does_not_hide_that_it_is_done(world: World, path: Path, end: str) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("#", 2)
    publisher = world.device("p")
    publisher.publish("first", b"holds the position back")
    publisher.publish("t", b"kept", qos=2, retain=True)
    first, kept = subscriber.messages()
    subscriber.send(PubRec(kept[2]))
    subscriber.send(PubComp(kept[2]))
    session = world.broker.sessions.get("s")
    assert session is not None
    session.next_id = kept[2]
    subscriber.subscribe("t", 2)
    (copy,) = subscriber.messages()
    assert (copy[1] & 1, copy[2]) == (1, kept[2])
    getattr(world, end)()
    subscriber = _world(path).device("s", clean=False)
    assert sorted((m[3], m[1] & 1) for m in subscriber.messages()) == [(first[3], 0), (copy[3], 1)]


def test_what_waits_behind_a_fetch_goes_on_when_that_is_unsubscribed_while_it_is_read(world: World) -> None:
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)], FETCHING)
    world.device("p").publish("b", b"stored")
    subscriber = world.device("s", clean=False)
    world.auto = False
    subscriber.subscribe("a")
    subscriber.subscribe("b")
    while world.commits:
        world.commit()
    subscriber.send(Unsubscribe(9, ("a",)))
    world.settle()
    assert [message[3] for message in subscriber.messages()] == [b"stored"]
    world.auto = True
    world.device("p").publish("b", b"new")
    assert [message[3] for message in subscriber.messages()] == [b"new"]


def test_a_queue_s_late_acknowledgement_is_logged_in_the_commit_that_takes_its_message(world: World, path: Path) -> None:
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False), Want(ACKED, "#", 0, False)], FETCHING)
    world.device("p").publish("queue", b"x", qos=2)
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("queue", 2)
    world.kill()
    world = _world(path)
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False), Want(ACKED, "#", 0, False)], FETCHING)
    subscriber = world.device("s", clean=False)
    (message,) = subscriber.messages()
    world.auto = False
    subscriber.send(PubRec(message[2]))
    world.commit()  # and whatever is to be read was not read when the power went
    world.kill()
    with closing(sqlite3.connect(path)) as db:
        acked = "SELECT count(*) FROM entry WHERE kind = ?"
        assert db.execute("SELECT count(*) FROM taken").fetchone() == db.execute(acked, (ACKED,)).fetchone() == (1,)


def test_a_queue_s_message_acknowledged_after_the_unsubscribe_is_taken(world: World, path: Path) -> None:
    rules = replace(FETCHING, forgets=("",))
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)], rules)
    world.device("p").publish("queue", b"x")
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("queue")
    (message,) = subscriber.messages()
    subscriber.send(Unsubscribe(9, ("queue",)))
    subscriber.send(PubAck(message[2]))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM taken").fetchone() == (1,)
