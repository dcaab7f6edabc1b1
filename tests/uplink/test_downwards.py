"""End to end on a real Redis: what a business system wrote there reaches a device that is connected, once, over kill -9."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from redis import Redis

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

DEADLINE = 30.0
TOML = '[gateway]\nname = "barn"\n\n[uplink]\nbackends = ["sqlite", "redis"]\n'
RULES = """
backend.redis.pool1.server = 127.0.0.1:{port}
backend.redis.pool1.lookup_interval = 1s
backend.redis.hook.client.connected.1 = {{"action": {{"function": "on_subscribe_lookup"}}, "pool": "pool1"}}
backend.redis.hook.session.subscribed.1 = {{"topic": "far/#", "action": {{"function": "on_message_fetch"}}, "pool": "pool1"}}
backend.redis.hook.session.subscribed.2 = {{"topic": "far/#", "action": {{"function": "on_retain_lookup"}}, "pool": "pool1"}}
"""


def made(gateway: Gateway) -> str:
    with closing(sqlite3.connect(f"file:{gateway.data}/log.db?mode=ro", uri=True)) as db:
        return str(db.execute("SELECT topic, source FROM proxy_subscription ORDER BY topic").fetchall())


def test_subscriptions_in_redis_reach_a_connected_device_and_one_that_returns_while_redis_is_down(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        files = {"emqx_backend_redis.conf": RULES.format(port=server.port)}
        with Gateway(tmp_path, toml=TOML, files=files) as gateway, server.client() as far:
            far.hset("mqtt:sub:device", "here/a", "1")
            device = MqttClient(gateway.port, "device", clean=False)
            wait_until(lambda: "here/a" in made(gateway), DEADLINE, gateway.log)
            far.hset("mqtt:sub:device", "here/b", "1")
            wait_until(lambda: "here/b" in made(gateway), DEADLINE, gateway.log)
            publisher = MqttClient(gateway.port, "publisher")
            for topic in ("here/a", "here/b"):
                publisher.publish_and_wait(topic, topic.encode())
                assert device.expect(Kind.PUBLISH).payload == topic.encode()
            server.kill()
            gateway.kill()
            gateway.start()
            other = MqttClient(gateway.port, "device")
            publisher = MqttClient(gateway.port, "publisher")
            publisher.publish_and_wait("here/b", b"again")
            assert other.expect(Kind.PUBLISH).payload == b"again"
            assert made(gateway) == "[('here/a', 'redis.pool1'), ('here/b', 'redis.pool1')]"


def put_message(far: Redis, msgid: str, topic: str, payload: str, qos: int = 1) -> None:
    """As a business system would."""
    fields: dict[Any, Any] = {
        "id": msgid,
        "from": "office",
        "qos": qos,
        "topic": topic,
        "retain": "false",
        "payload": payload,
    }
    far.hset(f"mqtt:msg:{msgid}", mapping=fields | {"ts": int(time.time())})
    far.zadd(f"mqtt:msg:{topic}", {msgid: 1})


def test_messages_and_retained_values_in_redis_reach_a_connected_device_and_one_that_comes_later(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        files = {"emqx_backend_redis.conf": RULES.format(port=server.port)}
        with Gateway(tmp_path, toml=TOML, files=files) as gateway, server.client() as far:
            put_message(far, "before", "far/orders", "first")
            mapping: dict[Any, Any] = {
                "id": "kept",
                "from": "office",
                "qos": 1,
                "topic": "far/value",
                "retain": "true",
                "payload": "kept",
            }
            far.hset("mqtt:retain:far/value", mapping=mapping | {"ts": int(time.time())})
            device = MqttClient(gateway.port, "device", clean=False)
            device.subscribe(("far/orders", 1))
            assert device.expect(Kind.PUBLISH).payload == b"first"
            put_message(far, "then", "far/orders", "second")
            assert device.expect(Kind.PUBLISH).payload == b"second"
            device.subscribe(("far/value", 1))
            found = device.expect(Kind.PUBLISH)
            assert (found.payload, found.retain) == (b"kept", True)
            device.disconnect()
            put_message(far, "while-away", "far/orders", "third")
            device = MqttClient(gateway.port, "device", clean=False)
            unanswered = [device.expect(Kind.PUBLISH) for _ in range(3)]
            assert sorted(bytes(packet.payload) for packet in unanswered) == [b"first", b"kept", b"second"]
            assert device.expect(Kind.PUBLISH).payload == b"third"
