"""MySQL and MariaDB as a far end: the connection, the transaction that applies a batch, and what the answers mean for us.

The mark in tidegate_ledger moves by compare-and-set in the batch's own transaction; messages go in as INSERTs of many rows.
The session is strict (what does not fit is refused, not cut), in UTC, and reads what is committed. Every answer that is not a
yes becomes `NotConnected`, `Rejected` or `Misconfigured` here and nowhere else.

Invariant: a link that raised NotConnected is not used again; the worker closes it and makes another.
"""

from __future__ import annotations

import functools
import select
import ssl
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any, TypeAlias, cast

import pymysql
from pymysql.constants import CLIENT
from pymysql.converters import escape_str

from . import sql_actions
from .backend import Batch, Mark, Shown
from .errors import Misconfigured, NotConnected, Rejected
from .mysql_errors import meaning
from .pools import Pool
from .sql_batch import arrange
from .sql_limits import Column
from .sql_link import GAP, LEDGER, STAMP, Dialect, Paper, SqlLink
from .sql_rows import Message, Own, Row, utc

__all__ = ["actions", "connect", "gap_action", "schema_session", "show"]

actions, gap_action = sql_actions.actions, sql_actions.gap_action

Connection: TypeAlias = "pymysql.Connection[Any]"
_IDLE_IN_TRANSACTION = 3
"""So many times the pool's timeout: then MariaDB frees the locks of a session whose line was lost."""
_KEYS = {"mqtt_client": "clientid", "mqtt_msg": "topic", "mqtt_retain": "topic", "mqtt_acked": "topic", "mqtt_sub": "topic"}
"""Tables and the column in which case matters."""


def connect(pool: Pool) -> MyLink:
    """Open a connection to the first server that can be written to. Raises NotConnected or Misconfigured."""
    db = open_connection(pool)
    try:
        with _answers(pool):
            return MyLink(db, pool)
    except BaseException:
        _close(db)
        raise


def open_connection(pool: Pool) -> Connection:
    """A session as every part of the gateway wants it: strict, in UTC, reading what is committed."""
    servers = pool.settings["server"]
    for number, (host, port) in enumerate(servers):
        try:
            with _answers(pool):
                return _open(pool, host, port, len(servers) > 1)
        except NotConnected:
            if number == len(servers) - 1:
                raise
    raise AssertionError("a pool has a server")


def _open(pool: Pool, host: str, port: int, must_write: bool) -> Connection:
    settings = pool.settings
    timeout = settings["timeout"]
    db = pymysql.connect(
        host=host,
        port=port,
        user=settings["user"],
        password=str(settings["password_file"] or settings["password"]),
        database=settings["database"],
        charset="utf8mb4",
        connect_timeout=timeout,
        read_timeout=timeout,
        write_timeout=timeout,
        client_flag=CLIENT.FOUND_ROWS,
        ssl=_tls(pool),
        ssl_disabled=not settings["ssl"],
    )
    try:
        with db.cursor() as cursor:
            # The driver escapes with backslashes.
            cursor.execute(
                "SET SESSION time_zone = '+00:00', sql_mode = concat('STRICT_ALL_TABLES,',"
                " replace(@@sql_mode, 'NO_BACKSLASH_ESCAPES', '')), innodb_lock_wait_timeout = %s",
                (max(1, int(timeout)),),
            )
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            with suppress(pymysql.err.OperationalError):  # MySQL has no such setting
                cursor.execute("SET SESSION idle_transaction_timeout = %s", (max(1, int(_IDLE_IN_TRANSACTION * timeout)),))
            cursor.execute("SELECT @@global.read_only")
            ((read_only,),) = cursor.fetchall()
            if must_write and read_only:
                raise NotConnected("is read-only")
    except BaseException:
        _close(db)
        raise
    return db


class MySession:
    """See `sql_schema.Session`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._db = open_connection(pool)

    def existing(self) -> Collection[str]:
        with _answers(self._pool), self._db.cursor() as cursor:
            cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = database()")
            return {name for (name,) in cursor.fetchall()}

    def run(self, statement: str) -> None:
        with _answers(self._pool), self._db.cursor() as cursor:
            cursor.execute(statement)

    def close(self) -> None:
        _close(self._db)


schema_session = MySession


def _tls(pool: Pool) -> ssl.SSLContext | None:
    settings = pool.settings
    if not settings["ssl"]:
        return None
    try:
        context = ssl.create_default_context(cafile=settings["cacertfile"] or None)
        if not settings["cacertfile"]:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if settings["certfile"]:
            context.load_cert_chain(settings["certfile"], settings["keyfile"] or None)
    except (ssl.SSLError, OSError) as error:
        hint = f"set backend.{pool.full_name}.cacertfile, certfile and keyfile to files in PEM format"
        raise Misconfigured(f"a file for the encrypted line cannot be used: {error}", hint) from error
    return context


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
    )

    def __init__(self, db: Connection, pool: Pool) -> None:
        self._db = db
        self._cursor = db.cursor()
        super().__init__(pool, _read_columns(self._cursor))
        ((self._largest,),) = self._ask("SELECT @@max_allowed_packet")
        self.warning = "; ".join(filter(None, (self.warning, _collation_warning(self._columns))))
        self._sweep()
        self._db.commit()

    def marks(self, gateway: str) -> dict[int, Mark] | None:
        found = super().marks(gateway)
        with _answers(self._pool):
            self._db.rollback()
        return found

    def fileno(self) -> int:
        return int(self._db._sock.fileno())  # type: ignore[attr-defined]

    def gone(self) -> bool:
        # Nobody asked anything: what can be read now is the end.
        readable, _, _ = select.select([self.fileno()], [], [], 0)
        return bool(readable)

    def close(self) -> None:
        _close(self._db)

    def _ask(self, sql: str, values: Sequence[object] = ()) -> Sequence[tuple[Any, ...]]:
        with _answers(self._pool):
            self._cursor.execute(sql, values)
            return list(self._cursor.fetchall())

    def _many(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        with _answers(self._pool):
            self._cursor.executemany(sql, rows)

    def _apply(self, batch: Batch, rows: Sequence[Row]) -> bool:
        with _answers(self._pool):
            if not self._move_mark(batch):
                self._db.rollback()
                return False
            try:
                for group in arrange(rows):
                    self._insert(group.messages)
                    self._rest(group)
                self._db.commit()
            except (pymysql.err.MySQLError, Rejected):
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
            with _answers(self._pool):
                self._cursor.execute("SAVEPOINT alone")
                try:
                    with _answers(self._pool):
                        self._alone(row)
                except Rejected as refused:
                    bad[place] = str(refused)
                    self._cursor.execute("ROLLBACK TO SAVEPOINT alone")
        with _answers(self._pool):
            self._db.rollback()
        return bad

    def _insert(self, messages: Sequence[Message]) -> None:
        """As large INSERTs as the server takes; the driver's own `executemany` is half as fast."""
        rows: list[str] = []
        size = 0
        for message in messages:
            row = _literal(message)
            size += len(row)
            if rows and size > self._largest // 2:
                self._cursor.execute(_INSERT + ",".join(rows))
                rows, size = [], len(row)
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
        SqlLink.__init__(self, pool, {table: {} for table in (LEDGER, STAMP, GAP)})
        self._db = cast(Any, paper)
        self._cursor = cast(Any, paper)


_INSERT = "INSERT INTO mqtt_msg (msgid, topic, sender, node, qos, retain, payload, arrived) VALUES "


def _literal(message: Message) -> str:
    """The row as SQL, each value escaped by the driver; topics and clients repeat, so their text is remembered."""
    msgid, topic, sender, node, qos, retain, payload, when = message
    try:
        content = escape_str(payload.decode())
    except UnicodeDecodeError:
        content = f"X'{payload.hex()}'"
    return (
        f"({escape_str(msgid)},{_text(topic)},{_text(sender)},{_text(node)},{qos:d},{retain:d},{content},'{utc(when // 1000)}')"
    )


@functools.lru_cache(maxsize=4096)
def _text(value: str) -> str:
    return escape_str(value)


def _size(row: Row) -> int:
    if isinstance(row, Own):
        return sum(len(value) for value in row.values if not isinstance(value, int))
    payload: bytes = getattr(row, "payload", b"")
    return len(payload)


def _read_columns(cursor: Any) -> dict[str, dict[str, Column]]:
    cursor.execute(
        "SELECT table_name, column_name, data_type, character_maximum_length, coalesce(collation_name, '')"
        " FROM information_schema.columns WHERE table_schema = database()"
        " AND (table_name LIKE 'mqtt\\_%' OR table_name LIKE 'tidegate\\_%')"
    )
    found: dict[str, dict[str, Column]] = {}
    for table, name, kind, width, collation in cursor.fetchall():
        found.setdefault(table, {})[name] = Column(kind, width, collation)
    return found


def _collation_warning(columns: Mapping[str, Mapping[str, Column]]) -> str:
    blurred = [
        table for table, key in _KEYS.items() if columns.get(table, {}).get(key, Column("", None)).collation.endswith("_ci")
    ]
    if not blurred:
        return ""
    alter = "; ".join(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" for table in blurred)
    return f"in {', '.join(blurred)} A/x and a/x are one topic, ADMIN and admin one client: {alter}"


def _close(db: Connection) -> None:
    with suppress(pymysql.err.MySQLError, OSError):
        db.close()


@contextmanager
def _answers(pool: Pool) -> Iterator[None]:
    """Turn what the driver raises into our three words."""
    try:
        yield
    except pymysql.err.MySQLError as error:
        if isinstance(getattr(error, "original_exception", None), ssl.SSLError):
            hint = f"set backend.{pool.full_name}.cacertfile (and certfile, keyfile) to what fits the server"
            raise _located(pool, Misconfigured(f"no encrypted line: {error.args[-1]}", hint)) from error
        number, text = error.args[0] if error.args else 0, str(error.args[-1]) if error.args else type(error).__name__
        raise _located(pool, meaning(number if isinstance(number, int) else 0, text, pool.full_name)) from error
    except (OSError, RuntimeError) as error:
        raise _located(pool, NotConnected(str(error))) from error
    except NotConnected as error:
        raise _located(pool, error) from error


def _located(pool: Pool, error: Exception) -> Exception:
    place = ", ".join(f"{host}:{port}" for host, port in pool.settings["server"])
    if place in str(error):
        return error
    if isinstance(error, Misconfigured):
        return Misconfigured(f"{place}: {error}", error.hint)
    return NotConnected(f"{place}: {error}") if isinstance(error, NotConnected) else error
