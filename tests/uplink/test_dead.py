"""`tidegate dead` with a real redis-server: what was refused is sent again once, changed, dropped, whatever is killed."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.control import ask as control_ask
from tidegate.gateway.status import render
from tidegate.uplink import to_redis
from tidegate.uplink.progress import Progress, read_dead
from tidegate.uplink.requests import leave, take_up
from tidegate.uplink.retry import send_again

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .logfile import GATEWAY
from .rig import MESSAGES, Rig

RULES = 'backend.redis.hook.message.publish.9 = {"action": {"commands": ["RPUSH list ${payload}"]}, "pool": "pool1"}\n'
TOML = '[uplink]\nbackends = ["sqlite", "redis"]\n'
V1 = Path(__file__).parent / "uplink-v1.db"

KILLED_AFTER_THE_YES = """
import os, pathlib, sys
from tidegate.uplink.progress import Progress
from tidegate.uplink import child
Progress.sent = lambda self, due: os.kill(os.getpid(), 9)
sys.exit(child.main(["--data", sys.argv[1], "--conf", sys.argv[2], "--backend", "redis"]))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def far(server: RedisServer) -> Iterator[Any]:
    with server.client() as far:
        far.set("list", "somebody else's")
        yield far


@pytest.fixture
def rig(tmp_path: Path, server: RedisServer, far: Any) -> Iterator[Rig]:
    with Rig(tmp_path, server.port, RULES) as rig:
        for payload in (b"a", b"b", b"c"):
            rig.log.publish("t", payload)
        rig.drain()
        yield rig


def dead(data: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    command = [sys.executable, "-m", "tidegate.gateway.cli", "dead", *arguments, "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, env=os.environ | environment)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def ask(rig: Rig, action: str, *ids: int) -> None:
    """As the uplink process takes it up."""
    leave(rig.data, action, list(ids))
    take_up(rig.data, rig.progress)


def counted(data: Path, key: str) -> int:
    with closing(sqlite3.connect(data / "uplink.db")) as db:
        (value,) = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return int(value)


def test_list_show_and_export_tell_what_was_refused(rig: Rig) -> None:
    (group,) = json.loads(dead(rig.data, "list", "--json"))
    assert (group["pool"], group["count"], group["example"]["id"]) == ("redis.pool1", 3, 3)
    assert group["reason"].startswith("WRONGTYPE")
    assert "3 records" in dead(rig.data, "list")
    assert group["ids"] == [1, 2, 3]
    assert "  ids: 1-3\n" in dead(rig.data, "list")
    ask(rig, "drop", 2)
    assert "  ids: 1, 3\n" in dead(rig.data, "list")
    assert "nothing is in quarantine of redis.other" in dead(rig.data, "list", "--pool", "redis.other")
    shown = json.loads(dead(rig.data, "show", "3"))
    assert shown["original"] == {"write": "command", "0": "RPUSH", "1": "list", "2": "c"}
    assert (shown["entry"]["topic"], shown["entry"]["payload"]) == ("t", "c")
    assert [json.loads(line)["id"] for line in dead(rig.data, "export").splitlines()] == [1, 3]
    assert "there is no record 9" in dead(rig.data, "show", "9", code=1)


def test_what_is_retried_after_the_key_is_mended_arrives_once_in_order(rig: Rig, far: Any) -> None:
    far.delete("list")
    ask(rig, "retry", 1, 2, 3)
    rig.drain()
    ask(rig, "retry", 1, 2, 3)
    rig.drain()
    assert far.lrange("list", 0, -1) == ["a", "b", "c"]
    assert rig.quarantine() == []
    assert counted(rig.data, "dead_sent") == 3


def test_what_is_refused_again_stays_and_can_be_retried(rig: Rig, far: Any) -> None:
    ask(rig, "retry", 1)
    rig.drain()
    assert [(row.id, row.due) for row in read_dead(rig.data)] == [(1, False), (2, False), (3, False)]
    assert far.hlen(f"tidegate:refused:{GATEWAY}.retry:pool1") == 0
    far.delete("list")
    ask(rig, "retry", 1)
    rig.drain()
    assert far.lrange("list", 0, -1) == ["a"]


def test_what_arrived_without_our_hearing_so_is_not_sent_again(rig: Rig, far: Any) -> None:
    far.delete("list")
    ask(rig, "retry", 1)
    due = rig.progress.due("redis.pool1")
    assert due
    with closing(to_redis.connect(rig.pool)) as link:
        assert send_again(link, due) is None
    rig.restart()
    rig.drain()
    assert far.lrange("list", 0, -1) == ["a"]
    assert [row.id for row in read_dead(rig.data)] == [2, 3]


def test_a_refusal_whose_answer_was_lost_is_not_taken_for_a_yes(rig: Rig) -> None:
    ask(rig, "retry", 1)
    due = rig.progress.due("redis.pool1")
    assert due
    with closing(to_redis.connect(rig.pool)) as link:
        assert send_again(link, due) is not None
    rig.restart()
    rig.drain()
    assert [(row.id, row.due) for row in read_dead(rig.data)] == [(1, False), (2, False), (3, False)]


def test_without_the_right_to_scripts_it_is_the_same(rig: Rig, far: Any, server: RedisServer) -> None:
    far.execute_command("ACL SETUSER plain on >pw ~* +@all -@scripting")
    rig.configure(server.port, RULES, "username = plain\npassword = pw")
    ask(rig, "retry", 1)
    rig.log.publish("t", b"x")
    rig.drain()
    assert [(row.id, row.due) for row in read_dead(rig.data)] == [(1, False), (2, False), (3, False), (4, False)]
    far.delete("list")
    ask(rig, "retry", 1)
    due = rig.progress.due("redis.pool1")
    rig.drain()
    assert due
    with closing(to_redis.connect(rig.pool)) as link:
        assert send_again(link, due) is None
    assert far.lrange("list", 0, -1) == ["a"]


def test_a_request_that_a_kill_left_lying_is_not_done_twice(rig: Rig, far: Any) -> None:
    path = leave(rig.data, "retry", [1])
    rig.progress.apply(path.name, "retry", [1], b"")
    rig.drain()
    assert [row.due for row in read_dead(rig.data)] == [False, False, False]
    far.delete("list")
    take_up(rig.data, rig.progress)
    rig.drain()
    assert not path.exists()
    assert not far.exists("list")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask in the name of another user")
def test_what_root_asks_for_belongs_to_the_gateway_s_user(tmp_path: Path) -> None:
    os.chown(tmp_path, 65_534, 65_534)
    path = leave(tmp_path, "retry", [1])
    assert [(place.stat().st_uid, place.stat().st_gid) for place in (path, path.parent)] == [(65_534, 65_534)] * 2


@pytest.mark.parametrize(
    "text",
    [
        *("[", "[" * 100_000, "[]", "{}", '{"action": "burn", "ids": [1], "edited": ""}', "\N{SNOWMAN}"),
        *('{"action": ["drop"], "ids": [1], "edited": ""}', '{"action": "drop", "ids": ["1"], "edited": ""}'),
        *(f'{{"action": "drop", "ids": [{10**20}], "edited": ""}}', '{"action": "edit", "ids": [1], "edited": 5}'),
    ],
    ids=str.__len__,
)
def test_what_is_no_request_is_put_aside_and_holds_nothing_up(rig: Rig, text: str) -> None:
    (rig.data / "dead").mkdir()
    (rig.data / "dead" / "0.json").write_text(text, "utf-8")
    (rig.data / "dead" / "1.json").mkdir()
    leave(rig.data, "drop", [1])
    take_up(rig.data, rig.progress)
    assert sorted(path.name for path in (rig.data / "dead").iterdir()) == ["0.unreadable", "1.unreadable"]
    assert [row.id for row in read_dead(rig.data)] == [2, 3]


def test_without_a_gateway_it_is_noted_and_sent_at_the_next_start_and_a_kill_after_the_yes_repeats_nothing(
    tmp_path: Path, server: RedisServer, far: Any
) -> None:
    with Rig(tmp_path, server.port, RULES) as rig:
        rig.log.publish("t", b"a")
        rig.log.publish("t", b"b")
        rig.drain()
    far.delete("list")
    assert "1 record to be sent again" in dead(rig.data, "retry", "1")
    assert "name both --pool and --reason" in dead(rig.data, "drop", "--pool", "redis.pool1", code=2)
    command = [sys.executable, "-c", KILLED_AFTER_THE_YES, str(rig.data), str(tmp_path)]
    for _ in range(2):
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            assert child.wait(20) == -9
    assert [(row.id, row.due) for row in read_dead(rig.data)] == [(1, True), (2, False)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tidegate.uplink.child", "--data", rig.data, "--conf", tmp_path, "--backend", "redis"],
        stdin=subprocess.PIPE,
    )
    wait_until(lambda: [row.id for row in read_dead(rig.data)] == [2])
    child.communicate(timeout=10)
    assert far.lrange("list", 0, -1) == ["a"]


def test_a_running_gateway_sends_what_is_retried_or_edited_and_drops_what_is_dropped(
    tmp_path: Path, server: RedisServer, far: Any
) -> None:
    rules = {"emqx_backend_redis.conf": f"backend.redis.pool1.server = 127.0.0.1:{server.port}\n{RULES}"}
    with Gateway(tmp_path, toml=TOML, files=rules) as gateway:
        client = MqttClient(gateway.port, "device")
        for payload in (b"a", b"b", b"c"):
            client.publish_and_wait("t", payload)
        wait_until(lambda: len(read_dead(gateway.data)) == 3, say=gateway.log)
        far.delete("list")
        assert "1 record dropped" in dead(gateway.data, "drop", "2")
        assert "1 record to be sent as changed" in dead(gateway.data, "edit", "3", "--set", "2=changed")
        wait_until(lambda: far.lrange("list", 0, -1) == ["changed"], say=gateway.log)
        assert "1 record to be sent again" in dead(gateway.data, "retry", "--pool", "redis.pool1", "--reason", "WRONGTYPE")
        wait_until(lambda: read_dead(gateway.data) == [], say=gateway.log)
        assert far.lrange("list", 0, -1) == ["changed", "a"]
        assert gateway.stop() == 0
    assert (counted(gateway.data, "dead_sent"), counted(gateway.data, "dead_dropped")) == (2, 1)


def test_what_waits_for_a_far_end_is_dropped_or_edited_only_while_nobody_may_be_sending_it(
    tmp_path: Path, server: RedisServer
) -> None:
    rules = {"emqx_backend_redis.conf": f"backend.redis.pool1.server = 127.0.0.1:{server.port}\n{RULES}"}
    with Rig(tmp_path, server.port, RULES) as rig:
        with server.client() as far:
            far.set("list", "somebody else's")
        for payload in (b"a", b"b", b"c"):
            rig.log.publish("t", payload)
        rig.drain()
    server.kill()
    with Gateway(tmp_path, toml=TOML, files=rules) as gateway:
        place = ("--config", str(tmp_path / "gateway.toml"))
        dead(gateway.data, "retry", "1", "2", *place)
        assert "wait until it has or is refused" in dead(gateway.data, "drop", "1", *place, code=1)
        assert "wait until it has or is refused" in dead(gateway.data, "edit", "1", "--set", "2=z", *place, code=1)
        assert gateway.stop() == 0
    assert "0 records dropped" in dead(gateway.data, "drop", "--pool", "redis.pool1", "--reason", "mended", *place)
    assert "as changed (1 waited to be sent again, and may" in dead(gateway.data, "edit", "1", "--set", "2=z", *place)
    assert "1 record dropped (1 waited to be sent again" in dead(gateway.data, "drop", "1", *place)
    (tmp_path / "gateway.toml").write_text("")
    with gateway:
        # It takes connections a moment before it answers questions.
        wait_until(lambda: gateway._log.read_text().count(" listening: ") == 2, say=gateway.log)
        status = control_ask(gateway.data / "control.sock", {"command": "status"})
        assert status["quarantine"] == [{"pool": "redis.pool1", "records": 2, "waiting": 1}]
        shown = render(status)
        assert "redis.pool1, which is not configured: 2 records, 1 wait to be sent again" in shown
        assert "redis.pool1 is not configured" in dead(gateway.data, "retry", "3", *place)
        assert "2 records dropped (2 waited to be sent again" in dead(gateway.data, "drop", "--all", *place)
        assert gateway.stop() == 0
    assert read_dead(gateway.data) == []


def test_what_waits_for_a_pool_that_was_taken_out_is_dropped_while_the_uplink_runs(rig: Rig) -> None:
    ask(rig, "retry", 1, 2)
    ask(rig, "drop", 1)
    assert [row.id for row in read_dead(rig.data)] == [1, 2, 3], "somebody may be sending it"
    rig.progress.keep_only(["redis.other"])
    ask(rig, "drop", 1, 3)
    assert [row.id for row in read_dead(rig.data)] == [2]


def test_a_message_is_edited_by_its_payload_in_options_or_the_editor(tmp_path: Path, server: RedisServer) -> None:
    with Rig(tmp_path, server.port, MESSAGES) as rig, server.client() as far:
        rig.log.publish("t", b"a")
        rig.log.publish("t", b"\xff")
        keys = [f"mqtt:msg:{msgid}" for msgid in rig.published()]
        far.mset(dict.fromkeys(keys, "x"))
        rig.drain()
        far.delete(*keys)
        assert "its fields are msgid, from" in dead(rig.data, "edit", "1", "--set", "colour=red", code=2)
        assert "qos is a number" in dead(rig.data, "edit", "1", "--set", "qos=high", code=2)
        dead(rig.data, "edit", "1", "--payload", "mended")
        assert json.loads(dead(rig.data, "show", "1"))["original"]["payload"] == "a"
        assert "nothing was changed" in dead(rig.data, "edit", "2", code=1, VISUAL="true")
        dead(rig.data, "edit", "2", VISUAL="sed -i s,/w==,AAE=,")
        rig.drain()
        assert [far.hget(key, "payload") for key in keys] == ["mended", "\0\1"]
        assert read_dead(rig.data) == []


def test_a_selection_must_be_said(rig: Rig) -> None:
    assert "say which" in dead(rig.data, "retry", code=2)
    assert "say which" in dead(rig.data, "drop", "--all", "1", code=2)
    assert len(read_dead(rig.data)) == 3


def test_a_file_of_the_first_format_is_moved_forward(tmp_path: Path) -> None:
    (tmp_path / "uplink.db").write_bytes(V1.read_bytes())
    (before,) = read_dead(tmp_path)
    progress = Progress(tmp_path)
    assert read_dead(tmp_path) == [before]
    assert (before.id, before.seq, before.due, before.edited) == (1, 3, False, None)
    assert progress.standing("redis.pool1").cursor == 7
    leave(tmp_path, "retry", [1])
    take_up(tmp_path, progress)
    due = progress.due("redis.pool1")
    progress.close()
    assert due
    assert due.data == before.original
