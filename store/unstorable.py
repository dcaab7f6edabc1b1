"""What the database will never take, told from a disk that refuses for now.

A value that is too big, a constraint, a trigger somebody made: such a row fails again however often it is tried, and would
hold everybody's acknowledgements back. `find` tries the parts of a batch, halving what is refused, and undoes it all; whoever
made the batch then takes out what was found, and commits the rest.

Invariant: `find` leaves the database as it was.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from .log import Batch

_NEVER = (sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE)


class Unstorable(Exception):
    """`rows` (seq -> why) and `changes` (their place in the batch -> why) that can never be stored."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, str] = {}
        self.changes: dict[int, str] = {}

    def __str__(self) -> str:
        return next(iter((*self.rows.values(), *self.changes.values())), "nothing")


def is_refusal(error: BaseException) -> bool:
    """Whether trying again cannot help: it is about what was to be written, not about the disk or the memory."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _NEVER
    if isinstance(error, sqlite3.Error):  # raised by the module itself: a value that cannot be bound
        return isinstance(error, sqlite3.DataError | sqlite3.InterfaceError | sqlite3.ProgrammingError)
    return isinstance(error, OverflowError | ValueError | TypeError)


def find(db: sqlite3.Connection, batch: Batch, write: Callable[[Batch], object]) -> Unstorable | None:
    """What of the batch `write` cannot write; None if each part can be written. Raises what `write` raises of the disk."""
    found = Unstorable()
    db.execute("BEGIN IMMEDIATE")
    try:
        _narrow(db, batch, 0, len(batch.rows) + len(batch.changes), write, found)
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    return found if found.rows or found.changes else None


def _narrow(
    db: sqlite3.Connection, batch: Batch, low: int, high: int, write: Callable[[Batch], object], found: Unstorable
) -> None:
    """Write what stands at `low` to `high`, rows before changes, as far as it can be written."""
    rows = len(batch.rows)
    part = Batch(batch.first_seq)
    part.rows = batch.rows[low:high]
    part.changes = batch.changes[max(0, low - rows) : max(0, high - rows)]
    why = _try(db, part, write)
    if not why:
        return
    if high - low > 1:
        middle = (low + high) // 2
        _narrow(db, batch, low, middle, write, found)
        _narrow(db, batch, middle, high, write, found)
    elif part.rows:
        found.rows[part.rows[0][0]] = why
    else:
        found.changes[low - rows] = why


def _try(db: sqlite3.Connection, part: Batch, write: Callable[[Batch], object]) -> str:
    """Write the part; if it is refused, why, and nothing of it is there."""
    db.execute("SAVEPOINT part")
    try:
        write(part)
    except Exception as error:
        if not is_refusal(error):
            raise
        db.execute("ROLLBACK TO part")
        return str(error) or type(error).__name__
    finally:
        if db.in_transaction:
            db.execute("RELEASE part")
    return ""
