"""What a rule means: which topics concern it, in what order rules run, what has no effect; nothing in a file is a crash."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tidegate.gateway.routing import Router
from tidegate.store.topic import FilterTree, covers, filters_overlap, matches, topic_filter_fault, topic_name_fault
from tidegate.uplink.conf import Mistake
from tidegate.uplink.rule import load, wants
from tidegate.uplink.vocabulary import EVENTS, POOL_KEYS

from .test_rule import RULE, SERVER, read

SQL = (
    "backend.mysql.pool1.server = 127.0.0.1:3306\n"
    'backend.mysql.hook.{event}.1 = {{"action": {{"sql": {sql}}}, "pool": "pool1"}}\n'
)
STATEMENTS = [
    ("message.publish", "insert into t values (${paylod})", 'unknown placeholder ${paylod}; did you mean "payload"?'),
    ("client.connected", "insert into t values (${topic})", "unknown placeholder ${topic}; known: clientid"),
    ("message.publish", "insert into t values (${message})", "unknown placeholder ${message}"),
    ("message.publish", "insert into t values ('${payload}')", "write it without them, it is bound as a value"),
    ("message.publish", "insert into t values ('it''s ${payload}')", "write it without them, it is bound as a value"),
    ("message.publish", "insert into t values (${payload)", "a placeholder has no closing brace"),
]


@pytest.mark.parametrize(("event", "statement", "words"), STATEMENTS, ids=[words for *_, words in STATEMENTS])
def test_a_statement_s_placeholders_are_checked_when_it_is_read(tmp_path: Path, event: str, statement: str, words: str) -> None:
    file = read(tmp_path, SQL.format(event=event, sql=json.dumps([statement])), "mysql")
    (mistake,) = [mistake for mistake in file.mistakes if mistake.line]
    assert (mistake.line, mistake.text.startswith('sql "insert": ')) == (2, True)
    assert words in mistake.text


def test_a_statement_alone_is_a_list_of_one(tmp_path: Path) -> None:
    statement = "insert into t values ('it''s', ${payload}) -- a comment"
    file = read(tmp_path, SQL.format(event="message.publish", sql=json.dumps(statement)), "mysql")
    assert [mistake for mistake in file.mistakes if mistake.line] == []
    assert [[one.text for one in rule.statements] for rule in file.rules] == [[statement]]


def test_a_time_series_has_one_function(tmp_path: Path) -> None:
    rule = 'backend.influxdb.hook.client.connected.1 = {"action": {"function": "on_client_connected"}, "pool": "pool1"}\n'
    file = read(tmp_path, "backend.influxdb.pool1.server = 127.0.0.1:8089\n" + rule, "influxdb")
    assert [mistake.text for mistake in file.mistakes if mistake.line] == [
        "influxdb has no function on_client_connected; known: on_message_publish"
    ]


def test_a_name_of_any_length_with_anything_in_it_does_no_harm_when_shown(tmp_path: Path) -> None:
    name = "\x1b[31m" + "x" * 100_000
    (mistake,) = read(tmp_path, SERVER + RULE.replace("{", json.dumps({name: 1})[:-1] + ", ", 1)).mistakes
    shown = str(mistake)
    assert len(shown) < 600
    assert shown.isprintable()
    assert 'unknown option "\\x1b[31mxxx' in shown


def test_an_option_without_effect_is_warned_of(tmp_path: Path) -> None:
    connected, publish = "backend.redis.hook.client.connected", "backend.redis.hook.message.publish"
    pool, command = '"pool": "pool1"}\n', '"action": {"commands": "INCR x"}'
    text = (
        f'{SERVER}{connected}.1 = {{"topic": "a", "action": {{"function": "on_client_connected"}}, {pool}'
        f'{publish}.1 = {{"expired_time": 1, "action": {{"function": "on_retain_delete"}}, {pool}'
        f'{publish}.2 = {{"payload_format": "plain_text", {command}, {pool}'
        f'{publish}.3 = {{"offline_opts": {{}}, {command}, {pool}'
    )
    assert [(warning.line, warning.text) for warning in read(tmp_path, text).warnings] == [
        (2, '"topic" has no effect: client.connected has none'),
        (3, '"expired_time" has no effect here: it goes with on_message_publish, on_message_store, on_message_retain'),
        (4, '"payload_format" has no effect in the file of redis: it belongs to mongo'),
        (
            5,
            '"offline_opts" has no effect here: it goes with on_message_fetch, on_message_fetch_for_queue,'
            " on_message_fetch_for_pubsub",
        ),
    ]


def test_a_file_that_is_no_text_is_told_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "emqx_backend_redis.conf"
    path.write_bytes(SERVER.encode() + b"# caf\xe9\n" + RULE.encode())
    (mistake,) = load(path, "redis").mistakes
    assert str(mistake) == f"{path}:2: is not UTF-8 text; save the file as UTF-8"


@pytest.mark.parametrize(("topic", "twice"), [("a/#", True), ("+/b", True), ("b/#", False)])
def test_storing_the_same_messages_by_two_rules_is_warned_of(tmp_path: Path, topic: str, twice: bool) -> None:
    store = RULE.replace("publish.1", "publish.2").replace("on_message_publish", "on_message_store")
    text = SERVER + RULE.replace("{", '{"topic": "a/b", ', 1) + store.replace("{", f'{{"topic": "{topic}", ', 1)
    warnings = [warning for warning in read(tmp_path, text).warnings if "stored once" in warning.text]
    assert [warning.line for warning in warnings] == [2] * twice


def test_rules_of_an_event_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    numbers = (10, 2, 1, 9)
    text = SERVER + "".join(RULE.replace("publish.1", f"publish.{number}") for number in numbers)
    rules = read(tmp_path, text).rules
    assert [rule.number for rule in rules] == [1, 2, 9, 10]
    assert [rule.line for rule in rules] == [4, 3, 5, 2]


CONCERNS = [
    ("session.subscribed", "queue/#", "queue/a", True),
    ("session.subscribed", "queue/#", "queue/+", True),
    ("session.subscribed", "queue/#", "#", False),
    ("session.subscribed", "queue/#", "$share/group/queue/a", True),
    ("session.unsubscribed", "queue/+", "$share/group/queue/+", True),
    ("session.subscribed", "#", "$share/group/$SYS/a", False),
    ("session.subscribed", "#", "$SYS/#", False),
    ("session.subscribed", "$SYS/#", "$SYS/#", True),
    ("message.publish", "+/a", "$x/a", False),
    ("message.publish", "$x/#", "$x/a", True),
    ("message.acked", "", "$x/a", True),
]


@pytest.mark.parametrize(("event", "topic_filter", "topic", "concerned"), CONCERNS)
def test_a_rule_concerns_topics_and_subscriptions(
    tmp_path: Path, event: str, topic_filter: str, topic: str, concerned: bool
) -> None:
    option = f'"topic": "{topic_filter}", ' if topic_filter else ""
    line = f'backend.redis.hook.{event}.1 = {{{option}"action": {{"commands": ["INCR x"]}}, "pool": "pool1"}}\n'
    (rule,) = read(tmp_path, SERVER + line).rules
    assert rule.concerns(topic) is concerned


# -- properties ------------------------------------------------------------------------------------------------------

_WORDS = """
backend redis mysql cassa ecql hook pool1 server password message publish session subscribed 1 127.0.0.1:6379 topic action
function commands sql on_message_publish ${topic} # + a/b $share/g/x expired_time offline_opts time_range 2h null true -1
1e400 \\ud800
"""
WORDS = _WORDS.split()
MARKS = [".", "=", " = ", "{", "}", "[", "]", ":", ",", '"', "\n", " ", "\x00", "\ufeff", "\u2028", "'"]
PIECES = st.lists(st.sampled_from(WORDS + MARKS), max_size=60).map(lambda pieces: "".join(pieces).encode())
BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
TEXTS = st.text(st.sampled_from("${}'\"`;-/* topic\n\0é"), max_size=20)
ACTIONS = st.builds(
    lambda key, texts: {"action": {key: texts}, "pool": "pool1"}, st.sampled_from(["sql", "commands", "cql"]), st.lists(TEXTS)
)
LINES = st.builds(
    lambda backend, event, body: f"backend.{backend}.hook.{event}.1 = {json.dumps(body)}\n".encode(errors="replace"),
    st.sampled_from(["redis", "mysql", "cassa"]),
    st.sampled_from(["message.publish", "session.subscribed", "client.connected", "x"]),
    BODIES | ACTIONS,
)
FILES = st.lists(st.binary(max_size=80) | PIECES | LINES, max_size=5).map(b"\n".join)


@given(FILES, st.sampled_from(sorted(POOL_KEYS)))
@example(b"backend.redis.pool1.password_file = a\x00b", "redis")
@example(b"backend.redis.pool1.database = " + b"9" * 5000, "redis")
def test_nothing_in_a_file_is_more_than_a_mistake_with_its_line(text: bytes, backend: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"emqx_backend_{backend}.conf"
        path.write_bytes(text)
        file = load(path, backend)
    lines = text.count(b"\n") + 1
    for told in (*file.mistakes, *file.warnings):
        assert isinstance(told, Mistake)
        assert told.file == str(path)
        assert 0 <= told.line <= lines
        assert str(told).isprintable()
    assert all(1 <= rule.line <= lines for rule in file.rules)


LEVELS = st.sampled_from(["", "a", "b", "$SYS", "$share", "é"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(lambda topic: topic_name_fault(topic) is None)
FILTERS = (
    st.lists(LEVELS | st.just("+"), min_size=1, max_size=4)
    .flatmap(lambda levels: st.sampled_from([levels, [*levels, "#"], ["#"]]))
    .map("/".join)
    .filter(lambda text: topic_filter_fault(text) is None and not text.startswith("$share/"))
)


@given(FILTERS, TOPICS)
def test_a_rule_s_filter_matches_as_a_subscription_of_the_broker_does(topic_filter: str, topic: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (rule,) = read(Path(directory), SERVER + RULE.replace("{", f'{{"topic": {json.dumps(topic_filter)}, ', 1)).rules
    tree: FilterTree[str, None] = FilterTree()
    tree.put(topic_filter, "subscriber", None)
    assert rule.concerns(topic) is bool(list(tree.find(topic)))


@given(
    FILTERS, FILTERS, st.sampled_from(["", "$share/group/"]), st.sampled_from(["session.subscribed", "session.unsubscribed"])
)
def test_the_broker_logs_the_subscriptions_that_concern_a_rule(one: str, other: str, share: str, event: str) -> None:
    line = f'backend.redis.hook.{event}.1 = {{"topic": "{one}", "action": {{"commands": "INCR x"}}, "pool": "pool1"}}\n'
    with tempfile.TemporaryDirectory() as directory:
        file = read(Path(directory), SERVER + line)
    router = Router()
    router.set_wants(wants([file]))
    assert router.wanted(EVENTS[event], share + other) is file.rules[0].concerns(share + other)


@given(FILTERS, FILTERS, TOPICS)
def test_filters_that_match_one_topic_overlap(one: str, other: str, topic: str) -> None:
    tree: FilterTree[str, None] = FilterTree()
    tree.put(one, "one", None)
    tree.put(other, "other", None)
    both = len(list(tree.find(topic))) == 2
    assert not both or filters_overlap(one, other)
    assert filters_overlap(one, other) is filters_overlap(other, one)


@given(FILTERS, FILTERS, TOPICS)
def test_a_filter_covers_what_matches_nothing_that_it_does_not(wide: str, narrow: str, topic: str) -> None:
    if covers(wide, narrow):
        assert matches(wide, topic) or not matches(narrow, topic)
    assert covers(narrow, narrow) and covers("#", narrow) is not narrow.startswith("$")


@given(FILTERS, FILTERS)
def test_filters_that_overlap_match_a_topic_made_of_both(one: str, other: str) -> None:
    if not filters_overlap(one, other):
        return
    tree: FilterTree[str, None] = FilterTree()
    tree.put(one, "one", None)
    tree.put(other, "other", None)
    assert any(len(list(tree.find(topic))) == 2 for topic in _meetings(one, other))


def _meetings(one: str, other: str) -> list[str]:
    """Topics that both might match: level by level what is no wildcard, for one wildcard in both any text."""
    ours, theirs = one.split("/"), other.split("/")
    longest = ours if len(ours) > len(theirs) else theirs
    levels = []
    for number, level in enumerate(longest):
        found = [parts[number] for parts in (ours, theirs) if number < len(parts) and parts[number] not in ("+", "#")]
        levels.append(found[0] if found else "x" if level != "#" else "#")
    plain = [level if level != "#" else "x" for level in levels]
    return ["/".join(plain), "/".join(plain[:-1])]
