"""Backup and restore of the log as files: whole or not there, made in between commits, and nothing is ever deleted."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from tidegate.store.backup import backup_stopped, backup_to, finish, restore
from tidegate.store.exchange import exchange, make_part, part_of, ready_of
from tidegate.store.lock import Held, hold, is_held
from tidegate.store.reader import LogReader
from tidegate.store.schema import LOG, StoreError
from tidegate.store.store import Store
from tidegate.store.worker import Worker

from tests.store.test_store import NOW, open_store, publish


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "log.db"


def quiet(copied: int, total: int) -> None:
    assert 0 <= copied <= total


def fill(path: Path, count: int) -> Store:
    store, log = open_store(path)
    for _ in range(count // 1000):
        publish(log, "t", 1000)
        store.apply(log.take())
    publish(log, "t", count % 1000)
    store.apply(log.take())
    return store


def payloads(path: Path) -> list[bytes]:
    return [entry.payload for entry in LogReader(path).read(0, 100_000)[0]]


def test_what_is_committed_between_two_steps_is_in_the_copy_too(path: Path, tmp_path: Path) -> None:
    store, log = open_store(path)
    publish(log, "t", 60_000)
    store.apply(log.take())
    steps: list[int] = []

    def commit(copied: int, total: int) -> None:
        steps.append(copied)
        publish(log, f"meanwhile/{len(steps)}", 10)
        store.apply(log.take())
        store.rest()

    backup_to(store.connection, tmp_path / "copy", commit)
    written = payloads(path)
    assert finish(tmp_path / "copy", path) == (tmp_path / "copy").stat().st_size
    assert len(steps) > 3, "many small steps"
    assert max(after - before for before, after in pairwise(steps)) <= 64
    assert payloads(tmp_path / "copy") == written[:-10], "the last ten were committed after the last step"
    store.close(NOW)


def test_a_copy_is_of_the_same_format(path: Path, tmp_path: Path) -> None:
    fill(path, 10).close(NOW)
    backup_stopped(path, tmp_path / "copy", quiet)
    with closing(sqlite3.connect(tmp_path / "copy")) as copy:
        assert copy.execute("PRAGMA application_id").fetchone() == (LOG.application_id,)
        assert copy.execute("PRAGMA user_version").fetchone() == (len(LOG.migrations),)
        assert copy.execute("PRAGMA auto_vacuum").fetchone() == (2,)
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o640


def test_a_backup_that_is_given_up_leaves_no_file_and_the_earlier_one_as_it_was(path: Path, tmp_path: Path) -> None:
    store = fill(path, 20_000)
    earlier = tmp_path / "copy"
    backup_to(store.connection, earlier, quiet)
    finish(earlier, path)
    before = earlier.read_bytes()

    def give_up(copied: int, total: int) -> None:
        raise StoreError("the gateway was stopped")

    for file in (earlier, tmp_path / "new"):
        with pytest.raises(StoreError, match="the gateway was stopped"):
            backup_to(store.connection, file, give_up)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "data"]
    assert earlier.read_bytes() == before
    store.close(NOW)


def test_a_copy_that_is_damaged_gets_no_name(path: Path, tmp_path: Path) -> None:
    store = fill(path, 20_000)
    file = tmp_path / "copy"
    backup_to(store.connection, file, quiet)
    content = bytearray(part_of(file).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = b"\xa5" * 4096
    part_of(file).write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        finish(file, path)
    assert [found.name for found in tmp_path.iterdir()] == ["data"]
    store.close(NOW)


def test_a_disk_on_which_sqlite_begins_again_and_again_ends_the_backup(path: Path, tmp_path: Path) -> None:
    store = fill(path, 20_000)

    def another_writes(copied: int, total: int) -> None:
        """A change by another connection makes SQLite begin from the first page."""
        with closing(sqlite3.connect(path)) as other:
            other.execute("INSERT OR REPLACE INTO meta VALUES ('x', ?)", (copied,))
            other.commit()

    with pytest.raises(StoreError, match="it had to begin again and again"):
        backup_to(store.connection, tmp_path / "copy", another_writes)
    store.close(NOW)


@pytest.mark.parametrize("name", ["log.db", "log.db-wal", "uplink.db", "broker.lock"])
def test_the_gateway_s_own_files_are_no_place_for_a_backup(path: Path, name: str) -> None:
    fill(path, 10).close(NOW)
    with pytest.raises(StoreError, match="belongs to the running log"):
        backup_stopped(path, path.parent / name, quiet)
    assert len(payloads(path)) == 10


def test_a_file_that_is_no_backup_is_not_written_over(path: Path, tmp_path: Path) -> None:
    fill(path, 10).close(NOW)
    (tmp_path / "letter").write_text("dear Anna")
    with pytest.raises(StoreError, match="is not a backup of a log: choose another name"):
        backup_stopped(path, tmp_path / "letter", quiet)
    assert (tmp_path / "letter").read_text() == "dear Anna"
    with pytest.raises(StoreError, match=r"there is no directory .*/nowhere: make it first"):
        backup_stopped(path, tmp_path / "nowhere" / "copy", quiet)


def test_a_restored_log_begins_a_new_epoch_even_if_it_was_stopped_cleanly(path: Path, tmp_path: Path) -> None:
    first = fill(path, 1500)
    first.close(NOW)
    backup_stopped(path, tmp_path / "copy", quiet)
    later, log = open_store(path)
    publish(log, "later", 5)
    later.apply(log.take())
    later.abandon()
    aside = restore(tmp_path / "copy", path)
    assert aside is not None
    assert aside.name.startswith("log.db.before-restore-2")
    assert len(payloads(aside)) == 1505, "nothing of it is lost"
    assert len(payloads(path)) == 1500
    again, _ = open_store(path, NOW + 1)
    assert not again.identity.clean
    assert again.identity.gateway == first.identity.gateway
    assert again.identity.epoch > first.identity.epoch
    assert again.identity.next_seq == 1501
    again.close(NOW)
    assert (tmp_path / "copy").exists()


def test_restoring_where_no_log_is(path: Path, tmp_path: Path) -> None:
    fill(path, 10).close(NOW)
    backup_stopped(path, tmp_path / "copy", quiet)
    (tmp_path / "new").mkdir()
    assert restore(tmp_path / "copy", tmp_path / "new" / "log.db") is None
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["log.db"]
    assert len(payloads(tmp_path / "new" / "log.db")) == 10


def test_what_is_no_whole_backup_is_not_restored(path: Path, tmp_path: Path) -> None:
    fill(path, 20_000).close(NOW)
    backup_stopped(path, tmp_path / "copy", quiet)
    content = (tmp_path / "copy").read_bytes()
    cases = {
        "half": (content[: len(content) // 2], "damaged|malformed"),
        "middle": (content[:400_000] + b"\xa5" * 4096 + content[404_096:], "is damaged"),
        "text": (b"dear Anna\n" * 1000, "is not a database"),
        "empty": (b"", "is empty, not a log of tidegate"),
    }
    before = path.read_bytes()
    for name, (damaged, words) in cases.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(StoreError, match=words) as refused:
            restore(tmp_path / name, path)
        assert str(refused.value).startswith(str(tmp_path / name))
        assert str(refused.value).endswith("name a file that `tidegate backup` made; nothing was changed")
    with pytest.raises(StoreError, match="there is no file"):
        restore(tmp_path / "nowhere", path)
    with pytest.raises(StoreError, match="is the present log itself"):
        restore(path, path)
    (tmp_path / "copy-wal").write_bytes(b"x")
    with pytest.raises(StoreError, match="not a backup but a log in use"):
        restore(tmp_path / "copy", path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["log.db"]


def test_an_exchange_that_was_cut_off_is_no_fresh_start(path: Path, tmp_path: Path) -> None:
    fill(path, 10).close(NOW)
    backup_stopped(path, tmp_path / "copy", quiet)
    ready_of(path).write_bytes((tmp_path / "copy").read_bytes())
    path.rename(path.with_name("log.db.before-restore-x"))
    with pytest.raises(StoreError, match=r"was cut off before .* run it again"):
        open_store(path)
    assert not path.exists()
    restore(tmp_path / "copy", path)
    assert len(payloads(path)) == 10
    assert not ready_of(path).exists()


def test_two_exchanges_in_one_second_do_not_hide_a_log(path: Path) -> None:
    for content in (b"first", b"second", b"third"):
        make_part(path).write_bytes(content)
        try:
            exchange(path, "before-restore")
        except FileExistsError:
            break
    kept = {file.read_bytes() for file in path.parent.iterdir()}
    assert b"first" in kept
    assert b"second" in kept


def test_the_lock_of_a_directory(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    lock = hold(tmp_path / "data")
    assert is_held(tmp_path / "data")
    with pytest.raises(Held, match="another tidegate is running on"):
        hold(tmp_path / "data")
    os.close(lock)
    assert not is_held(tmp_path / "data")


def test_a_long_job_serves_the_others_and_hears_that_it_is_to_end() -> None:
    order: list[object] = []
    over = threading.Event()
    worker = Worker("test", lambda done, value: done(value))
    started, go_on = threading.Event(), threading.Event()

    def long_job() -> str:
        started.set()
        assert go_on.wait(10)
        order.append(worker.serve())
        over.set()
        while worker.serve(0.01):
            pass
        return "long"

    worker.submit(long_job, order.append)
    assert started.wait(10)
    worker.submit(lambda: "short", order.append)
    worker.submit(lambda: 1 // 0, lambda error: order.append(type(error)))
    go_on.set()
    assert over.wait(10)
    worker.stop()
    assert order == ["short", ZeroDivisionError, True, "long"]


@pytest.mark.parametrize("beside", ["log.db-wal", "uplink.db"])
def test_a_log_of_0_bytes_is_no_new_log_where_one_has_been(path: Path, beside: str) -> None:
    path.write_bytes(b"")
    path.with_name(beside).write_bytes(b"something")
    with pytest.raises(StoreError, match=rf"has 0 bytes, but {beside} beside it .*move .* aside"):
        open_store(path)
    assert path.read_bytes() == b"" and path.with_name(beside).read_bytes() == b"something"


def test_a_log_of_0_bytes_alone_is_where_a_first_start_was_cut_off(path: Path) -> None:
    path.write_bytes(b"")
    fill(path, 3).close(NOW)
    assert len(payloads(path)) == 3


def test_a_start_takes_away_what_a_killed_restore_left(path: Path) -> None:
    part_of(path).write_bytes(b"half a log")
    fill(path, 3).close(NOW)
    assert [file.name for file in path.parent.iterdir()] == ["log.db"]
