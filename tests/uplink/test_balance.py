"""The balance of a pool: it holds through refusals, retries, drops, gaps and an older file, and says what nobody explains."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tidegate.store.reader import LogReader
from tidegate.uplink import progress
from tidegate.uplink.plan import Plan
from tidegate.uplink.progress import Progress, Standing, read_pools
from tidegate.uplink.rule import load
from tidegate.uplink.worker import Wait, Worker

from tests.support.said import Said

from .far_end import FarEnd
from .logfile import LogFile
from .rig import TestClock
from .test_dead import V1
from .test_worker import RULES, Backend

POOL = "redis.pool1"


class Box:
    """A log, a calm far end, and a worker that is stepped until it rests."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.log = LogFile(data)
        self.far = FarEnd(random.Random(1), {b"2 bad"})
        self.far.calm = True
        conf = data / "emqx_backend_redis.conf"
        conf.write_text(RULES)
        self._rules = load(conf, "redis").rules
        self._reader = LogReader(self.log.path)
        self.progress = Progress(data)
        self.clock = TestClock()

    def close(self) -> None:
        self.progress.close()
        self._reader.close()
        self.log.close()

    def drain(self) -> None:
        worker = Worker(
            POOL, Plan(self._rules, Backend(), "node"), self.far.connect, self._reader, self.progress, self.clock,
            Said(), random.Random(1),
        )  # fmt: skip
        for _ in range(1000):
            wait = worker.step()
            self.clock.now += wait.seconds or 0.0
            if wait == Wait(None, True):
                return
        raise AssertionError("does not come to rest")

    def lose(self, first: int, last: int) -> None:
        with sqlite3.connect(self.log.path) as db:
            db.execute("DELETE FROM entry WHERE seq BETWEEN ? AND ?", (first, last))

    def gap(self, first: int, last: int, reason: str = "disk_budget") -> None:
        self.log.gap(json.dumps({"first_seq": first, "last_seq": last, "reason": reason, "count": last - first + 1}))

    def sheet(self, **ahead: int) -> dict[str, Any]:
        (pool,) = read_pools(self.data, lambda cursor: ahead)
        sheet = pool.balance
        parts = sheet["delivered"] + sheet["waiting"] + sheet["parked"] + sheet["cancelled"] + sum(sheet["dropped"].values())
        assert sheet["wanted"] == parts or sheet["mismatch"], str(sheet)
        return sheet


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.close()


def test_what_no_rule_names_is_not_wanted(box: Box) -> None:
    for topic in ("once", "unwanted", "once"):
        box.log.publish(topic, b"x")
    box.log.connected("c1")
    box.drain()
    assert (box.sheet()["wanted"], box.sheet()["delivered"], box.sheet()["mismatch"]) == (2, 2, 0)


def test_what_waits_is_counted_before_anybody_looks_at_it(box: Box) -> None:
    box.log.publish("once")
    box.drain()
    box.log.publish_many(10)
    assert (box.sheet()["wanted"], box.sheet()["waiting"]) == (11, 10)


def test_a_refused_entry_is_parked_until_it_is_sent_or_dropped(box: Box) -> None:
    for payload in (b"good", b"bad", b"bad"):
        box.log.publish("once", payload)
    box.drain()
    assert (box.sheet()["delivered"], box.sheet()["parked"]) == (1, 2)
    box.progress.apply("a", "drop", [1], b"")
    assert (box.sheet()["parked"], box.sheet()["cancelled"]) == (1, 1)
    box.progress.apply("b", "retry", [2], b"")
    due = box.progress.due(POOL)
    assert due is not None
    box.progress.sent(due)
    assert (box.sheet()["delivered"], box.sheet()["parked"], box.sheet()["cancelled"]) == (2, 0, 1)
    assert box.sheet()["mismatch"] == 0


def test_what_falls_out_of_a_full_quarantine_is_dropped(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MAX_QUARANTINE", 2)
    for _ in range(5):
        box.log.publish("once", b"bad")
    box.drain()
    assert (box.sheet()["parked"], box.sheet()["dropped"], box.sheet()["mismatch"]) == (2, {"quarantine_full": 3}, 0)


def test_what_gap_records_name_is_dropped_by_their_reason(box: Box) -> None:
    box.log.publish_many(20)
    box.lose(3, 7)
    box.lose(11, 12)
    box.gap(3, 7)
    box.gap(11, 12, "damaged")
    box.drain()
    assert box.sheet()["dropped"] == {"disk_budget": 5, "damaged": 2}
    assert box.sheet()["mismatch"] == 0


def test_what_is_missing_and_named_by_nothing_is_a_mismatch(box: Box) -> None:
    box.log.publish_many(20)
    box.lose(3, 7)
    box.gap(3, 5)
    box.drain()
    assert box.sheet()["dropped"] == {"disk_budget": 3, "unexplained": 2}
    assert box.sheet()["mismatch"] == 2


def test_what_is_missing_is_no_mismatch_while_its_record_is_not_written(box: Box) -> None:
    box.log.publish_many(20)
    box.lose(3, 7)
    box.drain()
    assert box.sheet(disk_budget=0)["mismatch"] == 0
    assert box.sheet(disk_budget=0)["dropped"] == {"disk_budget": 5}


def test_what_is_gone_ahead_does_not_wait(box: Box) -> None:
    box.progress.save(POOL, Standing("unreachable"), {}, 0)
    box.log.publish_many(100)
    box.lose(11, 60)
    sheet = box.sheet(disk_budget=50)
    assert (sheet["waiting"], sheet["dropped"]) == (50, {"disk_budget": 50})


def test_a_new_pool_does_not_miss_what_was_gone_before_it(box: Box) -> None:
    kept = box.log.publish("once", retain=True)
    box.log.publish_many(20)
    with sqlite3.connect(box.log.path) as db:
        db.execute("INSERT INTO retained SELECT topic, seq FROM entry WHERE seq = ?", (kept,))
    box.lose(2, 10)
    box.drain()
    assert (box.sheet()["delivered"], box.sheet()["dropped"], box.sheet()["mismatch"]) == (12, {}, 0)


def test_a_pool_that_is_taken_out_and_comes_back_balances(box: Box) -> None:
    for payload in (b"good", b"bad"):
        box.log.publish("once", payload)
    box.drain()
    box.progress.keep_only([])
    box.drain()
    assert (box.sheet()["parked"], box.sheet()["mismatch"]) == (1, 0)


def test_a_file_of_the_first_version_explains_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "uplink.db").write_bytes(V1.read_bytes())
    with closing(LogFile(tmp_path)) as log:
        before = read_pools(tmp_path)
        Progress(tmp_path).close()
        log.publish("once")
        after = read_pools(tmp_path)
        assert len(before) == len(after) > 0
        for pool in after:
            assert pool.balance["mismatch"] == 0, str(pool.balance)
