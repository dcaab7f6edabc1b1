"""The next answers of the inbox, with what the log knows about each: the broker's reader asks, between two commits.

The file is opened for each look: answers are few, and whoever moves it aside or makes another is noticed. It is only read.

Invariant: the place where reading goes on is the one that the log has, so what was applied and committed is never read again.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from .inbox import IDENTITY, Answer, cursor_name, read
from .schema import open_reader

AT_ONCE = 200


class Answers(NamedTuple):
    """Some that follow each other; `cursor` names the place in this inbox."""

    cursor: str
    answers: list[Answer]


def next_answers(path: Path, log: sqlite3.Connection) -> Answers | None:
    """None: nothing is there. Raises StoreError, sqlite3.Error."""
    if not path.exists():
        return None
    with closing(open_reader(path)) as db:
        db.execute("BEGIN")
        try:
            row = db.execute(IDENTITY).fetchone()
            if row is None:
                return None
            name = cursor_name(row[0])
            (after,) = log.execute("SELECT ifnull((SELECT seq FROM cursor WHERE name = ?), 0)", (name,)).fetchone()
            answers = read(db, after, AT_ONCE)
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # made a moment ago, or by an earlier version
                return None
            raise
    return Answers(name, answers) if answers else None
