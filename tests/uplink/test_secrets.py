"""No mistake repeats a secret: what a person wrote wrongly is named by its key, its command or what is allowed instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.uplink.rule import Mistake, load

from .rig import LIST

LINES = [
    ("backend.redis.pool1.password hunter2", "`key = value`: backend.redis.pool1.password"),
    ("backend.redis.pool1.password: hunter2", "`key = value`: backend.redis.pool1.password"),
    ("backend.redis.pool1.password:hunter2", "`key = value`: backend.redis.pool1.password"),
    ("backend.redis.pool1.password\thunter2", "`key = value`: backend.redis.pool1.password"),
    ("hunter2", "`key = value`"),
    ("hunter2==", "unknown key: keys begin with"),
    ("backend.redis.pool1.password hunter2=", "unknown key backend.redis.pool1.password: keys begin with"),
    ("backend.redis.hook.client hunter2 = {}", "backend.redis.hook.client: a rule is written"),
]
SERVERS = [
    "admin:hunter2@127.0.0.1",
    "redis://:hunter2@127.0.0.1:6379",
    ":hunter2@127.0.0.1:6379",
    "rediss://127.0.0.1:6379",
    "redis://:hun,ter2@127.0.0.1:6379",
    "hunter2/127.0.0.1:6379",
    "admin:hunter2:6379",
    "127.0.0.1 hunter2:6379",
    "127.0.0.1:6379/hunter2",
    "127.0.0.1:6379:hunter2",
    "127.0.0.1:\u00b2",
    "127.0.0.1:65536",
    ":6379",
]
COMMANDS = [
    ("AUTH hunter2  x", 'command "AUTH": arguments are separated by exactly one space'),
    (" AUTH hunter2", 'command "AUTH": arguments are separated by exactly one space'),
    ("AUTH hunter2", 'command "AUTH": AUTH cannot run inside a batch'),
    ("SET hunter2 ${paylod}", 'command "SET": unknown placeholder ${paylod}; did you mean "payload"?'),
]


def mistakes(tmp_path: Path, line: str) -> tuple[Mistake, ...]:
    path = tmp_path / "emqx_backend_redis.conf"
    path.write_text(line + "\n", encoding="utf-8")
    return load(path, "redis").mistakes


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_of_a_line_without_its_equals_sign_only_the_key_is_shown(tmp_path: Path, line: str, expected: str) -> None:
    (mistake,) = mistakes(tmp_path, line)
    assert expected in mistake.text
    assert "hunter2" not in mistake.text


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_is_host_and_port_alone_and_anything_else_is_refused_unseen(tmp_path: Path, server: str) -> None:
    mistake = mistakes(tmp_path, f"backend.redis.pool1.server = {server}")[0]
    assert mistake.text == (
        "pool1.server: expected host:port alone, such as 127.0.0.1:6379, without redis://, user, password or database"
    )


@pytest.mark.parametrize(
    ("server", "host"), [("127.0.0.1:6379", "127.0.0.1"), ("my_redis-1.lan:6379", "my_redis-1.lan"), ("[::1]:6379", "::1")]
)
def test_names_and_addresses_of_both_families_are_servers(tmp_path: Path, server: str, host: str) -> None:
    path = tmp_path / "emqx_backend_redis.conf"
    path.write_text(f"backend.redis.pool1.server = {server}\n{LIST}")
    rules = load(path, "redis")
    assert rules.mistakes == ()
    assert rules.pools[0].settings["server"] == ((host, 6379),)


@pytest.mark.parametrize(("command", "expected"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_of_a_command_only_its_first_word_is_shown(tmp_path: Path, command: str, expected: str) -> None:
    action = f'{{"action": {{"commands": ["{command}"]}}, "pool": "pool1"}}'
    rule = f"backend.redis.pool1.database = 0\nbackend.redis.hook.message.publish.1 = {action}"
    (mistake,) = mistakes(tmp_path, rule)
    assert expected in mistake.text
    assert "hunter2" not in mistake.text
