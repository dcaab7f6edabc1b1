"""A session that stays away past its limits is moved forward: what it then gets, what is counted, what it holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import PubRec, PubRel
from tidegate.gateway.trimming import reach
from tidegate.store.catchup import CatchUp
from tidegate.store.entry import PUBLISH
from tidegate.store.log import Name
from tidegate.store.topic import matches

from tests.store.test_store import TopicName, open_store

from .world import NOW, World

Make = Callable[[Limits], World]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def make(path: Path) -> Make:
    return lambda limits: World(path, limits)


def _before(when: int, at: int, mono: int, run: int) -> bool:
    return at < when


def asleep(world: World, qos: int = 1) -> None:
    """A session that is away, with what it wants and what it does not."""
    sleeper = world.device("s", clean=False)
    sleeper.subscribe("t/#", qos)
    sleeper.disconnect()
    other = world.device("o", clean=False)
    other.subscribe("#", 1)
    world.settle()


def publish(world: World, count: int, first: int = 0, size: int = 10) -> None:
    device = world.device("p")
    for number in range(first, first + count):
        device.publish("t/a" if number % 2 else "other", b"%d".ljust(size) % number, packet_id=number + 1)
    device.disconnect()


def got(world: World) -> list[int]:
    device = world.device("s", clean=False)
    return [int(message[3]) for message in device.ack_all()]


def test_the_oldest_messages_above_the_limit_are_given_up(make: Make) -> None:
    world = make(Limits(max_waiting_messages=10))
    asleep(world)
    publish(world, 100)
    world.wait(1)
    world.wait(1)
    assert world.broker.delivery.dropped == {"max_waiting_messages": 40}
    assert (
        world.said[-1]
        == "session_cut: a session that stays away has lost its oldest messages client=s count=40 reason=max_waiting_messages"
    )
    assert got(world) == list(range(81, 100, 2))


def test_what_nobody_sent_to_it_does_not_count(make: Make) -> None:
    world = make(Limits(max_waiting_messages=60))
    asleep(world)
    publish(world, 100)
    world.wait(1)
    assert not world.broker.delivery.dropped
    assert got(world) == list(range(1, 100, 2))


def test_bytes_are_bounded_too(make: Make) -> None:
    world = make(Limits(max_waiting_bytes=1_000))
    asleep(world)
    publish(world, 40, size=100)
    world.wait(1)
    world.wait(1)
    assert world.broker.delivery.dropped == {"max_waiting_bytes": 10}
    assert got(world) == list(range(21, 40, 2))


def test_what_is_too_old_goes_and_holds_nothing_in_the_log(make: Make) -> None:
    world = make(Limits(max_waiting_age=3600))
    asleep(world)
    publish(world, 10)
    last = world.broker.delivery.live
    world.wait(1800)
    publish(world, 10, 10)
    world.device("o", clean=False).ack_all()
    assert reach(world.broker, ()).floor < last
    world.wait(1900)
    world.wait(1)
    world.wait(1)
    assert world.broker.delivery.dropped == {"max_waiting_age": 5}
    assert reach(world.broker, ()).floor >= last
    assert got(world) == [11, 13, 15, 17, 19]


def test_messages_without_payload_are_counted_like_others(make: Make) -> None:
    world = make(Limits(max_waiting_messages=10))
    asleep(world)
    device = world.device("p")
    for number in range(1, 12):
        device.publish("t/a", b"", packet_id=number)
    for _ in range(3):
        world.wait(1)
    assert world.broker.delivery.dropped == {"max_waiting_messages": 1}
    assert len(world.device("s", clean=False).ack_all()) == 10


def test_what_was_sent_and_not_acknowledged_goes_first(make: Make) -> None:
    world = make(Limits(max_waiting_messages=10))
    asleep(world)
    sleeper = world.device("s", clean=False)
    publish(world, 20)
    assert len(sleeper.messages()) == 10
    sleeper.cut()
    publish(world, 8, 20)
    world.wait(1)
    world.wait(1)
    assert world.broker.delivery.dropped == {"max_waiting_messages": 4}
    assert got(world) == list(range(9, 28, 2))
    world.wait(1)
    assert world.broker.delivery.dropped == {"max_waiting_messages": 4}, "and no more while it is there"


def test_a_qos_2_delivery_that_is_given_up_is_released(make: Make) -> None:
    world = make(Limits(max_waiting_age=60))
    asleep(world, 2)
    sleeper = world.device("s", clean=False)
    world.device("p").publish("t/a", b"1", 2)
    (message,) = sleeper.messages()
    sleeper.cut()
    world.wait(100)
    world.wait(1)
    again = world.device("s", clean=False)
    assert again.take(PubRel).packet_id == message[2]
    assert again.messages() == []
    assert world.broker.delivery.dropped == {"max_waiting_age": 1}
    again.send(PubRec(message[2]))
    assert not again.closed


def test_a_session_that_was_moved_stays_there_after_a_crash(make: Make, path: Path) -> None:
    world = make(Limits(max_waiting_messages=10))
    asleep(world)
    publish(world, 100)
    for _ in range(3):
        world.wait(1)
    world.kill()
    assert got(World(path)) == list(range(81, 100, 2))


def test_many_sessions_are_looked_at_a_bounded_number_at_a_time(make: Make) -> None:
    world = make(Limits(max_waiting_messages=10))
    for number in range(150):
        sleeper = world.device(f"s{number}", clean=False)
        sleeper.subscribe("t/#", 1)
        sleeper.disconnect()
    publish(world, 40)
    for _ in range(6):
        world.wait(1)
    assert world.broker.delivery.dropped == {"max_waiting_messages": 1_500}


@pytest.mark.parametrize("seed", range(5))
def test_counting_is_exact(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    store, log = open_store(path)
    topics = [TopicName(text) for text in ("a", "a/b", "a/b/c", "$x/a", "b/+x")]
    rows = []
    for _ in range(500):
        topic, size, qos = chance.choice(topics), chance.randrange(50), chance.randrange(3)
        rows.append((log.append(PUBLISH, Name("c"), topic, qos, bytes(size)), topic.text, size, qos))
    store.apply(log.take())
    reader = CatchUp(path)
    for filters in (["#"], ["a/#"], ["+"], ["a", "a/b"], ["+/b/#", "a"], ["none"]):
        wanted = [(seq, size) for seq, text, size, qos in rows if qos and any(matches(one, text) for one in filters)]
        assert reader.count(1, 500, filters)[:2] == (len(wanted), sum(size for _, size in wanted))
        if len(wanted) > 20:
            assert reader.count(1, 500, filters, 7, 0) == (7, sum(size for _, size in wanted[:7]), wanted[6][0])
            part = reader.count(1, 500, filters, 0, 200)
            assert part.bytes >= 200 > part.bytes - wanted[part.messages - 1][1]
    assert [reader.last_before(partial(_before, NOW + more)) for more in (-1, 0, 1)] == [0, 0, 500]
    reader.close()
    store.close(NOW)
