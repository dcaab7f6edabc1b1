"""MySQL and MariaDB as a far end: the transaction that applies a batch.

The mark in tidegate_ledger moves by compare-and-set in the batch's own transaction; messages go in as INSERTs of many rows.
How a connection is opened and what an error means: `mysql_session`.

Invariant: a link that raised NotConnected is not used again; the worker closes it and makes another.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, cast

import pymysql
from pymysql.converters import escape_str

from . import sql_actions, sql_positions
from .backend import Batch, Mark, Meanwhile, Shown
from .errors import Rejected
from .mysql_session import COLUMNS, Connection, MySession, answers, close_quietly, fileno, has_ended, open_connection
from .pools import Pool
from .sql_asking import MYSQL, SqlAsker
from .sql_batch import arrange
from .sql_limits import Column, gathered
from .sql_link import GAP, LEDGER, STAMP, Dialect, Paper, SqlLink
from .sql_positions import POSITION
from .sql_rows import Message, Own, Row, utc
from .sql_statement import text_or_bytes

__all__ = ["actions", "connect", "connect_asker", "gap_action", "schema_session", "show"]

actions, gap_action = sql_actions.actions, sql_actions.gap_action

_KEYS = {"mqtt_client": "clientid", "mqtt_msg": "topic", "mqtt_retain": "topic", "mqtt_acked": "topic", "mqtt_sub": "topic"}
"""Tables and the column in which case matters."""


def connect(pool: Pool) -> MyLink:
    """Open a connection to the first server that can be written to. Raises NotConnected or Misconfigured."""
    db = open_connection(pool)
    try:
        with answers(pool):
            return MyLink(db, pool)
    except BaseException:
        close_quietly(db)
        raise


def connect_asker(pool: Pool) -> SqlAsker:
    """Open a connection for questions. Raises NotConnected or Misconfigured."""
    return SqlAsker(MySession(pool, reads_only=True), MYSQL)


schema_session = MySession


def show(packed: Row, pool: Pool) -> Sequence[Shown]:
    """See `backend.Showing`."""
    paper = Paper()
    return _OnPaper(pool, paper).show(packed, paper)


class MyLink(SqlLink):
    """See `backend.Link`."""

    dialect = Dialect(
        client_times="SELECT clientid, online_at, offline_at FROM mqtt_client WHERE clientid IN %s",
        put_clients="INSERT INTO mqtt_client (clientid, state, node, online_at, offline_at, created) VALUES (%s,%s,%s,%s,%s,%s)"
        " ON DUPLICATE KEY UPDATE state = VALUES(state), node = VALUES(node),"
        " online_at = coalesce(VALUES(online_at), online_at), offline_at = VALUES(offline_at)",
        retained_times="SELECT topic, arrived FROM mqtt_retain WHERE topic IN %s",
        drop_retained="DELETE FROM mqtt_retain WHERE topic = %s",
        put_retained="INSERT INTO mqtt_retain (topic, msgid, sender, node, qos, payload, arrived) VALUES (%s,%s,%s,%s,%s,%s,%s)"
        " ON DUPLICATE KEY UPDATE msgid = VALUES(msgid), sender = VALUES(sender), node = VALUES(node), qos = VALUES(qos),"
        " payload = VALUES(payload), arrived = VALUES(arrived)",
        make_stamps="INSERT INTO tidegate_stamp (target, name, ms, gateway, epoch, seq) VALUES (%s,%s,%s,%s,%s,%s)"
        " ON DUPLICATE KEY UPDATE ms = ms",
        lock_stamps="SELECT name, ms, gateway, epoch, seq FROM tidegate_stamp WHERE target = %s AND name IN %s"
        " ORDER BY name FOR UPDATE",
        put_stamps="INSERT INTO tidegate_stamp (target, name, ms, gateway, epoch, seq) VALUES (%s,%s,%s,%s,%s,%s)"
        " ON DUPLICATE KEY UPDATE ms = VALUES(ms), gateway = VALUES(gateway), epoch = VALUES(epoch), seq = VALUES(seq),"
        " gone_at = NULL",
        mark_gone="UPDATE tidegate_stamp SET gone_at = utc_timestamp() WHERE target = 'retain' AND name = %s",
        sweep="DELETE FROM tidegate_stamp WHERE gone_at < utc_timestamp() - INTERVAL %s DAY",
        positions=sql_positions.MYSQL,
    )

    def __init__(self, db: Connection, pool: Pool) -> None:
        self._db = db
        self._cursor = db.cursor()
        self._cursor.execute(COLUMNS)
        super().__init__(pool, gathered(self._cursor.fetchall()))
        ((self._largest,),) = self._ask("SELECT @@max_allowed_packet")
        self.warning = "; ".join(filter(None, (self.warning, _collation_warning(self._columns))))
        self._sweep()
        self._db.commit()

    def marks(self, gateway: str) -> dict[int, Mark] | None:
        found = super().marks(gateway)
        with answers(self._pool):
            self._db.rollback()
        return found

    def fileno(self) -> int:
        return fileno(self._db)

    def gone(self) -> bool:
        return has_ended(self._db)

    def close(self) -> None:
        close_quietly(self._db)

    def _ask(self, sql: str, values: Sequence[object] = ()) -> Sequence[tuple[Any, ...]]:
        with answers(self._pool):
            self._cursor.execute(sql, values)
            return list(self._cursor.fetchall())

    def _many(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        with answers(self._pool):
            self._cursor.executemany(sql, rows)

    def _apply(self, batch: Batch, rows: Sequence[Row], meanwhile: Meanwhile) -> bool:
        with answers(self._pool):
            if not self._move_mark(batch):
                self._db.rollback()
                return False
            try:
                groups = arrange(rows)
                for group in groups:
                    if group is groups[-1] and group.messages:
                        self._db.meanwhile = meanwhile
                    self._insert(group.messages)
                    self._rest(group)
                self._db.commit()
            except (pymysql.err.MySQLError, Rejected):
                with suppress(pymysql.err.InterfaceError):  # a line that was lost has nothing to take back, and says less
                    self._db.rollback()
                raise
        return True

    def _move_mark(self, batch: Batch) -> bool:
        """By compare-and-set: False when it is not where expected."""
        if LEDGER in self._missing:
            return True
        key = self._mark_key(batch)
        if batch.expected == Mark():
            self._cursor.execute(
                "INSERT INTO tidegate_ledger (gateway, epoch, pool, seq, at) VALUES (%s, %s, %s, 0, utc_timestamp())"
                " ON DUPLICATE KEY UPDATE seq = seq",
                key,
            )
        moved: int = self._cursor.execute(
            "UPDATE tidegate_ledger SET seq = %s, at = utc_timestamp() WHERE gateway = %s AND epoch = %s AND pool = %s"
            " AND seq = %s",
            (batch.through, *key, batch.expected.seq),
        )
        return moved == 1

    def _refused_alone(self, rows: Sequence[Row]) -> Mapping[int, str]:
        bad: dict[int, str] = {}
        for place, row in enumerate(rows):
            with answers(self._pool):
                self._cursor.execute("SAVEPOINT alone")
                try:
                    with answers(self._pool):
                        self._alone(row)
                except Rejected as refused:
                    bad[place] = str(refused)
                    self._cursor.execute("ROLLBACK TO SAVEPOINT alone")
        with answers(self._pool):
            self._db.rollback()
        return bad

    def _insert(self, messages: Sequence[Message]) -> None:
        """As large INSERTs as the server takes; the driver's own `executemany` is half as fast."""
        rows: list[str] = []
        size = 0
        for message in messages:
            row = _literal(message)
            length = _bytes(row)
            size += length
            if rows and size > self._largest // 2:
                self._cursor.execute(_INSERT + ",".join(rows))
                rows, size = [], length
            rows.append(row)
        if rows:
            self._cursor.execute(_INSERT + ",".join(rows))

    def _run_own(self, statements: Sequence[Own]) -> None:
        for text, same in groupby(statements, key=lambda own: own.statement):
            sql = text.render(lambda _: "%s", lambda piece: piece.replace("%", "%%"))
            self._cursor.executemany(sql, [own.values for own in same])

    def _payload(self, table: str, payload: bytes) -> str | bytes:
        return payload

    def _prepared(self, rows: list[Row]) -> list[Row]:
        """A packet that is too large ends the connection instead of being refused: such a record is refused here."""
        largest = self._largest // 2 - 4096
        large = [place for place, row in enumerate(rows) if _size(row) > largest]
        if large:
            text = f"larger than max_allowed_packet ({self._largest}) of the server allows"
            raise Rejected(text, dict.fromkeys(large, text))
        return rows

    def _alter(self, table: str, column: str, size: int) -> str:
        kind = "mediumblob" if column == "payload" else f"varchar({size})"
        return f"ALTER TABLE {table} MODIFY {column} {kind}"


class _OnPaper(MyLink):
    """A link to nowhere, for `show`."""

    def __init__(self, pool: Pool, paper: Paper) -> None:
        SqlLink.__init__(self, pool, {table: {} for table in (LEDGER, STAMP, POSITION, GAP)})
        self._db = cast(Any, paper)
        self._cursor = cast(Any, paper)


_INSERT = "INSERT INTO mqtt_msg (msgid, topic, sender, node, qos, retain, payload, arrived) VALUES "


def _literal(message: Message) -> str:
    """The row as SQL, each value escaped by the driver; topics and clients repeat, so their text is remembered."""
    msgid, topic, sender, node, qos, retain, payload, when = message
    text = text_or_bytes(payload)
    content = escape_str(text) if isinstance(text, str) else f"X'{text.hex()}'"
    return (
        f"({escape_str(msgid)},{_text(topic)},{_text(sender)},{_text(node)},{qos:d},{retain:d},{content},'{utc(when // 1000)}')"
    )


@functools.lru_cache(maxsize=4096)
def _text(value: str) -> str:
    return escape_str(value)


def _size(row: Row) -> int:
    values = row.values if isinstance(row, Own) else row
    return sum(len(value) if isinstance(value, bytes) else _bytes(value) for value in values if isinstance(value, bytes | str))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _collation_warning(columns: Mapping[str, Mapping[str, Column]]) -> str:
    blurred = [
        table for table, key in _KEYS.items() if columns.get(table, {}).get(key, Column("", None)).collation.endswith("_ci")
    ]
    if not blurred:
        return ""
    alter = "; ".join(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" for table in blurred)
    return f"in {', '.join(blurred)} A/x and a/x are one topic, ADMIN and admin one client: {alter}"
