"""The uplink's file as the broker sees it: its identity and its inbox, written by the test in place of the uplink."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from tidegate.store.inbox import COLUMNS, SCHEMA, Answer


def make_inbox(path: Path, identity: str = "this-file") -> Path:
    """A new `uplink.db`."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID")
        db.execute("INSERT INTO meta VALUES ('identity', ?)", (identity,))
        db.execute(SCHEMA)
    return path


def put(path: Path, *answers: Answer) -> None:
    """Their ids are given by the file."""
    names = COLUMNS.partition(", ")[2]
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executemany(f"INSERT INTO inbox ({names}) VALUES ({','.join('?' * 14)})", [tuple(answer)[1:] for answer in answers])


def answer(kind: int, client: str, *filters: tuple[str, int], pool: str = "redis.pool1") -> Answer:
    """About subscriptions."""
    return Answer(0, pool, kind, client, filters=json.dumps(filters))
