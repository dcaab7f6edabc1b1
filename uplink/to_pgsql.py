"""PostgreSQL as a far end: the transaction that applies a batch.

The mark in tidegate_ledger moves by compare-and-set in the batch's own transaction. A small batch is one pipeline, a single
round trip; many messages go in by COPY. Presence and retained values are written only over older ones, under a lock on their
stamps. How a connection is opened and what an error means: `pgsql_session`.

Invariant: a link that raised NotConnected is not used again; the worker closes it and makes another.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import psycopg
from psycopg.pq import ExecStatus

from . import sql_actions, sql_positions
from .backend import Batch, Mark, Meanwhile, Shown, nothing
from .errors import Rejected
from .pgsql_copy import COPY, MESSAGE, Encoder, can_encode, copy
from .pgsql_session import COLUMNS, Connection, PgSession, answers, has_ended, open_connection
from .pools import Pool
from .sql_asking import PGSQL, SqlAsker
from .sql_batch import Group, arrange
from .sql_limits import NO_COLUMN, gathered
from .sql_link import GAP, LEDGER, STAMP, Dialect, Paper, SqlLink
from .sql_positions import POSITION
from .sql_rows import Message, Own, Retained, Row, utc
from .sql_statement import Statement, Value, text_or_bytes

__all__ = ["actions", "connect", "connect_asker", "gap_action", "schema_session", "show"]

actions, gap_action = sql_actions.actions, sql_actions.gap_action

COPY_FROM = 200
"""Messages from which COPY is faster than INSERTs in the same pipeline, in spite of its three more round trips."""
_BYTEA = 17
_Bound = tuple[str, Sequence[object]]
"""A statement and its values."""


def connect(pool: Pool) -> PgLink:
    """Open a connection and look at the tables. Raises NotConnected or Misconfigured."""
    db = open_connection(pool)
    try:
        with answers(pool):
            return PgLink(db, pool)
    except BaseException:
        db.close()
        raise


def connect_asker(pool: Pool) -> SqlAsker:
    """Open a connection for questions. Raises NotConnected or Misconfigured."""
    return SqlAsker(PgSession(pool, reads_only=True), PGSQL)


schema_session = PgSession


def show(packed: Row, pool: Pool) -> Sequence[Shown]:
    """See `backend.Showing`."""
    paper = Paper()
    return _OnPaper(pool, paper).show(packed, paper)


class PgLink(SqlLink):
    """See `backend.Link`."""

    dialect = Dialect(
        client_times="SELECT clientid, online_at, offline_at FROM mqtt_client WHERE clientid = ANY(%s)",
        put_clients="INSERT INTO mqtt_client (clientid, state, node, online_at, offline_at, created) VALUES (%s,%s,%s,%s,%s,%s)"
        " ON CONFLICT (clientid) DO UPDATE SET state = EXCLUDED.state, node = EXCLUDED.node,"
        " online_at = coalesce(EXCLUDED.online_at, mqtt_client.online_at), offline_at = EXCLUDED.offline_at",
        retained_times="SELECT topic, arrived FROM mqtt_retain WHERE topic = ANY(%s)",
        drop_retained="DELETE FROM mqtt_retain WHERE topic = %s",
        put_retained="INSERT INTO mqtt_retain (topic, msgid, sender, qos, payload, arrived) VALUES (%s,%s,%s,%s,%s,%s)"
        " ON CONFLICT (topic) DO UPDATE SET msgid = EXCLUDED.msgid, sender = EXCLUDED.sender, qos = EXCLUDED.qos,"
        " payload = EXCLUDED.payload, arrived = EXCLUDED.arrived",
        make_stamps="INSERT INTO tidegate_stamp (target, name, ms, gateway, epoch, seq) VALUES (%s,%s,%s,%s,%s,%s)"
        " ON CONFLICT (target, name) DO NOTHING",
        lock_stamps="SELECT name, ms, gateway, epoch, seq FROM tidegate_stamp WHERE target = %s AND name = ANY(%s)"
        " ORDER BY name FOR UPDATE",
        put_stamps="INSERT INTO tidegate_stamp (target, name, ms, gateway, epoch, seq) VALUES (%s,%s,%s,%s,%s,%s)"
        " ON CONFLICT (target, name) DO UPDATE SET ms = EXCLUDED.ms, gateway = EXCLUDED.gateway, epoch = EXCLUDED.epoch,"
        " seq = EXCLUDED.seq, gone_at = NULL",
        mark_gone="UPDATE tidegate_stamp SET gone_at = now() WHERE target = 'retain' AND name = %s",
        sweep="DELETE FROM tidegate_stamp WHERE gone_at < now() - make_interval(days => %s)",
        positions=sql_positions.PGSQL,
    )

    def __init__(self, db: Connection, pool: Pool) -> None:
        self._db = db
        super().__init__(pool, gathered(db.execute(COLUMNS).fetchall()))
        self._base64 = pool.settings["binary_payload"] == "base64"
        self._takes_bytes: dict[str, tuple[bool, ...]] = {}
        self._takes_raw = {table for table, names in self._columns.items() if names.get("payload", NO_COLUMN).type == "bytea"}
        columns = self._columns.get("mqtt_msg", {})
        self._encoder = Encoder(columns, self._content) if can_encode(columns) else None
        self._sweep()

    def fileno(self) -> int:
        return self._db.fileno()

    def gone(self) -> bool:
        return has_ended(self._db)

    def close(self) -> None:
        self._db.close()

    def _ask(self, sql: str, values: Sequence[object] = ()) -> Sequence[tuple[Any, ...]]:
        with answers(self._pool):
            return self._db.execute(sql, values).fetchall()

    def _many(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        with answers(self._pool):
            self._db.cursor().executemany(sql, rows)

    def _apply(self, batch: Batch, rows: Sequence[Row], meanwhile: Meanwhile) -> bool:
        with answers(self._pool):
            try:
                self._run(batch, rows, meanwhile)
            except (psycopg.Error, Rejected):
                self._db.execute("ROLLBACK")
                marks = self.marks(batch.gateway)
                if marks is not None and marks.get(batch.epoch, Mark()) != batch.expected:
                    return False
                raise
        return True

    def _run(self, batch: Batch, rows: Sequence[Row], meanwhile: Meanwhile) -> None:
        groups = arrange(rows)
        opening = [("BEGIN", ()), *self._mark_moves(batch)]
        if any(len(group.messages) >= COPY_FROM for group in groups):
            self._copy_groups(opening, groups, meanwhile)
            return
        with self._db.pipeline():
            for sql, values in opening:
                self._db.execute(sql, values)
            for group in groups:
                self._insert(group.messages)
                self._rest(group)
            self._db.execute("COMMIT")

    def _copy_groups(self, opening: Sequence[_Bound], groups: Sequence[Group], meanwhile: Meanwhile) -> None:
        bind = psycopg.ClientCursor(self._db).mogrify
        first = "; ".join([bind(sql, values) for sql, values in opening])
        for group in groups[:-1]:
            self._copy(first, group.messages, "", nothing)
            with self._db.pipeline():
                self._rest(group)
            first = ""
        last = groups[-1]
        self._copy(first, last.messages, "" if last.has_more else "COMMIT", meanwhile)
        if last.has_more:
            with self._db.pipeline():
                self._rest(last)
                self._db.execute("COMMIT")

    def _mark_moves(self, batch: Batch) -> Sequence[_Bound]:
        """By compare-and-set; when it is not where expected the division fails, and with it the transaction."""
        if LEDGER in self._missing:
            return ()
        key = self._mark_key(batch)
        make = (
            "INSERT INTO tidegate_ledger (gateway, epoch, pool, seq, at) VALUES (%s, %s, %s, 0, now())"
            " ON CONFLICT (gateway, epoch, pool) DO NOTHING",
            key,
        )
        move = (
            "WITH moved AS (UPDATE tidegate_ledger SET seq = %s, at = now() WHERE gateway = %s AND epoch = %s AND pool = %s"
            " AND seq = %s RETURNING 1) SELECT 1 / count(*) FROM moved",
            (batch.through, *key, batch.expected.seq),
        )
        return (make, move) if batch.expected == Mark() else (move,)

    def _refused_alone(self, rows: Sequence[Row]) -> Mapping[int, str]:
        bad: dict[int, str] = {}
        with answers(self._pool):
            self._db.execute("BEGIN")
            for place, row in enumerate(rows):
                try:
                    with answers(self._pool), self._db.transaction():
                        self._alone(row)
                except Rejected as refused:
                    bad[place] = str(refused)
            self._db.execute("ROLLBACK")
        return bad

    def _copy(self, first: str, messages: Sequence[Message], then: str, meanwhile: Meanwhile) -> None:
        """Between two other statements, each of which may be empty; all in one query where that is possible."""
        if self._encoder is not None and messages:
            copy(self._db, first, self._encoder.rows(messages), then, meanwhile)
            return
        if first:
            self._db.execute(first)
        if messages:
            with self._db.cursor() as cursor, cursor.copy(COPY) as rows:
                for message in messages:
                    rows.write_row(self._message_values(message))
        if then:
            self._db.execute(then)

    def _insert(self, messages: Sequence[Message]) -> None:
        sql = f"INSERT INTO mqtt_msg ({', '.join(MESSAGE)}) VALUES (%s,%s,%s,%s,%s,%s,%s)"
        self._db.cursor().executemany(sql, [self._message_values(message) for message in messages])

    def _message_values(self, message: Message) -> Sequence[object]:
        """In the order of MESSAGE."""
        msgid, topic, sender, _, qos, retain, payload, when = message
        return (msgid, topic, sender, qos, retain, utc(when // 1000), self._payload("mqtt_msg", payload))

    def _run_own(self, statements: Sequence[Own]) -> None:
        for own in statements:
            sql = own.statement.render(lambda _: "%s", lambda piece: piece.replace("%", "%%"))
            self._db.execute(sql, own.values)

    def _retained_values(self, row: Retained) -> Sequence[object]:
        topic, msgid, sender, _, *rest = super()._retained_values(row)
        return (topic, msgid, sender, *rest)

    def _payload(self, table: str, payload: bytes) -> str | bytes:
        if table in self._takes_raw:
            return payload
        text = text_or_bytes(payload)
        return self._as_text(payload) if text is payload else text

    def _content(self, payload: bytes) -> bytes:
        """What `_payload` makes of it, as mqtt_msg holds it."""
        if "mqtt_msg" in self._takes_raw or text_or_bytes(payload) is not payload:
            return payload
        return self._printable(payload)

    def _as_text(self, payload: bytes) -> str:
        return self._printable(payload).decode()

    def _printable(self, payload: bytes) -> bytes:
        return base64.b64encode(payload) if self._base64 else binascii.hexlify(payload)

    def _prepared(self, rows: list[Row]) -> list[Row]:
        """Bytes that a text column or parameter cannot take become text, or are refused, as the pool says."""
        refuses = self._pool.settings["binary_payload"] == "quarantine"
        bad: dict[int, str] = {}
        for place, row in enumerate(rows):
            if isinstance(row, Own):
                if any(isinstance(value, bytes) for value in row.values):
                    takes = self._parameters(row.statement)
                    values = [_bound(value, ok, self._as_text) for value, ok in zip(row.values, takes, strict=True)]
                    if refuses and tuple(values) != row.values:
                        bad[place] = _NOT_TEXT
                    rows[place] = row._replace(values=tuple(values))
            elif refuses and isinstance(row, Message | Retained) and isinstance(text_or_bytes(row.payload), bytes):
                table = "mqtt_msg" if isinstance(row, Message) else "mqtt_retain"
                if isinstance(self._payload(table, row.payload), str):
                    bad[place] = _NOT_TEXT
        if bad:
            raise Rejected(_NOT_TEXT, bad)
        return rows

    def _parameters(self, statement: Statement) -> tuple[bool, ...]:
        """Which parameters the server takes for bytes, as it says itself."""
        known = self._takes_bytes.get(statement.text)
        if known is None:
            with answers(self._pool):
                connection = self._db.pgconn
                prepared = connection.prepare(b"", statement.render(lambda number: f"${number}").encode())
                described = connection.describe_prepared(b"")
                known = tuple(described.param_type(number) == _BYTEA for number in range(described.nparams))
                if prepared.status != ExecStatus.COMMAND_OK:
                    # The statement itself is at fault: executing it says so.
                    known = (True,) * len(statement.names)
            self._takes_bytes[statement.text] = known
        return known

    def _alter(self, table: str, column: str, size: int) -> str:
        return f"ALTER TABLE {table} ALTER COLUMN {column} TYPE varchar({size})"


_NOT_TEXT = "the payload is not text (UTF-8 without NUL), and binary_payload is quarantine"


def _bound(value: Value, takes_bytes: bool, as_text: Callable[[bytes], str]) -> Value:
    return as_text(value) if isinstance(value, bytes) and not takes_bytes else value


class _OnPaper(PgLink):
    """A link to nowhere, for `show`."""

    def __init__(self, pool: Pool, paper: Paper) -> None:
        SqlLink.__init__(self, pool, {table: {} for table in (LEDGER, STAMP, POSITION, GAP)})
        self._db = cast(Any, paper)
        self._base64 = pool.settings["binary_payload"] == "base64"
        self._takes_raw = set()
