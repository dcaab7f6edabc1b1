"""PostgreSQL, MariaDB and MySQL as the campaign's far ends."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import pymysql

from tests.support.proxy import Proxy
from tests.support.real_mysql import MySql
from tests.support.sql_servers import PASSWORD, USER, MariaDb, Postgres, SqlServer
from tests.support.waiting import wait_until
from tests.uplink.sql_rig import rules, settings, sql_rule, tables

from . import far_end
from .far_end import Contents, Door, FarEnd, Fault, Presence, Row, between
from .sql_deadlock import Deadlock

CONNECTIONS = 12
_ERRORS = (OSError, psycopg.OperationalError, pymysql.err.OperationalError, pymysql.err.InterfaceError)
_MARKS = "SELECT gateway, epoch, pool, seq FROM tidegate_ledger ORDER BY gateway, epoch, pool"


class SqlFarEnd(FarEnd):
    """One server, one proxy; what differs is in the subclasses."""

    kind: type[SqlServer]
    options: Sequence[str]
    slots: int
    """Connections that anybody but a superuser can have."""
    lifted: str
    """The statement that gives the gateway's account another password."""

    def __init__(self, directory: Path) -> None:
        self._server = self.kind(*self.options)
        self._proxy = Proxy(self._server.port)
        self._stack = ExitStack()
        self._asking = threading.Lock()
        self._eye: Any = None

    def __enter__(self) -> Self:
        self._stack.enter_context(self._server)
        tables(self._server)
        self._server.run("CREATE TABLE tally (n int)", "INSERT INTO tally VALUES (0)", "CREATE TABLE weight (n int)")
        self._stack.enter_context(self._proxy)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._shut_eye()
        self._stack.close()

    def rules(self) -> str:
        server = f"server = 127.0.0.1:{self._proxy.port}"
        lines = [
            f"backend.{self.backend}.pool1.{line}\n" for line in [server, "timeout = 2s", *settings(self._server).split("\n")]
        ]
        return "".join(lines) + rules(self.backend) + sql_rule(self.backend, "message.publish.10", "update tally set n = n + 1")

    def doors(self) -> Sequence[Door]:
        return [Door(self._proxy, self._marks)]

    def faults(self) -> Sequence[Fault]:
        server = self._server
        found = [
            Fault(far_end.KILLED, lambda: between(server.kill, server.start)),
            Fault(far_end.FROZEN, lambda: between(server.freeze, server.thaw)),
            Fault(far_end.READ_ONLY, lambda: between(lambda: server.read_only(True), lambda: server.read_only(False))),
            Fault(far_end.MEMORY, self._without_memory),
            Fault(far_end.CONNECTIONS, self._crowded),
            Fault(far_end.DEADLOCK, lambda: Deadlock(server).going_on(), words="deadlock"),
            Fault(far_end.SCHEMA, self._without_messages, far_end.MISCONFIGURED),
            Fault(far_end.PASSWORD, self._changed_password, far_end.MISCONFIGURED),
            Fault(far_end.RESTORED, lambda: self.set_back(server.dump, server.restore), far_end.CONNECTED),
        ]
        return [fault for fault in found if fault.name not in self.impossible]

    def contents(self) -> Contents:
        ask = self._server.rows
        messages = ask("SELECT msgid, topic, sender, qos, retain, payload FROM mqtt_msg ORDER BY id")
        retained = ask("SELECT msgid, topic, sender, qos, 1, payload FROM mqtt_retain")
        clients = ask("SELECT clientid, state, online_at, offline_at FROM mqtt_client")
        return Contents(
            [_row(row) for row in messages],
            [msgid for (msgid,) in ask("SELECT msgid FROM list ORDER BY n")],
            {row[1]: _row(row) for row in retained},
            {name: Presence(int(state) == 1, _seconds(came) or 0, _seconds(went)) for name, state, came, went in clients},
            int(ask("SELECT n FROM tally")[0][0]),
        )

    def _marks(self) -> object:
        """By a connection that stays, since it is asked at every answer."""
        with self._asking:
            while True:
                fresh = self._eye is None
                self._eye = self._eye or self._server.connect()
                try:
                    with closing(self._eye.cursor()) as cursor:
                        cursor.execute(_MARKS)
                        return list(cursor.fetchall())
                except _ERRORS:
                    self._eye = None
                    if fresh:
                        raise

    def _shut_eye(self) -> None:
        with self._asking:
            if self._eye is not None:
                self._eye.close()
            self._eye = None

    def _without_messages(self) -> AbstractContextManager[None]:
        rename = "ALTER TABLE {} RENAME TO {}"
        return between(
            lambda: self._server.run(rename.format("mqtt_msg", "away")),
            lambda: self._server.run(rename.format("away", "mqtt_msg")),
        )

    def _changed_password(self) -> AbstractContextManager[None]:
        def change(word: str) -> None:
            self._server.run(self.lifted.format(word), database=self._server.first_database)
            self.drop()

        return between(lambda: change("changed"), lambda: change(PASSWORD))

    @contextmanager
    def _crowded(self) -> Iterator[None]:
        """Somebody else has every connection that is to be had."""
        self._shut_eye()
        with ExitStack() as held:
            taken: list[object] = []

            def full() -> bool:
                with suppress(*_ERRORS):
                    taken.append(held.enter_context(closing(self._server.connect_as_user())))
                return len(taken) >= self.slots

            with self.closed():
                wait_until(full)
            yield

    @abstractmethod
    def _without_memory(self) -> AbstractContextManager[None]:
        """Nothing is left for what the gateway asks."""


class PostgresFarEnd(SqlFarEnd):
    name, backend, kind = "pgsql", "pgsql", Postgres
    impossible: Mapping[str, str] = {}
    options = (f"max_connections={CONNECTIONS}", "max_locks_per_transaction=10")
    slots = CONNECTIONS - 3
    lifted = f"ALTER ROLE {USER} PASSWORD '{{}}'"

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """Somebody else has filled the shared memory for locks."""
        with closing(self._server.connect()) as other:
            with suppress(psycopg.errors.OutOfMemory):
                other.execute("SELECT pg_advisory_lock(n) FROM generate_series(1, 1000000) n")
            yield


class MariaDbFarEnd(SqlFarEnd):
    name, backend, kind = "mariadb", "mysql", MariaDb
    impossible: Mapping[str, str] = {}
    options: Sequence[str] = (f"--max-connections={CONNECTIONS}",)
    slots = CONNECTIONS
    lifted = f"ALTER USER {USER}@'127.0.0.1' IDENTIFIED BY '{{}}'"

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """New sessions may use next to none."""
        with closing(self._server.connect("")) as admin, closing(admin.cursor()) as cursor:
            cursor.execute("SET GLOBAL max_session_mem_used = 8192")
            try:
                self.drop()
                yield
            finally:
                cursor.execute("SET GLOBAL max_session_mem_used = DEFAULT")


class MySqlFarEnd(MariaDbFarEnd):
    name, kind = "mysql", MySql
    impossible: Mapping[str, str] = {far_end.MEMORY: "it bounds a session's memory at 2 MiB and more, which no batch needs"}


def _row(found: Sequence[Any]) -> Row:
    msgid, topic, sender, qos, retain, payload = found
    return Row(
        msgid, topic, sender, int(qos), bool(int(retain)), payload.encode() if isinstance(payload, str) else bytes(payload)
    )


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.replace(tzinfo=UTC).timestamp())
