"""Stored messages for new subscriptions beside what else decides over messages: clocks, limits of absence, other sessions."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.store.clock import CONFIRMED

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
