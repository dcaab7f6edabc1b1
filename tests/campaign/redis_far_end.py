"""A single Redis as the campaign's far end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import redis

from tests.support.proxy import Proxy
from tests.support.redis_server import RedisServer

from . import far_end
from .far_end import Contents, Door, FarEnd, Fault, Presence, Row, between

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
_ACTIONS = (
    ("client.connected.1", '{"function": "on_client_connected"}'),
    ("client.disconnected.1", '{"function": "on_client_disconnected"}'),
    ("message.publish.1", '{"function": "on_message_publish"}'),
    ("message.publish.2", '{"function": "on_message_retain"}'),
    ("message.publish.3", '{"function": "on_retain_delete"}'),
    ("message.publish.9", '{"commands": ["RPUSH list ${msgid}", "INCR tally"]}'),
)
NO_DEADLOCK = "a script has the server for itself"
NO_SCHEMA = "there is none"


class SingleRedis(FarEnd):
    """One server, one proxy."""

    name, backend = "redis", "redis"
    impossible: Mapping[str, str] = {far_end.DEADLOCK: NO_DEADLOCK, far_end.SCHEMA: NO_SCHEMA}

    def __init__(self, directory: Path) -> None:
        self._server = RedisServer(directory, *DURABLE, password="right")
        self._proxy = Proxy(self._server.port)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._server)
        self._stack.enter_context(self._proxy)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def rules(self) -> str:
        return rules(f"server = 127.0.0.1:{self._proxy.port}\npassword = right")

    def doors(self) -> Sequence[Door]:
        return [Door(self._proxy, lambda: marks(self._server))]

    def faults(self) -> Sequence[Fault]:
        server = self._server
        return [
            Fault(far_end.KILLED, lambda: between(server.kill, server.start)),
            Fault(far_end.FROZEN, lambda: between(server.freeze, server.thaw)),
            Fault(far_end.READ_ONLY, self._replica),
            Fault(far_end.READ_ONLY, lambda: configured(server, "min-replicas-to-write", "1", "0")),
            Fault(far_end.MEMORY, lambda: configured(server, "maxmemory", "1", "0")),
            Fault(far_end.CONNECTIONS, lambda: configured(server, "maxclients", "1", "10000", self.drop)),
            Fault(
                far_end.PASSWORD,
                lambda: configured(server, "requirepass", "changed", "right", self.drop),
                far_end.MISCONFIGURED,
            ),
            Fault(far_end.RESTORED, lambda: self.set_back(server.keep, server.bring_back), far_end.CONNECTED),
        ]

    def contents(self) -> Contents:
        with self._server.client(decode_responses=False) as client:
            return contents(client)

    @contextmanager
    def _replica(self) -> Iterator[None]:
        with self._server.client() as client:
            client.replicaof("127.0.0.1", "1")
            try:
                yield
            finally:
                client.replicaof("NO", "ONE")


@contextmanager
def configured(server: RedisServer, name: str, value: str, back: str, then: Any = lambda: None) -> Iterator[None]:
    """A setting of the running server; the connection that changes it stays, so that it can be changed back."""
    with server.client(single_connection_client=True) as client:
        client.config_set(name, value)
        try:
            then()
            yield
        finally:
            client.config_set(name, back)


def rules(settings: str) -> str:
    """The file: the pool's settings, and every function that writes."""
    lines = [f"backend.redis.pool1.{line}" for line in ["timeout = 1s", *settings.splitlines()]]
    for event, action in _ACTIONS:
        topic = '"topic": "#", ' if "message" in event else ""
        lines.append(f'backend.redis.hook.{event} = {{{topic}"action": {action}, "pool": "pool1"}}')
    return "\n".join(lines) + "\n"


def marks(server: RedisServer) -> object:
    """The ledgers and, on a cluster, the marks of slots that this server has."""
    with server.client() as client:
        keys: Any = [*client.keys("tidegate:ledger:*"), *client.keys("tidegate:mark:*")]
        return {key: client.hgetall(key) for key in sorted(keys)}


def contents(client: redis.Redis | redis.RedisCluster) -> Contents:
    """All keys of the specification; `client` answers in bytes."""
    stored = [row(client, key) for key in client.scan_iter("mqtt:msg:*", 1000) if client.type(key) == b"hash"]
    retained = [row(client, key) for key in client.scan_iter("mqtt:retain:*", 1000)]
    indexed: set[bytes] = set()
    for topic in {message.topic for message in stored}:
        members: Any = client.zrange(f"mqtt:msg:{topic}", 0, -1)
        indexed.update(members)
    missing = {message.msgid.encode() for message in stored} ^ indexed
    assert not missing, f"hashes without an index, or the other way: {sorted(missing)[:10]}"
    listed: Any = client.lrange("list", 0, -1)
    return Contents(
        sorted(stored, key=lambda message: message.msgid),
        [msgid.decode() for msgid in listed],
        {message.topic: message for message in retained},
        {key.decode().removeprefix("mqtt:client:"): _presence(client, key) for key in client.scan_iter("mqtt:client:*", 1000)},
        int(cast(bytes, client.get("tally"))),
    )


def row(client: redis.Redis | redis.RedisCluster, key: bytes) -> Row:
    """A message, or a retained one: the same fields."""
    found: Any = client.hgetall(key)
    name, topic, sender, qos, retain = (found[field].decode() for field in (b"id", b"topic", b"from", b"qos", b"retain"))
    return Row(name, topic, sender, int(qos), retain == "true", found[b"payload"])


def _presence(client: redis.Redis | redis.RedisCluster, key: bytes) -> Presence:
    found: Any = client.hgetall(key)
    gone = found[b"offline_at"]
    return Presence(found[b"state"] == b"1", int(found[b"online_at"]), None if gone == b"undefined" else int(gone))
