"""The next answers of the inbox, each with what the log knows about it: the broker's reader asks, between two commits.

The file is opened for each look: answers are few, and whoever moves it aside or makes another is noticed. It is only read.

Invariant: the place where reading goes on is the one that the log has, so what was applied and committed is never read again.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from .entry import KEPT_THERE, PUBLISH
from .foreign import unpack
from .inbox import IDENTITY, MESSAGE, POSITION, RETAINED, Answer, cursor_name, read
from .msgid import EPOCH_WIDTH, message_id, origin
from .schema import WHEN, open_reader

AT_ONCE = 200


class Local(NamedTuple):
    """What the log has to say about an answer."""

    ours: bool = False
    """A message that was published here and is still there; a position in this log."""
    given: bool = False
    """A message that the client has acknowledged."""
    waits: int = 0
    """Or it is here for the client already, as this entry."""
    at: int = -1
    """When the topic's retained message was set here, or deleted (ms)."""
    retained: int = 0
    """Its seq, 0 if there is none."""


class Answers(NamedTuple):
    """Some that follow each other; `cursor` names the place in this inbox."""

    cursor: str
    answers: list[tuple[Answer, Local]]


def next_answers(path: Path, log: sqlite3.Connection) -> Answers | None:
    """None: nothing is there. Raises StoreError, sqlite3.Error."""
    if not path.exists():
        return None
    try:
        with closing(open_reader(path)) as db:
            db.execute("BEGIN")
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
    return Answers(name, [(answer, _local(log, answer)) for answer in answers]) if answers else None


def _local(log: sqlite3.Connection, answer: Answer) -> Local:
    if answer.kind == MESSAGE:
        return _message(log, answer)
    if answer.kind == RETAINED:
        return _retained(log, answer)
    if answer.kind == POSITION:
        return Local(ours=_is_place(log, answer.epoch, answer.seq))
    return Local()


def _is_ours(log: sqlite3.Connection, msgid: str) -> bool:
    found = origin(msgid)
    if found is None:
        return False
    row = log.execute(
        "SELECT e.at, r.code, r.epoch, e.seq FROM entry e JOIN run r ON r.id = e.run WHERE e.seq = ? AND e.kind = ?",
        (found.seq, PUBLISH),
    ).fetchone()
    return row is not None and message_id(*row) == msgid


def _message(log: sqlite3.Connection, answer: Answer) -> Local:
    given, waits = log.execute(
        "SELECT ifnull(max(a.acked > 0), 0), ifnull(max(iif(a.acked, 0, e.seq)), 0) FROM addressed a"
        " JOIN client c ON c.id = a.client LEFT JOIN entry e ON e.seq = a.seq WHERE c.clientid = ? AND a.msgid = ?",
        (answer.client, answer.msgid),
    ).fetchone()
    return Local(ours=_is_ours(log, answer.msgid), given=bool(given), waits=waits)


def _retained(log: sqlite3.Connection, answer: Answer) -> Local:
    row = log.execute(
        f"SELECT e.seq, e.kind, {WHEN}, e.properties FROM retained k JOIN topic t ON t.id = k.topic"
        " JOIN entry e ON e.seq = k.seq JOIN run r ON r.id = e.run WHERE t.name = ?",
        (answer.topic,),
    ).fetchone()
    (cleared,) = log.execute("SELECT ifnull((SELECT at FROM cleared WHERE topic = ?), -1)", (answer.topic,)).fetchone()
    if row is None:
        return Local(ours=_is_ours(log, answer.msgid), at=cleared)
    seq, kind, at, properties = row
    at = unpack(properties).at if kind == KEPT_THERE else at
    return Local(ours=_is_ours(log, answer.msgid), at=max(at, cleared), retained=seq)


def _is_place(log: sqlite3.Connection, epoch: int, seq: int) -> bool:
    """Whether this log has given out the seq in that epoch, of which ids hold the last digits only."""
    digits = 62**EPOCH_WIDTH
    (found,) = log.execute(
        "SELECT EXISTS (SELECT 1 FROM (SELECT epoch, first_seq, lead(first_seq) OVER (ORDER BY id) AS next FROM run)"
        " WHERE epoch % ?1 = ?2 % ?1 AND first_seq <= ?3 AND ?3 < ifnull(next, 1 + (SELECT max(seq) FROM entry)))",
        (digits, epoch, seq),
    ).fetchone()
    return bool(found)
