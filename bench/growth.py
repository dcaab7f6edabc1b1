"""Whether the cost of a message stays the same however much waits, and what many sessions, topics and subscriptions cost.

    .venv/bin/python bench/growth.py [--large]        up to 10^6 waiting rows, with --large 10^7

Rows: the store itself is filled in batches of 500, the real gateway is started on it and drains it into a real redis-server.
Sessions, topics and subscriptions: the broker's core with a real database, without sockets, in CPU time. No peer is measured;
what counts is that a column stays flat.
"""

from __future__ import annotations

import argparse
import gc
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import brokers
from redis import Redis
from returning import returning
from tidegate.gateway.routing import Router, Topic
from tidegate.gateway.session import Session, Subscription
from tidegate.store.entry import PUBLISH
from tidegate.store.log import Log, Name
from tidegate.store.store import Store
from tidegate.store.topic import FilterTree
from tidegate.store.trim import KEEP_SEQ, Plan, Trim

from tests.broker.world import Device, World

BATCH = 500
TRIMMED = 50_000
"""Rows that a trim is measured with, of however many there are."""
DEADLINE = 600.0
TOPIC = "bench/000"
SESSIONS = (10, 100, 1_000)
MANY = 100_000
CROWD = 1_000


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--large", action="store_true", help="10^7 rows as well: some GB and many minutes")
    options = parser.parse_args()
    print("| waiting rows | ingest, µs | start-up, ms | drain, µs | our CPU | in Redis | its sorted set | trim, µs |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for count in [10**exponent for exponent in range(3, 8 if options.large else 7)]:
        print(f"| {count:,} | " + " | ".join(f"{value:,.1f}" for value in rows(count)) + " |", flush=True)
    print("\n| sessions that sleep | µs a message stored | return of all, ms a session | µs a message | reads of the log |")
    print("|---|---:|---:|---:|---:|")
    for count in SESSIONS:
        for apart in (False, True):
            name = f"{count:,} {'apart' if apart else 'together'}"
            print(f"| {name} | " + " | ".join(f"{value:,.1f}" for value in returning(count, apart)) + " |", flush=True)
    print(f"\n| {MANY:,} | put, µs each | found, µs each | memory, B each |\n|---|---:|---:|---:|")
    for name, figures in (("topics", topics()), ("subscriptions with wildcards", subscriptions())):
        print(f"| {name} | " + " | ".join(f"{value:,.1f}" for value in figures) + " |", flush=True)
    hot, many = churn()
    print(f"\nA publish after each subscription to something else, µs: {hot:.1f} to one topic with {CROWD:,} subscribers,")
    print(f"{many:.1f} to one of {CROWD:,} topics.")
    return 0


def rows(count: int) -> tuple[float, ...]:
    """Ingest (the last rows of the filling), start-up, drain and trim with so many rows waiting; see `Drain`."""
    port = brokers.free_port()
    with brokers.Broker(brokers.Tidegate(True, brokers.FarEnd("redis", port), "16GiB")) as broker:
        broker.stop()  # the pool has its cursor
        path = broker.directory / "data" / "log.db"
        ingest = _fill(path, count)
        start_up = broker.start()
        drain = _drain(port, count, broker.cpu_seconds)
        broker.stop(signal.SIGTERM)
        return ingest * 1e6, start_up * 1e3, *(part * 1e6 for part in drain), _trim(path, min(count, TRIMMED)) * 1e6


def _fill(path: Path, count: int) -> float:
    """Seconds per message of the last tenth."""
    store, log = _open(path)
    client, topic = Name("filler"), Topic(TOPIC.encode(), TOPIC)
    late, took = 0, 0.0
    for start in range(0, count, BATCH):
        for number in range(start, min(start + BATCH, count)):
            log.append(PUBLISH, client, topic, 1, b"%064d" % number)
        began = time.perf_counter()
        store.apply(log.take())
        if start >= count * 9 // 10 - BATCH:
            late += BATCH
            took += time.perf_counter() - began
    store.close(log.now)
    return took / late


class Drain(NamedTuple):
    """Seconds per message: by the clock; of our processors; in Redis, as it counts itself, while we wait; of that in the sorted
    set that holds all ids."""

    seconds: float
    ours: float
    in_redis: float
    in_sorted_set: float


def _drain(port: int, count: int, used: Callable[[], float]) -> Drain:
    with brokers.redis(port), closing(Redis(port=port)) as far:
        end = time.perf_counter() + DEADLINE
        key = f"mqtt:msg:{TOPIC}"
        while not (first := int(far.zcard(key))):
            assert time.perf_counter() < end, "nothing is drained"
            time.sleep(0.001)
        began, cpu = time.perf_counter(), used()
        while int(far.zcard(key)) < count:
            assert time.perf_counter() < end, f"{far.zcard(key)} of {count} drained"
            time.sleep(0.001)
        left = max(1, count - first)
        took, ours = (time.perf_counter() - began) / left, (used() - cpu) / left
        spent = {name: figures["usec"] / count / 1e6 for name, figures in far.info("commandstats").items()}
        scripts = sum(spent.get(f"cmdstat_{name}", 0.0) for name in ("eval", "evalsha"))
        return Drain(took, ours, scripts, spent["cmdstat_zadd"])


def _trim(path: Path, count: int) -> float:
    store, log = _open(path)
    first = store.connection.execute("SELECT min(seq) FROM entry").fetchone()[0]
    began = time.perf_counter()
    while isinstance(plan := Trim(1 << 40, -1000).plan(store.connection, log.clock.at(log.mono + 1), first + count), Plan):
        log.change(KEEP_SEQ, log.next_seq - 1)
        for sql, parameters in plan.changes:
            log.change(sql, *parameters)
        store.apply(log.take())
    took = time.perf_counter() - began
    store.abandon()
    return took / count


def _open(path: Path) -> tuple[Store, Log]:
    wall, mono = time.time_ns() // 1_000_000, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    store = Store.open(path, "bench", "full", wall, mono)
    log = Log(store.identity.next_seq, store.identity.last_at, store.identity.run, store.identity.clock)
    log.tick(mono)
    return store, log


def topics() -> tuple[float, float, float]:
    """Messages to so many topics: the first to each, another to each, memory of the process."""
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name) / "log.db")
        keeper = Device(world, "keeper", clean=False)
        keeper.subscribe("#")
        keeper.disconnect()
        world.auto = False
        sender = Device(world, "sender")
        world.settle()
        texts = [f"site/{number % 100}/device/{number}" for number in range(MANY)]

        def publish_all() -> None:
            for start in range(0, MANY, BATCH):
                for number, text in enumerate(texts[start : start + BATCH], 1):
                    sender.publish(text, b"x", packet_id=number)
                world.settle()
                sender.got.clear()

        before = _memory()
        first = _timed(publish_all)
        each = (_memory() - before) / MANY
        second = _timed(publish_all)
        world.kill()
        return first / MANY * 1e6, second / MANY * 1e6, each


def subscriptions() -> tuple[float, float, float]:
    """A tree of so many filters with wildcards: put, look up, memory."""
    filters = [f"site/{n % 100}/+/{n}/#" if n % 2 else f"site/+/device/{n}" for n in range(MANY)]
    before = _memory()
    tree: FilterTree[int, int] = FilterTree()

    def put_all() -> None:
        for number, text in enumerate(filters):
            tree.put(text, number, number)

    put = _timed(put_all)
    each = (_memory() - before) / MANY
    looked_up = range(0, MANY, 10)

    def find_some() -> None:
        for number in looked_up:
            assert [key for key, _ in tree.find(f"site/{number % 100}/device/{number}")], number

    return put / MANY * 1e6, _timed(find_some) / len(looked_up) * 1e6, each


def churn() -> tuple[float, float]:
    """Publishing, each time after a subscription to something else: to a topic with many subscribers, and to many topics."""
    router = Router()
    for number in range(CROWD):
        session = Session(Name(f"s{number}"), 0, 0)
        router.subscribe("hot/+", session, Subscription(1, False, False, 0, 0))
        router.subscribe(f"site/+/{number}", session, Subscription(1, False, False, 0, 0))
    other = Session(Name("other"), 0, 0)
    hot = router.topics[b"hot/1"]
    many = [router.topics[b"site/1/%d" % number] for number in range(CROWD)]

    def alternate(topics: list[Topic]) -> None:
        for number, topic in enumerate(topics):
            router.subscribe(f"elsewhere/{number}/#", other, Subscription(1, False, False, 0, 0))
            router.route(topic, PUBLISH)

    return _timed(lambda: alternate([hot] * CROWD)) / CROWD * 1e6, _timed(lambda: alternate(many)) / CROWD * 1e6


def _timed(act: Callable[[], None]) -> float:
    gc.collect()
    began = time.process_time()
    act()
    return time.process_time() - began


def _memory() -> float:
    """Resident bytes of this process."""
    gc.collect()
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
