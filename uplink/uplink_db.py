"""The file `uplink.db`: its tables, and how a file of an earlier version is moved forward.

Invariant: a migration that was released is never changed.
"""

from __future__ import annotations

import secrets
import sqlite3

from tidegate.store import inbox
from tidegate.store.schema import Format

_SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE pool (
  name TEXT PRIMARY KEY, state TEXT NOT NULL, error TEXT NOT NULL, hint TEXT NOT NULL, warning TEXT NOT NULL,
  cursor INTEGER NOT NULL, gateway TEXT NOT NULL, epoch INTEGER NOT NULL, delivered INTEGER NOT NULL,
  refused INTEGER NOT NULL, rate REAL NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE mark (
  pool TEXT NOT NULL, gateway TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
  PRIMARY KEY (pool, gateway, epoch)) WITHOUT ROWID;
CREATE TABLE quarantine (
  id INTEGER PRIMARY KEY, pool TEXT NOT NULL, gateway TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
  number INTEGER NOT NULL, msgid TEXT NOT NULL, target TEXT NOT NULL, reason TEXT NOT NULL, original BLOB NOT NULL,
  at INTEGER NOT NULL, UNIQUE (pool, gateway, epoch, seq, number))
"""


def _schema_1(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA_1.split(";\n"):
        connection.execute(statement)


def _schema_2(connection: sqlite3.Connection) -> None:
    """A row can be sent again (`attempt`: its mark's name at the far end) and changed before; no id is ever used again."""
    connection.execute("ALTER TABLE quarantine RENAME TO quarantine_1")
    connection.execute(
        "CREATE TABLE quarantine (id INTEGER PRIMARY KEY AUTOINCREMENT, pool TEXT NOT NULL, gateway TEXT NOT NULL,"
        " epoch INTEGER NOT NULL, seq INTEGER NOT NULL, number INTEGER NOT NULL, msgid TEXT NOT NULL, target TEXT NOT NULL,"
        " reason TEXT NOT NULL, original BLOB NOT NULL, at INTEGER NOT NULL, attempt INTEGER, edited BLOB,"
        " UNIQUE (pool, gateway, epoch, seq, number))"
    )
    connection.execute("INSERT INTO quarantine SELECT *, NULL, NULL FROM quarantine_1")
    connection.execute("DROP TABLE quarantine_1")
    connection.execute("CREATE INDEX quarantine_due ON quarantine (pool, id) WHERE attempt IS NOT NULL")


def _schema_3(connection: sqlite3.Connection) -> None:
    """The account of what became of everything up to the cursor (`balance`); an earlier file explains what it has."""
    for column in ("again INTEGER", "passed INTEGER", "missing INTEGER", "solid INTEGER"):
        connection.execute(f"ALTER TABLE pool ADD COLUMN {column} NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE pool ADD COLUMN named TEXT NOT NULL DEFAULT '{}'")
    connection.execute("UPDATE pool SET again = delivered - cursor, solid = cursor")
    connection.execute(
        "INSERT INTO meta SELECT 'parked_came.' || pool, count(*) FROM"
        " (SELECT DISTINCT pool, gateway, epoch, seq FROM quarantine) GROUP BY pool"
    )


_SCHEMA_4 = f"""
CREATE TABLE lane (
  pool TEXT PRIMARY KEY, cursor INTEGER NOT NULL, gateway TEXT NOT NULL, epoch INTEGER NOT NULL, state TEXT NOT NULL,
  error TEXT NOT NULL, hint TEXT NOT NULL, asked INTEGER NOT NULL, answers INTEGER NOT NULL, skipped INTEGER NOT NULL,
  refused INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE question (
  pool TEXT NOT NULL, client TEXT NOT NULL, filter TEXT NOT NULL, qos INTEGER NOT NULL, due INTEGER NOT NULL,
  PRIMARY KEY (pool, client, filter)) WITHOUT ROWID;
{inbox.SCHEMA.strip()}
"""


def _schema_4(connection: sqlite3.Connection) -> None:
    """What is asked of far ends, and the answers for the broker, which knows the file by its `identity`."""
    for statement in _SCHEMA_4.split(";\n"):
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES ('identity', ?)", (secrets.token_hex(8),))


def _schema_5(connection: sqlite3.Connection) -> None:
    """Messages of queues that were acknowledged before they were sent."""
    connection.execute("ALTER TABLE pool ADD COLUMN cancelled INTEGER NOT NULL DEFAULT 0")


UPLINK = Format(0x54475531, "uplink.db", (_schema_1, _schema_2, _schema_3, _schema_4, _schema_5))
"""`uplink.db`: application_id "TGU1"."""
