"""The budget: what goes first, what is said of it, that pages become free, and that what everybody had is no loss."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.store import thinning
from tidegate.store.entry import CONNECTED, DISCONNECTED, GAP, PUBLISH, RETAIN
from tidegate.store.log import Log, Name
from tidegate.store.policy import Policies, Policy
from tidegate.store.reader import LogReader
from tidegate.store.store import Store
from tidegate.store.thinning import by_policy
from tidegate.store.trim import Lost, Plan, Trim

from .test_store import NOW, TopicName, open_store

FOREVER = 10**12
THREE = Policies((Policy("high/#", 3), Policy("low/#", 1), Policy("#", 2)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def fill(store: Store, log: Log, topics: Iterable[str], size: int = 64) -> None:
    names = {text: TopicName(text) for text in dict.fromkeys(topics)}
    client = Name("c")
    for number, text in enumerate(topics):
        log.append(PUBLISH, client, names[text], 1, b"%d".ljust(size) % number)
        if number % 500 == 499:
            store.apply(log.take())
    store.apply(log.take())


def carry_out(plan: Plan, store: Store, log: Log) -> None:
    for sql, parameters in plan.changes:
        log.change(sql, *parameters)
    store.apply(log.take())


def cut(trim: Trim, store: Store, log: Log, floor: int = 0) -> list[Lost]:
    """Take steps until nothing is left to do; what was lost."""
    lost: list[Lost] = []
    while (plan := trim.plan(store.connection, log.clock.at(log.mono), floor)) is not None:
        if isinstance(plan, Plan):
            carry_out(plan, store, log)
            lost += plan.lost
    return lost


def left(store: Store) -> dict[str, list[int]]:
    """Topic -> the seqs that are there."""
    found: dict[str, list[int]] = {}
    sql = "SELECT t.name, e.seq FROM entry e JOIN topic t ON t.id = e.topic ORDER BY e.seq"
    for topic, seq in store.connection.execute(sql):
        found.setdefault(topic, []).append(seq)
    return found


def used(store: Store) -> int:
    values = [store.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")]
    return int(values[0] - values[1]) * 4096


def test_without_policies_the_oldest_goes(path: Path) -> None:
    store, log = open_store(path)
    fill(store, log, ["t"] * 400, 1000)
    lost = cut(Trim(600_000, FOREVER), store, log)
    (seqs,) = left(store).values()
    assert seqs == list(range(seqs[0], 401))
    assert sum(one.count for one in lost) == seqs[0] - 1
    assert (lost[0].first_seq, lost[-1].last_seq, {one.topic for one in lost}) == (1, seqs[0] - 1, {"t"})
    assert used(store) < 300_000
    store.close(NOW)


def test_a_step_takes_no_more_than_is_too_much(path: Path) -> None:
    store, log = open_store(path)
    fill(store, log, ["t"] * 200, 100_000)
    lost = cut(Trim(32 << 20, FOREVER), store, log)
    assert 45 < sum(one.count for one in lost) < 80, "20 MB become 0.85 of 16 MiB"
    store.close(NOW)


def test_the_lowest_priority_goes_first_also_from_the_middle_and_its_pages_become_free(path: Path) -> None:
    store, log = open_store(path)
    fill(store, log, ["high/a", "low/a", "mid", "low/b"] * 10_000)
    before = used(store)
    lost = cut(Trim(int(before * 0.85) * 2, FOREVER, THREE), store, log)
    assert {one.topic for one in lost} == {"low/a", "low/b"}
    there = left(store)
    assert len(there["high/a"]) == len(there["mid"]) == 10_000
    assert min(there["low/a"]) > max(one.last_seq for one in lost if one.topic == "low/a")
    assert used(store) < before * 0.85 * 0.86
    assert sum(one.count for one in lost) < 1.4 * 40_000 * (1 - 0.85 * 0.85), "and not much more than that"
    store.close(NOW)


def test_when_the_lowest_priority_is_used_up_the_next_one_goes(path: Path) -> None:
    store, log = open_store(path)
    fill(store, log, ["high/a", "low/a", "mid"] * 6_000)
    trim = Trim(used(store), FOREVER, THREE)
    lost = cut(trim, store, log)
    there = left(store)
    assert "low/a" not in there and len(there["high/a"]) == 6_000
    assert 0 < len(there["mid"]) < 6_000
    assert trim.level == 2
    counts: Counter[str] = Counter()
    for one in lost:
        counts[one.topic] += one.count
    assert counts == {"low/a": 6_000, "mid": 6_000 - len(there["mid"])}
    store.close(NOW)


@pytest.mark.parametrize("seed", range(5))
def test_records_name_exactly_what_is_missing(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    store, log = open_store(path)
    topics = [chance.choice(["high/a", "low/a", "low/b", "mid", "mid/x"]) for _ in range(20_000)]
    fill(store, log, topics, chance.choice([10, 64, 300]))
    lost = cut(Trim(used(store), FOREVER, THREE), store, log)
    there = {seq for seqs in left(store).values() for seq in seqs}
    missing = {seq for seq in range(1, 20_001) if seq not in there}
    named = {
        seq for one in lost for seq in range(one.first_seq, one.last_seq + 1) if topics[seq - 1] == one.topic and seq <= 20_000
    }
    assert named == missing
    assert sum(one.count for one in lost) == len(missing)
    store.close(NOW)


def test_what_everyone_had_goes_before_anything_is_lost(path: Path) -> None:
    store, log = open_store(path)
    fill(store, log, ["high/a", "low/a"] * 5_000)
    trim = Trim(int(used(store) * 0.7) * 2, FOREVER, THREE)
    assert cut(trim, store, log, floor=8_000) == []
    assert trim.level is None
    assert {len(seqs) for seqs in left(store).values()} != {5_000}
    store.close(NOW)


def test_retained_messages_and_gap_records_stay(path: Path) -> None:
    store, log = open_store(path)
    kept = log.append(PUBLISH, Name("c"), TopicName("kept"), 1 | RETAIN, b"x")
    log.append(GAP, None, None, 0, b"{}")
    store.apply(log.take())
    store.connection.execute("INSERT INTO retained SELECT id, ? FROM topic", (kept,))
    fill(store, log, ["t"] * 5_000)
    cut(Trim(100_000, FOREVER), store, log)
    assert left(store)["kept"] == [kept]
    assert [entry.kind for entry in LogReader(path).read(0, 2)[0]] == [PUBLISH, GAP]
    store.close(NOW)


def test_what_was_retained_when_the_walker_passed_goes_later(path: Path) -> None:
    store, log = open_store(path)
    fill(store, log, ["t"] * 2_000, 300)
    store.connection.execute("INSERT INTO retained SELECT 1000000 + seq, seq FROM entry")
    trim = Trim(500_000, FOREVER)
    assert cut(trim, store, log) == []
    store.connection.execute("DELETE FROM retained")
    lost: list[Lost] = []
    while (plan := trim.plan(store.connection, log.clock.at(3_605_000), 0)) is not None:
        if isinstance(plan, Plan):
            carry_out(plan, store, log)
            lost += plan.lost
    assert lost and used(store) < 250_000
    store.close(NOW)


def test_what_must_not_be_dropped_is_not_and_the_level_says_so(path: Path) -> None:
    store, log = open_store(path)
    policies = Policies((Policy("keep/#", 1, "reject_new"), Policy("#", 5)))
    fill(store, log, ["keep/a", "t"] * 5_000)
    trim = Trim(int(used(store) * 0.6), FOREVER, policies)
    cut(trim, store, log)
    there = left(store)
    assert len(there["keep/a"]) == 5_000 and "t" not in there
    assert trim.level == 6, "above every priority: nothing is left to drop"
    store.close(NOW)


def test_many_topics_are_named_by_their_policy(path: Path) -> None:
    store, log = open_store(path)
    topics = [f"low/{number}" for number in range(3_000)] * 2 + ["high/a"] * 100
    fill(store, log, topics)
    lost = by_policy(cut(Trim(used(store), FOREVER, THREE), store, log))
    assert {one.topic for one in lost} == {"low/#"}
    assert sum(one.count for one in lost) == 6_100 - sum(len(seqs) for seqs in left(store).values())
    store.close(NOW)


def test_free_pages_go_back_to_the_file_system_in_steps(path: Path) -> None:
    store, log = open_store(path)
    fill(store, log, ["t"] * 40_000)
    before = store.file_bytes()
    trim, steps = Trim(1 << 30, 0), 0
    while (plan := trim.plan(store.connection, log.clock.at(5_001), 40_000)) is not None:
        if isinstance(plan, Plan) and plan.changes:
            carry_out(plan, store, log)
        steps += isinstance(plan, Plan) and not plan.changes
    assert 2 < steps < 10, "256 pages at a time"
    store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert path.stat().st_size < 1_200_000 < before
    store.close(NOW)


def test_a_floor_of_free_space_makes_the_budget_smaller(path: Path) -> None:
    store, log = open_store(path)
    fill(store, log, ["t"] * 150, 100_000)
    pages = used(store)
    assert cut(Trim(1 << 30, FOREVER, free_floor=1 << 20, free=lambda: 5 << 20), store, log) == []
    lost = cut(Trim(1 << 30, FOREVER, free_floor=5 << 20, free=lambda: 0), store, log)
    assert {one.reason for one in lost} == {"free_floor"}
    assert used(store) < pages - (5 << 20)
    store.close(NOW)


def test_a_stretch_is_bounded_in_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "STRETCH", 100)
    store, log = open_store(path)
    fill(store, log, ["high/a"] * 1_000 + ["low/a"] * 1_000)
    looked = []
    trim = Trim(used(store), FOREVER, THREE)
    while (plan := trim.plan(store.connection, log.clock.at(5_000), 0)) is not None:
        if isinstance(plan, Plan):
            carry_out(plan, store, log)
            looked.append(sum(one.count for one in plan.lost))
    assert looked.count(0) >= 10 and max(looked) <= 100
    store.close(NOW)


def test_rows_written_anew_are_the_same_rows(path: Path) -> None:
    store, log = open_store(path)
    client = Name("c")
    topics = TopicName("high/a"), TopicName("low/a")
    for number in range(3_000):
        topic = topics[number % 2]
        log.append(PUBLISH, client, topic, 1, bytes([number % 256]) * (number % 90), b"\x01\x01" if number % 7 == 0 else None)
    store.apply(log.take())
    sql = "SELECT * FROM entry WHERE topic = (SELECT id FROM topic WHERE name = 'high/a') ORDER BY seq"
    before = store.connection.execute(sql).fetchall()
    assert cut(Trim(int(used(store) * 1.85), FOREVER, THREE), store, log)
    assert store.connection.execute(sql).fetchall() == before
    store.close(NOW)


def test_a_long_read_cannot_make_the_wal_grow_past_the_budget(path: Path) -> None:
    store, log = open_store(path)
    store.bound(4 << 20)
    topic, client = TopicName("t"), Name("c")
    with closing(sqlite3.connect(path)) as reader:
        fill(store, log, ["t"] * 500)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entry").fetchone()
        with pytest.raises(sqlite3.OperationalError, match="a long read of"):
            for _ in range(100):
                log.append(PUBLISH, client, topic, 1, bytes(100_000))
                store.apply(log.take())
        assert store.file_bytes() < (4 << 20) + (1 << 20)
    log.append(PUBLISH, client, topic, 1, b"goes on")
    store.apply(log.take())
    assert store.file_bytes() < 4 << 20
    store.close(NOW)


def test_presence_alone_goes_too(path: Path) -> None:
    """Its rows have no payload."""
    store, log = open_store(path)
    for number in range(20_000):
        log.append(CONNECTED if number % 2 else DISCONNECTED, Name("c"))
    store.apply(log.take())
    cut(Trim(int(used(store) * 0.6), FOREVER, THREE), store, log, 20_000)
    (count,) = store.connection.execute("SELECT count(*) FROM entry").fetchone()
    assert 0 < count < 15_000
    log.tick(5_000 + 3_600_000)
    cut(Trim(1 << 40, 1000, THREE), store, log, 20_000)
    assert store.connection.execute("SELECT count(*) FROM entry").fetchone() == (0,)
    store.close(NOW)
