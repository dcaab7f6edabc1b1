"""More of what Redis is asked: a broken channel, `first_fetch`, what is skipped, index entries without a message, wildcards."""

from __future__ import annotations

import json
import select
import time
from pathlib import Path
from typing import Any

import pytest
from tidegate.store.inbox import MESSAGE, RETAINED, SUBSCRIBE, SUBSCRIPTIONS
from tidegate.uplink.lane_book import read_lanes
from tidegate.uplink.redis_asking import GONE_FOR
from tidegate.uplink.told import Told

from tests.support.redis_server import RedisServer

from .lane_rig import LOOKUP, PUBSUB, LaneRig, rule, subscriptions
from .lane_rig import RETAINED as LOOK_UP_RETAINED

FETCH = "on_message_fetch_for_pubsub"


@pytest.fixture
def server(tmp_path: Path) -> Any:
    with RedisServer(tmp_path) as server:
        yield server


def put(far: Any, topic: str, msgid: str, ago: float = 0) -> None:
    fields = {"id": msgid, "from": "s", "qos": 1, "topic": topic, "payload": msgid, "ts": int(time.time() - ago)}
    far.hset(f"mqtt:msg:{msgid}", mapping=fields)
    far.zadd(f"mqtt:msg:{topic}", {msgid: 1})


def messages(rig: LaneRig, kind: int = MESSAGE) -> list[str]:
    return [answer.payload.decode() for answer in rig.take() if answer.kind == kind]


def fetching(options: str) -> str:
    return rule("session.subscribed", 2, FETCH, "pubsub/#", options)


# -- the channel -----------------------------------------------------------------------------------------------------


def test_after_a_broken_channel_everything_is_looked_up_again_and_the_difference_told(
    tmp_path: Path, server: RedisServer
) -> None:
    with LaneRig(tmp_path, server.port, LOOKUP) as rig, server.client() as far:
        rig.log.arrive("c1")
        far.hset("mqtt:sub:c1", "stays", 1)
        far.hset("mqtt:sub:c1", "goes", 1)
        rig.ask()
        far.publish("mqtt_channel", json.dumps({"type": "subscribe", "topic": "only said", "clientid": "c1", "qos": 1}))
        assert select.select([rig.lane.fileno], [], [], 10)[0]
        rig.step_until(lambda _: len(rig.answers()) == 2)
        assert [answer.kind for answer in rig.take()] == [SUBSCRIPTIONS, SUBSCRIBE]
        assert far.client_kill_filter(_type="pubsub") == 1
        far.hdel("mqtt:sub:c1", "goes")
        far.hset("mqtt:sub:c1", "comes", 2)
        assert far.publish("mqtt_channel", "nobody hears it") == 0
        assert select.select([rig.lane.fileno], [], [], 10)[0], "who waits for it is woken"
        rig.step_until(lambda _: bool(rig.answers()))
        assert [subscriptions(answer) for answer in rig.take()] == [("c1", {"stays": 1, "comes": 2})]
        assert far.publish("mqtt_channel", "{}") == 1, "it listens again"
        assert [line.partition(":")[0] for line in rig.said] == ["lookup_unreachable", "lookup_connected"]


def test_what_only_the_channel_said_goes_when_it_breaks(tmp_path: Path, server: RedisServer) -> None:
    with LaneRig(tmp_path, server.port, LOOKUP) as rig, server.client() as far:
        rig.log.arrive("c1")
        rig.ask()
        rig.take()
        far.publish("mqtt_channel", json.dumps({"type": "subscribe", "topic": "only said", "clientid": "c1"}))
        rig.step_until(lambda _: bool(rig.answers()))
        rig.take()
        far.client_kill_filter(_type="pubsub")
        rig.step_until(lambda _: bool(rig.answers()))
        assert [subscriptions(answer) for answer in rig.take()] == [("c1", {})]


def test_what_a_channel_said_before_the_first_lookup_is_not_taken_for_all_that_stands_there() -> None:
    """Found by simulation, seed 31245: a row that was gone since the life before stayed a subscription."""
    told = Told("redis.pool1", "AAAA")
    _, remember = told.heard(SUBSCRIBE, "c1", "said", 1)
    remember()
    told.interrupted()
    answers, _ = told.lookup("c1", [("said", 1)])
    assert [subscriptions(answer) for answer in answers] == [("c1", {"said": 1})]


# -- stored messages -------------------------------------------------------------------------------------------------


def test_first_fetch_none_gives_nothing_to_who_has_no_position(tmp_path: Path, server: RedisServer) -> None:
    with LaneRig(tmp_path, server.port, fetching('"first_fetch": "none", ')) as rig, server.client() as far:
        for name in ("m1", "m2", "m3"):
            put(far, "pubsub/a", name)
        for client in ("new", "known"):
            rig.log.arrive(client)
            rig.log.subscribe(client, "pubsub/a")
        far.set("mqtt:acked:known:pubsub/a", "m1")
        rig.ask()
        assert [(answer.client, answer.msgid) for answer in rig.take()] == [("known", "m2"), ("known", "m3")]


def test_what_the_limits_pass_over_is_counted_once_and_told(tmp_path: Path, server: RedisServer) -> None:
    options = '"offline_opts": {"max_returned_count": 2, "time_range": "1h"}, '
    with LaneRig(tmp_path, server.port, fetching(options)) as rig, server.client() as far:
        for number in range(6):
            put(far, "pubsub/a", f"m{number}")
        put(far, "pubsub/b", "n1", ago=2 * 3600)
        put(far, "pubsub/b", "n2")
        far.set("mqtt:acked:c1:pubsub/a", "m0")
        far.set("mqtt:acked:c1:pubsub/b", "n0")
        put(far, "pubsub/b", "n0")
        rig.log.arrive("c1")
        for topic in ("pubsub/a", "pubsub/b"):
            rig.log.subscribe("c1", topic)
        rig.ask()
        assert messages(rig) == ["m4", "m5", "n2"]
        rig.next_round()
        rig.lane.stop()
        assert read_lanes(rig.data)[rig.pool_name].skipped == 4, "m1, m2 and m3 by the count, n1 by its age"
        (said,) = rig.said
        assert said.startswith("fetch_skipped") and said.endswith("count=4")


def test_an_index_entry_without_its_message_is_removed_when_that_was_seen_twice(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LaneRig(tmp_path, server.port, PUBSUB) as rig, server.client() as far:
        put(far, "pubsub/a", "m1")
        far.zadd("mqtt:msg:pubsub/a", {"gone": 1, "late": 1})
        rig.log.arrive("c1")
        rig.log.subscribe("c1", "pubsub/a")
        rig.ask()
        assert messages(rig) == ["m1"]
        rig.next_round()
        assert far.zrange("mqtt:msg:pubsub/a", 0, -1) == ["gone", "late", "m1"], "whoever writes may write the index first"
        put(far, "pubsub/a", "late")
        monotonic = time.monotonic
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: monotonic() + GONE_FOR)
            rig.next_round()
        assert messages(rig) == ["late"]
        assert far.zrange("mqtt:msg:pubsub/a", 0, -1) == ["late", "m1"]


def test_who_may_not_write_is_answered_all_the_same(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.client() as far:
        far.execute_command("ACL SETUSER reader on >pw ~* &* +@read +@connection +@pubsub")
        far.zadd("mqtt:msg:pubsub/a", {"gone": 1})
        with LaneRig(tmp_path, server.port, PUBSUB, "username = reader\npassword = pw") as rig:
            rig.log.arrive("c1")
            rig.log.subscribe("c1", "pubsub/a")
            rig.ask()
            monotonic = time.monotonic
            with monkeypatch.context() as patch:
                patch.setattr(time, "monotonic", lambda: monotonic() + GONE_FOR)
                put(far, "pubsub/a", "m1")
                rig.next_round()
            assert messages(rig) == ["m1"]
            assert far.zrange("mqtt:msg:pubsub/a", 0, -1) == ["gone", "m1"]


# -- wildcards -------------------------------------------------------------------------------------------------------


def test_wildcards_ask_for_no_stored_messages(tmp_path: Path, server: RedisServer) -> None:
    with LaneRig(tmp_path, server.port, PUBSUB) as rig, server.client() as far:
        for topic in ("pubsub/a", "pubsub/+"):
            put(far, topic, f"of {topic}")
        rig.log.arrive("c1")
        rig.log.subscribe("c1", "pubsub/+")
        rig.log.subscribe("c1", "$share/g/pubsub/a")
        rig.ask()
        assert (rig.answers(), rig.waiting()) == ([], 0)


@pytest.mark.parametrize(
    ("topic_filter", "wanted"),
    [
        ("r/+", ["r/*", "r/[a]", "r/a", "r/b\\c", "r/é"]),
        ("r/#", ["r", "r/*", "r/[a]", "r/a", "r/a/b", "r/b\\c", "r/é"]),
        ("+/a", ["r/a"]),
        ("$x/+", ["$x/a"]),
        ("#", ["r", "r/*", "r/[a]", "r/a", "r/a/b", "r/b\\c", "r/é", "ra"]),
        ("r/+/b", ["r/a/b"]),
    ],
)
def test_retained_messages_by_wildcard_are_those_that_match(
    tmp_path: Path, server: RedisServer, topic_filter: str, wanted: list[str]
) -> None:
    with LaneRig(tmp_path, server.port, LOOK_UP_RETAINED) as rig, server.client() as far:
        for topic in ("r", "ra", "r/a", "r/a/b", "r/*", "r/[a]", "r/b\\c", "r/é", "$x/a"):
            far.hset(f"mqtt:retain:{topic}", mapping={"id": topic, "qos": 1, "payload": topic, "ts": 1_700_000_000})
        rig.log.arrive("c1")
        rig.log.subscribe("c1", topic_filter, 0)
        rig.ask()
        assert sorted(messages(rig, RETAINED)) == wanted
