"""What the lanes that ask keep in `uplink.db`: how far each is in the log, its questions, and the answers for the broker.

The connection is that of `Progress`, the one writer. Answers and the questions that they answer change in one transaction,
synced; a lost move of the cursor alone repeats questions, which is harmless.

Invariant: an answer is in the inbox before its question is forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tidegate.store.inbox import IDENTITY, Answer

from .crowd import Question
from .progress import Progress, read_rows

_LANE = "cursor, gateway, epoch, state, error, hint, asked, answers, skipped, refused"
_ANSWER = "pool, kind, client, filter, topic, filters, msgid, sender, qos, at, payload, queue, epoch, seq"


class LaneStanding(NamedTuple):
    """A lane's row. `gateway` and `epoch` are those of the log's newest run when it was saved."""

    cursor: int
    gateway: str = ""
    epoch: int = 0
    state: str = "starting"
    error: str = ""
    hint: str = ""
    asked: int = 0
    """Questions that were answered."""
    answers: int = 0
    skipped: int = 0
    """Messages that the limit of a rule passed over."""
    refused: int = 0
    """Questions that the far end refused, and what a channel said that means nothing."""


class LaneStatus(NamedTuple):
    """For `status`: `questions` wait for the far end, `inbox` for the broker."""

    state: str
    error: str
    hint: str
    questions: int
    inbox: int
    asked: int
    answers: int
    skipped: int
    refused: int


class LaneBook:
    """The writing side; its methods may be called from every lane's thread."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def standing(self, pool: str) -> LaneStanding | None:
        """None: the lane has never run."""
        rows = self._progress.rows(f"SELECT {_LANE} FROM lane WHERE pool = ?", pool)
        return LaneStanding(*rows[0]) if rows else None

    def questions(self, pool: str) -> list[Question]:
        rows = self._progress.rows("SELECT client, filter, qos, due FROM question WHERE pool = ?", pool)
        return [Question(*row) for row in rows]

    def save(
        self,
        pool: str,
        standing: LaneStanding,
        questions: Iterable[tuple[tuple[str, str], Question | None]],
        answers: Sequence[Answer] = (),
    ) -> None:
        """Write the lane's row, the questions that changed and the answers, as one transaction."""
        with self._progress.transaction("FULL" if answers else "NORMAL") as db:
            db.execute(f"INSERT OR REPLACE INTO lane (pool, {_LANE}) VALUES ({','.join('?' * 11)})", (pool, *standing))
            for (client, text), question in questions:
                if question is None:
                    db.execute("DELETE FROM question WHERE pool = ? AND client = ? AND filter = ?", (pool, client, text))
                else:
                    db.execute("INSERT OR REPLACE INTO question VALUES (?,?,?,?,?)", (pool, *question))
            db.executemany(
                f"INSERT INTO inbox ({_ANSWER}) VALUES ({','.join('?' * 14)})", [tuple(answer)[1:] for answer in answers]
            )
        self._progress.checkpoint()

    def keep_lanes(self, pools: Collection[str]) -> None:
        """Forget lanes of pools that ask nothing any more."""
        gone = [name for (name,) in self._progress.rows("SELECT pool FROM lane") if name not in pools]
        for name in gone:
            with self._progress.transaction() as db:
                db.execute("DELETE FROM lane WHERE pool = ?", (name,))
                db.execute("DELETE FROM question WHERE pool = ?", (name,))

    def identity(self) -> str:
        """By what the broker knows this file."""
        ((identity,),) = self._progress.rows(IDENTITY)
        return str(identity)

    def inbox(self) -> tuple[int, int, int]:
        """(first id, answers, bytes) of what stands there."""
        sql = "SELECT ifnull(min(id), 0), count(*), ifnull(sum(length(payload) + length(filters) + 300), 0) FROM inbox"
        ((first, count, size),) = self._progress.rows(sql)
        return first, count, size

    def done(self, through: int) -> None:
        """The broker is done with these answers; no id at or below is ever given out."""
        with self._progress.transaction() as db:
            db.execute("DELETE FROM inbox WHERE id <= ?", (through,))
            db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'inbox' AND seq < ?", (through, through))
            (known,) = db.execute("SELECT count(*) FROM sqlite_sequence WHERE name = 'inbox'").fetchone()
            if not known:
                db.execute("INSERT INTO sqlite_sequence VALUES ('inbox', ?)", (through,))


def read_lanes(data: Path) -> dict[str, LaneStatus]:
    """Every lane as it was saved last, by the name of its pool."""
    if read_rows(data, "SELECT 1 FROM pragma_user_version WHERE user_version < 4"):
        return {}
    rows = read_rows(
        data,
        "SELECT pool, state, error, hint,"
        " (SELECT count(*) FROM question q WHERE q.pool = lane.pool AND due),"
        " (SELECT count(*) FROM inbox i WHERE i.pool = lane.pool),"
        " asked, answers, skipped, refused FROM lane ORDER BY pool",
    )
    return {pool: LaneStatus(*row) for pool, *row in rows}


def lookup_answer(pool: str, client: str, rows: Sequence[tuple[str, int]], kind: int) -> Answer:
    """Subscriptions, for the inbox."""
    return Answer(0, pool, kind, client, filters=json.dumps([list(row) for row in rows]))
