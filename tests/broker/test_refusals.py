"""What the broker refuses, and in which words: packets out of their order, the gateway's own topics, bad credentials.

Each case is one that the suites of Eclipse Paho and mosquitto ask for (docs/mosquitto.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import ConnAck, Disconnect, PubAck, PubComp, PubRec, PubRel, SubAck, Will
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.mqtt.reasons import ReasonCode
from tidegate.store.entry import PUBLISH, Want
from tidegate.store.reader import LogReader

from tests.broker.world import World


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def world(path: Path) -> World:
    return World(path)


@pytest.mark.parametrize("qos", [1, 2])
def test_a_pubcomp_without_a_pubrec_ends_the_connection_and_the_message_comes_again(world: World, qos: int) -> None:
    device = world.device("s", clean=False)
    device.subscribe("t", qos)
    world.device("p").publish("t", b"x", qos)
    packet_id = device.messages()[0][2]
    device.send(PubComp(packet_id))
    assert device.closed
    again = world.device("s", clean=False)
    assert [message[3] for message in again.messages()] == [b"x"]


def test_a_pubcomp_after_its_pubrec_ends_nothing(world: World) -> None:
    device = world.device("s")
    device.subscribe("t", 2)
    publisher = world.device("p")
    publisher.publish("t", b"x", 2)
    publisher.send(PubRel(1))
    packet_id = device.messages()[0][2]
    device.send(PubRec(packet_id))
    assert device.take(PubRel) == PubRel(packet_id)
    device.send(PubComp(packet_id))
    assert not device.closed


@pytest.mark.parametrize(("qos", "answer"), [(1, PubAck), (2, PubRec)])
def test_sys_topics_are_the_gateways_alone_and_a_v5_client_is_told(world: World, path: Path, qos: int, answer: type) -> None:
    world.broker.router.set_wants(iter([Want(PUBLISH, "$SYS/#", 0, False)]))
    watcher = world.device("w")
    watcher.subscribe("$SYS/#", 1)
    publisher = world.device("p", version=5)
    publisher.publish("$SYS/broker/uptime", b"for ever", qos, retain=True)
    assert publisher.take(answer) == answer(1, ReasonCode.NOT_AUTHORIZED)
    assert watcher.messages() == []
    assert list(LogReader(path).read(0, 10)[0]) == []
    assert world.broker.counters["refused_publishes"] == 1
    assert not publisher.closed


def test_a_3_1_1_client_gets_its_acknowledgements_for_a_sys_topic(world: World) -> None:
    publisher = world.device("p")
    publisher.take(ConnAck)
    publisher.publish("$SYS/a", b"0", 0)
    publisher.publish("$SYS/a", b"1", 1)
    publisher.publish("$SYS/a", b"2", 2, packet_id=2)
    publisher.send(PubRel(2))
    assert publisher.got == [PubAck(1), PubRec(2), PubComp(2)]


def test_a_will_does_not_reach_sys_topics_either(world: World) -> None:
    watcher = world.device("w")
    watcher.subscribe("$SYS/#", 0)
    world.device("d", will=Will("$SYS/broker/uptime", b"gone", 1, True, {})).cut()
    assert watcher.messages() == []


def test_sys_values_of_the_gateway_still_arrive(world: World) -> None:
    watcher = world.device("w")
    watcher.subscribe("$SYS/#", 1)
    world.broker.publish_sys({"$SYS/broker/uptime": b"1 seconds"})
    assert [message[3] for message in watcher.messages()] == [b"1 seconds"]


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_wrong_password_is_not_a_malformed_one(world: World, version: int) -> None:
    device = world.device("m", version=version, username="mallory")
    assert device.take(ConnAck).reason == ReasonCode.NOT_AUTHORIZED
    assert device.closed


def test_mqtt_3_1_knows_no_session_present(world: World) -> None:
    world.device("old", version=3, clean=False).cut()
    assert world.device("old", version=3, clean=False).take(ConnAck) == ConnAck(False, ReasonCode.SUCCESS, {})
    assert world.device("old", version=4, clean=False).take(ConnAck).session_present


def test_what_is_retained_after_the_subscribe_comes_once(world: World) -> None:
    world.auto = False
    device = world.device("s")
    assert world.commits == []
    world.device("p", clean=False)
    assert world.commits
    device.subscribe("t", 0)
    world.device("q").publish("t", b"x", 0, retain=True)
    world.settle()
    assert device.take(SubAck)
    assert [message[3] for message in device.messages()] == [b"x"]


def test_more_unreleased_messages_than_the_receive_maximum_end_the_connection(path: Path) -> None:
    world = World(path, Limits(max_inflight=3))
    device = world.device("p", 5)
    assert device.take(ConnAck).properties[Property.RECEIVE_MAXIMUM] == 3
    for packet_id in range(1, 4):
        device.publish("t", b"x", 2, packet_id=packet_id)
    assert not device.closed
    device.publish("t", b"x", 2, packet_id=4)
    assert device.take(Disconnect).reason == ReasonCode.RECEIVE_MAXIMUM_EXCEEDED


def test_a_v5_publisher_is_told_that_no_session_gets_its_message(world: World) -> None:
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)])
    publisher, old = world.device("p", 5), world.device("o", 4)
    for packet_id in (1, 2):
        publisher.publish("t", b"x", packet_id=packet_id)
    old.publish("t", b"x", packet_id=1)
    sleeper = world.device("s", clean=False)
    sleeper.subscribe("t", 0)
    sleeper.cut()
    publisher.publish("t", b"x", packet_id=3)
    nobody = ReasonCode.NO_MATCHING_SUBSCRIBERS
    assert [p for p in publisher.got if isinstance(p, PubAck)] == [PubAck(1, nobody), PubAck(2, nobody), PubAck(3)]
    assert old.take(PubAck) == PubAck(1)


@pytest.mark.parametrize("keep_alive", [0, 61])
def test_a_client_that_cannot_be_told_a_shorter_keep_alive_is_refused(path: Path, keep_alive: int) -> None:
    world = World(path, Limits(max_keep_alive=60))
    refused = world.device("old", 4, keep_alive=keep_alive)
    assert refused.take(ConnAck).reason == ReasonCode.CLIENT_IDENTIFIER_NOT_VALID
    assert world.device("new", 5, keep_alive=keep_alive).take(ConnAck).properties[Property.SERVER_KEEP_ALIVE] == 60


@pytest.mark.parametrize("largest", [2, 14])
def test_a_connack_above_the_clients_packet_size_is_not_sent(world: World, largest: int) -> None:
    watcher = world.device("w")
    watcher.subscribe("gone", 0)
    will = Will("gone", b"x", 0, False, {})
    device = world.device("d", 5, will=will, properties={Property.MAXIMUM_PACKET_SIZE: largest})
    assert device.got == []
    assert device.closed
    assert watcher.messages() == []


def test_two_hundred_slashes_make_a_topic(world: World) -> None:
    device = world.device("d")
    device.subscribe("/" * 200, 0)
    device.publish("/" * 200, b"deep", 0)
    assert [message[3] for message in device.messages()] == [b"deep"]


def test_mqtt_3_1_may_send_a_pubrel_again_with_the_dup_flag_and_3_1_1_may_not(world: World) -> None:
    old = world.device("old", version=3)
    old.publish("t", b"x", 2)
    old.send_bytes(bytes.fromhex("6a020001"))
    assert old.take(PubComp) == PubComp(1)
    new = world.device("new", version=4)
    new.send_bytes(bytes.fromhex("6a020001"))
    assert new.closed
