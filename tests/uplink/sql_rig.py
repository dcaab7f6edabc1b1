"""What the tests of the SQL far ends share: servers with the shipped tables, rules, and the comparison row by row."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from tidegate.store.entry import PUBLISH
from tidegate.uplink.rule import SHIPPED
from tidegate.uplink.sql_statement import text_or_bytes

from tests.support.real_mysql import IS_SKIPPED, MISSING, MySql
from tests.support.sql_servers import PASSWORD, USER, MariaDb, Postgres, SqlServer

from .rig import Rig

SERVERS: dict[str, type[SqlServer]] = {"pgsql": Postgres, "mysql": MariaDb, "mysql-9": MySql}
NEEDS_MYSQL = pytest.mark.skipif(IS_SKIPPED, reason=MISSING)
EVERY_SERVER = ("pgsql", "mysql", pytest.param("mysql-9", marks=NEEDS_MYSQL))
"""Their names, for a fixture's `params`."""
_FUNCTIONS = (
    ("client.connected.1", "on_client_connected"),
    ("client.disconnected.1", "on_client_disconnected"),
    ("message.publish.1", "on_message_publish"),
    ("message.publish.2", "on_message_retain"),
    ("message.publish.3", "on_retain_delete"),
)
OWN_TABLE = "CREATE TABLE list (n SERIAL PRIMARY KEY, msgid varchar(64) NOT NULL)"
OWN = ("message.publish.9", "insert into list(msgid) values(${msgid})")
"""A statement that shows order and repetition."""


def function_rule(backend: str, hook: str, function: str, topic: str = "#") -> str:
    """A line of a rule file."""
    action = f'"action": {{"function": "{function}"}}, "pool": "pool1"'
    return f'backend.{backend}.hook.{hook} = {{"topic": "{topic}", {action}}}\n'


def sql_rule(backend: str, hook: str, sql: str, topic: str = "#") -> str:
    """A line with a statement of the user."""
    return f'backend.{backend}.hook.{hook} = {{"topic": "{topic}", "action": {{"sql": ["{sql}"]}}, "pool": "pool1"}}\n'


def rules(backend: str, own: bool = True) -> str:
    """Every function that writes, and a statement."""
    text = "".join(function_rule(backend, hook, function) for hook, function in _FUNCTIONS)
    return text + (sql_rule(backend, *OWN) if own else "")


def settings(server: SqlServer) -> str:
    user = "username" if server.backend == "pgsql" else "user"
    return f"{user} = {USER}\npassword = {PASSWORD}"


def tables(server: SqlServer) -> None:
    """The shipped tables, and one of the user's own."""
    text = (SHIPPED / f"emqx_backend_{server.backend}.sql").read_text()
    code = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("--"))
    server.run(*[part for part in code.split(";\n") if part.strip()], OWN_TABLE)


def rig(directory: Path, server: SqlServer, port: int | None = None, own: bool = True, more: str = "") -> Rig:
    """A worker before this server, or before the proxy on `port`."""
    backend = server.backend
    return Rig(directory, port or server.port, rules(backend, own), f"{settings(server)}\n{more}", backend)


def mark(server: SqlServer) -> list[int]:
    """The marks, by epoch."""
    return [seq for (seq,) in server.rows("SELECT seq FROM tidegate_ledger ORDER BY epoch")]


def messages(server: SqlServer) -> list[tuple[object, ...]]:
    """mqtt_msg in the order of its rows."""
    found = server.rows("SELECT msgid, topic, sender, qos, retain, payload, arrived FROM mqtt_msg ORDER BY id")
    return [(*row[:5], row[5].encode() if isinstance(row[5], str) else row[5], row[6]) for row in found]


def assert_holds_everything(rig: Rig, server: SqlServer) -> None:
    """Every message once, field by field and in order, and the user's statement once for each: no loss, no duplicate."""
    entries = [entry for entry in rig.log.entries() if entry.kind == PUBLISH]
    wanted = [entry for entry in entries if entry.qos and not (entry.retain and not entry.payload)]
    assert messages(server) == [
        (e.msgid, e.topic, e.clientid, e.qos, int(e.retain), _payload(server, e.payload), utc(e.when)) for e in wanted
    ]
    assert server.rows("SELECT msgid FROM list ORDER BY n") == [(entry.msgid,) for entry in entries]


def utc(ms: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000, UTC).replace(tzinfo=None)


def _payload(server: SqlServer, payload: bytes) -> bytes:
    text = text_or_bytes(payload)
    return payload if server.backend == "mysql" or isinstance(text, str) else payload.hex().encode()
