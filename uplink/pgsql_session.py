"""A session with PostgreSQL: how it is opened, what is asked in it, and what the driver's errors mean for us.

The driver would wait for ever for an answer; here every wait ends with the pool's timeout. Sessions speak UTC.

Invariant: inside `answers` no error but `NotConnected`, `Rejected` and `Misconfigured` gets out.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.rows import TupleRow

from .errors import Misconfigured, NotConnected, Rejected
from .pgsql_errors import meaning, of_a_refused_connection
from .pools import Pool
from .sql_alter import Index
from .sql_limits import Columns, gathered

# What it warns of (a pipeline left because of an error) the worker says itself.
logging.getLogger("psycopg").setLevel(logging.ERROR)

T = TypeVar("T")
COLUMNS = (
    "SELECT table_name, column_name, udt_name, character_maximum_length FROM information_schema.columns"
    " WHERE table_schema = ANY (current_schemas(false)) AND (table_name LIKE 'mqtt\\_%' OR table_name LIKE 'tidegate\\_%')"
)
_INDEXES = (
    "SELECT t.relname, i.indisunique, array_agg(a.attname::text ORDER BY k.n) FROM pg_index i"
    " JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace s ON s.oid = t.relnamespace CROSS JOIN LATERAL unnest(i.indkey)"
    " WITH ORDINALITY k(number, n)"
    " JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = k.number"
    " WHERE s.nspname = ANY (current_schemas(false)) AND i.indpred IS NULL GROUP BY i.indexrelid, t.relname, i.indisunique"
)


class Connection(psycopg.Connection[TupleRow]):
    """The driver waits for ever for an answer; this one gives up, because a server may be frozen."""

    answer_timeout: float | None = 10.0

    def wait(self, gen: PQGen[T], interval: float = 0.0, timeout: float | None = None) -> T:
        try:
            wanted = next(gen)
            while True:
                socket = self.pgconn.socket
                reads, writes = [socket] if wanted & 1 else [], [socket] if wanted & 2 else []
                readable, writable, _ = select.select(reads, writes, [], self.answer_timeout)
                if not readable and not writable:
                    raise NotConnected(f"no answer within {self.answer_timeout or 0:g} s")
                wanted = gen.send(bool(readable) * 1 | bool(writable) * 2)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            # Left to the garbage collector it would complain there that the line is lost.
            with suppress(psycopg.Error):
                gen.close()


def open_connection(pool: Pool) -> Connection:
    """A session as every part of the gateway wants it: UTC, and no transaction that outlives its client."""
    settings = pool.settings
    timeout = settings["timeout"]
    try:
        db = Connection.connect(
            host=",".join(host for host, _ in settings["server"]),
            port=",".join(str(port) for _, port in settings["server"]),
            user=settings["username"],
            password=str(settings["password_file"] or settings["password"]) or None,
            dbname=settings["database"],
            target_session_attrs="read-write" if len(settings["server"]) > 1 else "any",
            connect_timeout=max(2, round(timeout)),
            application_name="tidegate",
            client_encoding="utf8",
            autocommit=True,
            **_tls(pool),
        )
    except psycopg.OperationalError as error:
        raise _located(pool, of_a_refused_connection(str(error), pool.full_name)) from error
    db.answer_timeout = timeout
    with answers(pool):
        milliseconds = int(timeout * 1000)
        db.execute(
            f"SET timezone = 'UTC'; SET statement_timeout = {milliseconds}; "
            f"SET idle_in_transaction_session_timeout = {3 * milliseconds}"
        )
    return db


def has_ended(db: psycopg.Connection[TupleRow]) -> bool:
    """Whether the far end is gone, asked while no answer is awaited."""
    # A notice or a changed setting may come at any time; only the end is the end.
    while select.select([db.fileno()], [], [], 0)[0]:
        try:
            db.pgconn.consume_input()
        except psycopg.OperationalError:
            return True
    return False


class PgSession:
    """See `sql_schema.Session` and `sql_asking.Session`. Every statement is a transaction of its own."""

    def __init__(self, pool: Pool, reads_only: bool = False) -> None:
        self._pool = pool
        self._db = open_connection(pool)
        try:
            if reads_only:
                self.run("SET default_transaction_read_only = on")
        except BaseException:
            self.close()
            raise

    def existing(self) -> Collection[str]:
        found = self.ask(
            "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace"
            " WHERE nspname = ANY (current_schemas(false))"
        )
        return {name for (name,) in found}

    def ask(self, sql: str, values: Sequence[object] = ()) -> Sequence[tuple[Any, ...]]:
        with answers(self._pool):
            return self._db.execute(sql, values or None).fetchall()

    def run(self, statement: str) -> None:
        with answers(self._pool):
            self._db.execute(statement)

    def take_time(self) -> None:
        self._db.answer_timeout = None
        self.run("SET statement_timeout = 0")

    def columns(self) -> Columns:
        return gathered(self.ask(COLUMNS))

    def indexes(self) -> dict[str, list[Index]]:
        found: dict[str, list[Index]] = {}
        for table, unique, columns in self.ask(_INDEXES):
            found.setdefault(table, []).append(Index(unique, tuple(columns)))
        return found

    def fileno(self) -> int:
        return self._db.fileno()

    def check(self) -> None:
        with answers(self._pool):
            if has_ended(self._db):
                raise NotConnected("the server closed the connection")

    def close(self) -> None:
        self._db.close()


def _tls(pool: Pool) -> dict[str, Any]:
    settings = pool.settings
    if not settings["ssl"]:
        return {"sslmode": "disable"}
    files = {"sslrootcert": settings["cacertfile"], "sslcert": settings["certfile"], "sslkey": settings["keyfile"]}
    mode = "verify-full" if settings["cacertfile"] else "require"
    return {"sslmode": mode} | {name: path for name, path in files.items() if path}


@contextmanager
def answers(pool: Pool) -> Iterator[None]:
    """Turn what the driver raises into our three words."""
    try:
        yield
    except psycopg.Error as error:
        if error.sqlstate:
            raise _located(pool, meaning(error.sqlstate, str(error), pool.full_name)) from error
        if isinstance(error, psycopg.DataError):
            raise Rejected(str(error)) from error
        lost = _first_loss(error) or NotConnected(str(error).strip() or type(error).__name__)
        raise _located(pool, lost) from error
    except NotConnected as error:
        raise _located(pool, error) from error


def _first_loss(error: BaseException | None) -> NotConnected | None:
    """What was lost first: the driver trips over its consequences, and says only those."""
    while error is not None and not isinstance(error, NotConnected):
        error = error.__context__
    return error


def _located(pool: Pool, error: Exception) -> Exception:
    if isinstance(error, NotConnected | Misconfigured):
        place = ", ".join(f"{host}:{port}" for host, port in pool.settings["server"])
        if place not in str(error):
            text = f"{place}: {error}"
            return NotConnected(text) if isinstance(error, NotConnected) else Misconfigured(text, error.hint)
    return error
