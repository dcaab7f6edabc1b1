"""What is measured: each scenario takes a fresh broker, drives a load through it and returns named figures.

Rules: payloads of 64 bytes; sockets, subscriptions and packets are ready before the clock starts; a rate is
messages divided by the time until the last one was answered and received. After an ingest the gateway's log
is counted too.

Invariant: a scenario that returns has checked every acknowledgement, payload and order that it counts.
"""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import drain_sql
import wire
from brokers import Broker
from drain import drain_rate, raw_rate
from latency import percentiles
from load import Load, Mirror, Publisher, Result, Subscriber, WrongAnswer

PUBLISHERS = 10
SUBSCRIBERS = 50
MANY = 500
WINDOW = 100
CREDIT = 500
"""Messages per publisher that may be on their way to the subscriber."""
IDLE = 1000
SETTLED = 2.0
"""Seconds after which an idle broker has loaded, connected and checkpointed whatever it wants."""
PUBLISH_KIND = 6


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. Shares of one CPU used by generator and broker are 0 where they do not matter."""

    name: str
    unit: str
    value: float
    less_is_better: bool = False
    own_cpu: float = 0.0
    broker_cpu: float = 0.0
    peer: float = 0.0
    """What it is compared with when that is not mosquitto; the name says what it is."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A measurement; `messages` is its size in a full run.

    `alone`: the peer has nothing to compare. `uplink`: the gateway has a Redis pool, reachable ("up") or not, or one of a SQL
    server.
    """

    name: str
    messages: int
    measure: Callable[[Broker, int], list[Figure]]
    alone: bool = False
    uplink: Literal["", "up", "down", "pgsql", "mysql"] = ""


def ingest(broker: Broker, messages: int) -> list[Figure]:
    """10 clients, 100 messages in flight each."""
    return _ingest(broker, messages, PUBLISHERS, WINDOW)


def ingest_many(broker: Broker, messages: int) -> list[Figure]:
    """500 clients that wait for each acknowledgement."""
    return _ingest(broker, messages, MANY, 1)


def _ingest(broker: Broker, messages: int, clients: int, window: int) -> list[Figure]:
    load = Load()
    for number in range(clients):
        sock = wire.connect(broker.port, b"publisher-%d" % number)
        Publisher(load, sock, wire.stream(number, 1, messages // clients), window)
    written = broker.bytes_written()
    result = load.run(broker.cpu_seconds)
    load.close()
    if broker.stores:
        time.sleep(SETTLED)
    written = broker.bytes_written() - written
    _check_stored(broker, messages)
    label = f"QoS 1 ingest, {clients} clients, window {window}"
    figures = [_rate(label, messages, result)]
    if broker.stores:
        figures.append(Figure(f"bytes written per message, {clients} clients", "B", written / messages, True))
    return figures


def fan_in_0(broker: Broker, messages: int) -> list[Figure]:
    """Ten publishers, one subscriber, QoS 0."""
    return [_fan_in(broker, messages, 0)]


def fan_in_1(broker: Broker, messages: int) -> list[Figure]:
    """Ten publishers, one subscriber, QoS 1."""
    return [_fan_in(broker, messages, 1)]


def _fan_in(broker: Broker, messages: int, qos: int) -> Figure:
    each = messages // PUBLISHERS
    load = Load()
    sock = wire.connect(broker.port, b"subscriber")
    wire.subscribe(sock, b"bench/#", qos)
    subscriber = Subscriber(load, sock, qos, [each] * PUBLISHERS)
    subscriber.publishers = _publishers(load, broker, each, qos, CREDIT)
    result = load.run(broker.cpu_seconds)
    load.close()
    return _rate(f"QoS {qos} fan-in, {PUBLISHERS} to 1", messages, result)


def fan_out_0(broker: Broker, messages: int) -> list[Figure]:
    """One publisher, fifty subscribers, QoS 0."""
    return [_fan_out(broker, messages, 0)]


def fan_out_1(broker: Broker, messages: int) -> list[Figure]:
    """One publisher, fifty subscribers, QoS 1."""
    return [_fan_out(broker, messages, 1)]


def _fan_out(broker: Broker, messages: int, qos: int) -> Figure:
    published = messages // SUBSCRIBERS
    stream = wire.stream(0, qos, published)
    load = Load()
    pace = _Slowest()
    for number in range(SUBSCRIBERS):
        sock = wire.connect(broker.port, b"subscriber-%d" % number)
        wire.subscribe(sock, b"bench/#", qos)
        Mirror(load, sock, stream, pace.received)
    pace.publisher = Publisher(load, wire.connect(broker.port, b"publisher"), stream, WINDOW, WINDOW)
    result = load.run(broker.cpu_seconds)
    load.close()
    return _rate(f"QoS {qos} fan-out, 1 to {SUBSCRIBERS}", published * SUBSCRIBERS, result)


class _Slowest:
    """Grants the publisher what even the slowest subscriber has received."""

    publisher: Publisher

    def __init__(self) -> None:
        self._at = 0
        self._passed: dict[int, int] = {}

    def received(self, before: int, after: int) -> None:
        """A subscriber had `before` messages and has `after` now."""
        passed = self._passed
        for count in range(before + 1, after + 1):
            passed[count] = passed.get(count, 0) + 1
        start = self._at
        while passed.get(self._at + 1) == SUBSCRIBERS:
            self._at += 1
            del passed[self._at]
        if self._at > start:
            self.publisher.grant(self._at - start)


def replay(broker: Broker, messages: int) -> list[Figure]:
    """Messages for a sleeping session, and their delivery when it returns."""
    stored = store_for(broker, messages)
    load = Load()
    sock = wire.connect(broker.port, b"sleeper", clean=False)
    Subscriber(load, sock, 1, [messages // PUBLISHERS] * PUBLISHERS)
    replayed = load.run(broker.cpu_seconds)
    load.close()
    name = f"{messages:,} for a sleeping session"
    return [_rate(f"store {name}", messages, stored), _rate(f"replay {name}", messages, replayed)]


def start_up(broker: Broker, messages: int) -> list[Figure]:
    """Seconds until a CONNECT is answered when so many rows wait, after SIGTERM and after SIGKILL."""
    store_for(broker, messages)
    figures = []
    for how in (signal.SIGTERM, signal.SIGKILL):
        broker.stop(how)
        name = f"start-up with {messages:,} waiting rows, after {how.name}"
        figures.append(Figure(name, "s", broker.start(), True))
    return figures


def latency(broker: Broker, messages: int) -> list[Figure]:
    """PUBACK latency at 2,000 messages/s from 20 clients."""
    p50, p99 = percentiles(broker.port, messages, rate=2000, clients=20)
    return [
        Figure("PUBACK latency at 2,000/s, p50", "ms", p50 * 1000, True),
        Figure("PUBACK latency at 2,000/s, p99", "ms", p99 * 1000, True),
    ]


def memory(broker: Broker, messages: int) -> list[Figure]:
    """Proportional set size for each of a thousand idle connections with one subscription."""
    before = broker.pss()
    socks = []
    for number in range(IDLE):
        socks.append(wire.connect(broker.port, b"idle-%d" % number))
        wire.subscribe(socks[-1], b"idle/%d/set" % number, 1)
    each = (broker.pss() - before) / IDLE
    for sock in socks:
        sock.close()
    return [Figure("memory per idle connection", "KiB", each / 1024, True)]


def idle(broker: Broker, messages: int) -> list[Figure]:
    """Proportional set size of all processes of a broker that nobody uses."""
    time.sleep(SETTLED)
    return [Figure("idle memory, all processes", "MiB", broker.pss() / (1 << 20), True)]


def drain(broker: Broker, messages: int) -> list[Figure]:
    """A backlog into Redis."""
    assert broker.far_end is not None
    load = Load()
    _publishers(load, broker, messages // PUBLISHERS, 1, 0)
    load.run(broker.cpu_seconds)
    load.close()
    ours = drain_rate(broker, PUBLISHERS, messages, broker.far_end.port)
    raw = raw_rate(PUBLISHERS, messages)
    return [Figure("drain into Redis (peer: a raw redis-py pipeline)", "/s", ours, peer=raw)]


def drain_pgsql(broker: Broker, messages: int) -> list[Figure]:
    """A backlog into PostgreSQL."""
    return _drain_sql(broker, messages, "PostgreSQL (peer: psycopg, binary COPY)")


def drain_mysql(broker: Broker, messages: int) -> list[Figure]:
    """A backlog into MariaDB."""
    return _drain_sql(broker, messages, "MariaDB (peer: PyMySQL, executemany)")


def _drain_sql(broker: Broker, messages: int, name: str) -> list[Figure]:
    assert broker.far_end is not None
    assert broker.far_end.server is not None
    server = broker.far_end.server
    restart = " RESTART IDENTITY" if server.backend == "pgsql" else ""
    server.run(f"TRUNCATE TABLE mqtt_msg{restart}", "DELETE FROM tidegate_ledger")
    server.stop()
    load = Load()
    _publishers(load, broker, messages // PUBLISHERS, 1, 0)
    load.run(broker.cpu_seconds)
    load.close()
    ours = drain_sql.drain_rate(broker, PUBLISHERS, messages, server)
    broker.stop()
    raw = drain_sql.raw_rate(PUBLISHERS, messages, server)
    return [Figure(f"drain into {name}", "/s", ours, peer=raw)]


def store_for(broker: Broker, messages: int, names: Sequence[bytes] = (b"sleeper",)) -> Result:
    """Publish so many messages while these sessions sleep."""
    for name in names:
        sleeper = wire.connect(broker.port, name, clean=False)
        wire.subscribe(sleeper, b"bench/#", 1)
        wire.disconnect(sleeper)
    load = Load()
    _publishers(load, broker, messages // PUBLISHERS, 1, 0)
    result = load.run(broker.cpu_seconds)
    load.close()
    return result


def _publishers(load: Load, broker: Broker, each: int, qos: int, credit: int) -> list[Publisher]:
    return [
        Publisher(
            load,
            wire.connect(broker.port, b"publisher-%d" % number),
            wire.stream(number, qos, each),
            WINDOW,
            credit,
        )
        for number in range(PUBLISHERS)
    ]


def _rate(name: str, messages: int, result: Result) -> Figure:
    return Figure(name, "/s", messages / result.seconds, own_cpu=result.own_cpu, broker_cpu=result.broker_cpu)


def _check_stored(broker: Broker, messages: int) -> None:
    """Whatever a gateway acknowledged is in its log, each message once."""
    if not broker.stores:
        return
    with closing(sqlite3.connect(f"file:{broker.directory}/data/log.db?mode=ro", uri=True)) as log:
        sql = "SELECT count(*), count(DISTINCT payload) FROM entry WHERE kind = ?"
        rows, distinct = log.execute(sql, (PUBLISH_KIND,)).fetchone()
    if rows != messages or distinct != messages:
        raise WrongAnswer(f"{messages} acknowledged, the log has {rows} messages, {distinct} different ones")


SCENARIOS = (
    Scenario("ingest", 300_000, ingest),
    Scenario("ingest-500", 150_000, ingest_many),
    Scenario("fan-in-0", 500_000, fan_in_0),
    Scenario("fan-in-1", 200_000, fan_in_1),
    Scenario("fan-out-0", 1_500_000, fan_out_0),
    Scenario("fan-out-1", 750_000, fan_out_1),
    Scenario("replay", 100_000, replay),
    Scenario("latency", 10_000, latency),
    Scenario("memory", 0, memory),
    Scenario("drain", 100_000, drain, alone=True, uplink="down"),
    Scenario("drain-pgsql", 100_000, drain_pgsql, alone=True, uplink="pgsql"),
    Scenario("drain-mysql", 100_000, drain_mysql, alone=True, uplink="mysql"),
    Scenario("idle", 0, idle, uplink="up"),
    Scenario("start-up", 100_000, start_up, alone=True, uplink="down"),
)
