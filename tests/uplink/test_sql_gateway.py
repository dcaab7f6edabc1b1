"""SQL far ends from end to end: `tidegate uplink init` makes the tables, clients publish to the real gateway through an outage,
what is refused is mended by `tidegate dead`, and the tables hold what the gateway's own disk says was published."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.uplink.progress import PoolStatus, read_pools

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.sql_servers import PASSWORD, SqlServer
from tests.support.waiting import wait_until

from .sql_rig import EVERY_SERVER, OWN_TABLE, SERVERS, messages, rules, settings

DEADLINE = 60.0
TOML = '[gateway]\nname = "barn"\n\n[uplink]\nbackends = ["sqlite", "{backend}"]\n'


@pytest.fixture(params=EVERY_SERVER)
def server(request: pytest.FixtureRequest) -> Iterator[SqlServer]:
    with SERVERS[request.param]() as server:
        yield server


def gateway(directory: Path, server: SqlServer, more: str = "") -> Gateway:
    lines = [f"server = 127.0.0.1:{server.port}", "timeout = 500ms", *settings(server).splitlines()]
    text = "".join(f"backend.{server.backend}.pool1.{line}\n" for line in lines) + rules(server.backend) + more
    return Gateway(
        directory, toml=TOML.format(backend=server.backend), files={f"emqx_backend_{server.backend}.conf": text}
    )  # fmt: skip


def tidegate(directory: Path, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    places = ("--config", str(directory / "gateway.toml"), "--data", str(directory / "data"))
    command = [sys.executable, "-m", "tidegate.gateway.cli", *arguments, *places]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, input=answer, env=os.environ)


def pool(broker: Gateway) -> PoolStatus | None:
    return next(iter(read_pools(broker.data)), None)


def state(broker: Gateway) -> str:
    found = pool(broker)
    return found.state if found else ""


def test_the_tables_are_shown_agreed_to_and_made(tmp_path: Path, server: SqlServer) -> None:
    gateway(tmp_path, server)
    name = f"{server.backend}.pool1"
    refused = tidegate(tmp_path, "uplink", "init", name, answer="n\n")
    assert (refused.returncode, "nothing was created" in refused.stderr) == (1, True)
    assert refused.stdout.count("CREATE TABLE IF NOT EXISTS") == 9
    made = tidegate(tmp_path, "uplink", "init", name, "--yes")
    assert (made.returncode, made.stderr) == (0, "")
    assert "created tidegate_ledger\n" in made.stdout
    server.run("DROP TABLE mqtt_sub")
    again = tidegate(tmp_path, "uplink", "init", name, answer="y\n")
    assert (again.returncode, again.stdout.count("CREATE"), again.stdout.count("created mqtt_sub")) == (0, 1, 1)
    assert tidegate(tmp_path, "uplink", "init", name).stdout == f"{name} lacks nothing\n"


def test_what_init_cannot_do_it_says(tmp_path: Path, server: SqlServer) -> None:
    gateway(tmp_path, server)
    name = server.backend
    for arguments, code, words in [
        (["redis.pool1"], 2, "other far ends need no tables"),
        ([f"{name}.pool2"], 2, f"there is no {name}.pool2, but {name}.pool1"),
    ]:
        done = tidegate(tmp_path, "uplink", "init", *arguments)
        assert (done.returncode, words in done.stderr) == (code, True)
    path = tmp_path / f"emqx_backend_{name}.conf"
    path.write_text(path.read_text().replace(PASSWORD, "wrong"))
    done = tidegate(tmp_path, "uplink", "init", f"{name}.pool1")
    assert done.returncode == 1
    assert f"set backend.{name}.pool1." in done.stderr
    server.stop()
    done = tidegate(tmp_path, "uplink", "init", f"{name}.pool1")
    server.start()
    assert (done.returncode, f"127.0.0.1:{server.port}" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr


def test_messages_survive_an_outage_and_a_kill_and_what_is_refused_is_mended(tmp_path: Path, server: SqlServer) -> None:
    with gateway(tmp_path, server) as broker:
        wait_until(lambda: state(broker) in ("connected", "misconfigured"), DEADLINE, broker.log)
        clients = [MqttClient(broker.port, f"device-{number}") for number in range(3)]
        publish(clients, 0, 20)
        wait_until(lambda: state(broker) == "misconfigured", DEADLINE, broker.log)
        server.run(OWN_TABLE)
        made = tidegate(tmp_path, "uplink", "init", f"{server.backend}.pool1", "--yes")
        assert (made.returncode, made.stdout.splitlines()[-1]) == (0, "the running gateway tries again now")
        wait_until(lambda: drained(broker), DEADLINE, lambda: (pool(broker), broker.log()))
        server.kill()
        publish(clients, 20, 20)
        clients[0].publish_and_wait("t" * 300, b"too long a topic")
        clients[0].publish_and_wait("state", b"kept", retain=True)
        broker.kill()
        server.start()
        broker.start()
        clients = [MqttClient(broker.port, f"device-{number}") for number in range(3)]
        publish(clients, 40, 20)
        wait_until(lambda: drained(broker), DEADLINE, lambda: (pool(broker), broker.log()))
        (found,) = read_pools(broker.data)
        assert (found.state, found.refused) == ("connected", 1)
        column = "varchar(400)"
        server.run(
            f"ALTER TABLE mqtt_msg ALTER COLUMN topic TYPE {column}"
            if server.backend == "pgsql"
            else f"ALTER TABLE mqtt_msg DROP INDEX topic_index, MODIFY topic {column} NOT NULL"
        )
        shown = tidegate(tmp_path, "dead", "export")
        assert '"write": "message"' in shown.stdout
        assert "characters do not fit mqtt_msg.topic" in shown.stdout
        assert tidegate(tmp_path, "dead", "retry", "--all").returncode == 0
        wait_until(lambda: len(messages(server)) == 3 * 60 + 2, DEADLINE, broker.log)
        assert sorted(row[:6] for row in messages(server)) == sorted(stored(broker))
        assert server.rows("SELECT topic FROM mqtt_retain") == [("state",)]
        assert broker.stop() == 0


def publish(clients: list[MqttClient], first: int, count: int) -> None:
    for number in range(first, first + count):
        for index, client in enumerate(clients):
            client.publish_and_wait(f"t/{index}", b"%d of %d" % (number, index))


def drained(broker: Gateway) -> bool:
    found = pool(broker)
    return found is not None and (found.state, found.waiting) == ("connected", 0)


def stored(broker: Gateway) -> list[tuple[object, ...]]:
    """What the gateway's own disk says was published."""
    with closing(sqlite3.connect(f"file:{broker.data}/log.db?mode=ro", uri=True)) as log:
        return log.execute("SELECT msgid, topic, sender, qos, retain, payload FROM mqtt_msg ORDER BY id").fetchall()
