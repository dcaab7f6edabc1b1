"""A turn of the sockets: nobody's bytes may make the others wait long. The clock is the test's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tidegate.gateway.mqtt.packets import Connect, encode
from tidegate.gateway.server import READ, Sockets

from .world import World

PING, PONG = b"\xc0\0", b"\xd0\0"
CONNACK = b"\x20\x02\0\0"


class Listener(NamedTuple):
    host: str = "127.0.0.1"
    port: int = 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "log.db")
    yield world
    world.kill()


async def looks_at_the_clock(world: World, seconds: float) -> int:
    """How often, while a client sends twice READ bytes of pings at once and each look costs so many seconds."""
    looks = 0

    def clock() -> None:
        nonlocal looks
        looks += 1
        world.broker.now += seconds

    sockets = Sockets(world.broker, clock, world.said)
    (address,) = sockets.listen(Listener())
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
        pings = PING * READ
        sending = loop.create_task(loop.sock_sendall(sock, encode(Connect(4, "c"), 4) + pings))
        got = b""
        while len(got) < len(CONNACK + pings):
            got += await loop.sock_recv(sock, 1 << 20)
        await sending
        assert got == CONNACK + PONG * READ
    while world.broker.clients:
        await asyncio.sleep(0)
    sockets.stop_listening()
    return looks


def test_when_a_turn_takes_long_the_next_ones_read_less(world: World) -> None:
    assert asyncio.run(looks_at_the_clock(world, 1.0)) > 200


def test_when_turns_are_short_much_is_read_at_once(world: World) -> None:
    assert asyncio.run(looks_at_the_clock(world, 0.000_01)) < 100
