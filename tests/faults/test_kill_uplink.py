"""kill -9 of the uplink child at a hundred random moments, and of the broker above it, with a real
redis-server.

Every message adds its id to a Redis list, which is the one command that cannot be repeated unnoticed:
afterwards the list holds exactly the ids of the log, in its order. There is never more than one child, and
none outlives its broker.

The moments come from a seed, which is printed with a failure.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import redis

from tests.support.gateway import Gateway, running
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .traffic import Sender, run, run_for, settle

CHILD_KILLS = 100
BROKER_KILLS = 20
EARLY = 0.2
"""The share of kills that do not wait until the child has begun to write."""
CHILD_DEADLINE = 15.0
ORPHAN_DEADLINE = 2.0
DRAIN_DEADLINE = 30.0
TOML = '[uplink]\nbackends = ["sqlite", "redis"]\n'
RULES = """\
backend.redis.pool1.server = 127.0.0.1:{port}
backend.redis.hook.message.publish.1 = {{"action": {{"function": "on_message_publish"}}, "pool": "pool1"}}
backend.redis.hook.message.publish.2 = {{"action": {{"commands": ["RPUSH ids ${{msgid}}"]}}, "pool": "pool1"}}
"""


def test_kill_uplink_child_at_a_hundred_random_moments_writes_everything_once(tmp_path: Path) -> None:
    moments = _moments()
    senders = _senders()
    with RedisServer(tmp_path) as server, _gateway(tmp_path, server.port) as gateway:
        for sender in senders:
            sender.connect(gateway.port)
        child = 0
        for _ in range(CHILD_KILLS):
            child = _next_child(gateway, senders, child)
            _work(senders, server, moments)
            os.kill(child, signal.SIGKILL)
            os.kill(gateway.pid, signal.SIGHUP)  # starts the child at once, whatever its back-off
        settle(senders, [])
        _check_far_end(gateway, server, senders)
        assert gateway.stop() == 0


def test_kill_broker_leaves_no_uplink_child_behind_and_writes_everything_once(tmp_path: Path) -> None:
    moments = _moments()
    senders = _senders()
    with RedisServer(tmp_path) as server, _gateway(tmp_path, server.port) as gateway:
        for _ in range(BROKER_KILLS):
            for sender in senders:
                sender.connect(gateway.port)
            child = _next_child(gateway, senders, 0)
            _work(senders, server, moments)
            gateway.kill()
            _wait_until_gone(child)
            for sender in senders:
                sender.lose()
            gateway.start()
        for sender in senders:
            sender.connect(gateway.port)
        settle(senders, [])
        _check_far_end(gateway, server, senders)
        assert gateway.stop() == 0


def _moments() -> random.Random:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def _senders() -> list[Sender]:
    return [
        Sender("one", "kill/one", 1, version=5, window=4),
        Sender("two", "kill/two", 2, version=4, window=4),
    ]


def _gateway(directory: Path, redis_port: int) -> Gateway:
    return Gateway(directory, toml=TOML, files={"emqx_backend_redis.conf": RULES.format(port=redis_port)})


def _next_child(gateway: Gateway, senders: list[Sender], last: int) -> int:
    """Keep sending until there is a child that is not `last`; there is never more than one."""
    found: list[int] = []

    def started() -> bool:
        found[:] = [pid for pid in gateway.children() if pid != last and running(pid)]
        return bool(found)

    run(senders, started, CHILD_DEADLINE)
    assert len(found) == 1, f"several uplink children: {found}"
    return found[0]


def _work(senders: list[Sender], server: RedisServer, moments: random.Random) -> None:
    """Keep sending for a random time; mostly until the child has written something, and then a little more."""
    if moments.random() < EARLY:
        run_for(senders, moments.uniform(0.0, 0.3))
        return
    with server.client() as far:
        before = far.llen("ids")
        run(senders, lambda: far.llen("ids") > before, CHILD_DEADLINE)
    run_for(senders, moments.uniform(0.0, 0.1))


def _wait_until_gone(pid: int) -> None:
    wait_until(lambda: not running(pid), ORPHAN_DEADLINE)


def _check_far_end(gateway: Gateway, server: RedisServer, senders: list[Sender]) -> None:
    """Redis holds what the log holds: each id once in the list, in order, and each message."""
    with closing(sqlite3.connect(f"file:{gateway.data}/log.db?mode=ro", uri=True)) as log:
        rows = log.execute("SELECT msgid, payload FROM mqtt_msg ORDER BY id").fetchall()
    ids = [msgid.encode() for msgid, _ in rows]
    stored = {payload for _, payload in rows}
    for sender in senders:
        assert {sender.payload(number) for number in sender.acknowledged} <= stored
    far = redis.Redis(port=server.port)
    wait_until(lambda: far.llen("ids") >= len(ids), DRAIN_DEADLINE)
    assert far.lrange("ids", 0, -1) == ids
    for msgid, payload in rows[:: max(1, len(rows) // 1000)]:
        assert far.hget(f"mqtt:msg:{msgid}", "payload") == payload
    topics = [sender.topic for sender in senders]
    assert sum(far.zcard(f"mqtt:msg:{topic}") for topic in topics) == len(ids)
    far.close()
