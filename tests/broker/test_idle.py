"""What one idle connection takes of the memory: counted to the byte, so that it does not grow by and by."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import tidegate.gateway
import tidegate.store
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import Connect, PingReq, Subscribe, Subscription, encode
from tidegate.gateway.server import Link, Sockets
from tidegate.store.entry import CONNECTED, PUBLISH, Want
from tidegate.store.few import NO_DICT, NO_LIST

from .world import World

CLIENTS = 1_000
MOST = 1_310
"""Bytes, of which 118 are its client id and its topic filter."""
OURS = [f"{Path(package.__file__ or '').parent}/*" for package in (tidegate.gateway, tidegate.store)]


class Listener(NamedTuple):
    host: str = "127.0.0.1"
    port: int = 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "log.db")
    world.broker.router.set_wants([Want(kind, "", 0, False) for kind in (CONNECTED, PUBLISH)])
    yield world
    world.kill()


def test_an_idle_connection_takes_little(world: World) -> None:
    async def measure() -> float:
        sockets = Sockets(world.broker, lambda: None, world.said)
        (address,) = sockets.listen(Listener())
        with ExitStack() as stack:
            stack.callback(hang_up, world, sockets)
            await connect(world, stack, address, "first")
            tracemalloc.start()
            stack.callback(tracemalloc.stop)
            before = traced()
            for number in range(CLIENTS):
                await connect(world, stack, address, f"idle-{number}")
            assert len(world.broker.clients) == CLIENTS + 1
            return (traced() - before) / CLIENTS

    assert asyncio.run(measure()) < MOST


async def connect(world: World, stack: ExitStack, address: tuple[str, int], name: str) -> None:
    """One more that subscribes to a topic of its own and says nothing any more."""
    loop = asyncio.get_running_loop()
    sock = stack.enter_context(socket.socket())
    sock.setblocking(False)
    await loop.sock_connect(sock, address)
    subscribe = Subscribe(1, (Subscription(f"idle/{name}/set", 1, False, False, 0),), {})
    await loop.sock_sendall(sock, encode(Connect(4, name, True, 60, None, None, None, {}), 4) + encode(subscribe, 4))
    got = b""
    while len(got) < len(b"\x20\x02\0\0" + b"\x90\x03\0\1\1"):
        got += await loop.sock_recv(sock, 100)
        world.settle()


def hang_up(world: World, sockets: Sockets) -> None:
    sockets.stop_listening()
    for client in list(world.broker.clients):
        assert isinstance(client.link, Link)
        client.link.drop()


def traced() -> int:
    """Bytes that were allocated in our files and are not free."""
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, pattern) for pattern in OURS])
    return sum(trace.size for trace in snapshot.traces)


def test_retained_messages_that_wait_survive_a_ping_and_a_full_socket(tmp_path: Path) -> None:
    world = World(tmp_path / "log.db", Limits(max_inflight=2))
    for number in range(5):
        world.device("publisher").publish(f"r/{number}", b"kept", retain=True)
    device = world.device("device", keep_alive=60)
    device.subscribe("r/#", 1)
    device.send(PingReq())
    world.broker.writable(device.client, False)
    got = device.ack_all()
    world.broker.writable(device.client, True)
    world.settle()
    while messages := device.ack_all():
        got += messages
    assert sorted(topic for topic, *_ in got) == [f"r/{number}" for number in range(5)]
    world.kill()


@pytest.mark.parametrize("clean", [True, False])
def test_who_only_pings_has_no_container_of_its_own(world: World, clean: bool) -> None:
    device = world.device("device", clean=clean, keep_alive=60)
    device.subscribe("to/device", 1)
    device.subscribe("twice/device", 2)
    world.device("other").publish("to/device", b"hello")
    session = device.client.session
    assert session is not None and session.inflight, "nothing came: no test"
    device.ack_all()
    device.send(PingReq())
    for owner in (device.client, session, device.client.connection):
        for name in type(owner).__slots__:
            value = getattr(owner, name)
            if name != "subscriptions":
                assert not isinstance(value, dict | list | set | bytearray) or value is NO_DICT or value is NO_LIST, name
