"""One pool's worker, driven step by step against a real far end, with a clock that only the test moves."""

from __future__ import annotations

import importlib
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

from tidegate.store.entry import PUBLISH
from tidegate.store.reader import LogReader
from tidegate.uplink.backend import Backend, Link
from tidegate.uplink.plan import Plan
from tidegate.uplink.progress import Progress, Standing
from tidegate.uplink.rule import load
from tidegate.uplink.worker import Wait, Worker

from tests.support.redis_cluster import Cluster
from tests.support.redis_server import RedisServer
from tests.support.said import Said

from .logfile import GATEWAY, LogFile

PRESENCE = """
backend.redis.hook.client.connected.1 = {"action": {"function": "on_client_connected"}, "pool": "pool1"}
backend.redis.hook.client.disconnected.1 = {"action": {"function": "on_client_disconnected"}, "pool": "pool1"}
"""
MESSAGES = """
backend.redis.hook.message.publish.1 = {"action": {"function": "on_message_publish"}, "pool": "pool1"}
backend.redis.hook.message.publish.2 = {"action": {"function": "on_message_retain"}, "pool": "pool1"}
backend.redis.hook.message.publish.3 = {"action": {"function": "on_retain_delete"}, "pool": "pool1"}
"""
LIST = 'backend.redis.hook.message.publish.9 = {"action": {"commands": ["RPUSH list ${msgid}"]}, "pool": "pool1"}\n'
LEDGER = f"tidegate:ledger:{GATEWAY}:pool1"
REFUSED = f"tidegate:refused:{GATEWAY}:pool1"


class TestClock:
    """Stands still until it is moved."""

    __test__ = False

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> int:
        return int(self.now * 1000)


class Quarantined(NamedTuple):
    """A row of the quarantine."""

    seq: int
    number: int
    target: str
    reason: str
    original: bytes


class Rig:
    """`log` to append to, `worker` to step; `port` is where the far end, or a proxy before it, is found."""

    def __init__(
        self,
        directory: Path,
        port: int,
        rules: str = MESSAGES + LIST,
        settings: str = "",
        backend: str = "redis",
        node: str = "barn",
        gateway: str = GATEWAY,
    ) -> None:
        self.node = node
        self.data = directory / "data"
        self.data.mkdir(exist_ok=True)
        self.backend = backend
        self.pool_name = f"{backend}.pool1"
        self.conf = directory / f"emqx_backend_{backend}.conf"
        self.clock = TestClock()
        self.said = Said()
        self.log = LogFile(self.data, node, gateway)
        self.progress = Progress(self.data)
        self._reader = LogReader(self.data / "log.db")
        self.configure(port, rules, settings)

    def configure(self, port: int, rules: str, settings: str = "") -> None:
        """Write the rule file and begin with a new worker, as a restarted child does."""
        lines = [f"server = 127.0.0.1:{port}", "timeout = 300ms", *settings.splitlines()]
        self.conf.write_text("".join(f"backend.{self.pool_name}.{line}\n" for line in lines) + rules)
        rule_file = load(self.conf, self.backend)
        assert rule_file.mistakes == ()
        (self.pool,) = rule_file.pools
        self.rules = rule_file.rules
        self.restart()

    def restart(self) -> None:
        """A new worker on what is saved."""
        far_end = cast(Backend, importlib.import_module(f"tidegate.uplink.to_{self.backend}"))
        self.plan = Plan(self.rules, far_end, self.node)
        self.worker = Worker(
            self.pool_name,
            self.plan,
            self.connect,
            self._reader,
            self.progress,
            self.clock,
            self.said,
            random.Random(1),
        )

    def connect(self) -> Link:
        """Another connection to the far end."""
        return cast(Backend, importlib.import_module(f"tidegate.uplink.to_{self.backend}")).connect(self.pool)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.worker.stop()
        self.progress.close()
        self._reader.close()
        self.log.close()

    def drain(self, steps: int = 1000) -> None:
        """Step until nothing is left to carry; times to wait pass at once."""
        for _ in range(steps):
            if self.step() == Wait(None, True):
                return
        raise AssertionError(f"not drained in {steps} steps: {self.standing()}")

    def step(self) -> Wait:
        wait = self.worker.step()
        self.clock.now += wait.seconds or 0.0
        return wait

    def step_until(self, done: Callable[[], bool], steps: int = 1000) -> None:
        for _ in range(steps):
            if done():
                return
            self.step()
        raise AssertionError(f"not in {steps} steps: {self.standing()}")

    def standing(self) -> Standing:
        """What is saved of the pool; saving is made due first."""
        return self.progress.standing(self.pool_name)

    def quarantine(self) -> list[Quarantined]:
        with closing(sqlite3.connect(self.data / "uplink.db")) as db:
            rows = db.execute("SELECT seq, number, target, reason, original FROM quarantine ORDER BY seq, number")
            return [Quarantined(*row) for row in rows]

    def published(self) -> list[str]:
        """The ids of all messages in the log, in its order."""
        return [entry.msgid for entry in self.log.entries() if entry.kind == PUBLISH]


def assert_holds_everything(rig: Rig, server: RedisServer | Cluster) -> None:
    """Every message of QoS 1 and 2 with all its fields, every index in order, the list exact: no loss, no duplicate."""
    wanted = [
        entry for entry in rig.log.entries() if entry.kind == PUBLISH and entry.qos and not (entry.retain and not entry.payload)
    ]
    with server.client() as client:
        assert client.lrange("list", 0, -1) == rig.published()
        pipeline: Any = client.pipeline(transaction=False)
        for entry in wanted:
            pipeline.hgetall(f"mqtt:msg:{entry.msgid}")
        for entry, found in zip(wanted, pipeline.execute(), strict=True):
            assert found == {
                "id": entry.msgid,
                "from": entry.clientid,
                "qos": str(entry.qos),
                "topic": entry.topic,
                "retain": "true" if entry.retain else "false",
                "payload": entry.payload.decode(),
                "ts": str(entry.when // 1000),
            }
        for topic in {entry.topic for entry in wanted}:
            assert client.zrange(f"mqtt:msg:{topic}", 0, -1) == [e.msgid for e in wanted if e.topic == topic]
        assert len(set(client.scan_iter("mqtt:msg:*", 1000))) == len(wanted) + len({entry.topic for entry in wanted})
