"""The balance of a session: everything found for it is delivered, in flight, expired or dropped, also after a crash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.accounts import overview, sheet
from tidegate.gateway.config import load
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import Publish, PubRec
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.snapshot import Snapshot
from tidegate.gateway.trust import Trust
from tidegate.store.lines import Lines

from .test_budget import Box
from .world import World


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def world(path: Path) -> Iterator[World]:
    world = World(path)
    yield world
    world.kill()


def account(world: World) -> dict[str, Any]:
    session = world.broker.sessions.get("s")
    assert session is not None
    found = sheet(session, world.broker.delivery.live)
    assert found["mismatch"] == 0, str(found)
    parts = found["delivered"] + found["in_flight"] + found["waiting"] + found["expired"] + sum(found["dropped"].values())
    assert found["wanted"] == parts
    return found


def publish(world: World, count: int, topic: str = "t", **properties: int) -> None:
    device = world.device("p", 5)
    for number in range(count):
        device.send(Publish(topic, b"%d" % number, 1, False, False, number + 1, dict(properties)))  # type: ignore[arg-type]
    device.disconnect()
    world.settle()


def test_delivered_is_what_was_acknowledged(world: World) -> None:
    device = world.device("s", clean=False)
    device.subscribe("t", 1)
    publish(world, 10)
    assert (account(world)["wanted"], account(world)["in_flight"]) == (10, 10)
    device.ack_all()
    assert (account(world)["delivered"], account(world)["in_flight"]) == (10, 0)


def test_qos_2_is_delivered_when_it_is_complete(world: World) -> None:
    device = world.device("s", clean=False)
    device.subscribe("t", 2)
    world.device("p").publish("t", b"x", 2)
    (message,) = device.messages()
    device.send(PubRec(message[2]))
    assert account(world)["in_flight"] == 1
    device.send_bytes(b"\x70\x02" + message[2].to_bytes(2, "big"))
    assert (account(world)["delivered"], account(world)["in_flight"]) == (1, 0)


def test_entries_that_were_not_looked_at_stand_beside_the_sum(world: World) -> None:
    world.device("s", clean=False).subscribe("t", 1)
    world.device("s", clean=False).disconnect()
    world.device("all", clean=False).subscribe("#", 1)
    publish(world, 7)
    publish(world, 3, topic="other")
    assert (account(world)["wanted"], account(world)["unread_entries"]) == (0, 10)
    world.device("s", clean=False).ack_all()
    assert (account(world)["delivered"], account(world)["unread_entries"]) == (7, 0)


def test_where_what_may_wait_is_limited_messages_are_counted_and_not_entries(path: Path) -> None:
    world = World(path, Limits(max_waiting_messages=100))
    world.device("s", clean=False).subscribe("t", 1)
    world.device("s", clean=False).disconnect()
    world.device("all", clean=False).subscribe("#", 1)
    publish(world, 7)
    publish(world, 3, topic="other")
    world.wait(1)
    assert (account(world)["wanted"], account(world)["waiting"], account(world)["unread_entries"]) == (7, 7, 0)
    world.device("s", clean=False).ack_all()
    assert (account(world)["wanted"], account(world)["delivered"], account(world)["waiting"]) == (7, 7, 0)
    world.kill()


def test_what_expired_is_told(world: World) -> None:
    world.device("s", clean=False).subscribe("t", 1)
    world.device("s", clean=False).disconnect()
    device = world.device("p", 5)
    device.send(Publish("t", b"x", 1, False, False, 1, {Property.MESSAGE_EXPIRY_INTERVAL: 5}))
    device.disconnect()
    world.wait(10)
    assert world.device("s", clean=False).ack_all() == []
    assert account(world)["expired"] == 1


def test_the_account_survives_a_crash(world: World, path: Path) -> None:
    device = world.device("s", clean=False)
    device.subscribe("t", 1)
    publish(world, 10)
    device.ack_all()
    world.wait(1)
    other = World(path)
    assert account(other)["delivered"] == 10
    other.kill()


def test_given_up_because_of_limits_is_dropped(path: Path) -> None:
    world = World(path, Limits(max_waiting_messages=4))
    world.device("s", clean=False).subscribe("t", 1)
    world.device("s", clean=False).disconnect()
    publish(world, 10)
    for _ in range(3):
        world.wait(1)
    assert account(world)["dropped"] == {"max_waiting_messages": 6}
    assert len(world.device("s", clean=False).ack_all()) == 4
    world.wait(1)
    assert account(world)["wanted"] == 10
    world.kill()


def test_what_the_budget_takes_from_a_sleeper_is_dropped_and_kept_over_a_crash(path: Path) -> None:
    box = Box(path)
    sleeper = box.device("s", clean=False)
    sleeper.subscribe("low/#", 1)
    sleeper.disconnect()
    box.publish("low/a", 3_000)
    box.tick()
    lost = box.broker.gaps.open
    assert account(box)["dropped"] == {"disk_budget": lost} and lost > 0
    box.kill()
    box = Box(path)
    assert account(box)["dropped"] == {"disk_budget": lost}
    returning = box.device("s", clean=False)
    got = 0
    while messages := returning.ack_all():
        got += len(messages)
    assert got == 3_000 - lost
    assert account(box)["wanted"] == 3_000
    box.kill()


def read_to_the_end(box: Box, device: Any) -> int:
    got = 0
    while messages := device.ack_all():
        got += len(messages)
        box.settle()
    return got


def crowd(box: Box, device: Any, count: int, topic: str = "low/a", qos: int = 1) -> None:
    """Fill the budget while a reader that takes few at a time falls behind."""
    for number in range(count):
        device.publish(topic, b"%d".ljust(200) % number, qos, packet_id=number % 60_000 + 1)


def test_what_the_budget_takes_is_not_delivered_from_memory_as_well(path: Path) -> None:
    box = Box(path)
    reader = box.device("s", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 3600, Property.RECEIVE_MAXIMUM: 10})
    reader.subscribe("low/#", 1)
    crowd(box, box.device("p"), 3_000)
    assert (before := account(box))["in_flight"] == 10 and before["unread_entries"] == 2_990
    box.tick()
    lost = account(box)["dropped"]["disk_budget"]
    assert 0 < lost <= box.broker.gaps.open
    assert read_to_the_end(box, reader) == 3_000 - lost
    assert account(box)["wanted"] == 3_000
    box.kill()


def test_what_was_being_read_when_the_budget_took_it_is_counted_once(path: Path) -> None:
    box = Box(path)
    box.device("s", clean=False).subscribe("low/#", 1)
    box.device("s", clean=False).disconnect()
    crowd(box, box.device("p"), 3_000)
    box.broker.delivery.forget_tail()
    box.auto = False
    reader = box.device("s", clean=False)
    while not box.reads:
        box.commit()
    box.trimming.start()
    read = box.read_all()
    assert read[0].messages[0][0] < 100, "the piece was read before the removal is on disk"
    box.auto = True
    box.settle()
    box.tick()
    lost = account(box)["dropped"]["disk_budget"]
    assert read_to_the_end(box, reader) == 3_000 - lost
    assert account(box)["wanted"] == 3_000
    box.kill()


def test_a_session_that_stands_within_what_is_taken_is_charged_with_what_lies_before_it(path: Path) -> None:
    box = Box(path)
    sleeper = box.device("s", clean=False)
    sleeper.subscribe("low/#", 1)
    publisher = box.device("p")
    crowd(box, publisher, 300)
    sleeper.ack_all()
    sleeper.disconnect()
    crowd(box, publisher, 100, "low/a", 0)
    crowd(box, publisher, 200)
    crowd(box, publisher, 3_000, "high/a")
    box.tick()
    assert account(box)["delivered"] == 300
    assert account(box)["dropped"] == {"disk_budget": 200}, "neither what it has had nor what has QoS 0"
    box.kill()


def test_of_what_is_taken_only_what_a_session_would_have_got_is_charged_to_it(path: Path) -> None:
    box = Box(path)
    own = box.device("own", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 3600, Property.RECEIVE_MAXIMUM: 1})
    own.subscribe("low/#", 1, no_local=True)
    crowd(box, own, 100)
    crowd(box, box.device("p"), 200)
    late = box.device("late", clean=False)
    late.subscribe("#", 1)
    late.disconnect()
    crowd(box, box.device("p"), 3_000, "high/a")
    box.tick()
    own.disconnect()
    assert box.broker.gaps.open > 300
    charged = {name: box.broker.sessions.get(name) for name in ("own", "late")}
    lost = {name: session.dropped["disk_budget"] for name, session in charged.items() if session is not None}
    assert lost == {"own": 200 - 1, "late": box.broker.gaps.open - 300}
    box.kill()


def test_a_message_that_is_nowhere_is_a_mismatch(world: World) -> None:
    device = world.device("s", clean=False)
    device.subscribe("t", 1)
    publish(world, 3)
    session = world.broker.sessions.get("s")
    assert session is not None
    session.inflight.popitem()
    found = overview(world.broker.sessions, world.broker.delivery.live)
    assert (found["mismatch"], found["most"][0]["client"]) == (1, "s")


def test_a_balance_that_does_not_add_up_is_told_by_name(world: World, tmp_path: Path) -> None:
    device = world.device("s", clean=False)
    device.subscribe("t", 1)
    pools: list[dict[str, Any]] = [{"name": "redis.pool1", "balance": {"mismatch": 0}}]
    snapshot = Snapshot(
        load(None, tmp_path, (), {}), world.store, world.broker, Trust("always", 0), lambda: pools, 0.0, Lines(str)
    )
    assert snapshot.mismatches() == []
    pools[0]["balance"]["mismatch"] = 2
    session = world.broker.sessions.get("s")
    assert session is not None
    session.taken += 1
    pool, lost = snapshot.mismatches()
    assert (pool[0], lost[0]) == ("pool redis.pool1", "session s")
