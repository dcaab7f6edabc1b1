"""From end to end: a device reads at one gateway, goes to another that shares the Redis, and finds what it has not read."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .rig import MESSAGES

TOML = '[gateway]\nname = "{}"\n\n[uplink]\nbackends = ["sqlite", "redis"]\n'
FUNCTIONS = (
    ("session.subscribed.1", "a/#", "on_message_fetch_for_pubsub"),
    ("session.subscribed.2", "queue/#", "on_message_fetch_for_queue"),
    ("message.acked.1", "a/#", "on_message_acked_for_pubsub"),
    ("message.acked.2", "queue/#", "on_message_acked_for_queue"),
    ("session.unsubscribed.1", "a/#", "on_acked_delete"),
)
RULES = "backend.redis.pool1.server = 127.0.0.1:{port}\n" + (
    MESSAGES
    + "".join(
        f'backend.redis.hook.{hook} = {{"topic": "{topic}", "action": {{"function": "{function}"}}, "pool": "pool1"}}\n'
        for hook, topic, function in FUNCTIONS
    )
).replace("{", "{{").replace("}", "}}")


def take(client: MqttClient, count: int) -> list[bytes]:
    """So many messages, each acknowledged."""
    found: list[bytes] = []
    while len(found) < count:
        packet = client.expect(Kind.PUBLISH)
        found.append(packet.payload)
        client.answer(Kind.PUBACK, packet.packet_id)
    return found


@pytest.fixture
def far(tmp_path: Path) -> Any:
    with RedisServer(tmp_path) as server, server.client() as client, ExitStack() as stack:
        gateways = []
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            files = {"emqx_backend_redis.conf": RULES.format(port=server.port)}
            gateways.append(stack.enter_context(Gateway(folder, toml=TOML.format(name), files=files)))
        yield client, *gateways


def test_a_device_that_goes_to_another_gateway_finds_what_it_has_not_read(far: Any) -> None:
    redis, one, two = far
    sender = MqttClient(one.port, "sender")
    with MqttClient(one.port, "device") as device:
        device.subscribe(("a/b", 1), ("queue/1", 1))
        for number in range(3):
            sender.publish_and_wait("a/b", b"%d" % number)
        sender.publish_and_wait("queue/1", b"taken")
        assert sorted(take(device, 4)) == [b"0", b"1", b"2", b"taken"]
        wait_until(lambda: redis.zrange("mqtt:msg:a/b", 2, 2) == [redis.get("mqtt:acked:device:a/b")])
        wait_until(lambda: not redis.exists("mqtt:msg:queue/1"))
    for number in range(3, 5):
        sender.publish_and_wait("a/b", b"%d" % number)
    sender.publish_and_wait("queue/1", b"waits")
    wait_until(lambda: redis.zcard("mqtt:msg:a/b") == 5 and redis.zcard("mqtt:msg:queue/1") == 1)
    newest = redis.zrange("mqtt:msg:a/b", -1, -1)[0]
    with MqttClient(two.port, "device") as device:
        device.subscribe(("a/b", 1), ("queue/1", 1))
        assert sorted(take(device, 3)) == [b"3", b"4", b"waits"]
        wait_until(lambda: redis.get("mqtt:acked:device:a/b") == newest)
        wait_until(lambda: not redis.exists("mqtt:msg:queue/1"))
        device.unsubscribe("a/b")
        wait_until(lambda: not redis.exists("mqtt:acked:device:a/b"))
        device.subscribe(("a/+", 1))
        sender = MqttClient(two.port, "sender")
        sender.publish_and_wait("a/c", b"wild")
        assert take(device, 1) == [b"wild"]
        wait_until(lambda: redis.exists("mqtt:acked:device:a/c"))
        device.unsubscribe("a/+")
        wait_until(lambda: not redis.exists("mqtt:acked:device:a/c"))
    assert one.stop() == two.stop() == 0
