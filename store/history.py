"""Stored messages for a new subscription: where the window of one to many begins, and the messages themselves, oldest first.

The log has no index by topic, so the newest n of a topic are found by looking backward, a stretch of rows at a time; each is a
short transaction of its own, and other readers come in between. Positions and what a queue has given away stand in the
log's own tables, so the same question after a restart finds what is still due.

Invariant: of the messages that a client may fetch, none at or below its position of the topic, and none that was taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .catchup import BYTES, ROWS, CatchUp, Fetched
from .entry import PUBLISH, QOS_MASK, RETAIN, STORED
from .piece import MESSAGE

LOOK, READ = 8_000, 20_000
"""Rows of the log that one step looks through: a transaction of 20 ms."""
MAX_LISTED = 500
"""Topics named in a query one by one."""
SET_POSITION = (
    "INSERT INTO position (client, topic, seq, created) VALUES (?,?,?,?) ON CONFLICT (client, topic)"
    " DO UPDATE SET seq = excluded.seq, created = excluded.created WHERE excluded.seq > seq"
)
_FORGOTTEN = (
    " FROM position p JOIN topic t ON t.id = p.topic WHERE p.client = ?1 AND topic_matches(?2, t.name)"
    " AND NOT EXISTS (SELECT 1 FROM json_each(?3) WHERE topic_matches(value, t.name))"
)
"""A client's positions that go with the filter ?2, unless one of the filters ?3 is still subscribed that matches too."""
FORGET_POSITIONS = f"DELETE FROM position WHERE client = ?1 AND topic IN (SELECT p.topic{_FORGOTTEN})"
NOTE_FORGOTTEN = (
    "UPDATE entry SET payload = (SELECT CAST(json_group_array(name) AS BLOB) FROM"
    f" (SELECT t.name{_FORGOTTEN} ORDER BY t.name)) WHERE seq = ?4"
)
"""In the commit of the entry itself: far ends, which cannot search by filter, are told which positions go."""
STALE_POSITIONS = (
    "DELETE FROM position WHERE created < ? AND seq < (SELECT min(seq) FROM entry)"
    " AND client NOT IN (SELECT client FROM session)"
)
TAKE = "INSERT OR IGNORE INTO taken (seq) VALUES (?)"
ADD_ADDRESSED = "INSERT INTO addressed (seq, client, msgid) VALUES (?,?,?)"
ACK_ADDRESSED = "UPDATE addressed SET acked = ? WHERE seq = ?"
FORGET_ADDRESSED = "DELETE FROM addressed WHERE client = ? AND NOT acked"
WITHDRAW_ADDRESSED = "DELETE FROM addressed WHERE seq = ?"
FORGET_ACKED = "DELETE FROM addressed WHERE acked AND acked < ?"
SET_CLEARED = "INSERT OR REPLACE INTO cleared (topic, at) VALUES (?,?)"
FORGET_CLEARED = "DELETE FROM cleared WHERE at < ?"
ADD_FETCH = "INSERT OR REPLACE INTO fetch (client, filter, cursor, through) VALUES (?,?,NULL,?)"
MOVE_FETCH = "UPDATE fetch SET cursor = ? WHERE client = ? AND filter = ?"
DELETE_FETCH = "DELETE FROM fetch WHERE client = ? AND filter = ?"
DELETE_FETCHES = "DELETE FROM fetch WHERE client = ?"


IsOld = Callable[[int, int, int], bool]
"""Asked with `at`, `mono` and `run` of a row."""


class Question(NamedTuple):
    """What a client may fetch: of a filter, through a seq. One to many: the newest `limit` (0: all) that are not too old."""

    clientid: str
    topic_filter: str
    through: int
    queue: bool
    limit: int = 0
    is_old: IsOld | None = None
    window_first: bool = True


class Look(NamedTuple):
    """How far the looking backward came: all above `high`. `first` is the oldest message chosen."""

    high: int
    first: int
    found: int
    skipped: int
    chosen: bool
    over: bool


def look_back(reader: CatchUp, question: Question, look: Look | None) -> Look:
    """One step: choose the newest messages, then count those that are passed over."""
    db = reader.db
    db.execute("BEGIN")
    try:
        client, choice = _client(reader, question.clientid), _choice(reader, question.topic_filter)
        start = _first_young(reader, question)
        floor = start - 1 if question.window_first else question.through
        where = f"{_stored(question)} {choice} AND seq > {_position(client, floor)}"
        (lowest,) = db.execute(f"SELECT min(seq) + 1 FROM position WHERE client = {client} {choice}").fetchone()
        low = min(floor + 1, lowest or floor + 1)
        return _step(
            reader, question, look or Look(question.through, question.through + 1, 0, 0, False, False), where, start, low
        )
    finally:
        db.execute("COMMIT")


def _step(reader: CatchUp, question: Question, look: Look, where: str, start: int, low: int) -> Look:
    high, first, found, skipped, chosen, _ = look
    bottom = max(high - LOOK + 1, low)
    edge = high + 1
    if not chosen:
        limit = f"LIMIT {question.limit - found}" if question.limit else ""
        newest = (
            f"SELECT seq FROM entry WHERE seq BETWEEN {max(bottom, start)} AND {high} AND {where} ORDER BY seq DESC {limit}"
        )
        oldest, more = reader.db.execute(f"SELECT min(seq), count(*) FROM ({newest})").fetchone()
        first, found = oldest or first, found + more
        full = bool(question.limit) and found >= question.limit
        chosen = full or bottom <= max(start, low)
        edge = first if full else start
    if chosen:
        passed = f"SELECT count(*) FROM entry WHERE seq BETWEEN {bottom} AND {edge - 1} AND {where}"
        skipped += reader.db.execute(passed).fetchone()[0]
    return Look(bottom - 1, first, found, skipped, chosen, bottom <= low)


def read_history(reader: CatchUp, question: Question, first: int, limit: int) -> Fetched:
    """The next of the messages, from seq `first` on, at least one; about `limit` bytes of memory."""
    count = max(1, min(ROWS, limit // MESSAGE))
    reader.db.execute("BEGIN")
    try:
        (lowest,) = reader.db.execute("SELECT min(seq) FROM entry").fetchone()
        first = max(first, lowest or 0)
        last = min(first + READ - 1, question.through)
        client, choice = _client(reader, question.clientid), _choice(reader, question.topic_filter)
        where = f"seq BETWEEN {first} AND {last} AND {_stored(question)} {choice}"
        if not question.queue:
            where = f"{where} AND seq > {_position(client, 0 if question.window_first else question.through)}"
        messages, whole = reader.fetch_within(f"{where} ORDER BY seq LIMIT {count}", min(BYTES, limit))
    finally:
        reader.db.execute("COMMIT")
    done = not messages or (whole and len(messages) < count)
    return Fetched(messages, last if done else messages[-1][0])


def _stored(question: Question) -> str:
    """Messages that count as stored. A queue's are acknowledged, so have a QoS, and are taken once."""
    flags = QOS_MASK if question.queue else STORED
    taken = "AND NOT EXISTS (SELECT 1 FROM taken WHERE taken.seq = entry.seq)"
    return f"kind = {PUBLISH} AND flags & {flags} > 0 AND NOT (flags & {RETAIN} AND length(payload) = 0) {taken}"


def _position(client: int, otherwise: int) -> str:
    return f"ifnull((SELECT p.seq FROM position p WHERE p.client = {client} AND p.topic = entry.topic), {otherwise})"


def _client(reader: CatchUp, clientid: str) -> int:
    row = reader.db.execute("SELECT id FROM client WHERE clientid = ?", (clientid,)).fetchone()
    return int(row[0]) if row else 0


def _choice(reader: CatchUp, topic_filter: str) -> str:
    """A condition on the topic: found once for all that a step asks, unless there are too many to list."""
    if topic_filter == "#":
        return "AND topic NOT IN (SELECT id FROM topic WHERE name >= '$' AND name < '%')"
    wild = "+" in topic_filter or "#" in topic_filter
    chosen = "SELECT id FROM topic WHERE " + ("topic_matches(?, name)" if wild else "name = ?")
    found = reader.db.execute(f"{chosen} LIMIT {MAX_LISTED + 1}", (topic_filter,)).fetchall()
    if len(found) <= MAX_LISTED:
        return f"AND topic IN ({','.join(str(number) for (number,) in found)})"
    quoted = topic_filter.replace("'", "''")
    return f"AND topic IN (SELECT id FROM topic WHERE topic_matches('{quoted}', name))"


def _first_young(reader: CatchUp, question: Question) -> int:
    """The lowest seq of what is not too old, `through` + 1 if there is none."""
    old = reader.last_before(question.is_old) if question.is_old is not None else 0
    return min(old, question.through) + 1
