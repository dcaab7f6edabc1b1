"""Rows of the log for other programs: the specification's views, or a SELECT of the user's own, as JSON lines or CSV.

Read through sqlite-utils on a connection that cannot write. A view is read in pieces of its id, sized by how long the last one
took, and no transaction is open while rows are printed: whoever reads slowly (`| less`) must not keep the gateway from
checkpointing. A SELECT of one's own is one transaction, gathered before it is printed. Only the command line imports this file:
the broker has no use for what it needs.

Invariant: a piece of a view is read in well under 20 ms, unless one row alone takes longer.
"""

from __future__ import annotations

import base64
import csv
import json
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from sqlite_utils import Database

from .schema import LOG, StoreError, explain, is_ours, open_reader

Row = dict[str, Any]

VIEWS = {
    "mqtt_client": ("client", "created"),
    "mqtt_sub": ("proxy_subscription", "created"),
    "mqtt_msg": ("entry", "arrived"),
    "mqtt_retain": ("entry", "arrived"),
    "mqtt_acked": ("position", "created"),
}
"""View -> the table whose rowid is its id, and its column for `since`."""
FIRST_PIECE, MAX_PIECE = 8, 1 << 20
QUICK, SLOW = 0.003, 0.008
"""Seconds: a piece read faster may grow, one read slower shrinks."""
_IN_MEMORY = 16 << 20


def export_view(path: Path, view: str, since: str, as_csv: bool, out: IO[str]) -> None:
    """Print a view's rows in order of id; `since`: only from this time on (UTC, as the views show it). Raises StoreError."""
    with closing(_open(path)) as connection:
        write = _writer(out, as_csv)
        try:
            for piece in _pieces(connection, view, since):
                write(piece)
        except sqlite3.Error as error:
            raise StoreError(explain(path, error)) from error


def export_select(path: Path, sql: str, as_csv: bool, out: IO[str]) -> None:
    """Print what a SELECT answers. Raises StoreError."""
    with (
        closing(_open(path)) as connection,
        tempfile.SpooledTemporaryFile(_IN_MEMORY, "w+", encoding="utf-8", newline="") as gathered,
    ):
        try:
            _writer(gathered, as_csv)(_database(connection).query(sql))
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise StoreError(f"the SELECT was not understood: {error}") from error
        gathered.seek(0)
        while text := gathered.read(1 << 16):
            out.write(text)


def _open(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise StoreError(f"there is no log in {path.parent}: name its directory with --data DIR")
    connection = open_reader(path)
    try:
        is_ours(connection, path, LOG)
    except sqlite3.Error as error:
        connection.close()
        raise StoreError(explain(path, error)) from error
    return connection


def _database(connection: sqlite3.Connection) -> Database:
    return Database(connection, recursive_triggers=False, execute_plugins=False)


def _pieces(connection: sqlite3.Connection, view: str, since: str) -> Iterator[list[Row]]:
    table, column = VIEWS[view]
    rows = _database(connection).view(view)
    low, high = connection.execute(f"SELECT (SELECT min(rowid) FROM {table}), (SELECT max(rowid) FROM {table})").fetchone()
    size, after = FIRST_PIECE, (low or 0) - 1
    where = "id > :after AND id <= :through" + (f" AND {column} >= :since" if since else "")
    while high is not None and after < high:
        began = time.monotonic()
        bounds = {"after": after, "through": min(after + size, high), "since": since}
        piece = list(rows.rows_where(where, bounds, order_by="id"))
        passed = time.monotonic() - began
        yield piece
        after = bounds["through"]
        size = min(size * 2, MAX_PIECE) if passed < QUICK else max(1, size // 2) if passed > SLOW else size


def _writer(out: IO[str], as_csv: bool) -> Callable[[Iterable[Row]], None]:
    def write_json(rows: Iterable[Row]) -> None:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, default=_bytes_as_json) + "\n")

    table = csv.writer(out, lineterminator="\n")
    headed = False

    def write_csv(rows: Iterable[Row]) -> None:
        nonlocal headed
        for row in rows:
            if not headed:
                headed = True
                table.writerow(row)
            table.writerow(map(_plain, row.values()))

    return write_csv if as_csv else write_json


def _bytes_as_json(value: bytes) -> object:
    """Text where it is text; else as sqlite-utils writes and reads it."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"$base64": True, "encoded": base64.b64encode(value).decode("ascii")}


def _plain(value: object) -> object:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"base64:{base64.b64encode(value).decode('ascii')}"
