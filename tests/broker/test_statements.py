"""Numbered statements of the standard that a walk over all of them found broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import Disconnect, PubAck, Publish, Will
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.mqtt.reasons import ReasonCode

from tests.broker.world import Device, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "log.db", Limits())


def got(device: Device) -> list[tuple[bytes, int]]:
    """Payload and QoS of what came; it is acknowledged, and so is what comes upon that."""
    found: list[tuple[bytes, int]] = []
    while messages := device.messages():
        for _, flags, packet_id, payload in messages:
            found.append((payload, flags >> 1 & 3))
            if flags >> 1 & 3:
                device.send(PubAck(packet_id))
    return found


def publish(world: World, *payloads: bytes) -> None:
    publisher = world.device("p")
    for payload in payloads:
        publisher.publish("t", payload)


@pytest.mark.parametrize("reason", [ReasonCode.DISCONNECT_WITH_WILL_MESSAGE, ReasonCode.UNSPECIFIED_ERROR])
def test_only_a_normal_disconnect_takes_the_will_back(world: World, reason: ReasonCode) -> None:
    """[MQTT-3.1.2-10]"""
    watcher = world.device("s")
    watcher.subscribe("gone", 0)
    world.device("d", 5, will=Will("gone", b"with an error")).send(Disconnect(reason, {}))
    world.device("e", 5, will=Will("gone", b"normally")).send(Disconnect(ReasonCode.SUCCESS, {}))
    assert got(watcher) == [(b"with an error", 0)]


def test_a_message_with_expiry_0_reaches_who_is_there_and_nobody_later(world: World) -> None:
    there = world.device("s")
    there.subscribe("t", 1)
    away = world.device("q", clean=False)
    away.subscribe("t", 1)
    away.cut()
    world.device("p", 5).send(Publish("t", b"now", 1, False, False, 1, {Property.MESSAGE_EXPIRY_INTERVAL: 0}))
    assert got(there) == [(b"now", 1)]
    world.wait(1)
    assert got(world.device("q", clean=False)) == []


def test_what_waited_is_not_lost_when_its_subscription_gets_qos_0(world: World) -> None:
    """[MQTT-3.8.4-4], with a window that lets one message at a time leave."""
    device = world.device("s", 5, properties={Property.RECEIVE_MAXIMUM: 1}, auto_ack=False)
    device.subscribe("t", 1)
    publish(world, b"1", b"2", b"3")
    device.subscribe("t", 0)
    publish(world, b"4")
    assert sorted(got(device)) == [(b"1", 1), (b"2", 0), (b"3", 0), (b"4", 0)]
    publish(world, b"5")
    assert got(device) == [(b"5", 0)]


def test_a_session_that_comes_back_and_subscribes_with_qos_0_gets_what_it_missed(world: World) -> None:
    world.device("s", clean=False).subscribe("t", 1)
    world.device("s", clean=False).cut()
    publish(world, b"1", b"2")
    world.broker.delivery.forget_tail()
    world.auto = False
    device = world.device("s", clean=False)
    device.subscribe("t", 0)
    device.subscribe("t", 0)
    assert got(device) == []
    world.settle()
    assert got(device) == [(b"1", 0), (b"2", 0)]


def test_what_is_owed_survives_kill_9(world: World, tmp_path: Path) -> None:
    device = world.device("s", 5, clean=False, properties={Property.RECEIVE_MAXIMUM: 1, Property.SESSION_EXPIRY_INTERVAL: 60})
    device.subscribe("t", 1)
    publish(world, b"1", b"2")
    device.subscribe("t", 0)
    world.kill()
    again = World(tmp_path / "log.db", Limits())
    assert got(again.device("s", clean=False)) == [(b"1", 0), (b"2", 0)]


def test_a_subscription_that_keeps_up_owes_nothing(world: World) -> None:
    device = world.device("s", clean=False)
    device.subscribe("t", 1)
    publish(world, b"1")
    assert got(device) == [(b"1", 1)]
    device.subscribe("t", 0)
    device.cut()
    publish(world, b"2")
    assert got(world.device("s", clean=False)) == []


@pytest.mark.parametrize("behind", [False, True])
def test_an_own_message_goes_by_the_subscriptions_without_no_local(world: World, behind: bool) -> None:
    """[MQTT-3.8.3-3]: neither QoS nor identifier of the one with it."""
    device = world.device("s", 5, properties={Property.RECEIVE_MAXIMUM: 1})
    device.subscribe("t", 2, no_local=True, properties={Property.SUBSCRIPTION_IDENTIFIER: [1]})
    device.subscribe("#", 1, properties={Property.SUBSCRIPTION_IDENTIFIER: [2]})
    device.properties.clear()
    if behind:
        device.publish("t", b"first")
    device.publish("t", b"own", 2, packet_id=2)
    assert got(device)[-1] == (b"own", 1)
    assert device.properties[-1] == b"\x0b\2"
    world.device("p").publish("t", b"another's")
    assert device.properties[-1] == b"\x0b\1\x0b\2"
