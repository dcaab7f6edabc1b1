"""Tables that exist: what `tidegate uplink init` shows of them, and what `--alter` makes of them, on real servers."""

from __future__ import annotations

import importlib
import re
from contextlib import closing
from pathlib import Path
from typing import Any

from tidegate.uplink.rule import SHIPPED
from tidegate.uplink.sql_alter import alters

from tests.support.sql_servers import SqlServer

from .rig import Rig
from .sql_rig import assert_holds_everything, rig
from .test_sql_asking import pool_of
from .test_sql_gateway import gateway, tidegate

SPECIFIED = {
    "mysql": (
        "ALTER TABLE mqtt_msg DROP KEY tidegate_msgid, DROP KEY tidegate_topic",
        *(
            f"ALTER TABLE mqtt_{table} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci"
            for table in ("client", "sub", "msg", "retain", "acked")
        ),
    ),
    "pgsql": (
        "ALTER TABLE mqtt_acked ALTER topic TYPE varchar(64), ALTER mid TYPE integer",
        "DROP INDEX tidegate_msgid, tidegate_topic",
    ),
}
"""From the shipped tables to the specification's."""
MADE_EXACT = "ALTER TABLE mqtt_{} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
NEEDED = {
    "mysql": [
        *(MADE_EXACT.format(table) for table in ("client", "sub", "msg")),
        "ALTER TABLE mqtt_msg ADD KEY `tidegate_msgid` (`msgid`)",
        "ALTER TABLE mqtt_msg ADD KEY `tidegate_topic` (`topic`, `id`)",
        *(MADE_EXACT.format(table) for table in ("retain", "acked")),
    ],
    "pgsql": [
        "ALTER TABLE mqtt_acked ALTER COLUMN topic TYPE character varying(255)",
        "ALTER TABLE mqtt_acked ALTER COLUMN mid TYPE bigint",
    ],
}


def session_of(folder: Path, server: SqlServer) -> Any:
    """As `uplink init` opens it; its own rule file stands in a folder of its own."""
    (folder / "session").mkdir(exist_ok=True)
    pool = pool_of(folder / "session", server)
    return closing(importlib.import_module(f"tidegate.uplink.to_{server.backend}").schema_session(pool))


def needed(folder: Path, server: SqlServer) -> list[str]:
    with session_of(folder, server) as session:
        return alters(server.backend, session.columns(), session.indexes())


def test_the_shipped_tables_need_nothing(tmp_path: Path, server: SqlServer) -> None:
    assert needed(tmp_path, server) == []


def test_wider_columns_and_further_ones_are_left_alone(tmp_path: Path, server: SqlServer) -> None:
    server.run(
        "ALTER TABLE mqtt_sub ADD COLUMN price varchar(3)",
        "ALTER TABLE mqtt_client " + ("MODIFY node text" if server.backend == "mysql" else "ALTER node TYPE text"),
    )
    assert needed(tmp_path, server) == []


def test_the_specification_s_tables_are_shown_and_changed_only_with_alter(tmp_path: Path, server: SqlServer) -> None:
    server.run(*SPECIFIED[server.backend])
    server.run("INSERT INTO mqtt_acked (clientid, topic, mid) VALUES ('c', 't', 7)")
    gateway(tmp_path, server)
    name = f"{server.backend}.pool1"
    shown = tidegate(tmp_path, "uplink", "init", name, "--yes")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "not changed without --alter" in shown.stdout
    assert re.findall(r"^(ALTER .*);$", shown.stdout, re.MULTILINE) == NEEDED[server.backend]
    assert needed(tmp_path, server) == NEEDED[server.backend]
    refused = tidegate(tmp_path, "uplink", "init", name, "--alter", answer="n\n")
    assert (refused.returncode, "nothing was changed" in refused.stderr) == (1, True)
    assert needed(tmp_path, server) == NEEDED[server.backend]
    done = tidegate(tmp_path, "uplink", "init", name, "--alter", "--yes")
    assert (done.returncode, done.stdout.count("\nchanged ALTER")) == (0, len(NEEDED[server.backend]))
    assert tidegate(tmp_path, "uplink", "init", name).stdout == f"{name} lacks nothing\n"
    assert server.rows("SELECT clientid, topic, mid FROM mqtt_acked") == [("c", "t", 7)]


def test_what_a_table_lost_comes_back_and_messages_go_through(tmp_path: Path, server: SqlServer) -> None:
    unique = (
        "ALTER TABLE mqtt_client DROP KEY mqtt_client_key"
        if server.backend == "mysql"
        else "ALTER TABLE mqtt_client DROP CONSTRAINT mqtt_client_clientid_key"
    )
    drop_id = "ALTER TABLE mqtt_msg " + ("DROP KEY tidegate_topic, " if server.backend == "mysql" else "") + "DROP COLUMN id"
    narrow = "MODIFY topic varchar(9)" if server.backend == "mysql" else "ALTER topic TYPE varchar(9)"
    server.run(
        "ALTER TABLE mqtt_retain DROP COLUMN sender", drop_id,
        unique, f"ALTER TABLE mqtt_retain {narrow}", "ALTER TABLE tidegate_stamp DROP COLUMN gone_at",
    )  # fmt: skip
    with session_of(tmp_path, server) as session:
        for statement in needed(tmp_path, server):
            session.run(statement)
    gateway(tmp_path, server)
    assert tidegate(tmp_path, "uplink", "init", f"{server.backend}.pool1", "--yes").returncode == 0
    assert needed(tmp_path, server) == []
    with rig(tmp_path, server) as gate:
        carry(gate)
        assert_holds_everything(gate, server)
        assert server.rows("SELECT topic, sender FROM mqtt_retain") == [("a/long/topic", "c1")]


def carry(gate: Rig) -> None:
    gate.log.connected("c1")
    gate.log.publish("a/long/topic", b"x", retain=True)
    gate.log.publish("b", b"", retain=True)
    gate.log.disconnected("c1")
    gate.drain()


def test_a_key_that_doubles_forbid_is_told_with_the_server_s_words(tmp_path: Path, server: SqlServer) -> None:
    server.run(
        "ALTER TABLE mqtt_retain DROP KEY mqtt_retain_key"
        if server.backend == "mysql"
        else "ALTER TABLE mqtt_retain DROP CONSTRAINT mqtt_retain_topic_key",
        "INSERT INTO mqtt_retain (topic) VALUES ('t'), ('t')",
    )
    gateway(tmp_path, server)
    done = tidegate(tmp_path, "uplink", "init", f"{server.backend}.pool1", "--alter", "--yes")
    assert done.returncode == 1
    assert "uplicate" in done.stderr or "not be created" in done.stderr or "could not create unique index" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_line_of_the_shipped_tables_is_understood() -> None:
    from tidegate.uplink.sql_alter import table_of
    from tidegate.uplink.sql_schema import shipped

    for backend in ("mysql", "pgsql"):
        made = [table_of(step) for step in shipped(backend) if step.statement.startswith("CREATE TABLE")]
        text = (SHIPPED / f"emqx_backend_{backend}.sql").read_text()
        lines = re.findall(r"^  \S", text, re.MULTILINE)
        assert sum(len(table.columns) + len(table.keys) for table in made) == len(lines)


def test_a_change_may_take_longer_than_the_pool_s_timeout(tmp_path: Path, server: SqlServer) -> None:
    with session_of(tmp_path, server) as session:
        session.take_time()
        session.run("SELECT pg_sleep(2.5)" if server.backend == "pgsql" else "DO sleep(2.5)")
        assert session.columns()["mqtt_msg"].keys() >= {"topic"}
