"""What a SQL far end is asked on behalf of clients: mqtt_sub, mqtt_msg after a client's position, mqtt_retain.

Rows are taken as anybody may have written them: a NULL is a default, a QoS may be wrong, another column type is read all the
same, and what a collation without case finds too much is left out. A client's position is the vector in tidegate_position;
the specification's `mqtt_acked.mid` (a row's `id`) holds for ids that others made, and for all while there is no vector. The
order of messages is that of the rows, so of their arrival there.

Invariant: nothing is written, and no answer holds more than a page beyond its largest row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

from tidegate.store.msgid import EPOCH_WIDTH, GATEWAY_WIDTH, SEQ_WIDTH, TIME_WIDTH, WIDTH, base62, origin
from tidegate.store.topic import matches

from .asking import Fetch, Fetched, Found
from .errors import Rejected
from .sql_rows import milliseconds

POSITION = "tidegate_position"
COLUMNS = "id, msgid, topic, sender, qos, arrived, payload"
PAGE, PAGE_BYTES = 1000, 8 << 20
"""Of one answer, at most; always one row."""
MOST_RETAINED, MOST_RETAINED_BYTES = 20_000, 32 << 20
"""What one filter may match."""


class Session(Protocol):
    """A connection that only reads; raises the three words of `errors`."""

    def existing(self) -> Collection[str]:
        """Names of the tables there are."""
        ...

    def ask(self, sql: str, values: Sequence[object] = ()) -> Sequence[tuple[Any, ...]]: ...

    def fileno(self) -> int: ...

    def check(self) -> None:
        """Raises NotConnected if the far end is gone."""
        ...

    def close(self) -> None: ...


class Words(NamedTuple):
    """What dialects say differently. COLUMN stands for a column."""

    any_of: str
    """COLUMN is one of a list."""
    exactly: str
    """COLUMN is this text, byte for byte, whatever its collation."""
    begins: str
    """COLUMN is like this, `|` before what is no wildcard."""
    ours: str
    """`msgid` has our layout."""
    position: str
    """The gateway's code in `msgid` is this, its number at most that, and its time: a log that was laid back goes on in it."""
    young: str
    """`arrived` is at most so many seconds ago."""
    binary: Callable[[str], object]
    """A text for a comparison of bytes."""


_PATTERN = f"'^[0-9A-Za-z]{{{WIDTH}}}$'"
_CODE = f"substr(msgid, {TIME_WIDTH + 1}, {GATEWAY_WIDTH})"
_SEQ = f"substr(msgid, {TIME_WIDTH + GATEWAY_WIDTH + EPOCH_WIDTH + 1}, {SEQ_WIDTH})"
_TIME = f"substr(msgid, 1, {TIME_WIDTH})"
PGSQL = Words(
    any_of="COLUMN = ANY(%s)",
    exactly='COLUMN::text COLLATE "C" = %s',
    begins="""COLUMN::text COLLATE "C" LIKE %s ESCAPE '|'""",
    ours=f'msgid::text COLLATE "C" ~ {_PATTERN}',
    position=f'{_CODE} COLLATE "C" = %s AND {_SEQ} COLLATE "C" <= %s AND {_TIME} COLLATE "C" <= %s'.replace(
        "msgid", "msgid::text"
    ),
    young="arrived >= localtimestamp - make_interval(secs => %s)",
    binary=str,
)
MYSQL = Words(
    any_of="COLUMN IN %s",
    exactly="CAST(CONVERT(COLUMN USING utf8mb4) AS BINARY) = %s",
    begins="COLUMN LIKE %s ESCAPE '|'",
    # A pattern's end matches before a last line break too.
    ours=f"(char_length(msgid) = {WIDTH} AND msgid REGEXP {_PATTERN})",
    position=f"CAST({_CODE} AS BINARY) = %s AND CAST({_SEQ} AS BINARY) <= %s AND CAST({_TIME} AS BINARY) <= %s",
    young="arrived >= utc_timestamp() - INTERVAL %s SECOND",
    binary=str.encode,
)


class Condition(NamedTuple):
    """A part of a WHERE and what is bound in it."""

    sql: str
    values: tuple[object, ...] = ()

    def also(self, other: Condition) -> Condition:
        return Condition(f"{self.sql} AND {other.sql}", self.values + other.values)


class Place(NamedTuple):
    """The last message of a gateway that was read. `at`: the second in its id, ms."""

    epoch: int
    seq: int
    at: int


class Standing(NamedTuple):
    """How far a client has read a topic."""

    vector: dict[str, Place]
    row: int
    """The row of mqtt_msg that `mid` names; 0: none that is still there."""
    known: bool
    """Whether there is a position at all."""
    read: dict[str, tuple[int, int]]
    """The vector, or what is known of it by the row."""


class SqlAsker:
    """See `asking.Asker`."""

    def __init__(self, session: Session, words: Words) -> None:
        self._session = session
        self._words = words
        try:
            self._has_positions = POSITION in session.existing()
        except BaseException:
            session.close()
            raise

    def subscriptions(self, clients: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
        found: dict[str, list[tuple[str, int]]] = {}
        if not clients:
            return found
        wanted = set(clients)
        for client, topic, qos in self._rows("SELECT clientid, topic, qos FROM mqtt_sub", self._one_of("clientid", clients)):
            if topic and client in wanted:
                found.setdefault(client, []).append((topic, _number(qos)))
        return found

    def fetch(self, question: Fetch) -> Fetched:
        topic = self._is("topic", question.topic)
        if question.queue:
            return self._page(topic, question.after, Fetched((), 0, {}))
        standing = self._standing(self._is("clientid", question.client), topic)
        if not standing.known and not question.window_first:
            return Fetched((), 0, {})
        due = topic.also(self._unread(standing))
        if question.span:
            due = due.also(Condition(f"(arrived IS NULL OR {self._words.young})", (question.span / 1000,)))
        behind, skipped = (question.after, 0) if question.after else self._beyond(due, question.limit)
        return self._page(due, behind, Fetched((), skipped, standing.read))

    def retained(self, topic_filter: str) -> list[Found]:
        found: list[Found] = []
        size = last = 0
        which = self._is("topic", topic_filter)
        if {"+", "#"} & set(topic_filter):
            which = Condition(self._words.begins.replace("COLUMN", "topic"), (_beginning(topic_filter),))
        while page := self._heads("mqtt_retain", which, last):
            last = page[-1][0]
            chosen = [number for number, _, topic in page if topic and matches(topic_filter, topic)]
            size += sum(length for _, length, topic in page if topic and matches(topic_filter, topic))
            if len(found) + len(chosen) > MOST_RETAINED or size > MOST_RETAINED_BYTES:
                raise Rejected(
                    f"more than {MOST_RETAINED} retained messages or {MOST_RETAINED_BYTES >> 20} MiB in mqtt_retain match"
                    f" {topic_filter}: subscribe to less at once"
                )
            if chosen:
                rows = self._rows(f"SELECT {COLUMNS} FROM mqtt_retain", self._one_of("id", chosen))
                found += [_found(row, "retained:") for row in rows if row[-1]]
        return found

    def fileno(self) -> int:
        return self._session.fileno()

    def heard(self) -> list[bytes]:
        self._session.check()
        return []

    def check(self) -> None:
        self._session.check()

    def close(self) -> None:
        self._session.close()

    # -- positions -----------------------------------------------------------------------------------------------------

    def _standing(self, client: Condition, topic: Condition) -> Standing:
        vector: dict[str, Place] = {}
        if self._has_positions:
            sql = f"SELECT gateway, epoch, seq, at FROM {POSITION} WHERE {client.sql} AND {topic.sql} AND gateway <> ''"
            found = self._session.ask(sql, client.values + topic.values)
            vector = {code: Place(epoch, seq, *milliseconds(at)) for code, epoch, seq, at in found}
        sql = f"SELECT max(mid) FROM mqtt_acked WHERE {client.sql} AND {topic.sql}"
        ((mid,),) = self._session.ask(sql, client.values + topic.values)
        there = [] if mid is None else self._rows("SELECT msgid FROM mqtt_msg", topic.also(Condition("id = %s", (mid,))))
        read = {code: (place.epoch, place.seq) for code, place in vector.items()}
        if there and not vector and (known := origin(there[0][0] or "")) is not None:
            read = {known.code: (known.epoch, known.seq)}
        return Standing(vector, mid if there else 0, bool(vector) or mid is not None, read)

    def _unread(self, standing: Standing) -> Condition:
        """What the client has not read. Ours of a gateway that is not in the vector were never read."""
        if not standing.vector:
            return Condition("id > %s", (standing.row,))
        read = " OR ".join(f"({self._words.position})" for _ in standing.vector)
        values: list[object] = []
        for code, place in standing.vector.items():
            values += (code, base62(place.seq, SEQ_WIDTH), base62(place.at + 999, TIME_WIDTH))
        values = [self._words.binary(str(value)) for value in values]
        return Condition(f"(CASE WHEN {self._words.ours} THEN NOT ({read}) ELSE id > %s END)", (*values, standing.row))

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _beyond(self, due: Condition, limit: int) -> tuple[int, int]:
        """The last row that is beyond the newest `limit`, and how many those are."""
        newest = f"SELECT id FROM mqtt_msg WHERE {due.sql} ORDER BY id DESC LIMIT 1 OFFSET {limit:d}"
        if not limit or not (beyond := self._session.ask(newest, due.values)):
            return 0, 0
        ((last,),) = beyond
        before = due.also(Condition("id <= %s", (last,)))
        ((count,),) = self._session.ask(f"SELECT count(*) FROM mqtt_msg WHERE {before.sql}", before.values)
        return last, count

    def _page(self, due: Condition, behind: int, answer: Fetched) -> Fetched:
        """The answer with its messages: the first behind a row, as many as a page holds."""
        heads = self._heads("mqtt_msg", due, behind)
        size, count = 0, 0
        for _, length, _ in heads:
            size += length
            if count and size > PAGE_BYTES:
                break
            count += 1
        if not heads:
            return answer
        last = heads[count - 1][0]
        here = due.also(Condition("id > %s AND id <= %s", (behind, last)))
        messages = [_found(row, "row:") for row in self._rows(f"SELECT {COLUMNS} FROM mqtt_msg", here)]
        more = count < len(heads) or len(heads) == PAGE
        return answer._replace(messages=messages, further=last if more else 0)

    def _heads(self, table: str, which: Condition, behind: int) -> Sequence[tuple[int, int, str]]:
        """id, bytes and topic of the next rows."""
        next_rows = which.also(Condition("id > %s", (behind,)))
        sql = (
            f"SELECT id, coalesce(octet_length(payload), 0), topic FROM {table} WHERE {next_rows.sql} ORDER BY id LIMIT {PAGE}"
        )
        return self._session.ask(sql, next_rows.values)

    def _rows(self, select: str, which: Condition) -> Sequence[tuple[Any, ...]]:
        return self._session.ask(f"{select} WHERE {which.sql} ORDER BY id", which.values)

    def _is(self, column: str, text: str) -> Condition:
        """Equal in the column's own way, which finds an index, and byte for byte."""
        exactly = self._words.exactly.replace("COLUMN", column)
        return Condition(f"{column} = %s AND {exactly}", (text, self._words.binary(text)))

    def _one_of(self, column: str, values: Sequence[object]) -> Condition:
        return Condition(self._words.any_of.replace("COLUMN", column), (list(values),))


def _beginning(topic_filter: str) -> str:
    """The pattern of LIKE for what a filter with wildcards can match: all that begins so."""
    literal = re.split(r"/?#|\+", topic_filter, maxsplit=1)[0]
    return re.sub(r"([|%_])", r"|\1", literal) + "%"


def _found(row: tuple[Any, ...], nameless: str) -> Found:
    """A row as a message; one without a msgid is known by its number."""
    number, msgid, topic, sender, qos, arrived, payload = row
    (at,) = milliseconds(arrived) or [0]
    content = payload.encode() if isinstance(payload, str) else bytes(payload or b"")
    return Found(msgid or f"{nameless}{number}", topic, sender or "", min(max(_number(qos), 0), 2), at, content)


def _number(qos: object) -> int:
    """A QoS as it stands; NULL is 0, and -1 is none."""
    try:
        return int(str(qos)) if qos is not None else 0
    except ValueError:
        return -1
