"""From end to end: a device reads at one gateway, goes to another that shares the far end, and finds what it has not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.redis_cluster import Cluster, Watched
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .sql_rig import EVERY_SERVER, SERVERS, function_rule, tables
from .test_two_gateways import Far, FarRedis, FarSql

TOML = '[gateway]\nname = "{}"\n\n[uplink]\nbackends = ["sqlite", "{}"]\n'
FUNCTIONS = (
    ("message.publish.1", "on_message_publish", "#"),
    ("session.subscribed.1", "on_message_fetch_for_pubsub", "a/#"),
    ("session.subscribed.2", "on_message_fetch_for_queue", "queue/#"),
    ("message.acked.1", "on_message_acked_for_pubsub", "a/#"),
    ("message.acked.2", "on_message_acked_for_queue", "queue/#"),
    ("session.unsubscribed.1", "on_acked_delete", "a/#"),
)


def take(client: MqttClient, count: int) -> list[bytes]:
    """So many messages, each acknowledged."""
    found: list[bytes] = []
    while len(found) < count:
        packet = client.expect(Kind.PUBLISH)
        found.append(packet.payload)
        client.answer(Kind.PUBACK, packet.packet_id)
    return found


@pytest.fixture(params=["redis", "redis-sentinel", "redis-cluster", *EVERY_SERVER])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Far, list[Gateway]]]:
    kind: str = request.param
    with ExitStack() as stack:
        far: Far
        if kind == "redis-sentinel":
            watched = stack.enter_context(Watched(tmp_path))
            far = FarRedis(watched.master, stack.enter_context(watched.master.client()))
            far.settings = watched.settings()
        elif kind.startswith("redis"):
            server: Cluster | RedisServer = Cluster(tmp_path) if kind == "redis-cluster" else RedisServer(tmp_path)
            stack.enter_context(server)
            far = FarRedis(server, stack.enter_context(server.client()))
        else:
            sql = stack.enter_context(SERVERS[kind]())
            tables(sql)
            far = FarSql(sql)
        lines = [f"server = 127.0.0.1:{far.port}", *far.settings.splitlines()]
        conf = "".join(f"backend.{far.backend}.pool1.{line}\n" for line in lines)
        conf += "".join(function_rule(far.backend, *rule) for rule in FUNCTIONS)
        gateways = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            files = {f"emqx_backend_{far.backend}.conf": conf}
            gateways.append(stack.enter_context(Gateway(tmp_path / name, toml=TOML.format(name, far.backend), files=files)))
        yield far, gateways


def test_a_device_that_goes_to_another_gateway_finds_what_it_has_not_read(far: tuple[Far, list[Gateway]]) -> None:
    there, (one, two) = far
    sender = MqttClient(one.port, "sender")
    with MqttClient(one.port, "c") as device:
        device.subscribe(("a/b", 1), ("queue/1", 1))
        for number in range(3):
            sender.publish_and_wait("a/b", b"%d" % number)
        sender.publish_and_wait("queue/1", b"taken")
        assert sorted(take(device, 4)) == [b"0", b"1", b"2", b"taken"]
        wait_until(lambda: there.stored("a/b")[2:] == [there.acked()])
        wait_until(lambda: not there.stored("queue/1"))
    for number in range(3, 5):
        sender.publish_and_wait("a/b", b"%d" % number)
    sender.publish_and_wait("queue/1", b"waits")
    wait_until(lambda: len(there.stored("a/b")) == 5 and len(there.stored("queue/1")) == 1)
    with MqttClient(two.port, "c") as device:
        device.subscribe(("a/b", 1), ("queue/1", 1))
        assert sorted(take(device, 3)) == [b"3", b"4", b"waits"]
        wait_until(lambda: there.acked() == there.stored("a/b")[-1])
        wait_until(lambda: not there.stored("queue/1"))
        device.unsubscribe("a/b")
        wait_until(lambda: not there.acked())
        device.subscribe(("a/+", 1))
        sender = MqttClient(two.port, "sender")
        sender.publish_and_wait("a/c", b"wild")
        assert take(device, 1) == [b"wild"]
        wait_until(lambda: there.acked("a/c"))
        device.unsubscribe("a/+")
        wait_until(lambda: not there.acked("a/c"))
    assert one.stop() == two.stop() == 0
