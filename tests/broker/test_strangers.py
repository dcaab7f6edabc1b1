"""Strangers with random client ids come by the thousand: nothing stays of them, in memory or on disk, but their log."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

from tidegate.gateway.session import Client, Session
from tidegate.gateway.trimming import Trimming, reach
from tidegate.store.entry import CONNECTED, DISCONNECTED, PUBLISH, SESSION_CREATED, SUBSCRIBED, Want
from tidegate.store.trim import Trim

from tests.support.said import Said

from .world import Device, World

STRANGERS = 9_000
BUDGET = 2 << 20
MARK = "stranger-"
KINDS = (PUBLISH, CONNECTED, DISCONNECTED, SESSION_CREATED, SUBSCRIBED)


def test_random_client_ids_do_not_grow_the_box(tmp_path: Path) -> None:
    world = World(tmp_path / "log.db")
    world.broker.router.set_wants([Want(kind, "#", 0, False) for kind in KINDS])
    trim = Trim(BUDGET, 7 * 86_400_000)

    def now(job: Any, done: Any) -> None:
        done(job())

    trimming = Trimming(trim, world.store.connection, now, world.broker, lambda: reach(world.broker, ()), Said())
    world.auto = False
    chance = random.Random(1)
    most_clients = most_bytes = 0
    for number in range(STRANGERS):
        stranger(world, f"{MARK}{chance.getrandbits(128):032x}")
        if number % 20 == 19:
            world.settle()
            world.broker.tick()
            trimming.start()
            world.settle()
            (clients,) = world.store.connection.execute("SELECT count(*) FROM client").fetchone()
            most_clients, most_bytes = max(most_clients, clients), max(most_bytes, used(world))
    (entries,) = world.store.connection.execute("SELECT count(*) FROM entry").fetchone()
    assert entries < 4 * STRANGERS, "the budget took nothing: no test"
    assert most_clients < STRANGERS / 2
    assert most_bytes <= BUDGET
    assert (len(world.broker.sessions), len(world.broker.clients), world.broker.router.subscriptions) == (0, 0, 0)
    gc.collect()
    left: list[object] = [one for one in gc.get_objects() if isinstance(one, Client) and one.peer.startswith(MARK)]
    left += [one for one in gc.get_objects() if isinstance(one, Session) and one.name.text.startswith(MARK)]
    assert not left
    world.kill()


def stranger(world: World, name: str) -> None:
    """Comes once, subscribes, publishes, and goes for ever."""
    device = Device(world, name)
    device.subscribe(f"for/{name}/#", 1)
    device.publish(f"from/{name}", b"hello")
    device.publish("all", b"hello", packet_id=2)
    device.disconnect()


def used(world: World) -> int:
    count, free = (world.store.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    return int(count - free) * 4096
