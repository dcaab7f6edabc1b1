"""Reading rule files: the specification's own text, every mistake at once with its nearest name, and what must be logged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tidegate.store.entry import (
    ACKED,
    CONNECTED,
    DISCONNECTED,
    POSITION,
    PUBLISH,
    SESSION_CREATED,
    SUBSCRIBED,
    UNSUBSCRIBED,
    Want,
)
from tidegate.uplink.rule import SHIPPED, RuleFile, load, wants
from tidegate.uplink.vocabulary import FUNCTIONS, POOL_KEYS

BLOCK = Path(__file__).parent / "specification" / "emqx_backend_redis.conf"
SERVER = "backend.redis.pool1.server = 127.0.0.1:6379\n"
RULE = 'backend.redis.hook.message.publish.1 = {"action": {"function": "on_message_publish"}, "pool": "pool1"}\n'


def read(tmp_path: Path, text: str, backend: str = "redis") -> RuleFile:
    path = tmp_path / f"emqx_backend_{backend}.conf"
    path.write_text(text, encoding="utf-8")
    return load(path, backend)


def test_only_rules_that_work_are_logged_for() -> None:
    reading = {Want(kind, one, 0, False) for kind in (SUBSCRIBED, UNSUBSCRIBED) for one in ("queue/#", "pubsub/#", "")}
    assert set(wants([load(BLOCK, "redis")])) == reading | {
        Want(CONNECTED, "", 0, False),
        Want(DISCONNECTED, "", 0, False),
        Want(SESSION_CREATED, "", 0, False),
        Want(UNSUBSCRIBED, "#", 0, False),
        Want(ACKED, "queue/#", 0, False),
        Want(POSITION, "pubsub/#", 0, False),
        Want(PUBLISH, "#", 1, False),
        Want(PUBLISH, "#", 0, True),
    }


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_every_function_of_the_specification_is_a_known_name(tmp_path: Path, function: str) -> None:
    event = FUNCTIONS[function][0]
    line = f'backend.redis.hook.{event}.1 = {{"action": {{"function": "{function}"}}, "pool": "pool1"}}\n'
    rules = read(tmp_path, SERVER + line)
    assert rules.mistakes == ()
    assert [rule.function for rule in rules.rules] == [function]


@pytest.mark.parametrize(
    ("published", "stored", "warned"),
    [("#", "#", True), ("a/b", "a/#", True), ("#", "log/#", False), ("a/#", "a/+", False), ("a", "b", False)],
)
def test_who_stores_twice_is_warned_where_a_rule_adds_nothing(
    tmp_path: Path, published: str, stored: str, warned: bool
) -> None:
    first = RULE.replace("{", f'{{"topic": "{published}", ', 1)
    second = RULE.replace("publish.1", "publish.2").replace("on_message_publish", "on_message_store")
    warnings = read(tmp_path, SERVER + first + second.replace("{", f'{{"topic": "{stored}", ', 1)).warnings
    text = "on_message_store of line 3 stores these messages too, and those of QoS 0: each is stored once; take this"
    assert [(one.line, one.text) for one in warnings] == [(2, f"{text} on_message_publish out")] * warned


PUBLISH_1 = "backend.redis.hook.message.publish.1 = {"
FUNCTION = '"action": {"function": "on_message_publish"}, "pool": "pool1"}'
MISTAKES = [
    ("backend.redis.pool1.sever = 127.0.0.1:6379", 'unknown key "sever"; did you mean "server"?'),
    ("backend.redis.pool1.database = one", 'pool1.database: "one" is not a number'),
    ("backend.redis.pool1.server = localhost", "pool1.server: expected host:port alone, such as 127.0.0.1:6379"),
    ("backend.redis.pool1.server = a:1, b:2", "pool1.server: type single has one server"),
    ("backend.redis.pool1.timeout = 10", 'pool1.timeout: "10" is not a time such as 500ms or 10s'),
    ("backend.redis.pool1.type = singel", 'pool1.type: unknown value "singel"; did you mean "single"?'),
    ("backend.redis.pool1.type = sentinel", "pool1.type: type sentinel needs the master's name"),
    ("backend.redis.pool1.ssl = yes", 'pool1.ssl: "yes" is neither true nor false'),
    ("backend.redis.pool1.cacertfile = nowhere.crt", "nowhere.crt cannot be read: No such file or directory"),
    ("backend.redis.pool1.cacertfile = /dev/null", "has no effect without backend.redis.pool1.ssl = true"),
    ("backend.redis.pool1.password_file = nowhere", "cannot be read"),
    ("backend.redsi.pool1.server = 127.0.0.1:6379", 'unknown backend "redsi"; did you mean "redis"?'),
    ("backend.redis.server = 127.0.0.1:6379", "the pool is missing: backend.redis.pool1.server"),
    ("backend.redis.timerange = 20s", 'unknown key "timerange"'),
    ("backend.mysql.pool1.server = 127.0.0.1:3306", "a setting of mysql does not belong in the file of redis"),
    ("this is no setting", "neither a comment nor `key = value`"),
    ("bakend.redis.pool1.server = 1", "unknown key bakend.redis.pool1.server"),
    ("backend.redis.hook.message.publish = {}", "a rule is written backend.<backend>.hook.<event>.<number>"),
    ('backend.redis.hook.message.publsh.1 = {"action": {"function": "on_message_publish"}, "pool": "pool1"}',
     'unknown event "message.publsh"; did you mean "message.publish"?'),
    ("backend.redis.hook.message.publish.1 = {", "the rule is not valid JSON at character 2"),
    ("backend.redis.hook.message.publish.1 = []", "a rule is an object"),
    ('backend.redis.hook.message.publish.1 = {"action": {"function": "on_mesage_publish"}, "pool": "pool1"}',
     'unknown function "on_mesage_publish"; did you mean "on_message_publish"?'),
    ('backend.redis.hook.message.publish.1 = {"action": {"function": "on_client_connected"}, "pool": "pool1"}',
     "on_client_connected belongs to client.connected, not to message.publish"),
    ('backend.redis.hook.message.publish.1 = {"action": {"function": "on_message_publish"}, "pool": "poll1"}',
     'unknown pool "poll1"; did you mean "pool1"?'),
    ('backend.redis.hook.message.publish.1 = {"action": {"function": "on_message_publish"}}', '"pool" is missing'),
    ('backend.redis.hook.message.publish.1 = {"action": {"sql": ["x"]}, "pool": "pool1"}',
     'unknown action "sql"; known: commands, function'),
    ('backend.redis.hook.message.publish.1 = {"pool": "pool1"}', '"action" holds exactly one of function, commands'),
    ('backend.redis.hook.message.publish.1 = {"tpoic": "a", "action": {"function": "on_message_publish"}, "pool": "pool1"}',
     'unknown option "tpoic"; did you mean "topic"?'),
    ('backend.redis.hook.message.publish.1 = {"topic": "a/#/b", "action": {"function": "on_message_publish"}, "pool": "pool1"}',
     '"topic" "a/#/b" is no topic filter: # stands alone in the last level'),
    ('backend.redis.hook.message.publish.1 = {"action": {"function": "on_message_publish"}, "expired_time": -1, "pool": "pool1"}',  # noqa: E501
     '"expired_time" is a number of seconds greater than 0'),
    ('backend.redis.hook.message.publish.1 = {"action": {"function": "on_message_publish"}, "payload_format": "xml", "pool": "pool1"}',  # noqa: E501
     'unknown payload_format "xml"'),
    ('backend.redis.hook.session.subscribed.1 = {"action": {"function": "on_message_fetch"}, "offline_opts": {"time_rnge": "2h"}, "pool": "pool1"}',  # noqa: E501
     'unknown option "time_rnge" in offline_opts; did you mean "time_range"?'),
    ('backend.redis.hook.session.subscribed.1 = {"action": {"function": "on_message_fetch"}, "offline_opts": {"time_range": "2 h"}, "pool": "pool1"}',  # noqa: E501
     '"time_range" is a time such as'),
    ('backend.redis.hook.message.publish.1 = {"action": {"commands": ["SET a ${paylod}"]}, "pool": "pool1"}',
     'unknown placeholder ${paylod}; did you mean "payload"?'),
    ('backend.redis.hook.client.connected.1 = {"action": {"commands": ["SET a ${topic}"]}, "pool": "pool1"}',
     "unknown placeholder ${topic}; known: clientid"),
    ('backend.redis.hook.message.publish.1 = {"action": {"commands": ["SET a  b"]}, "pool": "pool1"}', "exactly one space"),
    ('backend.redis.hook.message.publish.1 = {"action": {"commands": ["SET a ${topic"]}, "pool": "pool1"}', "no closing brace"),
    ('backend.redis.hook.message.publish.1 = {"action": {"commands": ["HSET x m:${message}"]}, "pool": "pool1"}',
     "${message} stands alone"),
    ('backend.redis.hook.message.publish.1 = {"action": {"commands": ["BLPOP x 0"]}, "pool": "pool1"}',
     "BLPOP cannot run inside a batch"),
    ('backend.redis.hook.message.publish.1 = {"action": {"commands": []}, "pool": "pool1"}', '"commands" is a list of texts'),
    (f'{PUBLISH_1}"pool": "a", {FUNCTION}', 'the rule is not valid JSON: "pool" stands there twice'),
    (f'{PUBLISH_1}"topic": "\\ud800", {FUNCTION}', r"a \u escape stands for half a character"),
    (f'{PUBLISH_1}"topic": ' + "[" * 100_000, "too many brackets inside one another"),
    (f'{PUBLISH_1}"expired_time": ' + "9" * 5000 + "}", "a number has too many digits"),
    (f'{PUBLISH_1}"expired_time": NaN}}', "NaN is no value"),
    (f'{PUBLISH_1}"expired_time": 1e9, {FUNCTION}', '"expired_time" is a number of seconds greater than 0, at most 3153600000'),
    (f'{PUBLISH_1}"topic": "$share/g/a", {FUNCTION}', "a rule sees topics without $share/GROUP/, leave that out"),
    (f'{PUBLISH_1}"offline_opts": {{"max_returned_count": true}}, {FUNCTION}', '"max_returned_count" is a number, 0 or more'),
    ("backend.redis.hook.message.publish.9999999999 = {}", "a rule is written backend.<backend>.hook.<event>.<number>"),
    ("backend.redis.pool1.timeout = 99999999m", '"99999999m" is not a time such as 500ms or 10s, a day at most'),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), MISTAKES, ids=[expected for _, expected in MISTAKES])
def test_a_mistake_is_named_with_file_line_and_what_is_known(tmp_path: Path, line: str, expected: str) -> None:
    rules = read(tmp_path, SERVER + line + "\n")
    (mistake,) = rules.mistakes
    assert str(mistake).startswith(f"{tmp_path}/emqx_backend_redis.conf:2: ")
    assert expected in mistake.text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("backend.redis.msg.expired_after = 3600", 'msg.expired_after has no effect here: say it by "expired_time" in each'),
        ("backend.redis.time_range = 20s", 'time_range has no effect here: say it by "offline_opts" in each rule'),
        ("backend.redis.max_returned_count = 500", 'max_returned_count has no effect here: say it by "offline_opts"'),
    ],
)
def test_what_emqx_s_files_say_for_all_rules_is_a_warning_that_names_the_option(tmp_path: Path, line: str, text: str) -> None:
    found = read(tmp_path, SERVER + line + "\n" + RULE)
    assert (found.mistakes, [pool.name for pool in found.pools]) == ((), ["pool1"])
    (warning,) = found.warnings
    assert (warning.line, warning.text[: len(text)]) == (2, text)


def test_all_mistakes_are_reported_together_in_order_of_lines(tmp_path: Path) -> None:
    rules = read(tmp_path, SERVER + "".join(line + "\n" for line, _ in MISTAKES))
    lines = [mistake.line for mistake in rules.mistakes]
    assert lines == sorted(lines)
    # Later settings of a key replace earlier ones, so what only the whole shows is said once.
    whole = {4 + 1, 8, 9}
    assert set(range(2, len(MISTAKES) + 2)) - set(lines) <= whole


def test_every_mistake_of_one_rule_is_told_at_once(tmp_path: Path) -> None:
    line = (
        'backend.redis.hook.message.publsh.1 = {"topic": "a#", "action": {"function": "on_mesage_store"}, "poll": "pool1",'
        ' "pool": "pool2", "expired_time": 0, "offline_opts": {"time_range": 2}, "payload_format": []}\n'
    )
    texts = [mistake.text for mistake in read(tmp_path, SERVER + line).mistakes]
    assert [text.split(";")[0] for text in texts] == [
        'unknown event "message.publsh"',
        'unknown option "poll"',
        'unknown function "on_mesage_store"',
        '"time_range" is a time such as "30s", "90m", "2h" or "7d"',
        '"topic" "a#" is no topic filter: # stands alone in the last level',
        'unknown pool "pool2"',
        '"expired_time" is a number of seconds greater than 0, at most 3153600000',
        'unknown payload_format "[]"',
    ]


def test_a_missing_file_is_a_mistake_except_for_sqlite(tmp_path: Path) -> None:
    (mistake,) = load(tmp_path / "emqx_backend_redis.conf", "redis").mistakes
    assert "cannot be read: No such file or directory; create it" in mistake.text
    shipped = load(tmp_path / "emqx_backend_sqlite.conf", "sqlite")
    assert shipped.mistakes == ()
    assert shipped.path == SHIPPED / "emqx_backend_sqlite.conf"


def test_a_rule_whose_pool_is_not_set_up_is_told_the_nearest_one_or_how_to_make_it(tmp_path: Path) -> None:
    (near,) = read(tmp_path, SERVER + RULE.replace('"pool1"', '"pol1"')).mistakes
    assert (near.line, near.text) == (2, 'unknown pool "pol1"; did you mean "pool1"?')
    (none,) = read(tmp_path, RULE).mistakes
    assert none.text == 'unknown pool "pool1"; no pool is set up: write backend.redis.pool1.server = ...'


def test_a_pool_that_no_rule_names_is_warned_of(tmp_path: Path) -> None:
    rules = read(tmp_path, SERVER + SERVER.replace("pool1", "pool2") + RULE)
    assert rules.mistakes == ()
    assert [(warning.line, warning.text) for warning in rules.warnings] == [(2, "no rule names pool2, so nothing goes there")]


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, letter: str) -> None:
    rules = read(tmp_path, f"# a{letter}b\n{SERVER}backend.redis.pool1.password = c{letter}d\n" + RULE)
    assert rules.mistakes == ()
    assert rules.pools[0].settings["password"] == f"c{letter}d"
    assert [rule.line for rule in rules.rules] == [4]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("backend.redis.pool1.database = ²", '"²" is not a number'),
        ("backend.redis.pool1.timeout = ²s", '"²s" is not a time'),
        (RULE.replace("{", '{"offline_opts": {"time_range": "²h"}, ', 1), '"time_range" is a time such as'),
    ],
)
def test_a_digit_that_is_no_number_is_a_mistake(tmp_path: Path, line: str, words: str) -> None:
    (mistake,) = read(tmp_path, f"{SERVER}{line}\n{RULE.replace('publish.1', 'publish.2')}").mistakes
    assert mistake.line == 2
    assert words in mistake.text


def test_two_passwords_are_a_mistake_that_names_both_lines(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2\n")
    for first, second in (("password = x", "password_file = secret"), ("password_file = secret", "password = x")):
        text = f"backend.redis.pool1.{first}\n{SERVER}backend.redis.pool1.{second}\n{RULE}"
        (mistake,) = read(tmp_path, text).mistakes
        assert mistake.line == 3
        assert mistake.text == "pool1: password and password_file are both given, in lines 1 and 3: take one out"


def test_a_repeated_rule_replaces_the_first_with_a_warning(tmp_path: Path) -> None:
    rules = read(tmp_path, SERVER + RULE + RULE.replace("{", '{"topic": "a", ', 1))
    assert [rule.topic_filter for rule in rules.rules] == ["a"]
    assert "message.publish.1 again: this one replaces line 2" in rules.warnings[0].text


def test_a_password_that_everybody_can_read_is_warned_of_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "emqx_backend_redis.conf").touch(0o644)
    rules = read(tmp_path, SERVER + "backend.redis.pool1.password = hunter2\n" + RULE)
    assert "everybody on this machine can read the password" in rules.warnings[0].text
    assert rules.pools[0].settings["password"] == "hunter2"
    assert "hunter2" not in repr(rules)


def test_a_password_file_is_read_beside_the_rule_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2\n")
    rules = read(tmp_path, SERVER + "backend.redis.pool1.password_file = secret\n" + RULE)
    assert rules.mistakes == ()
    assert rules.pools[0].settings["password_file"] == "hunter2"


def test_commands_want_every_qos_and_messages_from_qos_1(tmp_path: Path) -> None:
    commands = 'backend.redis.hook.message.publish.2 = {"topic": "a/+", "action": {"commands": ["INCR x"]}, "pool": "pool1"}\n'
    assert wants([read(tmp_path, SERVER + RULE + commands)]) == [
        Want(PUBLISH, "", 1, False),
        Want(PUBLISH, "a/+", 0, False),
    ]


def test_storing_every_qos_wants_every_qos(tmp_path: Path) -> None:
    server = "backend.pgsql.pool1.server = 127.0.0.1:5432\n"
    rule = RULE.replace("redis", "pgsql").replace("on_message_publish", "on_message_store")
    assert wants([read(tmp_path, server + rule, "pgsql")]) == [Want(PUBLISH, "", 0, False)]


def test_a_file_with_a_mistake_wants_everything_its_rules_could_have_wanted(tmp_path: Path) -> None:
    broken = (
        'backend.redis.hook.message.acked.1 = {"topic": "a", "action": {"commands": ["SET x ${nothing}"]}, "pool": "pool1"}\n'
    )
    assert wants([read(tmp_path, SERVER + RULE.replace("{", '{"topic": "a", ', 1) + broken)]) == [
        Want(PUBLISH, "", 0, False),
        Want(ACKED, "", 0, False),
        Want(POSITION, "", 0, False),
    ]


def test_a_file_with_a_mistake_goes_on_wanting_what_it_wanted_when_it_was_good(tmp_path: Path) -> None:
    """What is misspelt may mean anything: nothing that was kept until now may be let go for it."""
    half = read(tmp_path, SERVER + RULE.replace("message.publish", "clint.cnected"))
    good = [Want(DISCONNECTED, "", 0, False), Want(SESSION_CREATED, "#", 0, False)]
    assert set(wants([half], {"redis": good})) >= {Want(CONNECTED, "", 0, False), *good}


def test_a_file_nobody_can_read_wants_what_it_wanted_when_it_was_good(tmp_path: Path) -> None:
    unreadable = read(tmp_path, "?")
    good = [Want(SUBSCRIBED, "#", 0, False), Want(SESSION_CREATED, "#", 0, False)]
    assert wants([unreadable], {"redis": good}) == good
    assert set(wants([unreadable])) == {
        Want(PUBLISH, "", 1, False),
        Want(CONNECTED, "", 0, False),
        Want(DISCONNECTED, "", 0, False),
    }


@pytest.mark.parametrize("backend", ["redis", "mysql", "pgsql"])
def test_the_shipped_file_shows_every_key_with_its_default(backend: str) -> None:
    path = SHIPPED / f"emqx_backend_{backend}.conf"
    rules = load(path, backend)
    assert rules.mistakes == rules.warnings == ()
    shown = set(re.findall(rf"^(?:## )?backend\.{backend}\.pool1\.(\w+) =", path.read_text(), re.MULTILINE))
    assert shown == set(POOL_KEYS[backend])
    assert rules.pools[0].settings == {name: key.default for name, key in POOL_KEYS[backend].items()}


@pytest.mark.parametrize("backend", ["redis", "sqlite", "mysql", "pgsql"])
def test_the_shipped_rules_store_presence_messages_and_retained(backend: str) -> None:
    rules = load(SHIPPED / f"emqx_backend_{backend}.conf", backend)
    assert rules.mistakes == rules.warnings == ()
    assert [rule.function for rule in rules.rules] == [
        "on_client_connected",
        "on_client_disconnected",
        "on_message_publish",
        "on_message_retain",
        "on_retain_delete",
    ]


@pytest.mark.parametrize("backend", ["redis", "sqlite", "mysql", "pgsql"])
def test_every_rule_that_is_commented_out_in_a_shipped_file_loads_too(tmp_path: Path, backend: str) -> None:
    text = (SHIPPED / f"emqx_backend_{backend}.conf").read_text()
    active = re.sub(r"^## (backend\.\w+\.hook\.\w+\.\w+\.\d)", r"\1", text, flags=re.MULTILINE)
    rules = read(tmp_path, active, backend)
    assert rules.mistakes == ()
    assert len(rules.rules) > 8
