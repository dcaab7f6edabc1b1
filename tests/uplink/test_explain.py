"""What `tidegate rules test` shows is what the worker sends: compared with a real Redis, and with what the broker logs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from tidegate.gateway.routing import Router
from tidegate.store.entry import ACKED, CONNECTED, KIND_NAMES, POSITION, PUBLISH, SUBSCRIBED, UNSUBSCRIBED, Entry
from tidegate.store.topic import topic_name_fault
from tidegate.uplink import to_redis
from tidegate.uplink.backend import Backend, Packed, Shown
from tidegate.uplink.explain import (
    ASKS,
    KEPT,
    MISCONFIGURED,
    NOT_BUILT,
    NOTHING,
    OTHER_EVENT,
    OTHER_TOPIC,
    SENDS,
    Verdict,
    explain,
    why_nothing,
)
from tidegate.uplink.redis_actions import ACTIONS
from tidegate.uplink.rule import SHIPPED, RuleFile, load, wants
from tidegate.uplink.vocabulary import FUNCTIONS

from tests.support.redis_server import RedisServer

from .logfile import GATEWAY, START
from .rig import LIST, PRESENCE, Rig
from .test_redis_positions import RULES as ACKNOWLEDGING
from .test_rule import RULE, SERVER, read

GOING = "tidegate:stamp:{mqtt:client:gone}"
BLOCKS = Path(__file__).parent / "specification"


def entry(topic: str = "a/b", payload: bytes = b"x", qos: int = 1, retain: bool = False, kind: int = PUBLISH) -> Entry:
    return Entry(7, START, START, kind, "c1", topic, qos, retain, payload, b"", GATEWAY, 1, "0" * 20)


def explained(file: RuleFile, about: Entry) -> list[Verdict]:
    return explain(file, about, "barn", lambda name: cast(Backend, {"redis": to_redis}[name]))


# -- the same as the worker ------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


def everything(far: redis.Redis) -> dict[str, object]:
    """Every key but the worker's own mark, with what it holds and whether it expires."""
    found: dict[str, object] = {}
    readers: dict[str, Any] = {
        "hash": far.hgetall, "zset": lambda key: far.zrange(key, 0, -1, withscores=True), "string": far.get,
        "list": lambda key: far.lrange(key, 0, -1),
    }  # fmt: skip
    for key in cast(list[str], far.keys("*")):
        if not key.startswith("tidegate:ledger:"):
            found[key] = (readers[cast(str, far.type(key))](key), far.ttl(key) > 0)
    return found


def after_its_time(stamp: Any) -> tuple[object, ...]:
    text, expires = stamp
    return (expires, *text.split()[1:])


def test_typing_what_is_shown_into_an_empty_redis_gives_what_the_worker_writes(tmp_path: Path, server: RedisServer) -> None:
    own = LIST.replace("RPUSH list ${msgid}", "HSET copy:${clientid} ${message}").replace("publish.9", "publish.8")
    with Rig(tmp_path, server.port, PRESENCE + ACKNOWLEDGING + LIST + own) as rig, server.client() as far:
        rig.log.connected("c 1")
        rig.log.connected("gone")
        rig.log.disconnected("gone")
        rig.log.publish("a/b c", b'with "quotes",\r\nlines and \x00', qos=2, client="c 1")
        rig.log.publish("state", b"kept", qos=0, retain=True)
        rig.log.publish("state", b"kept longer", retain=True)
        rig.log.publish("old", b"kept", retain=True)
        rig.log.publish("old", b"", retain=True)
        rig.drain()
        rig.log.position("c 1", "a/b c", rig.published()[0])
        rig.log.append(UNSUBSCRIBED, "gone", "a/b", 0, None)
        rig.log.publish("queue/1", b"x")
        rig.log.append(ACKED, "c 1", "queue/1", 0, rig.published()[-1].encode())
        rig.drain()
        file = load(rig.conf, "redis")
        written = everything(far)
        assert len(written) > 10
        far.flushdb()
        for logged in rig.log.entries():
            about = logged._replace(kind=ACKED) if logged.kind == POSITION else logged
            for verdict in explained(file, about):
                for shown in verdict.writes:
                    far.execute_command(*cast(Sequence[bytes], shown.values))
        found = everything(far)
        # The stamp of a going has the time of the coming, which only the far end knows; the rest of it is the event's.
        assert after_its_time(found.pop(GOING)) == after_its_time(written.pop(GOING))
        assert found == written


TOPICS = st.lists(st.sampled_from(["a", "b", "$x", ""]), min_size=1, max_size=3).map("/".join).filter(
    lambda topic: topic_name_fault(topic) is None
)  # fmt: skip
ENTRIES = st.builds(entry, TOPICS, st.sampled_from([b"", b"x", b"\xff"]), st.integers(0, 2), st.booleans(), st.just(PUBLISH))
PUBLISHING = sorted(name for name in FUNCTIONS if FUNCTIONS[name] == ("message.publish",))


@given(st.sampled_from(PUBLISHING), ENTRIES)
def test_a_reason_is_given_exactly_when_the_action_writes_nothing(function: str, about: Entry) -> None:
    rule = load_rule(f'{{"action": {{"function": "{function}"}}, "pool": "pool1"}}').rules[0]
    assert bool(ACTIONS[function](rule, "barn")(about)) is not bool(why_nothing(function, about))


@given(
    st.sampled_from([f'{{"function": "{name}"}}' for name in PUBLISHING] + ['{"commands": "INCR x"}']),
    st.sampled_from(["", "#", "a/#", "+/b", "$x/#", "a"]),
    ENTRIES,
)
def test_what_would_be_sent_is_what_the_broker_logs(action: str, topic_filter: str, about: Entry) -> None:
    """Else the preview would promise what the worker never sees."""
    option = f'"topic": "{topic_filter}", ' if topic_filter else ""
    file = load_rule(f'{{{option}"action": {action}, "pool": "pool1"}}')
    router = Router()
    router.set_wants(wants([file]))
    topic = router.topics[about.topic.encode()]
    router.route(topic, PUBLISH)
    logged = topic.stored_qos0 or (topic.stored and about.qos > 0) or (topic.stored_retained and about.retain)
    (verdict,) = explained(file, about)
    assert logged or verdict.result != SENDS


def load_rule(body: str) -> RuleFile:
    with tempfile.TemporaryDirectory() as directory:
        file = read(Path(directory), f"{SERVER}backend.redis.hook.message.publish.1 = {body}\n")
    assert file.mistakes == ()
    return file


# -- why not ---------------------------------------------------------------------------------------------------------


def by_name(verdicts: Sequence[Verdict]) -> dict[str, tuple[str, str]]:
    return {verdict.rule.name: (verdict.result, verdict.reason) for verdict in verdicts}


def test_every_rule_gets_a_verdict_with_its_reason() -> None:
    file = load(BLOCKS / "emqx_backend_redis.conf", "redis")
    found = by_name(explained(file, entry("sensor/1", qos=0)))
    assert len(found) == len(file.rules)
    assert found["message.publish.1"] == (NOTHING, why_nothing("on_message_publish", entry(qos=0)))
    assert "QoS 0" in found["message.publish.1"][1]
    assert found["message.publish.2"] == (NOTHING, "it is not retained")
    assert found["client.connected.1"] == (OTHER_EVENT, "it is a rule of client.connected")
    assert "which, is not known" in why_nothing("on_acked_delete", entry("pubsub/#", kind=UNSUBSCRIBED, payload=b""))
    assert not why_nothing("on_acked_delete", entry("pubsub/a", kind=UNSUBSCRIBED, payload=b""))
    found = by_name(explained(file, entry("$share/g/pubsub/+", kind=SUBSCRIBED)))
    assert found["session.subscribed.1"] == (OTHER_TOPIC, "queue/# does not match $share/g/pubsub/+")
    assert found["session.subscribed.2"][0] == NOTHING
    assert "only literal topics" in found["session.subscribed.2"][1]
    assert found["session.subscribed.3"] == (ASKS, "for retained messages")
    found = by_name(explained(file, entry("queue/a", kind=SUBSCRIBED)))
    assert found["session.subscribed.1"] == (ASKS, "for all messages of the topic")
    found = by_name(explained(file, entry("queue/a", kind=SUBSCRIBED, qos=0)))
    assert found["session.subscribed.1"] == (NOTHING, "a subscription with QoS 0 fetches nothing")


def test_a_topic_with_a_dollar_says_why_a_wildcard_does_not_match(tmp_path: Path) -> None:
    (verdict,) = explained(read(tmp_path, SERVER + RULE.replace("{", '{"topic": "#", ', 1)), entry("$x/a"))
    assert verdict.reason == "# does not match $x/a: # and + do not stand for topics that begin with $"
    (everywhere,) = explained(read(tmp_path, SERVER + RULE), entry("$x/a"))
    assert everywhere.result == SENDS


def test_a_file_with_a_mistake_sends_nothing_and_the_first_mistake_says_why(tmp_path: Path) -> None:
    file = read(tmp_path, SERVER + RULE + "this is nothing\nnor this\n")
    (verdict,) = explained(file, entry())
    assert (verdict.result, verdict.writes) == (MISCONFIGURED, ())
    assert verdict.reason == f"its pool waits until the file is mended: {file.mistakes[0]} (and 1 more)"


def test_a_backend_of_a_later_version_says_so() -> None:
    verdicts = explained(load(BLOCKS / "emqx_backend_opentsdb.conf", "opentsdb"), entry("sensor/1"))
    assert by_name(verdicts)["message.publish.1"] == (NOT_BUILT, "the backend opentsdb comes with a later version")


def test_what_two_rules_would_store_is_stored_by_one(tmp_path: Path) -> None:
    store = RULE.replace("publish.1", "publish.2").replace("on_message_publish", "on_message_store")
    found = by_name(explained(read(tmp_path, SERVER + RULE + store), entry()))
    assert found["message.publish.1"] == (NOTHING, "on_message_store of another rule stores it already")
    assert found["message.publish.2"] == (SENDS, "")


def test_a_driver_that_is_missing_is_named(tmp_path: Path) -> None:
    def find(name: str) -> Backend:
        raise ModuleNotFoundError(f"No module named '{name}'")

    (verdict,) = explain(read(tmp_path, SERVER + RULE), entry(), "barn", find)
    assert (verdict.result, verdict.reason) == (
        MISCONFIGURED,
        "the driver of redis is not installed: No module named 'redis'",
    )


def test_the_box_keeps_what_its_own_rules_say() -> None:
    found = by_name(explained(load(SHIPPED / "emqx_backend_sqlite.conf", "sqlite"), entry()))
    assert found["message.publish.1"] == (KEPT, "its log holds it, to be read in the view mqtt_msg; nothing is sent")
    assert found["message.publish.2"] == (NOTHING, "it is not retained")


# -- other backends --------------------------------------------------------------------------------------------------


def far_end(**more: object) -> Backend:
    """A far end that takes a statement with bound values."""

    def actions(rule: object, node: str) -> object:
        return lambda about: (Packed(about.payload, 1),)

    return cast(Backend, SimpleNamespace(actions=actions, gap_action=lambda: None, **more))


def test_a_backend_shows_its_statements_with_their_values(tmp_path: Path) -> None:
    statement = Shown("insert into t values (%s)", [b"x"])
    with_show = far_end(show=lambda packed, pool: [statement])
    (verdict,) = explain(read(tmp_path, SERVER + RULE), entry(), "barn", lambda name: with_show)
    assert (verdict.result, verdict.writes) == (SENDS, [statement])


def test_a_backend_that_cannot_show_its_writes_shows_what_quarantine_would_keep(tmp_path: Path) -> None:
    (verdict,) = explain(read(tmp_path, SERVER + RULE), entry(payload=b"raw"), "barn", lambda name: far_end())
    assert verdict.writes == [Shown("", [b"raw"])]


def test_presence_is_shown_with_its_condition(tmp_path: Path) -> None:
    file = read(tmp_path, SERVER + PRESENCE)
    (verdict, _) = explained(file, entry("", b"", kind=CONNECTED))
    assert KIND_NAMES[CONNECTED] == verdict.rule.event
    assert [(shown.values[0], shown.condition) for shown in verdict.writes] == [
        (b"HSET", ""),
        (b"HSET", "unless something newer stands there"),
        (b"SET", "unless something newer stands there"),
    ]
