"""Damage at the edges of a log: its header, its write-ahead log, its end. What a start says, and how salvage leads out."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.store.backup import backup_stopped
from tidegate.store.damaged import Damaged, tables_of
from tidegate.store.entry import GAP, PUBLISH
from tidegate.store.log import Name
from tidegate.store.reader import LogReader
from tidegate.store.salvage import salvage
from tidegate.store.schema import LOG, Format, StoreError, open_reader, open_writer

from tests.store.test_store import NOW, TopicName, open_store

COUNT = 300
OLD = Path(__file__).parent / "log-v1.db"


def fill(path: Path) -> None:
    """So many messages, the last half only in the write-ahead log; as after a kill."""
    store, log = open_store(path)
    for half in range(2):
        for number in range(COUNT // 2):
            log.append(PUBLISH, Name("c1"), TopicName("a"), 1, b"%d " % (half * COUNT // 2 + number) * 40)
        store.apply(log.take())
        if not half:
            store.rest()
    for tail in ("", "-wal"):
        shutil.copyfile(f"{path}{tail}", f"{path}.copy{tail}")
    store.close(NOW)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A log with its write-ahead log."""
    fill(tmp_path / "log.db")
    for tail in ("", "-wal"):
        Path(f"{tmp_path}/log.db.copy{tail}").rename(f"{tmp_path}/log.db{tail}")
    return tmp_path / "log.db"


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A log without one."""
    fill(tmp_path / "log.db")
    for tail in ("", "-wal"):
        Path(f"{tmp_path}/log.db.copy{tail}").unlink()
    return tmp_path / "log.db"


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir() if not file.name.endswith("-shm")}


def run(path: Path) -> str:
    return "\n".join(salvage(path, NOW, lambda table, rows: None))


def starts_with(path: Path) -> int:
    """The log opens; how many messages it has."""
    store, _ = open_store(path, NOW + 1000)
    (count,) = store.connection.execute("SELECT count(*) FROM entry WHERE kind = ?", (PUBLISH,)).fetchone()
    store.close(NOW)
    return int(count)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (18, 3), (20, 1), (30, 1), (31, 255), (47, 5), (59, 2), (60, 128), (61, 1), (63, 1), (63, 2), (71, 0x30),
    ],
    ids=[
        "a file format to write that nobody knows", "bytes kept on each page", "more pages", "fewer or more pages",
        "a schema format that nobody knows", "another encoding", "a version below zero", "a version that cannot be",
        "an earlier version", "another earlier version", "another program's",
    ],
)  # fmt: skip
def test_one_wrong_byte_in_the_header_is_refused_and_mended_by_salvage(stopped: Path, at: int, value: int) -> None:
    damaged = bytearray(stopped.read_bytes())
    damaged[at] = value
    stopped.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"tidegate salvage --data|newer tidegate"):
        open_store(stopped)
    assert stopped.read_bytes() == damaged
    assert "is whole" not in run(stopped)
    assert starts_with(stopped) == COUNT


def test_fewer_pages_in_the_header_than_the_file_has_lose_nothing(stopped: Path) -> None:
    damaged = bytearray(stopped.read_bytes())
    damaged[28:32] = (len(damaged) // 4096 // 2).to_bytes(4, "big")
    stopped.write_bytes(damaged)
    assert f"messages and other entries ({COUNT})" in run(stopped)
    assert starts_with(stopped) == COUNT


def test_a_header_is_mended_without_the_schema_of_a_log_that_was_moved_forward(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    shutil.copyfile(OLD, path)
    assert starts_with(path) == 2
    path.write_bytes(bytes(100) + path.read_bytes()[100:])
    assert "are lost" not in run(path)
    assert starts_with(path) == 2


def test_the_write_ahead_log_of_another_database_is_not_moved_into_the_log(killed: Path) -> None:
    other = killed.with_name("other.db")
    with closing(open_writer(other, Format(1, "other", (lambda db: None,)))) as db:
        db.execute("CREATE TABLE a (b)")
        shutil.copyfile(f"{other}-wal", f"{killed}-wal")
    before = content(killed)
    for attempt in (lambda: open_store(killed), lambda: backup_stopped(killed, killed.with_name("b"), lambda *_: None)):
        with pytest.raises(StoreError, match="belongs to another program"):
            attempt()
    assert content(killed) == before
    run(killed)
    aside = {
        name.partition(".damaged-")[0] + name[-4:] * name.endswith("-wal"): found
        for name, found in content(killed).items()
        if "damaged" in name
    }
    assert aside == {name: before[name] for name in ("log.db", "log.db-wal")}
    assert starts_with(killed)


@pytest.mark.parametrize("how", ["emptied", "deleted"])
def test_a_log_of_which_only_the_write_ahead_log_is_left_is_not_looked_at_but_salvaged(killed: Path, how: str) -> None:
    killed.unlink()
    if how == "emptied":
        killed.touch()
    before = content(killed)
    for attempt in (
        lambda: open_store(killed),
        lambda: open_reader(killed),
        lambda: LogReader(killed),
        lambda: backup_stopped(killed, killed.with_name("b"), lambda *_: None),
    ):
        with pytest.raises(StoreError, match=r"log.db-wal beside it .* `tidegate salvage --data .* move both aside"):
            attempt()
    assert content(killed) == before
    assert "entries: " in run(killed)
    assert starts_with(killed) >= COUNT // 2


def test_the_last_row_before_a_page_that_cannot_be_read_is_saved(stopped: Path) -> None:
    """Where the file ends in the middle of a page, which nothing but SQLite can read."""
    with closing(sqlite3.connect(stopped)) as db:
        pages = [page for (page,) in db.execute("SELECT pageno FROM dbstat WHERE name = 'entry' AND pagetype = 'leaf'")]
        assert len(pages) > 5
    damaged = stopped.read_bytes()[: (max(pages) - 1) * 4096 + 2000]
    stopped.write_bytes(damaged)
    with closing(sqlite3.connect(stopped)) as db:
        db.execute("PRAGMA writable_schema = ON")
        readable = {seq for seq in range(1, COUNT + 1) if _reads(db, seq)}
    run(stopped)
    entries, _ = LogReader(stopped).read(0, 2 * COUNT)
    assert readable <= {entry.seq for entry in entries}


def _reads(db: sqlite3.Connection, seq: int) -> bool:
    try:
        return db.execute("SELECT * FROM entry NOT INDEXED WHERE seq = ?", (seq,)).fetchone() is not None
    except sqlite3.Error:
        return False


@pytest.mark.parametrize("tail", ["", "-wal", "-shm"])
def test_a_directory_in_the_place_of_a_file_is_named(stopped: Path, tail: str) -> None:
    place = Path(f"{stopped}{tail}")
    place.unlink(missing_ok=True)
    place.mkdir()
    with pytest.raises(StoreError, match=f"{place} is a directory where a file belongs: move it aside"):
        open_store(stopped)


def test_values_that_no_gateway_wrote_are_damage_too(stopped: Path) -> None:
    with closing(sqlite3.connect(stopped)) as db:
        db.execute("UPDATE run SET boot = x'00'")
        db.commit()
    with pytest.raises(StoreError, match=r"is damaged .it holds what no gateway wrote: .*tidegate salvage --data"):
        open_store(stopped)
    run(stopped)
    assert starts_with(stopped) == COUNT


def test_a_schema_that_is_no_text_any_more_is_one_sentence(stopped: Path) -> None:
    stopped.write_bytes(stopped.read_bytes().replace(b"CREATE TABLE run", b"CREATE TABLE \xff\xfe\xff"))
    with pytest.raises(StoreError, match=r"is damaged .*tidegate salvage --data [^\n]*nothing was changed$"):
        open_store(stopped)


def test_first_rows_that_a_damaged_page_hides_are_told(stopped: Path) -> None:
    """Its first row shows another number, with values that cannot be."""
    with closing(sqlite3.connect(stopped)) as db:
        (page,) = db.execute("SELECT min(pageno) FROM dbstat WHERE name = 'entry' AND pagetype = 'leaf'").fetchone()
    damaged = bytearray(stopped.read_bytes())
    start = (page - 1) * 4096
    for cell in range(5):
        at = start + int.from_bytes(damaged[start + 8 + 2 * cell : start + 10 + 2 * cell], "big")
        damaged[at : at + 20] = bytes(20)
    stopped.write_bytes(damaged)
    run(stopped)
    entries, _ = LogReader(stopped).read(0, 2 * COUNT)
    there = {entry.seq for entry in entries if entry.kind == PUBLISH}
    gaps = [json.loads(entry.payload) for entry in entries if entry.kind == GAP]
    lost = set(range(1, COUNT + 1)) - there
    assert lost and all(any(gap["first_seq"] <= seq <= gap["last_seq"] for gap in gaps) for seq in lost)


def test_a_file_of_a_newer_version_is_still_believed(stopped: Path) -> None:
    damaged = bytearray(stopped.read_bytes())
    damaged[60:64] = (len(LOG.migrations) + 1).to_bytes(4, "big")
    stopped.write_bytes(damaged)
    for attempt in (lambda: open_store(stopped), lambda: run(stopped)):
        with pytest.raises(StoreError, match="written by a newer tidegate"):
            attempt()
    assert stopped.read_bytes() == damaged


def test_a_page_whose_numbers_lead_past_the_rows_behind_it_hides_none_of_them(stopped: Path) -> None:
    """SQLite ends a search there without a fault; what lies behind is found from the other end."""
    with closing(sqlite3.connect(stopped)) as db:
        pages = sorted(db.execute("SELECT pageno FROM dbstat WHERE name = 'entry' AND pagetype = 'leaf'"))
    damaged = bytearray(stopped.read_bytes())
    start = (pages[5][0] - 1) * 4096
    first = start + int.from_bytes(damaged[start + 8 : start + 10], "big")
    damaged[first + 2 : first + 4] = b"\xff\x7f"  # the number of its first row: 16,383
    stopped.write_bytes(damaged)
    table = next(table for table in tables_of(sqlite3.connect(stopped)) if table.name == "entry")
    with closing(Damaged(stopped)) as found:
        assert len(list(found.rows(table, COUNT, lambda row: True))) == COUNT - 1
    run(stopped)
    assert starts_with(stopped) == COUNT - 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, who may not open a file")
def test_a_whole_log_that_may_not_be_opened_is_not_salvaged(killed: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:  # others may not reach pytest's
        path = Path(directory) / killed.name
        for tail in ("", "-wal"):
            shutil.copyfile(f"{killed}{tail}", f"{path}{tail}")
        for file in (path.parent, *path.parent.iterdir()):
            os.chown(file, 65_534, 65_534)
        Path(f"{path}-shm").touch(0o600)
        before = content(path)
        command = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            sys.executable,
            "-B",
            "-c",
            SALVAGE,
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "cannot be opened" in done.stdout and "check owner and rights" in done.stdout, done.stderr
        assert content(path) == before


SALVAGE = """
import sys, pathlib
from tidegate.store.salvage import salvage
from tidegate.store.schema import StoreError
try:
    print(salvage(pathlib.Path(sys.argv[1]), 0, lambda table, rows: None))
except StoreError as error:
    print(error)
"""
