"""Weeks of an outage in minutes: the broker's core with the real store, a clock that is moved, and a far end that is away.

Messages of three priorities are published second by second while the trim keeps the budget; then a real redis-server comes
back, the uplink's worker carries what is left, and what is missing is compared with what the gap records name.
"""

from __future__ import annotations

import random
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.gateway.mqtt.packets import Publish, encode
from tidegate.gateway.trimming import Reach, Trimming, reach
from tidegate.store.entry import PUBLISH, Want
from tidegate.store.policy import Policies, Policy
from tidegate.store.reader import LogReader
from tidegate.store.store import file_bytes
from tidegate.store.trim import Plan, Trim
from tidegate.uplink import to_redis
from tidegate.uplink.plan import Plan as Rules
from tidegate.uplink.progress import Progress, Standing, cursors
from tidegate.uplink.rule import load
from tidegate.uplink.worker import Wait, Worker

from tests.broker.world import World
from tests.support.redis_server import RedisServer
from tests.support.said import Said
from tests.uplink.rig import TestClock

RATE = 20
SAMPLE = 60
"""Seconds of the outage between two looks at the files."""
WEEK = 7 * 86_400
TOPICS = [f"low/{number}" for number in range(10)] + [f"mid/{number}" for number in range(5)] + ["high/0", "high/1"]
WEIGHTS = [97 / 10] * 10 + [2.5 / 5] * 5 + [0.5 / 2] * 2
POLICIES = Policies((Policy("high/#", 3), Policy("mid/#", 2)))
POOL = "redis.pool1"
RULES = """\
backend.redis.pool1.server = 127.0.0.1:{port}
backend.redis.hook.message.publish.1 = {{"topic": "#", "action": {{"commands": ["RPUSH got ${{payload}}"]}}, "pool": "pool1"}}
"""


@dataclass
class Sheet:
    """What came of it; sizes in bytes, times in seconds."""

    messages: int = 0
    budget: int = 0
    most_on_disk: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By the first level of the topic."""
    dropped_too_high: int = 0
    """Dropped while something of a lower priority was there."""
    delivered: int = 0
    unnamed: int = 0
    """Missing at the far end, and no gap record names it."""
    named_wrongly: int = 0
    records: int = 0
    counted_by_records: int = 0
    memory_early: int = 0
    memory_most_later: int = 0
    worst_commit: float = 0.0
    worst_trim: float = 0.0
    """Of the commits that take entries away."""
    on_disk_at_the_end: int = 0
    took: float = 0.0

    def text(self) -> str:
        return "\n".join(f"{name.replace('_', ' '):<24}{value}" for name, value in vars(self).items())


class Box(World):
    """The broker with its trim, as the gateway has it; commits are timed."""

    def __init__(self, data: Path, budget: int, sheet: Sheet) -> None:
        self._data = data
        self._sheet = sheet
        self._jobs: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        super().__init__(data / "log.db")
        self.store.bound(budget)
        self.broker.router.set_wants([Want(PUBLISH, "#", 0, False)])
        trim = Trim(budget, WEEK * 1000, POLICIES, beside=lambda: file_bytes(data / "uplink.db"))
        self.trimming = Trimming(trim, self.store.connection, self._submit, self.broker, self._reach, Said())
        carry_out = self.broker.trim
        self.broker.trim = lambda plan: carry_out(self._looked_at(plan))  # type: ignore[method-assign]

    def _submit(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self._jobs.append((job, done))

    def settle(self) -> None:
        super().settle()
        while self._jobs:
            job, done = self._jobs.pop(0)
            done(job())
            super().settle()

    def _reach(self) -> Reach:
        return reach(self.broker, cursors(self._data).values() or [0])

    def _looked_at(self, plan: Plan) -> Plan:
        """Count what a step takes, and whether it is the turn of that."""
        for lost in plan.lost:
            level = lost.topic.partition("/")[0]
            self._sheet.dropped[level] += lost.count
            lower = {"low": (), "mid": ("low/*",), "high": ("low/*", "mid/*")}[level]
            for pattern in lower:
                (there,) = self.store.connection.execute(
                    "SELECT count(*) FROM entry WHERE topic IN (SELECT id FROM topic WHERE name GLOB ?)", (pattern,)
                ).fetchone()
                self._sheet.dropped_too_high += lost.count * bool(there)
        return plan

    def commit(self) -> None:
        size, trims = self.commits[0][0].size, any(sql.startswith("DELETE FROM entry") for sql, _ in self.commits[0][0].changes)
        began = time.perf_counter()
        super().commit()
        took = time.perf_counter() - began
        self._sheet.worst_commit = max(self._sheet.worst_commit, took)
        self._sheet.worst_trim = max(self._sheet.worst_trim, took * trims)
        self.trimming.committed(size)

    def second(self) -> None:
        self.wait(1.0)
        self.trimming.tick()
        self.settle()

    def disk(self) -> int:
        return sum(file_bytes(self._data / name) for name in ("log.db", "uplink.db"))


class Outage:
    """`publish`, then `come_back`; the sheet says how it went."""

    def __init__(self, directory: Path, messages: int, budget: int, seed: int = 1) -> None:
        self.sheet = Sheet(messages, budget)
        self._directory = directory
        self._data = directory / "data"
        self._data.mkdir()
        self._chance = random.Random(seed)
        self._topic_of = array("b", bytes(messages))
        self._seq_of = array("q", bytes(8 * messages))
        self._began = time.perf_counter()
        self.box = Box(self._data, budget, self.sheet)
        self._progress = Progress(self._data)
        self._progress.save(POOL, Standing("unreachable"), {}, 0)

    def close(self) -> None:
        self.box.kill()
        self._progress.close()

    def publish(self) -> None:
        """Everything, second by second."""
        sheet, box = self.sheet, self.box
        device = box.device("sensor", 4)
        for start in range(0, sheet.messages, RATE):
            end = min(start + RATE, sheet.messages)
            packets = []
            for number, kind in enumerate(self._chance.choices(range(len(TOPICS)), WEIGHTS, k=end - start), start):
                self._topic_of[number] = kind
                self._seq_of[number] = box.broker.log.next_seq + number - start
                packets.append(encode(Publish(TOPICS[kind], b"%064d" % number, 1, False, False, number % 60_000 + 1, {}), 4))
            device.send_bytes(b"".join(packets))
            assert len(device.got) >= 1, "not acknowledged"
            device.got.clear()
            box.second()
            if start // RATE % SAMPLE == 0:
                self._sample(start)
        device.cut()

    def _sample(self, number: int) -> None:
        sheet = self.sheet
        sheet.most_on_disk = max(sheet.most_on_disk, self.box.disk())
        memory = _memory()
        if number < sheet.messages // 2:
            sheet.memory_early = max(sheet.memory_early, memory)
        else:
            sheet.memory_most_later = max(sheet.memory_most_later, memory)

    def come_back(self, redis: RedisServer) -> None:
        """The far end is there again: carry everything, compare, and let a week pass."""
        conf = self._directory / "emqx_backend_redis.conf"
        conf.write_text(RULES.format(port=redis.port))
        file = load(conf, "redis")
        assert not file.mistakes
        reader = LogReader(self._data / "log.db")
        worker = Worker(
            POOL, Rules(file.rules, to_redis, "box"), lambda: to_redis.connect(file.pools[0]), reader, self._progress,
            clock := TestClock(), Said(), self._chance,
        )  # fmt: skip
        _drain(worker, clock)
        for _ in range(20):
            self.box.second()  # it is seen that the far end reads on: the records become entries
        _drain(worker, clock)
        worker.stop()
        reader.close()
        self._compare(redis)
        self.box.wait(WEEK + 3600)
        for _ in range(20):
            self.box.second()
        self.box.store.rest()
        self.sheet.on_disk_at_the_end = (self._data / "log.db").stat().st_size
        self.sheet.took = time.perf_counter() - self._began

    def _compare(self, redis: RedisServer) -> None:
        sheet = self.sheet
        with redis.client() as client:
            got = bytearray(sheet.messages)
            numbers = list(map(int, client.lrange("got", 0, -1)))
            records: Any = client.xrange(f"tidegate:gap:{self.box.store.identity.gateway}")
        assert numbers == sorted(set(numbers)), "once, and in order"
        for number in numbers:
            got[number] = 1
        sheet.delivered = len(numbers)
        for _, record in records:
            sheet.records += 1
            sheet.counted_by_records += int(record["count"])
            kind = TOPICS.index(record["topic"])
            first = bisect_left(self._seq_of, int(record["first_seq"]))
            for number in range(first, bisect_right(self._seq_of, int(record["last_seq"]))):
                if self._topic_of[number] == kind:
                    sheet.named_wrongly += got[number] == 1
                    got[number] = got[number] or 2
        sheet.unnamed = got.count(0)


def _drain(worker: Worker, clock: TestClock) -> None:
    for _ in range(1_000_000):
        wait = worker.step()
        clock.now += wait.seconds or 0.0
        if wait == Wait(None, True):
            return
    raise AssertionError("not drained")


def _memory() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
