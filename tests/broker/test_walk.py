"""Sessions that fell behind walk through the log together: each gets its own, in order, from few reads and bounded memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import PubAck, encode
from tidegate.gateway.walk import HELD, SLICE
from tidegate.store.catchup import ROWS
from tidegate.store.entry import PUBLISH, Want
from tidegate.store.topic import matches

from .world import Device, World

SESSIONS = 60
MESSAGES = 3 * ROWS
TOPICS = [f"site/{number % 4}/{number}" for number in range(12)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "log.db", Limits(max_inflight=200))
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)])
    yield world
    world.kill()


def publish(world: World, topics: list[str], payload: bytes = b"") -> None:
    """A message to each, numbered; then nothing of it is in memory any more."""
    sender = Device(world, "sender")
    world.auto = False
    for number, topic in enumerate(topics):
        sender.publish(topic, b"%d " % number + payload, packet_id=number % 100 + 1)
        if number % 100 == 99:
            world.settle()
            sender.got.clear()
    world.settle()
    world.broker.delivery.forget_tail()


def sleeper(world: World, name: str, filters: list[str], at: int = 1) -> None:
    """A session that fell asleep when `at` was the next seq."""
    device = world.device(name, clean=False)
    for text in filters:
        device.subscribe(text, 1)
    device.cut()
    session = world.broker.sessions.get(name)
    assert session is not None
    session.next_seq = at


def serve(world: World, devices: list[Device]) -> dict[str, list[int]]:
    """Let things happen one by one, everybody acknowledging what it got, until nothing is due; the numbers of what came."""
    got: dict[str, list[int]] = {device.client.peer: [] for device in devices}
    busy = True
    while busy:
        busy = bool(world.commits or world.reads)
        if world.commits:
            world.commit()
        if world.reads:
            world.read()
        for device in devices:
            for message in device.messages():
                got[device.client.peer].append(int(message[3].split()[0]))
                device.send(PubAck(message[2]))
                busy = True
    return got


@pytest.mark.parametrize("seed", range(3))
def test_sessions_from_different_places_and_with_different_filters_share_few_reads(world: World, seed: int) -> None:
    chance = random.Random(seed)
    choices = ["site/#", "site/+/5", "site/2/+", "+/1/#", "#", *TOPICS]
    asleep = {f"s{n}": (chance.sample(choices, 3), chance.randrange(MESSAGES)) for n in range(SESSIONS)}
    for name, (filters, _) in asleep.items():
        sleeper(world, name, filters)
    topics = [chance.choice(TOPICS) for _ in range(MESSAGES)]
    first = world.broker.log.next_seq
    publish(world, topics)
    for name, (_, at) in asleep.items():
        session = world.broker.sessions.get(name)
        assert session is not None
        session.next_seq = first + at
    got = serve(world, [world.device(name, clean=False) for name in asleep])
    for name, (filters, at) in asleep.items():
        expected = [n for n in range(at, MESSAGES) if any(matches(text, topics[n]) for text in filters)]
        assert got[name] == expected, (name, filters, at)
    assert world.pieces_read < SESSIONS / 2, world.pieces_read


def test_what_is_held_for_many_slow_sessions_is_bounded(tmp_path: Path) -> None:
    world = World(tmp_path / "log.db", Limits(max_inflight=2))
    names = [f"s{number}" for number in range(100)]
    for name in names:
        sleeper(world, name, ["t"])
    first = world.broker.log.next_seq
    publish(world, ["t"] * 2_000, bytes(20_000))
    for number, name in enumerate(names):
        session = world.broker.sessions.get(name)
        assert session is not None
        session.next_seq = first + 10 * number
    devices = [world.device(name, clean=False) for name in names]
    world.settle()
    held = [sum(len(m[3]) for m in session.backlog) for session in world.broker.sessions]
    assert sum(held) <= HELD
    assert [len(device.messages()) for device in devices] == [2] * len(names)
    world.kill()


def test_one_far_behind_does_not_keep_the_others_waiting(world: World) -> None:
    sleeper(world, "far", ["t"])
    sleeper(world, "near", ["t"])
    publish(world, ["t"] * MESSAGES)
    session = world.broker.sessions.get("near")
    assert session is not None
    session.next_seq = world.broker.log.next_seq - 1
    far, near = (world.device(name, clean=False) for name in ("far", "near"))
    while world.commits:
        world.commit()
    reads = 0
    while not (came := near.messages()):
        world.read()
        reads += 1
        far.ack_all()
    assert [message[3].split()[0] for message in came] == [b"%d" % (MESSAGES - 1)]
    assert reads <= 3


def test_a_subscription_made_while_its_session_waits_for_the_log_misses_nothing(world: World) -> None:
    sleeper(world, "s", ["t"])
    publish(world, ["t", "u"] * 10)
    device = world.device("s", clean=False)
    while world.commits:
        world.commit()
    device.subscribe("u", 1)
    while world.commits:
        world.commit()
    Device(world, "other").publish("u", b"99", packet_id=7)
    while world.commits:
        world.commit()
    world.broker.delivery.forget_tail()
    got = serve(world, [device])
    assert got["s"] == [*range(0, 20, 2), 99]


def test_a_failed_read_ends_only_the_connection_it_was_led_by(world: World) -> None:
    for name in ("a", "b"):
        sleeper(world, name, ["t"])
    publish(world, ["t"] * 5)
    a, b = (world.device(name, clean=False) for name in ("a", "b"))
    while world.commits:
        world.commit()
    (_, done), world.reads = world.reads[0], []
    done(OSError("the card is gone"))
    assert a.closed and not b.closed
    assert serve(world, [b])["b"] == [0, 1, 2, 3, 4]


def test_who_waits_for_its_turn_gets_it_when_the_crowd_is_gone(tmp_path: Path) -> None:
    world = World(tmp_path / "log.db", Limits(max_inflight=5))
    names = [f"s{number}" for number in range(8)]
    for name in names:
        sleeper(world, name, ["t"])
    publish(world, ["t"] * 20)
    devices = [world.device(name, clean=False) for name in names]
    world.settle()
    first = devices[0]
    for message in first.messages():
        first.send(PubAck(message[2]))
    for device in devices[1:]:
        device.cut()
    world.broker.tick()
    for _ in range(10):
        if world.reads:
            world.read()
    assert [message[3] for message in first.messages()] == [b"%d " % number for number in range(5, 10)]
    world.kill()


def test_many_are_served_by_turns(tmp_path: Path) -> None:
    world = World(tmp_path / "log.db", Limits(max_inflight=1_000))
    names = [f"s{number}" for number in range(20)]
    for name in names:
        sleeper(world, name, ["t"])
    publish(world, ["t"] * 2_000)
    devices = [world.device(name, clean=False) for name in names]
    while world.commits:
        world.commit()
    most = 0
    while world.reads:
        world.read()
        came = [device.messages() for device in devices]
        most = max(most, sum(map(len, came)))
        for device, messages in zip(devices, came, strict=True):
            for message in messages:
                device.send_bytes(encode(PubAck(message[2]), 4))
        while world.commits:
            world.commit()
    assert most <= SLICE + 1_000
    world.kill()
