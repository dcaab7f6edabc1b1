"""Rule files of the SQL backends: the specification's own blocks, the mistakes only they can have, and what is warned of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tidegate.uplink.vocabulary import DRIVERS

from .test_specification import block as specified
from .test_specification import load_text

SERVER = "backend.pgsql.pool1.server = 127.0.0.1:5432\n"
RULE = 'backend.pgsql.hook.message.publish.1 = {"action": {"function": "on_message_publish"}, "pool": "pool1"}\n'


@pytest.mark.parametrize(("backend", "user", "port"), [("mysql", "user", 3306), ("pgsql", "username", 5432)])
def test_the_specification_s_own_blocks_load_verbatim(tmp_path: Path, backend: str, user: str, port: int) -> None:
    rules = load_text(tmp_path, backend, specified(backend))
    assert rules.mistakes == ()
    (pool,) = rules.pools
    assert (pool.settings["server"], pool.settings[user]) == ((("127.0.0.1", port),), "root")
    assert (pool.settings["password"], pool.settings["database"], pool.settings["ssl"]) == ("public", "mqtt", False)
    assert [rule.function for rule in rules.rules if rule.function] == [
        "on_client_connected",
        "on_client_disconnected",
        "on_subscribe_lookup",
        "on_message_fetch",
        "on_retain_lookup",
        "on_message_publish",
        "on_message_retain",
        "on_retain_delete",
        "on_message_acked",
    ]
    assert [statement.names for rule in rules.rules for statement in rule.statements] == [("clientid",), ("clientid", "topic")]


MISTAKES = [
    ("backend.pgsql.pool1.ssl = yes", 'pool1.ssl: "yes" is neither true nor false'),
    ("backend.pgsql.pool1.cacertfile = nowhere.pem", "nowhere.pem cannot be read: No such file"),
    ("backend.pgsql.pool1.binary_payload = hexx", 'unknown value "hexx"; did you mean "hex"?'),
    ("backend.pgsql.pool1.user = me", 'unknown key "user"; did you mean "username"?'),
    ('"insert into t values(${paylod})"', 'unknown placeholder ${paylod}; did you mean "payload"?'),
    ("\"insert into t values('${payload}')\"", "a placeholder stands inside quotes: write it without them"),
    ('"insert into t values(1); delete from t"', "one statement for each text"),
    ('"COMMIT"', "commit cannot run inside the transaction of a batch"),
    ('"/* all of it */ truncate t"', "truncate cannot run inside the transaction of a batch"),
    ('"insert into t values(${payload"', "no closing brace"),
]


@pytest.mark.parametrize(("line", "expected"), MISTAKES, ids=[expected for _, expected in MISTAKES])
def test_a_mistake_in_a_sql_file_is_named(tmp_path: Path, line: str, expected: str) -> None:
    if not line.startswith("backend"):
        line = f'backend.pgsql.hook.message.publish.1 = {{"action": {{"sql": [{line}]}}, "pool": "pool1"}}'
    (mistake,) = load_text(tmp_path, "pgsql", SERVER + line + "\n").mistakes
    assert mistake.line == 2
    assert expected in mistake.text


def test_what_only_looks_like_a_second_statement_or_a_placeholder_is_none(tmp_path: Path) -> None:
    sql = "insert into t values('a; b', \\\"it's\\\", ${payload}) -- ; the end"
    line = f'backend.mysql.hook.message.publish.1 = {{"action": {{"sql": "{sql}"}}, "pool": "pool1"}}\n'
    rules = load_text(tmp_path, "mysql", SERVER.replace("pgsql", "mysql") + line)
    assert [str(mistake) for mistake in rules.mistakes] == []
    assert rules.rules[0].statements[0].names == ("payload",)


def test_a_line_without_checks_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    (warning,) = load_text(tmp_path, "pgsql", SERVER + "backend.pgsql.pool1.ssl = true\n" + RULE).warnings
    assert "the server is not checked" in warning.text
    (mistake,) = load_text(tmp_path, "pgsql", SERVER + "backend.pgsql.pool1.cacertfile = ca.pem\n" + RULE).mistakes
    assert "has no effect without backend.pgsql.pool1.ssl = true" in mistake.text


def test_a_driver_that_is_not_installed_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRIVERS, "pgsql", ("not_there", "postgresql"))
    (mistake,) = load_text(tmp_path, "pgsql", SERVER + RULE).mistakes
    program = f"{sys.prefix}/bin/pip install '.[postgresql]'"  # Of this environment and this clone: neither is on any index.
    assert mistake.text == f"the driver not_there is not installed: {program} in the clone of Tidegate"


LOOKUP = '{kind}.hook.session.created.1 = {{"action": {{"function": "on_subscribe_lookup"}}, "pool": "pool1"}}'
PUBLISH = '{kind}.hook.message.publish.1 = {{"action": {{"function": "on_message_publish"}}, "pool": "pool1"}}'


@pytest.mark.parametrize(
    ("kind", "size", "rules", "settings", "expected"),
    [
        ("pgsql", 1, (PUBLISH,), (), ""),
        ("pgsql", 0, (PUBLISH,), (), "0 is too small for these rules: one writes: set 1 or more"),
        (
            "mysql",
            1,
            (PUBLISH, LOOKUP),
            (),
            "one looks things up: set 2 or more; or take out the rules that read back",
        ),
        ("mysql", 2, (PUBLISH, LOOKUP), (), ""),
        ("redis", 2, (LOOKUP,), (), "one writes, one looks things up, one listens to the channel: set 3 or more"),
        ("redis", 2, (LOOKUP,), ("channel =",), ""),
        ("redis", 1, (PUBLISH,), (), ""),
    ],
)
def test_a_pool_size_too_small_for_what_is_never_shared(
    tmp_path: Path, kind: str, size: int, rules: tuple[str, ...], settings: tuple[str, ...], expected: str
) -> None:
    lines = [f"backend.{kind}.pool1.pool_size = {size}", *(f"backend.{kind}.pool1.{line}" for line in settings)]
    lines += [f"backend.{rule.format(kind=kind)}" for rule in rules]
    mistakes = load_text(tmp_path, kind, "\n".join(lines)).mistakes
    assert [mistake.line for mistake in mistakes] == ([1] if expected else [])
    assert expected in "".join(map(str, mistakes))
