"""Salvage of real damaged files: what can be read is there, what is lost is told, and no name is used twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.store.entry import GAP, PUBLISH, RETAIN, Entry
from tidegate.store.exchange import ready_of
from tidegate.store.log import Name
from tidegate.store.reader import LogReader
from tidegate.store.salvage import salvage
from tidegate.store.schema import LOG, StoreError
from tidegate.store.store import Store
from tidegate.store.trim import KEEP_SEQ

from tests.store.test_store import NOW, TopicName, open_store

COUNT = 20_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of a few MB: messages, a retained one, a session; its first 1,000 entries are trimmed."""
    path = tmp_path / "log.db"
    store, log = open_store(path)
    client, topics = Name("c1"), [TopicName(f"a/{number}") for number in range(50)]
    for number in range(COUNT):
        retain = RETAIN if number == 10 else 0
        log.append(PUBLISH, client, topics[number % 50], 1 | retain, b"%d " % number * (1 + number * 7 % 30))
    log.append(PUBLISH, client, topics[0], 1, b"large" * 5000)
    log.change("INSERT INTO retained VALUES (?, ?)", topics[10], 11)
    log.change("INSERT INTO session (client, created, expiry, expires_at, cursor) VALUES (?, 1, 1, NULL, 15000)", client)
    log.change("INSERT INTO subscription VALUES (?, 'a/#', 1, NULL, 1)", client)
    log.change(KEEP_SEQ, COUNT + 1)
    log.change("DELETE FROM entry WHERE seq <= 1000 AND seq <> 11")
    store.apply(log.take())
    store.close(NOW)
    return path


WHOLE = [11, *range(1001, COUNT + 2)]


def run(path: Path, now: int = NOW) -> str:
    return "\n".join(salvage(path, now, lambda table, rows: None))


def read_all(path: Path) -> list[Entry]:
    reader, entries, through = LogReader(path), [], 0
    while (piece := reader.read(through, 5000))[1] > through:
        entries += piece[0]
        through = piece[1]
    reader.close()
    return entries


def seqs(path: Path) -> tuple[list[int], list[tuple[int, int]]]:
    """Seqs that are there, gap records apart, and the ranges that gap records name."""
    entries = read_all(path)
    gaps = [json.loads(entry.payload) for entry in entries if entry.kind == GAP]
    assert all(gap["reason"] == "damaged" for gap in gaps)
    return [e.seq for e in entries if e.kind != GAP], [(gap["first_seq"], gap["last_seq"]) for gap in gaps]


def complete(path: Path, altered: int = 0) -> None:
    """Every entry that was there is there as it was, or lies in a gap record; no gap record names one that is there.

    `altered`: messages at the edges of what was overwritten, which SQLite cannot tell from good ones.
    """
    entries = read_all(path)
    there, gaps = seqs(path)
    lost = set(WHOLE) - set(there)
    assert all(any(first <= seq <= last for first, last in gaps) for seq in lost)
    assert not any(first <= seq <= last for first, last in gaps for seq in there)
    for entry in entries:
        if entry.kind == PUBLISH and entry.seq <= COUNT:
            number = entry.seq - 1
            altered -= entry.payload != b"%d " % number * (1 + number * 7 % 30)
            assert (entry.clientid, entry.topic) == ("c1", f"a/{number % 50}")
    assert altered >= 0


def next_start(path: Path, before: tuple[str, int]) -> Store:
    """Same gateway, new epoch, higher numbers."""
    (top,) = sqlite3.connect(path).execute("SELECT max(seq) FROM entry").fetchone()
    store, _ = open_store(path, NOW + 1000)
    assert not store.identity.clean
    assert (store.identity.gateway, store.identity.epoch > before[1]) == (before[0], True)
    assert store.identity.next_seq > max(top, COUNT + 1)
    return store


def identity(path: Path) -> tuple[str, int]:
    with closing(sqlite3.connect(path)) as db:
        found: tuple[str, int] = db.execute("SELECT gateway, epoch FROM run ORDER BY id DESC").fetchone()
    return found


def damage(path: Path, change: Callable[[bytes], bytes]) -> bytes:
    damaged = change(path.read_bytes())
    path.write_bytes(damaged)
    return damaged


def overwritten(start: int, length: int, filler: bytes = b"\xa5") -> Callable[[bytes], bytes]:
    return lambda content: content[:start] + filler * length + content[start + length :]


def aside(path: Path) -> Path:
    (found,) = (file for file in path.parent.iterdir() if file.name.startswith("log.db.damaged-") and file.name.endswith("Z"))
    return found


@pytest.mark.parametrize("start", [999_424, 1_000_000, 1_500_001])
def test_bytes_overwritten_in_the_middle(path: Path, start: int) -> None:
    before = identity(path)
    damaged = damage(path, overwritten(start, 8192))
    report = run(path)
    there, gaps = seqs(path)
    assert len(WHOLE) - 700 < len(there) < len(WHOLE)
    assert gaps
    complete(path, 2 if start % 4096 else 0)
    lost = sum(last - first + 1 for first, last in gaps)
    assert f"messages and other entries: {len(there)} saved, at most {lost} are lost, with the numbers " in report
    assert "saved without loss: " in report and "subscriptions (1)" in report
    assert "entry" not in report.replace("$lost", "") and "rows" not in report, "no names of tables"
    assert aside(path).read_bytes() == damaged, "the damaged file is kept as it was"
    assert str(aside(path)) in report
    next_start(path, before).close(NOW)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_file_that_was_cut_short(path: Path, part: float) -> None:
    before = identity(path)
    damage(path, lambda content: content[: int(len(content) * part)])
    run(path)
    there, gaps = seqs(path)
    assert len(there) > len(WHOLE) * (part - 0.15), "also entries whose way through the tree is gone"
    assert gaps[-1][1] >= COUNT + 1
    complete(path)
    next_start(path, before).close(NOW)


@pytest.mark.parametrize("length", [16, 100, 4096])
def test_a_header_that_is_destroyed(path: Path, length: int) -> None:
    before = identity(path)
    damage(path, overwritten(0, length, b"\0"))
    with pytest.raises(StoreError, match="tidegate salvage"):
        open_store(path)
    run(path)
    assert seqs(path) == (WHOLE, [])
    complete(path)
    assert not [file for file in path.parent.iterdir() if "scratch" in file.name or "part" in file.name]
    next_start(path, before).close(NOW)


def test_what_is_only_in_the_write_ahead_log_is_saved(path: Path) -> None:
    store, log = open_store(path)
    log.append(PUBLISH, Name("late"), TopicName("a/late"), 1, b"last words")
    store.apply(log.take())
    kept = {tail: Path(f"{path}{tail}").read_bytes() for tail in ("", "-wal")}
    store.close(NOW)
    for tail, content in kept.items():
        Path(f"{path}{tail}").write_bytes(overwritten(1_000_000, 4096)(content) if not tail else content)
    run(path)
    entries, _ = LogReader(path).read(COUNT + 1, 10)
    assert (entries[0].clientid, entries[0].payload) == ("late", b"last words")
    assert Path(f"{aside(path)}-wal").read_bytes() == kept["-wal"]


def test_an_end_that_is_lost_far_beyond_what_is_known_otherwise(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE entry SET seq = seq + 1000000 WHERE seq > 11")
        db.execute("UPDATE meta SET value = 11 WHERE key = 'seq'")
        db.execute("UPDATE session SET cursor = 11")
        db.execute("DELETE FROM entry WHERE seq = 11")
        db.execute("DELETE FROM retained")
        db.commit()
        db.execute("VACUUM")
    damage(path, lambda content: content[: int(len(content) * 0.9)])
    run(path)
    there, gaps = seqs(path)
    assert len(there) > len(WHOLE) * 0.75
    assert there == list(range(1_001_001, 1_001_001 + len(there)))
    assert gaps[-1][0] == there[-1] + 1, "also where a page beside the tree had one row more"
    assert gaps[-1][1] >= 1_000_000 + COUNT + 1


def test_a_trimmed_log_has_no_gap_where_it_was_trimmed(path: Path) -> None:
    damage(path, overwritten(1_000_000, 4096))
    run(path)
    _, gaps = seqs(path)
    assert min(first for first, _ in gaps) > 1001


def test_a_place_in_the_inbox_is_no_number_of_the_log(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("INSERT INTO cursor VALUES ('inbox:0123', 1000000000)")
        db.execute("INSERT INTO addressed (seq, client, msgid) VALUES (2000, 1, 'foreign')")
        db.execute("INSERT INTO proxy_subscription VALUES (1, 'c1', 'a/#', 1, 0, 'redis.pool1')")
    damage(path, overwritten(999_424, 4096))
    run(path)
    complete(path)
    assert max(last for _, last in seqs(path)[1]) <= COUNT
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT seq FROM cursor").fetchall() == [(1_000_000_000,)]
        assert db.execute("SELECT seq, client, msgid, acked FROM addressed").fetchall() == [(2000, 1, "foreign", 0)]
        assert db.execute("SELECT source FROM proxy_subscription").fetchall() == [("redis.pool1",)]


def test_runs_that_are_lost_do_not_bring_old_names_back(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'run'").fetchone()
    before = identity(path)
    damage(path, overwritten((root - 1) * 4096, 4096))
    report = run(path, now=5_000)  # by a clock that nobody has set
    assert f"{len(WHOLE)} entries are named anew" in report
    assert seqs(path)[0] == WHOLE
    store = next_start(path, before)
    assert store.identity.epoch > 20_000
    store.close(NOW)


def test_names_that_are_lost_are_replaced_and_what_hung_on_them_is_dropped(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        roots = [root for (root,) in db.execute("SELECT rootpage FROM sqlite_schema WHERE tbl_name IN ('client', 'topic')")]
    for root in roots:
        damage(path, overwritten((root - 1) * 4096, 4096))
    report = run(path)
    for what in ("sessions", "subscriptions", "retained messages"):
        assert f"{what}: 1 dropped, because what they belong to is lost" in report
    assert "topics: the names of 50 that entries have are lost" in report
    entries, _ = LogReader(path).read(1000, 1)
    assert (entries[0].clientid, entries[0].topic) == ("$lost/client/1", "$lost/topic/1")


def test_a_table_of_names_is_read_from_its_index(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'topic'").fetchone()
    damage(path, overwritten((root - 1) * 4096, 4096))
    run(path)
    complete(path)


def test_a_whole_log_is_left_alone(path: Path) -> None:
    before = path.read_bytes()
    assert "is whole: nothing was changed" in run(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["log.db"]


@pytest.mark.parametrize(
    "change",
    [overwritten(100, 10_000_000), lambda _: b"dear Anna\n" * 2000, lambda _: b""],
    ids=["all but the header is destroyed", "another file", "empty"],
)
def test_a_file_of_which_nothing_can_be_read_is_no_fresh_start(path: Path, change: Callable[[bytes], bytes]) -> None:
    damaged = damage(path, change)
    with pytest.raises(StoreError, match=r"nothing in .* can be read as a log .*nothing was changed"):
        run(path)
    assert path.read_bytes() == damaged
    assert [file.name for file in path.parent.iterdir()] == ["log.db"]


def test_a_salvage_that_was_cut_off_is_finished(path: Path) -> None:
    content = path.read_bytes()
    path.rename(path.with_name("log.db.damaged-x"))
    ready_of(path).write_bytes(content)
    assert "it is finished now" in run(path)
    assert path.read_bytes() == content


def test_there_is_nothing_to_salvage(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no log in"):
        run(tmp_path / "log.db")


def test_a_damaged_log_of_an_older_version_is_salvaged_as_such_and_moved_forward_by_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    content = bytearray((Path(__file__).parent / "log-v1.db").read_bytes())
    with closing(sqlite3.connect(Path(__file__).parent / "log-v1.db")) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'retained'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    content[(page - 1) * size : page * size] = b"\xff" * size
    path.write_bytes(content)
    assert "retained" in run(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    store, _ = open_store(path)
    assert store.connection.execute("SELECT payload FROM mqtt_msg ORDER BY id").fetchall() == [(b"0",), (b"1",)]
    assert store.connection.execute("PRAGMA user_version").fetchone() == (len(LOG.migrations),)
    store.close(NOW)
