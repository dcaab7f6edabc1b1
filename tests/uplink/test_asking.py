"""What a far end is asked for devices, and when: lookups, rounds, outages, sessions that are gone, on a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.redis_server import RedisServer

from .lane_rig import LOOKUP, LaneRig, subscriptions


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def rig(tmp_path: Path, server: RedisServer) -> Iterator[LaneRig]:
    with LaneRig(tmp_path, server.port, LOOKUP) as rig:
        yield rig


def test_a_new_session_s_subscriptions_are_looked_up(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        far.hset("mqtt:sub:c1", mapping={"a/b": 1, "x/#": 2, "odd": "seven"})
    rig.log.arrive("c1")
    rig.ask()
    assert [subscriptions(answer) for answer in rig.answers()] == [("c1", {"a/b": 1, "x/#": 2, "odd": -1})]
    assert (rig.told, rig.waiting()) == (2, 0)
