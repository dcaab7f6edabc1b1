"""Stored messages for new subscriptions beside what else decides over messages: clocks, limits of absence, other sessions."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.offline import HELD
from tidegate.store.clock import CONFIRMED
from tidegate.store.piece import MESSAGE

from .test_offline import HOUR, look, one_to_many, open_world, positions, publish, rules, take


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.mark.parametrize("days", [-30, 30])
def test_a_step_of_the_clock_makes_no_stored_message_older_or_younger(path: Path, days: int) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["old"])
    world.wait(3 * HOUR // 1000)
    publish(world, "pubsub/a", ["young"])
    log = world.broker.log
    log.step(log.clock.offset + days * 24 * HOUR, CONFIRMED)
    assert take(one_to_many(world, "s")) == ["young"], "of the last two hours"


@pytest.mark.parametrize("qos", [1, 2])
def test_what_a_client_fetches_is_not_what_waits_for_it_too_long(path: Path, qos: int) -> None:
    world = open_world(path, rules(span=0), Limits(max_inflight=1, max_waiting_age=3600))
    publish(world, "pubsub/a", ["1", "2"], qos)
    world.wait(7200)
    device = one_to_many(world, "s", qos=qos, clean=False)
    assert look(device) == ["1"]
    device.cut()
    world.wait(10)
    assert take(world.device("s", clean=False)) == ["1", "2"]
    assert world.broker.delivery.dropped["max_waiting_age"] == 0


@pytest.mark.parametrize("qos", [1, 2])
def test_what_a_limit_gave_up_does_not_hold_the_position(path: Path, qos: int) -> None:
    world = open_world(path, limits=Limits(max_waiting_age=60))
    device = one_to_many(world, "s", qos=qos, clean=False)
    publish(world, "pubsub/a", ["1"], qos)
    assert look(device) == ["1"]
    device.cut()
    world.wait(120)
    assert world.broker.delivery.dropped["max_waiting_age"] == 1
    publish(world, "pubsub/a", ["2"], qos)
    assert take(world.device("s", clean=False)) == ["2"]
    assert positions(world, path) == [("s", "pubsub/a", "2")]


def test_what_many_clients_fetch_at_once_is_bounded_in_memory(path: Path) -> None:
    world = open_world(path, rules(count=0), Limits(max_inflight=1))
    payloads = [str(number).zfill(1_000) for number in range(1_000)]
    publish(world, "pubsub/a", payloads)
    devices = [one_to_many(world, f"s{number}") for number in range(60)]
    fetches = [fetch for session in world.broker.sessions if session.progress for fetch in session.progress.pending]
    assert len(fetches) == 60 and all(fetch.piece for fetch in fetches)
    held = sum(len(message[3]) + MESSAGE for fetch in fetches for message in fetch.piece)
    assert held < 5 * HELD < 60 * 1_000 * 1_300 / 3, "a share of it for each, the first ones a greater one"
    assert take(devices[-1]) == payloads


def test_who_fetches_from_a_queue_and_goes_remembers_nothing_of_it(path: Path) -> None:
    world = open_world(path, limits=Limits(max_inflight=1))
    publish(world, "queue/a", ["1", "2", "3"])
    asleep = one_to_many(world, "asleep", "queue/a", clean=False)
    assert look(asleep) == ["1"]
    other = one_to_many(world, "other", "queue/a")
    assert take(other) == ["1", "2", "3"]
    (fetch,) = world.broker.sessions.get("asleep").followed().pending  # type: ignore[union-attr]
    assert len(fetch.taken) == 2, "what it still has in its hands"
    asleep.cut()
    world.wait(1)
    assert fetch.taken == set()
    assert take(world.device("asleep", clean=False)) == ["1"]


def test_a_message_that_cannot_be_stored_holds_up_no_fetch(path: Path) -> None:
    world = open_world(path)
    world.store.connection.execute(
        "CREATE TRIGGER no_bad BEFORE INSERT ON entry WHEN new.payload = x'62' BEGIN SELECT RAISE(ABORT, 'bad'); END"
    )
    publish(world, "pubsub/a", ["1"])
    sinner = world.device("sinner")
    world.auto = False
    world.device("opens the first batch", clean=False)
    sinner.publish("pubsub/a", b"b")
    device = one_to_many(world, "s", clean=False)
    world.settle()
    world.auto = True
    assert sinner.closed and take(device) == ["1"]
