"""Reading a damaged `log.db`: every row that SQLite can still reach.

A table is read in order of its rowid. Where that fails, what remains of the range is halved, and halved again, until the
rows beyond the damage are read and the numbers that cannot be are known one by one. A page whose bytes were exchanged may
still look like one: a row whose types or numbers cannot be is damage too. A first page that is destroyed (header, schema) is
made anew in a copy, because every log of one version has its tables at the same places.

Invariant: the damaged file and its write-ahead log are read and never written, not even by a checkpoint.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .first_page import FAULTS, HEADER, MAX_PAGES, PAGE, check_header, copy_with_header, remove_scratch, version_of
from .schema import LOG, StoreError, close_unmoved, explain, is_ours, refuse_lost, uri_path

Row = tuple[Any, ...]
Sane = Callable[[Row], bool]
TAIL = 20_000
"""Numbers beyond the last known one that are tried where the end of a table cannot be read, or before the first."""
LARGEST = (1 << 63) - 2
_NO_DAMAGE = ("SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_BUSY", "SQLITE_FULL", "SQLITE_NOMEM", "SQLITE_IOERR_SHM")
"""Why a log cannot be opened although nothing is wrong with it."""
_TYPES: dict[str, tuple[type, ...]] = {"INTEGER": (int,), "TEXT": (str,), "BLOB": (bytes, str)}


class Table(NamedTuple):
    """A table as the schema has it; `key` is its rowid, or empty for one without."""

    name: str
    columns: tuple[str, ...]
    types: tuple[tuple[tuple[type, ...], bool], ...]
    """Of each column: the types it may hold (none: any), and whether NULL may stand there."""
    order: str
    key: str

    def fits(self, row: Row) -> bool:
        """Whether the values can be a row of it."""
        return all(
            optional if value is None else not types or isinstance(value, types)
            for value, (types, optional) in zip(row, self.types, strict=True)
        )


def tables_of(db: sqlite3.Connection) -> list[Table]:
    """The tables of a fresh log."""
    names = db.execute(
        "SELECT name, wr FROM pragma_table_list WHERE schema = 'main' AND type = 'table' AND name NOT LIKE 'sqlite_%'"
    ).fetchall()
    found = []
    for name, without_rowid in names:
        info = db.execute('SELECT name, type, "notnull", pk FROM pragma_table_info(?) ORDER BY cid', (name,)).fetchall()
        keys = [column for _, column in sorted((pk, column) for column, _, _, pk in info if pk)]
        found.append(
            Table(
                name,
                tuple(column for column, *_ in info),
                tuple((_TYPES.get(kind, ()), not (required or pk)) for _, kind, required, pk in info),
                ", ".join(f"{key} {{0}}" for key in keys),
                "" if without_rowid else "rowid",
            )
        )
    return found


class Damaged:
    """The damaged file, open for reading. `lost`: table -> ranges of rowids that could not be read, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: dict[str, list[tuple[int, int]]] = {}
        self.open_end: set[str] = set()
        """Tables whose last row is not known: the last range that is lost may end anywhere."""
        self.open_start: set[str] = set()
        """Tables whose first row is not known."""
        self._scratch: Path | None = None
        try:
            refuse_lost(path)
            check_header(path)
            self._db = _open(path)
        except (*FAULTS, StoreError) as error:
            if getattr(error, "sqlite_errorname", "").startswith(_NO_DAMAGE):
                raise StoreError(explain(path, error)) from error
            self._scratch = path.with_name(f"{path.name}.scratch")
            try:
                self._db = _open_copy(path, self._scratch)
            except BaseException:
                remove_scratch(self._scratch)
                raise
        self.pages = max(path.stat().st_size // 4096, self._pragma("page_count"), _pages_once(path))
        self._said = self._pragma("user_version") if self._scratch is None else 0
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        self.version = version_of(self._said, tables)

    def close(self) -> None:
        self._db.close()
        if self._scratch is not None:
            remove_scratch(self._scratch)
        wal = Path(f"{self.path}-wal")
        if wal.exists() and not wal.stat().st_size:  # it came by our reading
            wal.unlink()
            Path(f"{self.path}-shm").unlink(missing_ok=True)

    def is_whole(self) -> bool:
        """Whether a start finds no fault in it."""
        try:
            self._db.execute("PRAGMA writable_schema = OFF")
            ours = self._said == self.version and is_ours(self._db, self.path, LOG)
            return ours and self._db.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
        except (*FAULTS, StoreError):
            return False

    def rows(self, table: Table, hint: int, sane: Sane) -> Iterator[Row]:
        """Every readable row of a table with rowids; `hint`: rows up to this number are known to have been there."""
        low = self._end(table, "ASC")
        if low is not None and not self._is_row(table, low, sane):
            low = None
        last = self._end(table, "DESC")
        if low is None and last is None and self._is_empty(table):
            return
        if low is None:
            self.open_start.add(table.name)
            first = self._first_readable(table)
            if not first:  # not a path leads into it
                self.open_end.add(table.name)
                self.lost[table.name] = [(1, max(1, hint))]
                return
            low = max(1, first - TAIL)
        start, high = low, max(low, hint) if last is None else last
        found = high
        while True:
            for row in self._scan(table, start, high if last is not None else high + TAIL, sane):
                found = max(found, row[0])
                yield row[1:]
            if last is not None:
                return
            self.open_end.add(table.name)
            if found <= high:
                self._cut_end(table.name, high)
                return
            start, high = high + TAIL + 1, found

    def rows_without_rowid(self, table: Table, clients: list[int]) -> Iterator[Row]:
        """From the front, from the back, and client by client: what can be read of a table without rowids, some rows twice."""
        columns = ", ".join(table.columns)
        select = f"SELECT {columns} FROM {table.name}"
        try:
            yield from self._sane_rows(table, f"{select} ORDER BY {table.order.format('ASC')}")
            return
        except FAULTS:
            self.lost[table.name] = []
        with suppress(*FAULTS):
            yield from self._sane_rows(table, f"{select} ORDER BY {table.order.format('DESC')}")
        for client in clients if table.columns[0] == "client" else ():
            with suppress(*FAULTS):
                yield from self._sane_rows(table, f"{select} WHERE client = {client}")

    def names(self, table: str, column: str) -> Iterator[tuple[int, str]]:
        """Numbers and names as the index has them, which a damaged table may not."""
        for order in ("ASC", "DESC"):
            with suppress(*FAULTS):
                for number, name in self._db.execute(f"SELECT id, {column} FROM {table} ORDER BY {column} {order}"):
                    if isinstance(number, int) and isinstance(name, str):
                        yield number, name

    def _sane_rows(self, table: Table, sql: str) -> Iterator[Row]:
        for row in self._db.execute(sql):
            if not table.fits(row):
                raise sqlite3.DatabaseError("a row that cannot be")
            yield row

    def _scan(self, table: Table, low: int, high: int, sane: Sane) -> Iterator[Row]:
        ranges = [(low, high)]
        while ranges:
            at, high = ranges.pop()
            try:
                for row in self._read(table, at, high, sane):
                    yield row
                    at = row[0] + 1
                if at <= high and self._ends(table, "DESC", at, high):
                    raise sqlite3.DatabaseError("a page that leads past what is behind it")
            except FAULTS:
                if at < high:
                    middle = (at + high) // 2
                    ranges += [(middle + 1, high), (at, middle)]
                elif at == high:
                    self._lose(table.name, at)

    def _read(self, table: Table, low: int, high: int, sane: Sane) -> Iterator[Row]:
        """Rows from `low` through `high`, in order. Raises sqlite3.Error where that cannot be."""
        sql = (
            f"SELECT rowid, {', '.join(table.columns)} FROM {table.name} NOT INDEXED WHERE rowid BETWEEN ?1 AND ?2"
            " ORDER BY rowid LIMIT ?2 - ?1 + 1"  # after the last one no look at the next page, which may be damaged
        )
        for row in self._db.execute(sql, (low, high)):
            if not (low <= row[0] <= high and table.fits(row[1:]) and sane(row[1:])):
                raise sqlite3.DatabaseError("a row that cannot be")
            yield row
            low = row[0] + 1

    def _is_row(self, table: Table, number: int, sane: Sane) -> bool:
        try:
            return any(True for _ in self._read(table, number, number, sane))
        except FAULTS:
            return False

    def _lose(self, name: str, number: int) -> None:
        ranges = self.lost.setdefault(name, [])
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))

    def _cut_end(self, name: str, high: int) -> None:
        """The numbers that were only tried are not known to have been there, the first of them apart."""
        ranges = self.lost.get(name, [])
        if ranges and ranges[-1][1] > high:
            ranges[-1] = (ranges[-1][0], max(high, ranges[-1][0]))

    def _end(self, table: Table, order: str) -> int | None:
        """The first or the last number; None where it cannot be read, or a damaged page shows one with others beyond it."""
        try:
            found = self._ends(table, order, -LARGEST, LARGEST)
            if not found:
                return None
            number = int(found[0])
            first = order == "ASC"
            beyond = self._ends(table, "DESC", -LARGEST, number - 1) if first else self._ends(table, "ASC", number + 1, LARGEST)
        except FAULTS:
            return None
        return None if beyond else number

    def _ends(self, table: Table, order: str, low: int, high: int) -> Row | None:
        """The first or the last number from `low` through `high`."""
        sql = f"SELECT rowid FROM {table.name} NOT INDEXED WHERE rowid BETWEEN ? AND ? ORDER BY rowid {order} LIMIT 1"
        found: Row | None = self._db.execute(sql, (low, high)).fetchone()
        return found

    def _first_readable(self, table: Table) -> int:
        """A number from which on rows can be read, below which none were seen to be; 0 if there is none."""
        step = 1
        while not self._reads_at(table, step):
            if step > 1 << 40:
                return 0
            step *= 2
        low, high = step // 2, step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._reads_at(table, middle) else (middle, high)
        return high

    def _reads_at(self, table: Table, number: int) -> bool:
        sql = f"SELECT rowid FROM {table.name} NOT INDEXED WHERE rowid >= ? ORDER BY rowid LIMIT 1"
        try:
            return self._db.execute(sql, (number,)).fetchone() is not None
        except FAULTS:
            return False

    def _is_empty(self, table: Table) -> bool:
        try:
            return bool(self._db.execute(f"SELECT count(*) FROM {table.name} NOT INDEXED").fetchone() == (0,))
        except FAULTS:
            return False

    def _pragma(self, name: str) -> int:
        try:
            return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])
        except FAULTS:
            return 0


def _open(path: Path) -> sqlite3.Connection:
    """A connection that reads what is there, the write-ahead log included, and leaves both as they are.

    A reader may not recover a write-ahead log; so a writer does, and goes before the reader.
    """
    writer = sqlite3.connect(path, isolation_level=None)
    try:
        _look(writer)
        reader = sqlite3.connect(f"file:{uri_path(path)}?mode=ro", uri=True, isolation_level=None)
        try:
            _look(reader)
        except BaseException:
            reader.close()
            raise
        return reader
    finally:
        close_unmoved(writer, path)


def _open_copy(path: Path, scratch: Path) -> sqlite3.Connection:
    """The same of a copy whose first page is mended: its header, and if that does not do all of it."""
    copy_with_header(path, scratch, HEADER)
    try:
        return _open(scratch)
    except FAULTS:
        copy_with_header(path, scratch, PAGE)
        return _open(scratch)


def _pages_once(path: Path) -> int:
    """How many pages the file had by its header, before it was cut short; 0 if that cannot be."""
    with path.open("rb") as file:
        pages = int.from_bytes(file.read(32)[28:], "big")
    return pages if pages < MAX_PAGES else 0


def _look(connection: sqlite3.Connection) -> None:
    """Raises sqlite3.Error when the schema cannot be read."""
    connection.execute("PRAGMA writable_schema = ON")  # else a file that was cut short is refused as a whole
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA cell_size_check = ON")
    for table in ("meta", "run", "entry"):
        connection.execute(f"SELECT 1 FROM sqlite_schema WHERE name = '{table}' AND rootpage > 1").fetchone()
        connection.execute(f"EXPLAIN SELECT * FROM {table}").fetchone()
