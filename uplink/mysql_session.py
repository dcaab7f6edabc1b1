"""A session with MySQL or MariaDB: how it is opened, what is asked in it, and what the driver's errors mean for us.

Strict (what does not fit is refused, not cut), in UTC, and reading what is committed.

Invariant: inside `answers` no error but `NotConnected`, `Rejected` and `Misconfigured` gets out.
"""

from __future__ import annotations

import select
import ssl
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pymysql
from pymysql.constants import CLIENT

from .backend import Meanwhile, nothing
from .errors import Misconfigured, NotConnected
from .mysql_errors import meaning
from .pools import Pool
from .sql_alter import Index
from .sql_limits import Columns, gathered

COLUMNS = (
    "SELECT table_name, column_name, data_type, character_maximum_length, coalesce(collation_name, '')"
    " FROM information_schema.columns WHERE table_schema = database()"
    " AND (table_name LIKE 'mqtt\\_%' OR table_name LIKE 'tidegate\\_%')"
)
_INDEXES = (
    "SELECT table_name, max(non_unique), group_concat(column_name ORDER BY seq_in_index) FROM information_schema.statistics"
    " WHERE table_schema = database() GROUP BY table_name, index_name"
)
_IDLE_IN_TRANSACTION = 3
"""So many times the pool's timeout: then MariaDB frees the locks of a session whose line was lost."""


class Connection(pymysql.Connection):  # type: ignore[type-arg]
    """One that does something else while the answer to its next query is on the way."""

    meanwhile: Meanwhile = staticmethod(nothing)

    def _read_query_result(self, unbuffered: bool = False) -> int:
        # The driver has sent the query and would wait.
        meanwhile, self.meanwhile = self.meanwhile, nothing
        meanwhile()
        return super()._read_query_result(unbuffered)


def open_connection(pool: Pool) -> Connection:
    """A session as every part of the gateway wants it: strict, in UTC, reading what is committed."""
    servers = pool.settings["server"]
    for number, (host, port) in enumerate(servers):
        try:
            with answers(pool):
                return _open(pool, host, port, len(servers) > 1)
        except NotConnected:
            if number == len(servers) - 1:
                raise
    raise AssertionError("a pool has a server")


def _open(pool: Pool, host: str, port: int, must_write: bool) -> Connection:
    settings = pool.settings
    timeout = settings["timeout"]
    db = Connection(
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
        close_quietly(db)
        raise
    return db


def has_ended(db: Connection) -> bool:
    """Whether the far end is gone, asked while no answer is awaited: then what can be read is the end."""
    readable, _, _ = select.select([fileno(db)], [], [], 0)
    return bool(readable)


def fileno(db: Connection) -> int:
    """The connection's socket."""
    return int(db._sock.fileno())  # type: ignore[attr-defined]


class MySession:
    """See `sql_schema.Session` and `sql_asking.Session`. Every statement is a transaction of its own."""

    def __init__(self, pool: Pool, reads_only: bool = False) -> None:
        self._pool = pool
        self._db = open_connection(pool)
        try:
            self.run("SET SESSION autocommit = 1")
            if reads_only:
                self.run("SET SESSION TRANSACTION READ ONLY")
        except BaseException:
            self.close()
            raise

    def existing(self) -> Collection[str]:
        found = self.ask("SELECT table_name FROM information_schema.tables WHERE table_schema = database()")
        return {name for (name,) in found}

    def ask(self, sql: str, values: Sequence[object] = ()) -> Sequence[tuple[Any, ...]]:
        with answers(self._pool), self._db.cursor() as cursor:
            cursor.execute(sql, values or None)
            return list(cursor.fetchall())

    def run(self, statement: str) -> None:
        with answers(self._pool), self._db.cursor() as cursor:
            cursor.execute(statement)

    def take_time(self) -> None:
        self._db._read_timeout = None  # type: ignore[attr-defined]

    def columns(self) -> Columns:
        return gathered(self.ask(COLUMNS))

    def indexes(self) -> dict[str, list[Index]]:
        found: dict[str, list[Index]] = {}
        for table, not_unique, columns in self.ask(_INDEXES):
            found.setdefault(table, []).append(Index(not not_unique, tuple(columns.split(","))))
        return found

    def fileno(self) -> int:
        return fileno(self._db)

    def check(self) -> None:
        with answers(self._pool):
            if has_ended(self._db):
                raise NotConnected("the server closed the connection")

    def close(self) -> None:
        close_quietly(self._db)


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


def close_quietly(db: Connection) -> None:
    with suppress(pymysql.err.MySQLError, OSError):
        db.close()


@contextmanager
def answers(pool: Pool) -> Iterator[None]:
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
