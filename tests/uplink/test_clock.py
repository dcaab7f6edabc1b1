"""A wrong clock from end to end: the real gateway boots in 1970, the clock jumps to now and back, and a real Redis gets
everything once, in order, with the true time."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tidegate.store.entry import PUBLISH
from tidegate.store.reader import LogReader
from tidegate.uplink.progress import read_dead

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.wrong_clock import WrongClock

from .rig import LIST, MESSAGES, PRESENCE

RULES = "backend.redis.pool1.server = 127.0.0.1:{port}\n" + MESSAGES + PRESENCE + LIST
DEADLINE = 30.0


def gateway_on(directory: Path, server: RedisServer, clock: WrongClock, toml: str = "") -> Gateway:
    return Gateway(
        directory,
        toml=f'[gateway]\nname = "barn"\n[uplink]\nbackends = ["sqlite", "redis"]\n{toml}',
        files={"emqx_backend_redis.conf": RULES.replace("{port}", str(server.port))},
        environment=clock.environment,
    )


class Publisher:
    """Publishes numbered messages and remembers when each was truly sent."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}

    def publish(self, gateway: Gateway, count: int = 3) -> None:
        with MqttClient(gateway.port, "d") as client:
            for _ in range(count):
                payload = str(len(self.sent))
                self.sent[payload] = time.time()
                client.publish_and_wait("t", payload.encode(), qos=1 + len(self.sent) % 2)


def status(gateway: Gateway) -> dict[str, Any]:
    command = [sys.executable, "-m", "tidegate.gateway.cli", "status", "--json", "--data", str(gateway.data)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def clock_is(gateway: Gateway, state: str) -> None:
    wait_until(lambda: status(gateway)["clock"]["state"] == state, DEADLINE, gateway.log)


def arrived(far: Any, count: int) -> list[str]:
    """The ids of the messages, once so many are there."""
    wait_until(lambda: far.llen("list") >= count, DEADLINE)
    ids: list[str] = far.lrange("list", 0, -1)
    assert far.zrange("mqtt:msg:t", 0, -1) == ids, "sorted as bytes the ids are in the order of the log"
    return ids


def check(far: Any, publisher: Publisher) -> None:
    """Everything once, in order, with the time at which it truly was sent."""
    ids = arrived(far, len(publisher.sent))
    messages = [far.hgetall(f"mqtt:msg:{one}") for one in ids]
    assert [message["payload"] for message in messages] == list(publisher.sent)
    late = {m["payload"]: int(m["ts"]) - publisher.sent[m["payload"]] for m in messages}
    assert all(-1 <= seconds <= 1 for seconds in late.values()), late


def test_a_boot_in_1970_a_jump_to_now_and_ten_minutes_back(tmp_path: Path) -> None:
    clock, publisher = WrongClock(tmp_path), Publisher()
    clock.set_to(600)
    with RedisServer(tmp_path) as server, server.client() as far, gateway_on(tmp_path, server, clock) as gateway:
        publisher.publish(gateway)
        clock_is(gateway, "estimated")
        gateway.stop()
        gateway.start()
        publisher.publish(gateway)
        gateway.kill()
        gateway.start()
        publisher.publish(gateway)
        assert far.llen("list") == 0, "what cannot be put right any more waits for the time"
        assert status(gateway)["pools"][0]["waiting"] >= len(publisher.sent)
        clock.be_off(0)
        clock_is(gateway, "plausible")
        publisher.publish(gateway)
        check(far, publisher)
        clock.be_off(-600)
        clock_is(gateway, "estimated")
        publisher.publish(gateway)
        check(far, publisher)
        gateway.stop()
        gateway.start()
        publisher.publish(gateway)
        check(far, publisher)
        assert far.hget("mqtt:client:d", "state") in ("0", "1")
        gateway.stop()
        check_log(gateway, publisher)


def check_log(gateway: Gateway, publisher: Publisher) -> None:
    """On the box, too, nothing is missing, and ids and times are in order and right."""
    with closing(LogReader(gateway.data / "log.db")) as reader:
        entries, _ = reader.read(0, 10_000)
    published = [entry for entry in entries if entry.kind == PUBLISH]
    assert [entry.payload.decode() for entry in published] == list(publisher.sent)
    assert [entry.msgid for entry in entries] == sorted(entry.msgid for entry in entries)
    assert all(abs(entry.when / 1000 - publisher.sent[entry.payload.decode()]) < 1 for entry in published)


def test_far_ends_wait_for_the_clock_no_longer_than_they_are_told_to(tmp_path: Path) -> None:
    clock, publisher = WrongClock(tmp_path), Publisher()
    with RedisServer(tmp_path) as server, server.client() as far:
        with gateway_on(tmp_path, server, clock) as gateway:
            publisher.publish(gateway)
            arrived(far, 3)
            gateway.stop()
        last = max(publisher.sent.values())
        clock.set_to(600)
        # The machine was started anew since then, as far as the log can tell.
        forget_the_boot(gateway)
        with gateway_on(tmp_path, server, clock, '[clock]\nwait = "2s"\n') as gateway:
            publisher.publish(gateway)
            ids = arrived(far, 6)
            assert "wait for it" not in status(gateway)["clock"]["why"]
            times = [int(far.hget(f"mqtt:msg:{one}", "ts")) for one in ids]
            assert times == sorted(times)
            assert times[-1] >= int(last), "an estimate is never before the last known time"
            gateway.stop()


def test_what_is_refused_meanwhile_has_the_gateways_time(tmp_path: Path) -> None:
    clock = WrongClock(tmp_path)
    with RedisServer(tmp_path) as server, server.client() as far, gateway_on(tmp_path, server, clock) as gateway:
        far.set("mqtt:msg:t", "not a sorted set")
        Publisher().publish(gateway, 1)
        clock.set_to(600)
        Publisher().publish(gateway, 1)
        wait_until(lambda: len(read_dead(gateway.data)) == 2, DEADLINE, gateway.log)
        assert all(abs(dead.at / 1000 - time.time()) < DEADLINE for dead in read_dead(gateway.data))
        gateway.stop()


def forget_the_boot(gateway: Gateway) -> None:
    with closing(sqlite3.connect(gateway.data / "log.db")) as db:
        db.execute("UPDATE run SET boot = 'another'")
        db.commit()


def test_a_clock_always_trusted_is_followed_both_ways(tmp_path: Path) -> None:
    clock, publisher = WrongClock(tmp_path), Publisher()
    with (
        RedisServer(tmp_path) as server,
        server.client() as far,
        gateway_on(tmp_path, server, clock, '[clock]\ntrust = "always"\n') as gateway,
    ):
        clock.be_off(600)
        wait_until(lambda: status(gateway)["clock"]["time"] > time.time() + 500, DEADLINE)
        clock.be_off(0)
        wait_until(lambda: status(gateway)["clock"]["time"] < time.time() + 100, DEADLINE)
        publisher.publish(gateway)
        check(far, publisher)
        assert status(gateway)["clock"]["trusted"]
        gateway.stop()
