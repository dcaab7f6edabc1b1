"""Unused names: found in bounded steps, removed at the end of a commit unless something came in between."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tidegate.store.entry import CONNECTED, PUBLISH
from tidegate.store.log import Log, Name
from tidegate.store.names import KEEP_FIRST, STEP, Names, Unused
from tidegate.store.store import WAL_LIMIT, Store
from tidegate.store.trim import KEEP_SEQ, Plan, Trim

from .test_store import NOW, TopicName, open_store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def store_with(path: Path, topics: list[str]) -> tuple[Store, Log, dict[str, int]]:
    """Topics with a message each; the message is gone, the names are not."""
    store, log = open_store(path)
    for text in topics:
        log.append(PUBLISH, Name("c"), TopicName(text), 1, b"x")
        store.apply(log.take())
    store.connection.execute("DELETE FROM entry")
    return store, log, dict(store.connection.execute("SELECT name, id FROM topic").fetchall())


def topics(store: Store) -> list[str]:
    return [text for (text,) in store.connection.execute("SELECT name FROM topic ORDER BY id")]


def handed_out(names: Names, store: Store) -> list[Unused]:
    found = []
    while (step := names.step(store.connection)) is not None:
        found.append(step)
        if step.first is not None:
            store.connection.execute("INSERT OR REPLACE INTO meta VALUES ('names', ?)", (step.first,))
    return found


def test_a_name_that_is_used_between_the_look_and_the_removal_stays(path: Path) -> None:
    store, log, number = store_with(path, ["by number before", "by number", "by name", "unused", "highest"])
    unused = Unused(5, tuple((number[text], text) for text in number))
    earlier = TopicName("by number before", number["by number before"])
    log.append(PUBLISH, Name("c"), earlier, 1, b"x")
    store.apply(log.take())
    log.append(PUBLISH, Name("c"), TopicName("by number", number["by number"]), 1, b"x")
    by_name = TopicName("by name")
    log.change("INSERT INTO retained VALUES (?, 6)", by_name)
    log.change("DELETE FROM retained")
    log.batch.unused.append(unused)
    store.apply(log.take())
    assert topics(store) == ["by number before", "by number", "by name", "highest"]
    assert by_name.id == number["by name"]
    store.close(NOW)


def test_a_removed_name_comes_back_with_another_number(path: Path) -> None:
    store, log, number = store_with(path, ["a", "b"])
    log.batch.unused.append(Unused(2, ((number["a"], "a"), (number["b"], "b"))))
    store.apply(log.take())
    again = TopicName("a")
    log.append(PUBLISH, Name("c"), again, 1, b"x")
    store.apply(log.take())
    assert again.id > max(number.values())
    store.close(NOW)


def test_a_failed_commit_removes_no_name(path: Path) -> None:
    store, log, number = store_with(path, ["a", "b"])
    log.batch.unused.append(Unused(2, ((number["a"], "a"),)))
    log.append(PUBLISH, Name("c"), TopicName("c"), 1, b"x")
    batch = log.take()
    store.connection.execute("PRAGMA query_only = 1")
    with pytest.raises(Exception, match="readonly"):
        store.apply(batch)
    store.connection.execute("PRAGMA query_only = 0")
    assert topics(store) == ["a", "b"]
    store.apply(batch)
    assert topics(store) == ["b", "c"]
    store.close(NOW)


def test_a_look_ends_early_when_all_names_are_alive_and_is_not_repeated(path: Path) -> None:
    store, log = open_store(path)
    client, topic = Name("c"), TopicName("t")
    for _ in range(10 * STEP):
        log.append(PUBLISH, client, topic, 1, b"x")
    log.append(CONNECTED, Name("d"))
    log.append(PUBLISH, client, TopicName("u"), 1, b"x")
    store.apply(log.take())
    names = Names()
    store.connection.execute("DELETE FROM entry WHERE seq <= ?", (STEP,))
    assert names.step(store.connection) is None, "less than a quarter of the log went"
    store.connection.execute("DELETE FROM entry WHERE seq <= ?", (4 * STEP,))
    assert len(handed_out(names, store)) <= 3
    assert names.step(store.connection) is None
    store.close(NOW)


def test_presence_goes_with_the_last_event_of_a_client_and_not_while_it_is_online(path: Path) -> None:
    store, log = open_store(path)
    for clientid, state in (("online", 1), ("offline", 0), ("last", 0)):
        name = Name(clientid)
        log.append(CONNECTED, name)
        log.change("UPDATE client SET state = ? WHERE id = ?", state, name)
        store.apply(log.take())
    store.connection.execute("DELETE FROM entry")
    store.connection.execute(KEEP_SEQ, (3,))
    found = [name for step in handed_out(Names(), store) for name in step.clients]
    assert [text for _, text in found] == ["offline"]
    store.close(NOW)


def test_random_names_do_not_grow_the_write_ahead_log(path: Path) -> None:
    """Each stands on a page of its own in the index of names, so that a few of them dirty as much as thousands of rows."""
    store, log = open_store(path)
    chance = random.Random(2)
    names = [f"{chance.getrandbits(128):032x}" for _ in range(30_000)]
    for start in range(0, len(names), 200):
        for text in names[start : start + 200]:
            log.append(PUBLISH, Name(text), TopicName(text), 1, b"x")
        store.apply(log.take())
    numbers = dict(store.connection.execute("SELECT name, id FROM topic").fetchall())
    log.change("DELETE FROM entry")
    store.apply(log.take())
    for start in range(0, len(names), 500):
        found = tuple((numbers[text], text) for text in names[start : start + 500])
        log.batch.unused.append(Unused(log.next_seq - 1, found, found))
        store.apply(log.take())
    assert store.connection.execute("SELECT count(*) FROM topic").fetchone() == (1,)
    assert path.with_name("log.db-wal").stat().st_size < WAL_LIMIT * 2
    store.close(NOW)


def test_a_look_comes_to_its_end_although_entries_keep_coming(path: Path) -> None:
    store, log, _ = store_with(path, [f"t{number}" for number in range(20)])
    log.append(PUBLISH, Name("c"), TopicName("t19"), 1, b"x")
    store.apply(log.take())
    names, found, steps = Names(), 0, 0
    while (step := names.step(store.connection)) is not None and steps < 20:
        steps += 1
        found += len(step.topics)
        if step.first is not None:
            log.change(KEEP_FIRST, step.first)
        log.append(PUBLISH, Name("c"), TopicName("t19"), 1, b"x")
        store.apply(log.take())
    assert found == 19
    assert step is None, "the look goes on for ever"
    store.close(NOW)


def test_what_names_will_free_is_not_taken_from_the_messages(path: Path) -> None:
    store, log = open_store(path)
    for number in range(6_000):
        log.append(PUBLISH, Name(f"c{number}"), TopicName(f"t{number}"), 1, b"x")
    client, topic = Name("c"), TopicName("t")
    for _ in range(20_000):
        log.append(PUBLISH, client, topic, 1, b"x")
    store.apply(log.take())
    store.connection.execute("DELETE FROM entry WHERE seq <= 15000")
    pages, free = (store.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    trim = Trim(2 * int((pages - free) * 4096 / 0.92), 10**12)  # of a small budget one half is for the write-ahead log
    answers = [trim.plan(store.connection, log.clock.at(log.mono), 0) for _ in range(6)]
    assert isinstance(answers[0], Unused)
    assert not any(isinstance(answer, Plan) and answer.changes for answer in answers)
    store.close(NOW)
