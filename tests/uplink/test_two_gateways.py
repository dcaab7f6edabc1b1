"""Two gateways on one far end, one of them away for a week: nothing is skipped, and nothing older wins, whoever comes first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
from tidegate.store.entry import ACKED, UNSUBSCRIBED
from tidegate.store.msgid import gateway_code
from tidegate.uplink.asking import Asker, Fetch
from tidegate.uplink.redis_stored import standing_of
from tidegate.uplink.worker import Wait

from tests.support.redis_cluster import Cluster
from tests.support.redis_server import RedisServer
from tests.support.sql_servers import SqlServer

from .logfile import GATEWAY, START
from .rig import Rig
from .sql_rig import EVERY_SERVER, SERVERS, function_rule, settings, tables, utc

Running = RedisServer | Cluster | SqlServer
AWAY = "1111111111111111"
HERE_CODE, AWAY_CODE = gateway_code(GATEWAY), gateway_code(AWAY)
DAY = 86_400_000
FUNCTIONS = (
    ("client.connected.1", "on_client_connected", "#"),
    ("client.disconnected.1", "on_client_disconnected", "#"),
    ("message.publish.1", "on_message_publish", "#"),
    ("message.publish.2", "on_message_retain", "#"),
    ("message.publish.3", "on_retain_delete", "#"),
    ("message.acked.1", "on_message_acked_for_pubsub", "a/#"),
    ("message.acked.2", "on_message_acked_for_queue", "queue/#"),
    ("session.unsubscribed.1", "on_acked_delete", "a/#"),
)


class Far(Protocol):
    """The far end, looked at from outside."""

    backend: str
    port: int
    settings: str

    def presence(self) -> tuple[int, int]:
        """State and second of coming of the client."""
        ...

    def retained(self) -> dict[str, bytes]: ...
    def stored(self, topic: str) -> list[str]: ...
    def vector(self) -> dict[str, int]: ...
    def acked(self, topic: str = "a/b") -> str: ...


class FarRedis:
    backend = "redis"

    def __init__(self, server: RedisServer | Cluster, client: Any) -> None:
        self.port = server.port
        self.settings = "type = cluster" if isinstance(server, Cluster) else ""
        self._client = client

    def presence(self) -> tuple[int, int]:
        found = self._client.hgetall("mqtt:client:c")
        assert (found["state"] == "1") == self._client.hexists("mqtt:node:here", "c")
        assert not self._client.exists("mqtt:node:away")
        return int(found["state"]), int(found["online_at"])

    def retained(self) -> dict[str, bytes]:
        keys = self._client.keys("mqtt:retain:*")
        return {key.removeprefix("mqtt:retain:"): self._client.hget(key, "payload").encode() for key in keys}

    def stored(self, topic: str) -> list[str]:
        found: list[str] = self._client.zrange(f"mqtt:msg:{topic}", 0, -1)
        return sorted(found)

    def vector(self) -> dict[str, int]:
        found = self._client.hgetall("tidegate:position:c:a/b")
        pairs = [part.encode() for pair in found.items() for part in pair]
        return {code: seq for code, (_, seq) in standing_of(pairs, b"").read.items()}

    def acked(self, topic: str = "a/b") -> str:
        return str(self._client.get(f"mqtt:acked:c:{topic}") or "")


class FarSql:
    def __init__(self, server: SqlServer) -> None:
        self.backend, self.port, self.settings = server.backend, server.port, settings(server)
        self._server = server

    def presence(self) -> tuple[int, int]:
        ((state, node, online),) = self._server.rows("SELECT state, node, online_at FROM mqtt_client WHERE clientid = 'c'")
        assert node == "here"
        (day,) = [day for day in range(9) if utc(START + day * DAY) == online]
        return int(str(state)), (START + day * DAY) // 1000

    def retained(self) -> dict[str, bytes]:
        found = self._server.rows("SELECT topic, payload FROM mqtt_retain")
        return {str(topic): payload if isinstance(payload, bytes) else str(payload).encode() for topic, payload in found}

    def stored(self, topic: str) -> list[str]:
        return sorted(str(msgid) for (msgid,) in self._server.rows(f"SELECT msgid FROM mqtt_msg WHERE topic = '{topic}'"))

    def vector(self) -> dict[str, int]:
        found = self._server.rows("SELECT gateway, seq FROM tidegate_position WHERE clientid = 'c' AND gateway <> ''")
        return {str(code): int(str(seq)) for code, seq in found}

    def acked(self, topic: str = "a/b") -> str:
        acked = "SELECT m.msgid FROM mqtt_acked a JOIN mqtt_msg m ON m.id = a.mid"
        found = self._server.rows(f"{acked} WHERE a.clientid = 'c' AND a.topic = '{topic}'")
        return str(found[0][0]) if found else ""


@pytest.fixture(scope="module", params=["redis", "redis-cluster", *EVERY_SERVER])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if request.param == "redis":
        with RedisServer(tmp_path_factory.mktemp("redis")) as server:
            yield server
    elif request.param == "redis-cluster":
        with Cluster(tmp_path_factory.mktemp("redis")) as cluster:
            yield cluster
    else:
        with SERVERS[request.param]() as sql:
            yield sql


@pytest.fixture
def far(running: Running) -> Iterator[Far]:
    if isinstance(running, SqlServer):
        running.recreate()
        tables(running)
        yield FarSql(running)
    else:
        with running.client() as client:
            client.flushall()
            yield FarRedis(running, client)


class Gateways:
    """`here` and `away`, each with its own log and worker."""

    def __init__(self, stack: ExitStack, folder: Path, far: Far) -> None:
        self._folder, self._far = folder, far
        self.here = stack.enter_context(self._rig("here", GATEWAY))
        self.away = stack.enter_context(self._rig("away", AWAY))

    def _rig(self, name: str, gateway: str) -> Rig:
        (self._folder / name).mkdir()
        text = "".join(function_rule(self._far.backend, *rule) for rule in FUNCTIONS)
        return Rig(self._folder / name, self._far.port, text, self._far.settings, self._far.backend, name, gateway)

    def unread(self) -> list[str]:
        """What the client would get with a new subscription."""
        asker: Asker = importlib.import_module(f"tidegate.uplink.to_{self._far.backend}").connect_asker(self.here.pool)
        try:
            return sorted(found.msgid for found in asker.fetch(Fetch("c", "a/b", False, 500, 0, True, 0)).messages)
        finally:
            asker.close()


@pytest.fixture
def gateways(tmp_path: Path, far: Far) -> Iterator[Gateways]:
    with ExitStack() as stack:
        yield Gateways(stack, tmp_path, far)


def publish(rig: Rig, topic: str, payload: bytes, day: float, retain: bool = False) -> str:
    seq = rig.log.publish(topic, payload, retain=retain, at=START + int(day * DAY))
    return next(entry.msgid for entry in rig.log.entries() if entry.seq == seq)


def position(rig: Rig, msgid: str, day: float) -> None:
    rig.log.position("c", "a/b", msgid, START + int(day * DAY))


def seq_of(rig: Rig, msgid: str) -> int:
    return next(entry.seq for entry in rig.log.entries() if entry.msgid == msgid)


def in_turn(gateways: Gateways) -> None:
    """A batch each, small ones."""
    done = {"here": False, "away": False}
    while not all(done.values()):
        for rig in (gateways.here, gateways.away):
            done[rig.node] = rig.step() == Wait(None, True)


def here_first(gateways: Gateways) -> None:
    gateways.here.drain()
    gateways.away.drain()


def away_first(gateways: Gateways) -> None:
    gateways.away.drain()
    gateways.here.drain()


ORDERS: dict[str, Callable[[Gateways], None]] = {
    "who was away comes back": here_first,
    "who was away comes first": away_first,
    "both at once": in_turn,
}


@pytest.mark.parametrize("order", ORDERS)
def test_after_a_week_presence_retained_messages_and_positions_are_right(gateways: Gateways, far: Far, order: str) -> None:
    here, away = gateways.here, gateways.away
    # The client begins at the gateway that is away, and goes on at the other one.
    away.log.connected("c", START)
    theirs = [publish(away, "a/b", b"1", 0.1), publish(away, "a/b", b"2", 0.2)]
    position(away, theirs[1], 0.3)
    publish(away, "state", b"a week old", 0.4, retain=True)
    publish(away, "gone", b"a week old", 0.4, retain=True)
    publish(away, "only there", b"kept", 0.4, retain=True)
    theirs.append(publish(away, "a/b", b"3", 0.6))
    here.log.connected("c", START + 2 * DAY)
    away.log.disconnected("c", START + 2 * DAY + 90_000)  # noticed late that it had gone
    ours = [publish(here, "a/b", b"%d" % number, 2 + number) for number in range(5)]
    for msgid in ours[:4]:
        position(here, msgid, 6.1)
    publish(here, "gone", b"", 6.2, retain=True)
    publish(here, "state", b"today", 6.3, retain=True)
    ORDERS[order](gateways)
    assert far.stored("a/b") == sorted(theirs + ours)
    assert far.retained() == {"state": b"today", "only there": b"kept"}
    assert far.presence() == (1, (START + 2 * DAY) // 1000)
    assert far.vector() == {HERE_CODE: seq_of(here, ours[3]), AWAY_CODE: seq_of(away, theirs[1])}
    assert far.acked() == ours[3]
    assert gateways.unread() == sorted([theirs[2], ours[4]]), "nothing is skipped, nothing comes again"
    # It comes back to the other one, and reads there what the far end had for it: that moves this gateway's place too.
    position(away, theirs[2], 8.1)
    position(away, ours[4], 8.2)
    ORDERS[order](gateways)
    assert far.vector() == {HERE_CODE: seq_of(here, ours[4]), AWAY_CODE: seq_of(away, theirs[2])}
    assert (far.acked(), gateways.unread()) == (ours[4], [])


@pytest.mark.parametrize("order", ORDERS)
def test_a_position_that_was_dropped_meanwhile_does_not_come_back(gateways: Gateways, far: Far, order: str) -> None:
    here, away = gateways.here, gateways.away
    theirs = publish(away, "a/b", b"1", 0.1)
    position(away, theirs, 0.2)
    ours = publish(here, "a/b", b"2", 5)
    position(here, ours, 5.1)
    here.log.append(UNSUBSCRIBED, "c", "a/b", 0, None, START + 6 * DAY)
    ORDERS[order](gateways)
    assert (far.vector(), far.acked()) == ({}, "")
    assert gateways.unread() == sorted([ours, theirs]), "the next subscription counts as the first"
    position(here, ours, 7)
    ORDERS[order](gateways)
    assert far.vector() == {HERE_CODE: seq_of(here, ours)}


@pytest.mark.parametrize("order", ORDERS)
def test_what_one_gateway_took_out_of_a_queue_of_the_other_is_gone(gateways: Gateways, far: Far, order: str) -> None:
    """Who is away has sent it before; while it is away, a client of the other one takes it out."""
    here, away = gateways.here, gateways.away
    first, second = publish(away, "queue/1", b"1", 0.1), publish(away, "queue/1", b"2", 0.2)
    away.drain()
    here.log.append(ACKED, "c", "queue/1", 0, first.encode(), START + DAY)
    publish(away, "queue/1", b"3", 6)
    away.log.acked("d", "queue/1", away.log.seq)
    ORDERS[order](gateways)
    assert far.stored("queue/1") == [second]
