"""The main job from end to end: clients publish to the real gateway while Redis is killed, frozen and refused, and then Redis
holds exactly what was published, in the order in which the gateway stored it."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tidegate.uplink.progress import PoolStatus, read_pools

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.proxy import Proxy
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .rig import LIST, MESSAGES, PRESENCE

CLIENTS = 20
EACH = 500
WINDOW = 20
DEADLINE = 60.0
TOML = '[gateway]\nname = "barn"\n\n[uplink]\nbackends = ["sqlite", "redis"]\n'
SETTINGS = "backend.redis.pool1.server = 127.0.0.1:{port}\nbackend.redis.pool1.timeout = 500ms\n"
FIELDS = ("id", "from", "qos", "topic", "retain", "payload")


def test_ten_thousand_messages_of_twenty_clients_survive_every_outage(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path, "--appendonly", "yes") as server,
        Proxy(server.port) as proxy,
        Gateway(tmp_path, toml=TOML, files={"emqx_backend_redis.conf": rules(proxy.port)}) as gateway,
    ):
        clients = [MqttClient(gateway.port, f"device-{number}") for number in range(CLIENTS)]
        sent = 0
        for before, after in outages(server, proxy, gateway):
            sent = publish(clients, sent, EACH // 8)
            before()
            sent = publish(clients, sent, EACH // 8)
            after()
        publish(clients, sent, EACH - sent)
        for number, client in enumerate(clients):
            client.publish_and_wait(f"state/{number}", b"kept", retain=True)
            client.publish_and_wait(f"gone/{number}", b"for a while", retain=True)
            client.publish_and_wait(f"gone/{number}", b"", retain=True)
        clients[0].send(b"\xe0\x00")
        wait_until(lambda: drained(gateway), DEADLINE, lambda: (pool(gateway), gateway.log()))
        with server.client() as far:
            wait_until(lambda: far.hget("mqtt:client:device-0", "state") == "0", DEADLINE)
            check(far, stored(gateway))
        found = pool(gateway)
        assert found
        assert (found.state, found.waiting, found.refused) == ("connected", 0, 0)
        assert gateway.stop() == 0


def test_a_mended_file_is_taken_up_by_sighup_and_what_waited_is_sent(tmp_path: Path) -> None:
    broken = {"emqx_backend_redis.conf": rules(1).replace("on_message_publish", "on_mesage_publish")}
    with RedisServer(tmp_path) as server, Gateway(tmp_path, toml=TOML, files=broken) as gateway:
        client = MqttClient(gateway.port, "device")
        wait_until(lambda: state(gateway) == "misconfigured", say=gateway.log)
        for number in range(50):
            client.publish_and_wait("t", b"%d" % number)
        found = pool(gateway)
        assert found
        assert 'did you mean "on_message_publish"?' in found.error
        assert found.waiting >= 50
        (tmp_path / "emqx_backend_redis.conf").write_text(rules(server.port))
        os.kill(gateway.pid, signal.SIGHUP)
        with server.client() as far:
            wait_until(lambda: far.llen("list") == 50, DEADLINE, gateway.log)
            assert [far.hget(f"mqtt:msg:{msgid}", "payload") for msgid in far.lrange("list", 0, -1)] == [
                str(number) for number in range(50)
            ]
        assert gateway.stop() == 0


def outages(server: RedisServer, proxy: Proxy, gateway: Gateway) -> Sequence[tuple[Callable[[], None], Callable[[], None]]]:
    """Begin and end of each; each lasts until the uplink has noticed it."""

    def noticed(end: Callable[[], None]) -> Callable[[], None]:
        def mend() -> None:
            wait_until(lambda: state(gateway) == "unreachable", DEADLINE, gateway.log)
            end()

        return mend

    return [
        (server.kill, noticed(server.start)),
        (server.freeze, noticed(server.thaw)),
        (lambda: proxy.set("refuse"), noticed(lambda: proxy.set("pass"))),
    ]


def rules(port: int) -> str:
    return SETTINGS.format(port=port) + PRESENCE + MESSAGES + LIST


def publish(clients: Sequence[MqttClient], first: int, count: int) -> int:
    """`count` messages of each client, at most a window unanswered; the number that comes next."""
    for start in range(first, first + count, WINDOW):
        numbers = range(start, min(start + WINDOW, first + count))
        for index, client in enumerate(clients):
            for number in numbers:
                client.publish(f"t/{index}", b"%d of %d" % (number, index), 1)
        for client in clients:
            for _ in numbers:
                client.expect(Kind.PUBACK)
    return first + count


def stored(gateway: Gateway) -> list[dict[str, Any]]:
    """What the gateway's own disk says was published."""
    with closing(sqlite3.connect(f"file:{gateway.data}/log.db?mode=ro", uri=True)) as log:
        rows = log.execute("SELECT msgid, sender, qos, topic, retain, payload FROM mqtt_msg ORDER BY id").fetchall()
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]


def check(far: Any, messages: list[dict[str, Any]]) -> None:
    assert len(messages) == CLIENTS * (EACH + 2)
    clears = CLIENTS
    listed = far.lrange("list", 0, -1)
    ids = [message["id"] for message in messages]
    assert len(listed) == len(ids) + clears
    assert [msgid for msgid in listed if msgid in set(ids)] == ids == sorted(ids)
    for message in messages:
        found = far.hgetall(f"mqtt:msg:{message['id']}")
        wanted = message | {"retain": "true" if message["retain"] else "false", "payload": message["payload"].decode()}
        assert {name: found[name] for name in FIELDS} == {name: str(wanted[name]) for name in FIELDS}
    for number in range(CLIENTS):
        mine = [m for m in messages if m["topic"] == f"t/{number}"]
        assert [m["payload"] for m in mine] == [b"%d of %d" % (index, number) for index in range(EACH)]
        assert far.zrange(f"mqtt:msg:t/{number}", 0, -1) == [m["id"] for m in mine]
        assert far.hget(f"mqtt:retain:state/{number}", "payload") == "kept"
    assert len(far.keys("mqtt:msg:*")) == len(messages) + 3 * CLIENTS
    assert len(far.keys("mqtt:retain:*")) == CLIENTS
    states = {number: far.hgetall(f"mqtt:client:device-{number}") for number in range(CLIENTS)}
    assert [states[number]["state"] for number in range(CLIENTS)] == ["0"] + ["1"] * (CLIENTS - 1)
    assert states[0]["offline_at"].isdigit()
    assert set(far.hgetall("mqtt:node:barn")) == {f"device-{number}" for number in range(1, CLIENTS)}


def pool(gateway: Gateway) -> PoolStatus | None:
    return next(iter(read_pools(gateway.data)), None)


def state(gateway: Gateway) -> str:
    found = pool(gateway)
    return found.state if found else ""


def drained(gateway: Gateway) -> bool:
    found = pool(gateway)
    return found is not None and found.state == "connected" and found.waiting == 0
