"""Order (4.6): what waits for nothing does not overtake what waits for the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import ConnAck, PubAck, Publish, PubRec, PubRel, SubAck, Unsubscribe
from tidegate.gateway.mqtt.reasons import ReasonCode
from tidegate.gateway.routing import MAX_TOPICS

from tests.broker.world import Device, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "log.db", Limits())


def subscriber(world: World, name: str, filter_: str, qos: int, clean: bool = True) -> Device:
    device = world.device(name, clean=clean)
    device.subscribe(filter_, qos)
    device.take(ConnAck)
    device.take(SubAck)
    return device


def publisher(world: World, version: int = 4) -> Device:
    device = world.device("p", version)
    device.take(ConnAck)
    world.auto = False
    return device


def test_a_puback_that_waits_for_nothing_leaves_after_those_that_wait(world: World) -> None:
    """[MQTT-4.6.0-2]; one before it waits in the batch being committed, another in the next."""
    subscriber(world, "s", "stored", 1)
    device = publisher(world)
    device.publish("stored", b"", packet_id=1)
    device.publish("nobody", b"", packet_id=2)
    assert device.got == []
    device.publish("stored", b"", packet_id=3)
    device.publish("nobody", b"", packet_id=4)
    world.commit()
    assert device.got == [PubAck(1), PubAck(2)]
    world.commit()
    assert device.got == [PubAck(1), PubAck(2), PubAck(3), PubAck(4)]


def test_a_puback_that_waits_for_nothing_does_not_wait_for_other_clients(world: World) -> None:
    subscriber(world, "s", "stored", 1)
    other = world.device("other")
    device = publisher(world)
    other.publish("stored", b"")
    device.publish("nobody", b"", packet_id=2)
    assert device.got == [PubAck(2)]


def test_a_puback_waits_behind_a_pubrec_but_not_after_it_has_left(world: World) -> None:
    device = publisher(world)
    device.publish("nobody", b"", qos=2, packet_id=1)
    device.publish("nobody", b"", packet_id=2)
    assert device.got == []
    world.settle()
    device.publish("nobody", b"", packet_id=3)
    assert device.got == [PubRec(1), PubAck(2), PubAck(3)]


@pytest.mark.parametrize("qos", [1, 2])
def test_a_refusal_leaves_after_the_acknowledgements_before_it(world: World, qos: int) -> None:
    """[MQTT-4.6.0-2], [MQTT-4.6.0-3]"""
    subscriber(world, "s", "stored", 1)
    device = publisher(world, 5)
    device.publish("stored", b"", qos, packet_id=1)
    device.publish("$SYS/mine", b"", qos, packet_id=2)
    assert device.got == []
    world.settle()
    answer = PubAck if qos == 1 else PubRec
    assert device.got == [answer(1), answer(2, ReasonCode.NOT_AUTHORIZED)]


@pytest.mark.parametrize("version", [4, 5])
def test_pubrels_leave_in_the_order_of_their_pubrecs(world: World, version: int) -> None:
    """[MQTT-4.6.0-4]: the first waits for the disk, the second is for a packet id that was never used."""
    device = world.device("s", version, clean=False, properties={17: 60} if version == 5 else {})
    device.subscribe("t", 2)
    world.device("p").publish("t", b"", qos=2)
    ((_, _, packet_id, _),) = device.messages()
    device.got.clear()
    world.auto = False
    device.send(PubRec(packet_id))
    device.send(PubRec(packet_id + 1))
    assert device.got == []
    world.settle()
    unknown = ReasonCode.PACKET_IDENTIFIER_NOT_FOUND if version == 5 else ReasonCode.SUCCESS
    assert device.got == [PubRel(packet_id), PubRel(packet_id + 1, unknown)]


def test_a_message_that_nobody_stores_is_not_delivered_before_a_retained_one(world: World) -> None:
    """[MQTT-4.6.0-6]: same topic, same QoS, and only the first waits for the disk."""
    watcher = subscriber(world, "s", "t", 0)
    device = publisher(world)
    device.publish("t", b"kept", retain=True, packet_id=1)
    device.publish("t", b"not kept", packet_id=2)
    world.settle()
    assert [payload for *_, payload in watcher.messages()] == [b"kept", b"not kept"]
    assert device.got == [PubAck(1), PubAck(2)]


def test_a_message_is_not_delivered_before_one_that_was_stored_for_a_subscription_that_is_gone(world: World) -> None:
    watcher = subscriber(world, "s", "t", 0)
    storing = subscriber(world, "q", "t", 1)
    device = publisher(world)
    device.publish("t", b"stored", packet_id=1)
    storing.send(Unsubscribe(1, ("t",), {}))
    device.publish("t", b"not stored", packet_id=2)
    world.settle()
    assert [payload for *_, payload in watcher.messages()] == [b"stored", b"not stored"]


@pytest.mark.parametrize("how", ["its name's number ended", "there were too many"])
def test_a_topic_that_was_forgotten_and_is_known_again_keeps_its_order(world: World, how: str) -> None:
    watcher = subscriber(world, "s", "t", 0)
    device = publisher(world)
    device.publish("t", b"kept", retain=True, packet_id=1)
    topics = world.broker.router.topics
    if how == "there were too many":
        assert all([topics[str(number).encode()] for number in range(MAX_TOPICS)])
    else:
        topics.forget("t")
    assert b"t" not in topics
    device.publish("t", b"not kept", packet_id=2)
    world.settle()
    assert [payload for *_, payload in watcher.messages()] == [b"kept", b"not kept"]


def test_nothing_is_stored_for_the_sake_of_order_when_nothing_waits(world: World) -> None:
    watcher = subscriber(world, "s", "t", 0)
    device = publisher(world)
    device.publish("t", b"kept", retain=True, packet_id=1)
    world.settle()
    device.send(Publish("t", b"at once", 1, False, False, 2, {}))
    assert [payload for *_, payload in watcher.messages()] == [b"kept", b"at once"]
    assert world.commits == []
