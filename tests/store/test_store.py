"""The log on disk: identity, epochs, commits that are whole or not there, names, trim, and the specification's views."""

from __future__ import annotations

import shutil
import sqlite3
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.store.catchup import CatchUp
from tidegate.store.clock import BELIEVED, CONFIRMED
from tidegate.store.entry import CONNECTED, DISCONNECTED, PUBLISH, RETAIN
from tidegate.store.log import Log, Name
from tidegate.store.msgid import WIDTH, message_id
from tidegate.store.reader import LogReader
from tidegate.store.schema import LOG, StoreError, open_writer
from tidegate.store.store import Store
from tidegate.store.summary import STRETCH
from tidegate.store.topic import TopicTree, matches
from tidegate.store.trim import Plan, Trim

NOW = 1_764_000_000_000


class TopicName(Name):
    __slots__ = ()
    table = "topic"


def open_store(path: Path, wall: int = NOW) -> tuple[Store, Log]:
    mono = 5_000 + wall - NOW
    store = Store.open(path, "barn-7", "full", wall, mono)
    identity = store.identity
    log = Log(identity.next_seq, identity.last_at, identity.run, identity.clock)
    log.tick(mono)
    return store, log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def publish(log: Log, text: str, count: int = 1, flags: int = 1) -> None:
    client, topic = Name("c1"), TopicName(text)
    for number in range(count):
        log.append(PUBLISH, client, topic, flags, b"%d" % number)


def test_a_clean_stop_keeps_the_gateway_and_goes_on_counting_in_a_new_epoch(path: Path) -> None:
    store, log = open_store(path)
    publish(log, "t", 3)
    store.apply(log.take())
    store.close(NOW)
    again, _ = open_store(path, NOW + 1000)
    assert again.identity.clean
    assert again.identity.gateway == store.identity.gateway
    assert again.identity.epoch > store.identity.epoch, "this file may be an old copy, laid back after others went on"
    assert again.identity.next_seq == 4
    again.close(NOW)


def test_an_unclean_stop_begins_a_new_epoch_and_logs_who_was_online_as_gone(path: Path) -> None:
    store, log = open_store(path)
    client = Name("ghost")
    log.append(CONNECTED, client)
    log.change("UPDATE client SET state = 1, online_at = ? WHERE id = ?", log.at, client)
    store.apply(log.take())
    store.abandon()
    again, _ = open_store(path, NOW + 60_000)
    assert again.identity.epoch > store.identity.epoch
    entries, _ = LogReader(path).read(0, 10)
    assert [(e.kind, e.clientid) for e in entries] == [(CONNECTED, "ghost"), (DISCONNECTED, "ghost")]
    assert entries[1].when == NOW, "stamped with the last time the gateway is known to have lived"
    again.close(NOW)


def test_a_copied_card_gets_another_gateway_id(path: Path) -> None:
    store, _ = open_store(path)
    store.close(NOW)
    db = sqlite3.connect(path)
    db.execute("UPDATE meta SET value = 'serial-number:other' WHERE key = 'machine'")
    db.commit()
    db.close()
    again, _ = open_store(path)
    assert again.identity.gateway != store.identity.gateway
    again.close(NOW)


def test_a_batch_that_fails_leaves_nothing_and_its_names_unnumbered(path: Path) -> None:
    store, log = open_store(path)
    client, topic = Name("c1"), TopicName("t")
    log.append(PUBLISH, client, topic, 1, b"x")
    log.change("INSERT INTO nowhere VALUES (?)", 1)
    batch = log.take()
    with pytest.raises(sqlite3.OperationalError):
        store.apply(batch)
    assert (client.id, topic.id) == (0, 0)
    assert store.connection.execute("SELECT count(*) FROM entry").fetchone() == (0,)
    assert store.connection.execute("SELECT count(*) FROM topic").fetchone() == (0,)
    batch.changes.clear()
    store.apply(batch)
    assert client.id and topic.id
    store.close(NOW)


@pytest.mark.parametrize("count", [1, 4, 5, 19, 99, 499, 500, 501, 1_234])
def test_every_size_of_batch_is_stored_whole_and_in_order(path: Path, count: int) -> None:
    store, log = open_store(path)
    publish(log, "t", count)
    store.apply(log.take())
    entries, through = LogReader(path).read(0, 5_000)
    assert [e.payload for e in entries] == [b"%d" % number for number in range(count)]
    assert through == count
    store.close(NOW)


def test_the_clock_never_goes_back_in_the_log(path: Path) -> None:
    store, log = open_store(path)
    publish(log, "t")
    log.step(NOW - 600_000 - 6_000, CONFIRMED)
    log.tick(6_000)
    publish(log, "t")
    store.apply(log.take())
    first, second = LogReader(path).read(0, 5)[0]
    assert second.at == first.at
    assert second.msgid > first.msgid
    store.close(NOW)


def test_message_ids_sort_as_bytes_in_the_order_of_the_log() -> None:
    ids = [message_id(NOW + n // 5, "Ab0z", 1, n) for n in range(1, 40_000, 61)]
    assert ids == sorted(ids, key=str.encode)
    assert {len(text) for text in ids} == {WIDTH} == {20}


def test_the_views_answer_the_specifications_examples(path: Path) -> None:
    store, log = open_store(path)
    client, topic = Name("test"), TopicName("retain")
    log.append(CONNECTED, client)
    log.change("UPDATE client SET state = 1, online_at = ?, created = ? WHERE id = ?", NOW, NOW, client)
    seq = log.append(PUBLISH, client, topic, 1 | RETAIN, b"www")
    log.change("INSERT OR REPLACE INTO retained (topic, seq) VALUES (?,?)", topic, seq)
    store.apply(log.take())
    db = store.connection
    assert db.execute(
        "select clientid, state, node, online_at, offline_at from mqtt_client where clientid = 'test'"
    ).fetchall() == [("test", "1", "barn-7", "2025-11-24 16:00:00", None)]
    entry = LogReader(path).read(0, 5)[0][1]
    assert db.execute(
        "select id, msgid, topic, sender, node, qos, retain, payload, arrived from mqtt_msg where sender = 'test'"
    ).fetchall() == [(seq, entry.msgid, "retain", "test", "barn-7", 1, 1, b"www", "2025-11-24 16:00:00")]
    assert db.execute(
        "select id, topic, msgid, sender, node, qos, payload, arrived from mqtt_retain where topic = 'retain'"
    ).fetchall() == [(seq, "retain", entry.msgid, "test", "barn-7", 1, b"www", "2025-11-24 16:00:00")]
    assert db.execute("select * from mqtt_sub where clientid = 'test'").fetchall() == []
    assert db.execute("select * from mqtt_acked").fetchall() == []
    store.close(NOW)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_bytes(b"this is not a database at all, really not" * 100), "is not a database"),
        (
            lambda p: sqlite3.connect(p).execute("CREATE TABLE theirs (x)").connection.close(),
            "belongs to another program",
        ),
    ],
    ids=["no database", "somebody else's database"],
)
def test_a_foreign_file_is_refused_with_one_sentence_and_left_as_it_is(path: Path, make, says: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    make(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=says):
        open_store(path)
    assert path.read_bytes() == before


def test_a_newer_file_is_refused_with_words(path: Path) -> None:
    store, _ = open_store(path)
    store.close(NOW)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="newer tidegate"):
        open_writer(path, LOG)


def test_files_of_the_first_release_are_moved_forward(tmp_path: Path) -> None:
    """The upgrade test of version 1: its file, as shipped beside this test, is read by this program."""
    shutil.copy(Path(__file__).parent / "log-v1.db", tmp_path / "log.db")
    with closing(open_writer(tmp_path / "log.db", LOG)) as moved:
        assert moved.execute("PRAGMA user_version").fetchone() == (3,)
        levels = moved.execute("SELECT clock, clock_offset FROM run").fetchall()
        assert levels == [(BELIEVED, 1_763_999_995_000)], "how far its clock was known was not told then"
        moved.execute("UPDATE run SET clock_offset = clock_offset + 86400000, boot = 'another'")
        assert moved.execute("SELECT DISTINCT arrived FROM mqtt_msg").fetchall() == [("2025-11-25 16:00:00",)]
    store, _ = open_store(tmp_path / "log.db")
    entries, _ = LogReader(tmp_path / "log.db").read(0, 10)
    assert [(e.topic, e.payload) for e in entries if e.kind == PUBLISH] == [
        ("first/release", b"0"),
        ("first/release", b"1"),
    ]
    assert store.connection.execute("PRAGMA user_version").fetchone() == (3,)
    accounts = store.connection.execute("SELECT delivered, expired, dropped FROM session").fetchall()
    assert set(accounts) <= {(0, 0, "{}")}
    views = store.connection.execute("SELECT payload FROM mqtt_msg ORDER BY id").fetchall()
    assert views == [(b"0",), (b"1",)]
    store.connection.execute("INSERT INTO taken SELECT min(id) FROM mqtt_msg")
    assert store.connection.execute("SELECT payload FROM mqtt_msg").fetchall() == [(b"1",)]
    assert store.connection.execute("SELECT client, filter, cursor, through FROM fetch").fetchall() == []
    store.close(NOW)


def test_made_subscriptions_of_earlier_releases_were_made_here(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "log-v1.db", tmp_path / "log.db")
    with closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as old:
        old.execute("INSERT INTO proxy_subscription VALUES (7, 'c', 'a/#', 1, 1764000000000)")
        view = old.execute("SELECT sql FROM sqlite_schema WHERE name = 'mqtt_sub'").fetchone()
    with closing(open_writer(tmp_path / "log.db", LOG)) as moved:
        rows = moved.execute("SELECT id, clientid, topic, qos, created, source FROM proxy_subscription").fetchall()
        assert rows == [(7, "c", "a/#", 1, 1_764_000_000_000, "")]
        assert moved.execute("SELECT * FROM mqtt_sub").fetchall() == [(7, "c", "a/#", 1, "2025-11-24 16:00:00")]
        assert moved.execute("SELECT sql FROM sqlite_schema WHERE name = 'mqtt_sub'").fetchone() == view
        moved.execute("INSERT INTO proxy_subscription VALUES (8, 'c', 'a/#', 2, 0, 'redis.pool1')")


def carry_out(plan: Plan, store: Store, log: Log) -> None:
    for sql, parameters in plan.changes:
        log.change(sql, *parameters)
    store.apply(log.take())


def test_trim_by_age_takes_only_what_everyone_is_done_with_and_keeps_retained(path: Path) -> None:
    store, log = open_store(path)
    publish(log, "kept", 1, 1 | RETAIN)
    log.change("INSERT INTO retained SELECT id, 1 FROM topic WHERE name = 'kept'")
    publish(log, "t", 9)
    store.apply(log.take())
    trim = Trim(budget=1 << 30, max_age=1000)
    assert trim.plan(store.connection, log.clock.at(5_000), 10) is None, "nothing is old yet"
    plan = trim.plan(store.connection, log.clock.at(10_000), 4)
    assert isinstance(plan, Plan) and not plan.lost
    carry_out(plan, store, log)
    left = [e.seq for e in LogReader(path).read(0, 20)[0]]
    assert left == [1, 5, 6, 7, 8, 9, 10]
    store.close(NOW)


def test_reading_on_finds_exactly_the_matching_messages_in_order(path: Path) -> None:
    store, log = open_store(path)
    client = Name("c1")
    topics = [TopicName(f"a/{n}/t") for n in range(7)]
    for number in range(10_000):
        log.append(PUBLISH, client, topics[number % 7], number % 3, b"%d" % number, b"\x01\x01" if number % 5 == 0 else None)
    store.apply(log.take())
    reader = CatchUp(path)
    for filters, wanted in (
        ({"a/3/t"}, {3}),
        ({"a/+/t"}, set(range(7))),
        ({"a/1/t", "a/2/#"}, {1, 2}),
        ({"#"}, set(range(7))),
    ):
        found, first = [], 1
        while first <= 10_000:
            messages, through = reader.read(first, 10_000, filters).take(first, tuple(filters), 1 << 20)
            found += messages
            first = through + 1
        expected = [n for n in range(10_000) if n % 7 in wanted and n % 3]
        assert [int(m[3]) for m in found] == expected
        assert [m[4] for m in found] == [b"\x01\x01" if n % 5 == 0 else b"" for n in expected]
    store.close(NOW)


def test_a_large_payload_bounds_a_piece_in_bytes(path: Path) -> None:
    store, log = open_store(path)
    client, topic = Name("c1"), TopicName("t")
    for _ in range(6):
        log.append(PUBLISH, client, topic, 1, bytes(400_000))
    store.apply(log.take())
    piece = CatchUp(path).read(1, 6, {"t"})
    assert 1 <= len(piece.messages) <= 3
    assert piece.through == piece.messages[-1][0]
    store.close(NOW)


def test_long_topic_names_bound_a_piece_and_what_is_remembered_of_them(path: Path) -> None:
    store, log = open_store(path)
    topics = [f"{number}/".ljust(60_000, "x") for number in range(300)]
    for topic in topics:
        publish(log, topic, 2)
    publish(log, "short", 3)
    store.apply(log.take())
    catch_up = CatchUp(path)
    tracemalloc.start()
    got, first, most = [], 1, 0
    while first <= 603:
        piece = catch_up.read(first, 603, {"#"})
        taken, through = piece.take(first, ("#",), 1 << 30)
        most = max(most, len({message[1] for message in taken}))
        got += [(message[0], message[1][:4]) for message in taken]
        first = through + 1
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got == [(seq, (topics[(seq - 1) // 2] if seq <= 600 else "short").encode()[:4]) for seq in range(1, 604)]
    assert 1 < most < 80 and held < 32 << 20
    fetched = catch_up.fetch(range(1, 601, 2))
    assert [message[0] for message in fetched.messages] == list(range(1, fetched.through + 1, 2)) and fetched.through < 600
    small, _ = catch_up.read(1, 603, {"#"}).take(1, ("#",), 1_000_000)
    assert sum(len(message[1]) for message in small) <= 1_000_000
    catch_up.close()
    store.abandon()


def test_an_empty_log_is_looked_through_at_once(path: Path) -> None:
    store, _ = open_store(path)
    assert CatchUp(path).read(1, 400, {"t"}).through == 400
    store.close(NOW)


def test_retained_topics_are_found_as_a_subscription_would_match_them() -> None:
    topics = ["a", "a/b", "a/b/c", "a//c", "/a", "$SYS/x", "b/b", "a/x/c"]
    tree: TopicTree[str] = TopicTree()
    for topic in topics:
        tree.put(topic, topic)
    for wanted in ("#", "+", "a/#", "a/+/c", "+/b", "/+", "$SYS/#", "+/x", "a/b", "none", "a/b/#"):
        assert sorted(tree.find(wanted)) == sorted(topic for topic in topics if matches(wanted, topic)), wanted
    for topic in topics:
        assert tree.remove(topic) and not tree.remove(topic)
    assert len(tree) == 0 and list(tree.find("#")) == []


def test_sessions_at_the_same_place_share_one_reading(path: Path) -> None:
    store, log = open_store(path)
    publish(log, "t", 3)
    store.apply(log.take())
    catch_up = CatchUp(path)
    piece = catch_up.read(1, 3, {"t"})
    publish(log, "t", 2)
    store.apply(log.take())
    assert catch_up.read(1, 5, {"t"}) is piece
    assert [message[0] for message in catch_up.read(piece.through + 1, 5, {"t"}).messages] == [4, 5]
    assert catch_up.read(1, 5, {"other"}).take(1, ("other",), 1000)[0] == []
    catch_up.close()
    store.abandon()


def test_what_a_dead_run_left_in_the_wal_is_moved_into_the_database(path: Path) -> None:
    """No fsync may have brought it to the disk; read back through the kernel's cache it must be written anew."""
    store, log = open_store(path)
    publish(log, "t", 3)
    store.apply(log.take())
    copy = path.with_name("copy.db")
    again, _ = open_store(path)
    shutil.copy(path, copy)
    with sqlite3.connect(copy) as moved:
        assert moved.execute("SELECT count(*) FROM mqtt_msg").fetchone() == (3,)
    again.abandon()
    store.abandon()  # not before: the last to close would have moved it


def test_what_nobody_wants_is_passed_over_once_somebody_has_looked(path: Path) -> None:
    store, log = open_store(path)
    client, usual, rare = Name("c1"), TopicName("usual"), TopicName("rare/1")
    last = 6 * STRETCH
    for number in range(1, last + 1):
        log.append(PUBLISH, client, rare if number == last else usual, 1, b"x")
    store.apply(log.take())
    catch_up = CatchUp(path)
    first, looks = 1, 0
    while first <= last:
        first = catch_up.read(first, last, {"other"}).through + 1
        looks += 1
    assert looks >= 5, "one read looks through a bounded stretch"
    piece = catch_up.read(1, last, {"rare/+"})
    assert [message[0] for message in piece.messages] == [last]
    catch_up.close()
    store.abandon()


def test_an_older_copy_laid_back_begins_an_epoch_above_those_it_does_not_know(path: Path) -> None:
    open_store(path)[0].close(NOW)
    image = path.read_bytes()
    for hour in range(1, 4):
        lost, _ = open_store(path, NOW + hour * 3_600_000)
        lost.close(NOW)
    path.write_bytes(image)
    again, _ = open_store(path, NOW + 5 * 3_600_000)
    assert again.identity.epoch > lost.identity.epoch
    again.close(NOW)


def test_epochs_rise_though_the_clock_went_back(path: Path) -> None:
    epochs = []
    for wall in (NOW, NOW + 1000, 1000, 2000, NOW):
        store, _ = open_store(path, wall)
        epochs.append(store.identity.epoch)
        store.close(wall)
    assert epochs == sorted(set(epochs))
