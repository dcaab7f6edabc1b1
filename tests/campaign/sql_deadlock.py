"""A second session that locks rows of the gateway's tables in the other order, so that the server must choose a victim.

The gateway's transaction locks the ledger first and the user's `tally` last. This one holds `tally` until the gateway waits
for it, then asks for the ledger. It has written so much (MariaDB, MySQL) or is so patient (PostgreSQL) that the gateway is the
one that is sent away.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pymysql

from tests.support.sql_servers import SqlServer

_LOOK = 0.15
"""InnoDB renews what it tells of waits only if nobody has asked for 0.1 s; PostgreSQL looks for deadlocks after 1 s."""
_WAITS = {
    "pgsql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
}
_WEIGHT = {
    "pgsql": ["SET LOCAL ROLE NONE", "SET LOCAL deadlock_timeout = '1min'"],
    "mysql": [f"INSERT INTO weight VALUES {', '.join(['(1)'] * 5000)}"],
}


class Deadlock:
    """Use `going_on` around traffic: deadlocks are made, one after the other."""

    def __init__(self, server: SqlServer) -> None:
        self._server = server
        self._over = threading.Event()
        self._failed: list[BaseException] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """While it lasts a thread holds rows and asks for others."""
        thread = threading.Thread(target=self._work, name="deadlock")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
        if self._failed:
            raise self._failed[0]

    def _work(self) -> None:
        try:
            with closing(self._server.connect()) as other, closing(other.cursor()) as cursor:
                while not self._over.is_set():
                    self._once(cursor)
        except BaseException as error:  # noqa: BLE001 - told where the thread is waited for
            self._failed.append(error)

    def _once(self, cursor: Any) -> None:
        cursor.execute("BEGIN")
        for statement in _WEIGHT[self._server.backend]:
            cursor.execute(statement)
        try:
            cursor.execute("UPDATE tally SET n = n")
            while not self._over.is_set():
                if self._server.rows(_WAITS[self._server.backend])[0][0]:
                    cursor.execute("SELECT * FROM tidegate_ledger FOR UPDATE")
                    break
                self._over.wait(_LOOK)
        except (psycopg.OperationalError, pymysql.err.OperationalError):
            pass  # this one was the victim
        finally:
            cursor.execute("ROLLBACK")
