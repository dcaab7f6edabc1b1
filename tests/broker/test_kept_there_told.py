"""A far end's retained message moves no position, also not when a restart comes between it and its acknowledgement."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.gateway.inbox import Inbox
from tidegate.store.entry import POSITION
from tidegate.store.inbox import RETAINED, Answer

from tests.broker.inbox_file import make_inbox, put
from tests.broker.test_told import entries, open_world
from tests.broker.world import NOW


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("qos", [1, 2])
def test_a_retained_message_of_a_far_end_moves_no_position(tmp_path: Path, restart: bool, qos: int) -> None:
    path, inbox = tmp_path / "log.db", make_inbox(tmp_path / "uplink.db")
    world = open_world(path)
    reader = world.device("r", clean=False)
    reader.subscribe("read/a", qos)
    kept = Answer(0, "redis.pool1", RETAINED, "r", "read/a", "read/a", "[]", "kept-there", "elsewhere", qos, NOW + 5000, b"x")
    put(inbox, kept)
    Inbox(world.broker, inbox).look()
    world.settle()
    if restart:
        world.stop()
        world = open_world(path)
        reader = world.device("r", clean=False)
    assert len(reader.ack_all()) == 1
    world.wait(1)
    assert [entry.payload for entry in entries(path) if entry.kind == POSITION] == []
    world.kill()
