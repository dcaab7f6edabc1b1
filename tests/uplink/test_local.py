"""The rules of sqlite as the broker gets them, from the shipped file and from mistaken ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tidegate.store.entry import CONNECTED, DISCONNECTED, PUBLISH, Want
from tidegate.store.local import NO_RULES, PUBSUB, QUEUE, FetchRule, Keep, LocalRules
from tidegate.uplink.local import local_rules
from tidegate.uplink.rule import SHIPPED, RuleFile, load, wants

WEEK = 604_800_000
STORED = 'backend.sqlite.hook.message.publish.9 = {"action": {"function": "on_message_publish"}}\n'


def read(tmp_path: Path, text: str) -> RuleFile:
    path = tmp_path / "emqx_backend_sqlite.conf"
    path.write_text(text)
    return load(path, "sqlite")


def rule(event: str, function: str, more: str = "", number: int = 1) -> str:
    return f'backend.sqlite.hook.{event}.{number} = {{"action": {{"function": "{function}"}}{more}}}\n'


def test_as_shipped_the_broker_gives_nothing_back() -> None:
    local = local_rules([load(SHIPPED / "emqx_backend_sqlite.conf", "sqlite")])
    assert local == LocalRules(keeps=(Keep("#", WEEK),))


def test_every_rule_that_is_shipped_commented_out_works_as_it_stands(tmp_path: Path) -> None:
    text = (SHIPPED / "emqx_backend_sqlite.conf").read_text()
    file = read(tmp_path, re.sub(r"^## backend\.sqlite\.hook\.(?!<)", "backend.sqlite.hook.", text, flags=re.M))
    assert file.mistakes == ()
    assert file.warnings == ()
    assert len(file.rules) == 13
    assert local_rules([file]) == LocalRules(
        lookup_new=True,
        fetches=(FetchRule("queue/#", True, 500, 7_200_000, True), FetchRule("pubsub/#", False, 500, 7_200_000, True)),
        acks=(("queue/#", QUEUE), ("pubsub/#", PUBSUB)),
        forgets=("pubsub/#",),
        keeps=(Keep("#", WEEK), Keep("log/#", 86_400_000, every_qos=True)),
    )
    assert set(wants([file])) == {
        Want(CONNECTED, "", 0, False),
        Want(DISCONNECTED, "", 0, False),
        Want(PUBLISH, "#", 1, False),
        Want(PUBLISH, "log/#", 0, False),
        Want(PUBLISH, "#", 0, True),
    }, "what only reads the log writes nothing into it"


def test_options_and_the_other_lookup(tmp_path: Path) -> None:
    more = ', "topic": "a/+", "offline_opts": {"max_returned_count": 0, "time_range": "1d"}, "first_fetch": "none"'
    text = rule("client.connected", "on_subscription_lookup") + rule("session.subscribed", "on_message_fetch", more)
    local = local_rules([read(tmp_path, text + rule("message.acked", "on_message_acked") + STORED)])
    assert local is not None and local.lookup_always and not local.lookup_new
    assert local.fetches == (FetchRule("a/+", False, 0, 86_400_000, False),)
    assert local.acks == (("", PUBSUB),) and local.ack_of("$of/a") == PUBSUB, "without a topic a rule is about every topic"


def test_a_mistake_leaves_what_was_in_force(tmp_path: Path) -> None:
    file = read(tmp_path, rule("session.subscribed", "on_message_fetch", ', "first_fetch": "windw"') + STORED)
    (mistake,) = file.mistakes
    assert mistake.text == 'unknown first_fetch "windw"; did you mean "window"?' and mistake.line == 1
    assert local_rules([file]) is None
    assert Want(PUBLISH, "", 0, False) in wants([file]) and len(wants([file])) == 1, "nobody reads other events"
    assert local_rules([]) == NO_RULES


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (STORED + rule("session.subscribed", "on_message_fetch_for_queue"), "every new subscriber gets every message again"),
        (STORED + rule("session.subscribed", "on_message_fetch"), "every new subscription gets the same again"),
        (
            rule("session.subscribed", "on_message_fetch") + rule("message.acked", "on_message_acked"),
            "there is nothing to fetch",
        ),
        (STORED + rule("message.publish", "on_message_store"), "stored once"),
    ],
)
def test_what_is_hardly_meant_is_warned_of(tmp_path: Path, text: str, warning: str) -> None:
    file = read(tmp_path, text)
    assert file.mistakes == ()
    (found,) = file.warnings
    assert warning in found.text


def test_the_rule_s_filter_is_matched_against_the_filter_as_a_topic() -> None:
    fetch = FetchRule("queue/#", True, 500, 0, True)
    many = FetchRule("#", False, 500, 0, True)
    local = LocalRules(fetches=(many, fetch), acks=(("queue/#", QUEUE), ("#", PUBSUB)), forgets=("a/#",))
    asked = [local.fetch_for(text) for text in ("queue/a", "queue/+", "$share/g/queue/a", "#", "$SYS/#")]
    assert asked == [fetch, fetch, fetch, many, None]
    assert [local.ack_of(topic) for topic in ("queue/a", "other", "$SYS/x")] == [QUEUE | PUBSUB, PUBSUB, 0]
    assert [local.forgets_position(text) for text in ("a/+", "$share/g/a", "#")] == [True, True, False]


def test_what_a_far_end_is_asked_for_is_answered_here_first(tmp_path: Path) -> None:
    path = tmp_path / "emqx_backend_redis.conf"
    hook = "backend.redis.hook"
    path.write_text(
        f"""backend.redis.pool1.server = 127.0.0.1:6379
{hook}.client.connected.1 = {{"action": {{"function": "on_subscribe_lookup"}}, "pool": "pool1"}}
{hook}.session.subscribed.1 = {{"topic": "a/#", "action": {{"function": "on_message_fetch"}}, "pool": "pool1"}}
{hook}.session.subscribed.2 = {{"topic": "b/#", "action": {{"function": "on_retain_lookup"}}, "pool": "pool1"}}
{hook}.message.acked.1 = {{"topic": "a/#", "action": {{"function": "on_message_acked"}}, "pool": "pool1"}}
"""
    )
    local = local_rules([load(path, "redis"), load(SHIPPED / "emqx_backend_sqlite.conf", "sqlite")])
    assert local == LocalRules(
        pools_always=frozenset({"redis.pool1"}),
        retained=("b/#",),
        fetches=(FetchRule("a/#", False, 500, 7_200_000, True),),
        acks=(("a/#", PUBSUB),),
        keeps=(Keep("#", WEEK),),
    )
