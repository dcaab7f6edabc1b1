"""The files `log.db` and `uplink.db`: who they are, their versions, how they are made and moved forward.

Rules: a file is ours when its `application_id` says so; `user_version` is the number of migrations applied; a newer
file is refused with words, a foreign or damaged one too, and none is ever replaced. `auto_vacuum` is set before the
first table, later SQLite ignores it. Migrations only ever append to the list, each is one transaction.

Invariant: after `open_writer` returns, the file has exactly the schema of the newest migration.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import msgid
from .entry import PUBLISH, QOS_MASK, RETAIN, STORED
from .report import brief
from .topic import matches

LOG_NAME = "log.db"
TAILS = ("", "-wal", "-shm")
Migration = Callable[[sqlite3.Connection], None]


STRANGE = (ValueError, TypeError, AttributeError, LookupError)
"""What values raise that a damaged page shows; and sqlite3, when a damaged schema is in its message."""


class StoreError(Exception):
    """The database cannot be used; the text says which file, why and what to do."""


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of database file: `application_id`, a name for people, and its migrations."""

    application_id: int
    name: str
    migrations: Sequence[Migration]


def open_writer(path: Path, form: Format, synchronous: str = "FULL") -> sqlite3.Connection:
    """Open or make the file, the only writing and checkpointing connection to it.

    Raises StoreError: not a database, somebody else's, damaged, newer than this program, not writable.
    """
    try:
        return _open_writer(path, form, synchronous)
    except (sqlite3.Error, *STRANGE) as error:
        raise StoreError(explain(path, error)) from error
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}: check owner and rights of {path.parent}") from error


def open_reader(path: Path) -> sqlite3.Connection:
    """Open for reading only; hold no transaction longer than 20 ms. Raises StoreError."""
    refuse_lost(path)
    try:
        connection = sqlite3.connect(
            f"file:{uri_path(path)}?mode=ro", uri=True, isolation_level=None, check_same_thread=False, timeout=1.0
        )
        connection.execute("PRAGMA query_only = 1")
    except sqlite3.Error as error:
        raise StoreError(explain(path, error)) from error
    return connection


def know_topics(connection: sqlite3.Connection) -> None:
    """Let SQL ask `topic_matches(filter, name)`."""
    connection.create_function("topic_matches", 2, matches, deterministic=True)


def explain(path: Path, error: Exception) -> str:
    """One sentence for a person about an SQLite error on this file, or one of STRANGE."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if isinstance(error, STRANGE):
        name, error = "SQLITE_CORRUPT", ValueError(f"it holds what no gateway wrote: {brief(error)}")
    directory = next((file for tail in TAILS if (file := Path(f"{path}{tail}")).is_dir()), None)
    if directory is not None:
        return f"{directory} is a directory where a file belongs: move it aside; nothing was changed"
    if name.startswith("SQLITE_NOTADB"):
        advice = f"move it aside or choose another data directory{_if_it_was_one(path)}"
        return f"{path} is not a database: {advice}; nothing was changed"
    if name.startswith(_DAMAGE) or (name == "SQLITE_READONLY" and _may_write(path)):
        begin_anew = f"move it and {path.name}-wal aside: far ends know how far they are, only its quarantine is not taken over"
        mend = _salvage(path) if path.name == LOG_NAME else begin_anew
        return f"{path} is damaged ({' '.join(str(error).split())}): {mend}; nothing was changed"
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
        return f"{path} cannot be opened ({error}): check owner and rights of {path.parent}"
    if name.startswith("SQLITE_BUSY"):
        return f"{path} is in use by another program: stop it first"
    return f"{path}: {disk_fault(error)}"


def _if_it_was_one(path: Path) -> str:
    return f" (if it was a log of tidegate: {_salvage(path)})" if path.name == LOG_NAME else ""


def _salvage(path: Path) -> str:
    return f"`tidegate salvage --data {path.parent}` moves it aside and saves what can be read"


def _may_write(path: Path) -> bool:
    return all(os.access(file, os.W_OK) for tail in TAILS if (file := Path(f"{path}{tail}")).exists())


def disk_fault(error: BaseException) -> str:
    """Why the disk refuses, and what a person can do."""
    name = getattr(error, "sqlite_errorname", "") or ""
    for start, hint in _DISK_FAULTS.items():
        if name.startswith(start):
            return f"{error} ({hint})"
    return str(error)


_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_ERROR", "SQLITE_CONSTRAINT", "SQLITE_MISMATCH")
"""Our own statements fail on a schema or rows that are not ours any more."""
_DISK_FAULTS = {
    "SQLITE_FULL": "make room on it",
    "SQLITE_READONLY": "the file system is read-only: see dmesg",
    "SQLITE_BUSY": "another program holds it: stop that",
    "SQLITE_IOERR_SHM": "make room on it",
    "SQLITE_IOERR_FSYNC": "the disk did not confirm what was written: see dmesg, the card may be dying",
    "SQLITE_IOERR": "reading or writing failed, or the file system became read-only: see dmesg",
}


def is_lost(path: Path) -> bool:
    """Whether only its write-ahead log is left of a database, which SQLite would delete at a first look."""
    wal = Path(f"{path}-wal")
    return not (path.exists() and path.stat().st_size) and wal.is_file() and wal.stat().st_size > 0


def refuse_lost(path: Path) -> None:
    """Raises StoreError."""
    if is_lost(path):
        how = "has 0 bytes" if path.exists() else "is not there"
        salvage = f", or `tidegate salvage --data {path.parent}` saves what can be read" if path.name == LOG_NAME else ""
        raise StoreError(
            f"{path} {how}, but {path.name}-wal beside it says that its content was lost: put it back{salvage}; to begin a new"
            f" one move both aside; nothing was changed"
        )


def close_unmoved(connection: sqlite3.Connection, path: Path) -> None:
    """Close and leave the write-ahead log as it is; the last to go would move it into the database, even another one's."""
    last = None
    wal = Path(f"{path}-wal")
    with suppress(sqlite3.Error):
        if wal.is_file() and wal.stat().st_size:
            last = sqlite3.connect(f"file:{uri_path(path)}?mode=ro", uri=True)
            last.execute("PRAGMA schema_version").fetchone()
    connection.close()
    if last is not None:
        last.close()


def uri_path(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _open_writer(path: Path, form: Format, synchronous: str) -> sqlite3.Connection:
    refuse_lost(path)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.0)
    try:
        os.chmod(path, 0o640)
        _identify(connection, path, form)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA journal_size_limit = {16 << 20}")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA cache_size = -4096")
        _migrate(connection, form)
        sync_directory(path.parent)
    except BaseException:
        close_unmoved(connection, path)
        raise
    return connection


def sync_directory(directory: Path) -> None:
    """A file that was just made survives a power cut only if its name does."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_ours(connection: sqlite3.Connection, path: Path, form: Format) -> bool:
    """Whether the file has this format; False for one that was just made. Raises StoreError: another program's, or newer."""
    try:
        # In one statement: its writer may just be making the file.
        application_id, version, tables = connection.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)"
            " FROM pragma_application_id, pragma_user_version"
        ).fetchone()
    except UnicodeDecodeError as error:
        raise StoreError(explain(path, error)) from error
    if application_id != form.application_id and (tables or application_id):
        raise StoreError(
            f"{path} belongs to another program (application_id {application_id}): choose another data "
            f"directory or move it aside{_if_it_was_one(path)}; nothing was changed"
        )
    if not 0 <= version <= len(form.migrations):
        raise StoreError(
            f"{path} was written by a newer tidegate ({form.name} version {version}, this program knows "
            f"{len(form.migrations)}): install that version again; nothing was changed"
        )
    return bool(application_id)


def _identify(connection: sqlite3.Connection, path: Path, form: Format) -> None:
    if not is_ours(connection, path, form):
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute(f"PRAGMA application_id = {form.application_id}")


def _migrate(connection: sqlite3.Connection, form: Format) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for number in range(version, len(form.migrations)):
        connection.execute("BEGIN IMMEDIATE")
        form.migrations[number](connection)
        connection.execute(f"PRAGMA user_version = {number + 1}")
        connection.execute("COMMIT")


def _log_1(connection: sqlite3.Connection) -> None:
    _run(connection, _LOG_1)


def _run(connection: sqlite3.Connection, script: str) -> None:
    for statement in script.split(";\n"):
        if statement.strip():
            connection.execute(statement)


_MSGID = msgid.sql_expression("e.at", "r.code", "r.epoch", "e.seq")
WHEN = "CASE WHEN e.mono THEN ifnull(e.mono + r.clock_offset, e.at) ELSE e.at END"
"""Time (ms) of the row `e` of the run `r`, as it is known by now."""
_UTC = "strftime('%Y-%m-%d %H:%M:%S', {} / 1000, 'unixepoch')"

_LOG_1 = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE run (
  id INTEGER PRIMARY KEY, gateway TEXT NOT NULL, code TEXT NOT NULL, epoch INTEGER NOT NULL, node TEXT NOT NULL,
  boot TEXT NOT NULL, clock_offset INTEGER, first_seq INTEGER NOT NULL, started_at INTEGER NOT NULL,
  alive_at INTEGER NOT NULL, clean INTEGER NOT NULL DEFAULT 0);
CREATE TABLE client (
  id INTEGER PRIMARY KEY, clientid TEXT NOT NULL UNIQUE, state INTEGER, online_at INTEGER, offline_at INTEGER,
  created INTEGER);
CREATE TABLE topic (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE entry (
  seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, mono INTEGER NOT NULL, run INTEGER NOT NULL, kind INTEGER NOT NULL,
  client INTEGER, topic INTEGER, flags INTEGER, payload BLOB, properties BLOB);
CREATE TABLE retained (topic INTEGER PRIMARY KEY, seq INTEGER NOT NULL);
CREATE TABLE session (
  client INTEGER PRIMARY KEY, created INTEGER NOT NULL, expiry INTEGER NOT NULL, expires_at INTEGER,
  cursor INTEGER NOT NULL);
CREATE TABLE subscription (
  client INTEGER NOT NULL, filter TEXT NOT NULL, options INTEGER NOT NULL, identifier INTEGER, since INTEGER NOT NULL,
  PRIMARY KEY (client, filter)) WITHOUT ROWID;
CREATE TABLE inflight (
  client INTEGER NOT NULL, seq INTEGER NOT NULL, packet_id INTEGER NOT NULL, state INTEGER NOT NULL,
  PRIMARY KEY (client, seq, packet_id)) WITHOUT ROWID;
CREATE TABLE received (
  client INTEGER NOT NULL, packet_id INTEGER NOT NULL, PRIMARY KEY (client, packet_id)) WITHOUT ROWID;
CREATE TABLE cursor (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE proxy_subscription (
  id INTEGER PRIMARY KEY, clientid TEXT NOT NULL, topic TEXT NOT NULL, qos INTEGER NOT NULL, created INTEGER NOT NULL,
  UNIQUE (clientid, topic));
CREATE TABLE position (
  id INTEGER PRIMARY KEY, client INTEGER NOT NULL, topic INTEGER NOT NULL, seq INTEGER NOT NULL,
  created INTEGER NOT NULL, UNIQUE (client, topic));
CREATE VIEW mqtt_client AS
  SELECT c.id, c.clientid, CAST(c.state AS TEXT) AS state, (SELECT node FROM run ORDER BY id DESC LIMIT 1) AS node,
    {_UTC.format("c.online_at")} AS online_at, {_UTC.format("c.offline_at")} AS offline_at,
    {_UTC.format("c.created")} AS created
  FROM client c WHERE c.state IS NOT NULL;
CREATE VIEW mqtt_sub AS
  SELECT id, clientid, topic, qos, {_UTC.format("created")} AS created FROM proxy_subscription;
CREATE VIEW mqtt_msg AS
  SELECT e.seq AS id, {_MSGID} AS msgid, t.name AS topic, c.clientid AS sender, r.node AS node,
    e.flags & {QOS_MASK} AS qos, (e.flags & {RETAIN}) / {RETAIN} AS retain, e.payload AS payload,
    {_UTC.format("e.at")} AS arrived
  FROM entry e JOIN run r ON r.id = e.run JOIN topic t ON t.id = e.topic JOIN client c ON c.id = e.client
  WHERE e.kind = {PUBLISH} AND e.flags & {QOS_MASK} > 0 AND NOT (e.flags & {RETAIN} AND length(e.payload) = 0);
CREATE VIEW mqtt_retain AS
  SELECT e.seq AS id, t.name AS topic, {_MSGID} AS msgid, c.clientid AS sender, r.node AS node,
    e.flags & {QOS_MASK} AS qos, e.payload AS payload, {_UTC.format("e.at")} AS arrived
  FROM retained k JOIN entry e ON e.seq = k.seq JOIN run r ON r.id = e.run JOIN topic t ON t.id = e.topic
    JOIN client c ON c.id = e.client;
CREATE VIEW mqtt_acked AS
  SELECT p.id, c.clientid, t.name AS topic, p.seq AS mid, {_UTC.format("p.created")} AS created
  FROM position p JOIN client c ON c.id = p.client JOIN topic t ON t.id = p.topic;
"""


def _log_2(connection: sqlite3.Connection) -> None:
    _clock(connection)
    _balance(connection)
    _local(connection)


def _clock(connection: sqlite3.Connection) -> None:
    """Of each run how far its clock was known (`store.clock`); the views tell times as they are known by now."""
    connection.execute("ALTER TABLE run ADD COLUMN clock INTEGER NOT NULL DEFAULT 1")
    for view, old in connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE name IN ('mqtt_msg', 'mqtt_retain')"
    ).fetchall():
        connection.execute(f"DROP VIEW {view}")
        connection.execute(old.replace(_UTC.format("e.at"), _UTC.format(WHEN)))


def _balance(connection: sqlite3.Connection) -> None:
    """What became of a session's messages; `dropped` is JSON, reason -> count."""
    connection.execute("ALTER TABLE session ADD COLUMN delivered INTEGER NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE session ADD COLUMN expired INTEGER NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE session ADD COLUMN dropped TEXT NOT NULL DEFAULT '{}'")


def _local(connection: sqlite3.Connection) -> None:
    """What the SQLite functions keep (`store.local`), and the view without what queues gave away."""
    _run(connection, _LOCAL)


_LOCAL = f"""
CREATE TABLE fetch (
  client INTEGER NOT NULL, filter TEXT NOT NULL, cursor INTEGER, through INTEGER NOT NULL,
  PRIMARY KEY (client, filter)) WITHOUT ROWID;
CREATE TABLE taken (seq INTEGER PRIMARY KEY);
DROP VIEW mqtt_msg;
CREATE VIEW mqtt_msg AS
  SELECT e.seq AS id, {_MSGID} AS msgid, t.name AS topic, c.clientid AS sender, r.node AS node,
    e.flags & {QOS_MASK} AS qos, (e.flags & {RETAIN}) / {RETAIN} AS retain, e.payload AS payload,
    {_UTC.format(WHEN)} AS arrived
  FROM entry e JOIN run r ON r.id = e.run JOIN topic t ON t.id = e.topic JOIN client c ON c.id = e.client
  WHERE e.kind = {PUBLISH} AND e.flags & {STORED} > 0 AND NOT (e.flags & {RETAIN} AND length(e.payload) = 0)
    AND NOT EXISTS (SELECT 1 FROM taken WHERE seq = e.seq);
"""


def _log_3(connection: sqlite3.Connection) -> None:
    """What far ends know for devices (`store.inbox`): where a made subscription comes from, messages for one client."""
    (view,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'mqtt_sub'").fetchone()
    connection.execute("DROP VIEW mqtt_sub")
    _run(connection, _DOWNWARDS)
    connection.execute(view)


_DOWNWARDS = """
CREATE TABLE made (
  id INTEGER PRIMARY KEY, clientid TEXT NOT NULL, topic TEXT NOT NULL, qos INTEGER NOT NULL, created INTEGER NOT NULL,
  source TEXT NOT NULL DEFAULT '', UNIQUE (clientid, topic, source));
INSERT INTO made (id, clientid, topic, qos, created) SELECT id, clientid, topic, qos, created FROM proxy_subscription;
DROP TABLE proxy_subscription;
ALTER TABLE made RENAME TO proxy_subscription;
CREATE TABLE addressed (
  seq INTEGER PRIMARY KEY, client INTEGER NOT NULL, msgid TEXT NOT NULL, acked INTEGER NOT NULL DEFAULT 0);
CREATE INDEX addressed_to ON addressed (client, msgid);
CREATE TABLE cleared (topic TEXT PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID;
"""

LOG = Format(0x54474C31, "log.db", (_log_1, _log_2, _log_3))
"""`log.db`: application_id "TGL1"."""
