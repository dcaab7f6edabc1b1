"""The first page of a damaged `log.db`: its header of 100 bytes, and the schema behind it.

Of the header everything but the count of pages is the same in every log, so one that cannot be is written anew in a copy, and
the schema stays. A schema that is destroyed too is replaced by the one of this version, whose tables stand at the same places
in every log that began with it.

Invariant: the damaged file itself is only read.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from .schema import LOG, TAILS, Format, StoreError, open_writer

FAULTS = (sqlite3.Error, UnicodeDecodeError)
"""What reading raises; the second one where sqlite3 cannot decode its own message about a damaged schema."""
PAGE, HEADER = 4096, 100
WAL_HEADER, FRAME_HEADER = 32, 24
MAX_PAGES = 1 << 24
MAX_VERSION = 255
"""A `user_version` above it is no version of a later program."""


def check_header(path: Path) -> None:
    """Raises sqlite3.DatabaseError where no log's file can begin like this; with a write-ahead log nothing is certain."""
    wal = Path(f"{path}-wal")
    if wal.exists() and wal.stat().st_size:
        return
    with path.open("rb") as file:
        head = file.read(HEADER)
    number = {at: int.from_bytes(head[at : at + 4], "big") for at in (28, 44, 56, 60, 68)}
    if not (
        head.startswith(b"SQLite format 3\0\x10\0")
        and head[18:24] in (b"\1\1\0@  ", b"\2\2\0@  ")
        and number[28] * PAGE >= path.stat().st_size // PAGE * PAGE
        and (number[44], number[56], number[68]) == (4, 1, LOG.application_id)
        and number[60] <= MAX_VERSION
    ):
        raise sqlite3.DatabaseError("the header is damaged")


def version_of(said: int, tables: set[str]) -> int:
    """The version of a log that has these tables; `said`: what its header says, 0 if nothing."""
    bring = {}
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        before: set[str] = set()
        for number, migration in enumerate(LOG.migrations, 1):
            migration(db)
            there = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
            bring[number], before = there - before, there
    at_least = max((number for number, new in bring.items() if new & tables), default=len(bring))
    if said >= at_least:
        return said
    return at_least if any(bring[number] for number in range(at_least + 1, len(bring) + 1)) else len(bring)


def copy_with_header(path: Path, scratch: Path, length: int) -> None:
    """The file with its write-ahead log as `scratch`, with the first `length` bytes (HEADER or PAGE) made anew."""
    remove_scratch(scratch)
    first = _first_page(scratch)
    shutil.copyfile(path, scratch)
    _write_head(scratch, first[:HEADER])
    with suppress(FileNotFoundError):
        shutil.copyfile(f"{path}-wal", f"{scratch}-wal")
        with closing(sqlite3.connect(scratch, isolation_level=None)) as copy, suppress(*FAULTS):
            os.truncate(scratch, max(_pages_of_wal(scratch) * PAGE, scratch.stat().st_size))  # else SQLite thinks it too short
            copy.execute("PRAGMA writable_schema = ON")
            copy.execute("PRAGMA schema_version").fetchone()  # the first look takes the write-ahead log up
            copy.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    remove_scratch(scratch, TAILS[1:])
    _write_head(scratch, first[:length])


def _write_head(scratch: Path, first: bytes) -> None:
    head = bytearray(first)
    head[28:32] = max(2, scratch.stat().st_size // PAGE).to_bytes(4, "big")
    head[32:40] = bytes(8)
    head[92:96] = head[24:28]
    with scratch.open("r+b") as file:
        file.write(head)


def _pages_of_wal(path: Path) -> int:
    """The most pages that the database has after any of its commits."""
    frames = Path(f"{path}-wal").read_bytes()[WAL_HEADER:]
    sizes = (int.from_bytes(frames[at + 4 : at + 8], "big") for at in range(0, len(frames), FRAME_HEADER + PAGE))
    return max((size for size in sizes if size < MAX_PAGES), default=0)


def remove_scratch(scratch: Path, tails: tuple[str, ...] = TAILS) -> None:
    for tail in tails:
        Path(f"{scratch}{tail}").unlink(missing_ok=True)


def _first_page(scratch: Path) -> bytes:
    """A first page that names all tables of a log at the places where every log has them, and nothing else."""
    form = Format(LOG.application_id, LOG.name, LOG.migrations)
    fresh = open_writer(scratch, form)
    places = fresh.execute("SELECT type, name, tbl_name, rootpage, sql FROM sqlite_schema WHERE rootpage > 0").fetchall()
    fresh.close()
    remove_scratch(scratch)
    with_schema = sqlite3.connect(scratch, isolation_level=None)
    try:
        with_schema.execute("PRAGMA auto_vacuum = INCREMENTAL")
        with_schema.execute("CREATE TABLE t (x)")  # makes the file
        with_schema.execute("PRAGMA writable_schema = ON")
        with_schema.execute("DELETE FROM sqlite_schema")
        squeezed = [(*place[:4], " ".join(place[4].split()) if place[4] else None) for place in places]
        with_schema.executemany("INSERT INTO sqlite_schema VALUES (?,?,?,?,?)", squeezed)
    finally:
        with_schema.close()
    page = scratch.read_bytes()[:PAGE]
    remove_scratch(scratch)
    if page[HEADER] != 13:
        raise StoreError("the first page of the log is destroyed and its tables do not fit into a new one")
    return page
