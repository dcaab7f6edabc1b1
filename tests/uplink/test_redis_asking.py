"""What Redis is asked: stored messages after a client's position, queues, retained messages, the channel."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tidegate.store.inbox import MESSAGE, RETAINED, SUBSCRIBE, UNSUBSCRIBE
from tidegate.store.msgid import message_id
from tidegate.uplink.redis_channel import Channel
from tidegate.uplink.redis_wire import connect

from tests.support.redis_server import RedisServer

from .lane_rig import INTERVAL, LOOKUP, PUBSUB, QUEUE, Devices, LaneRig
from .lane_rig import RETAINED as LOOK_UP_RETAINED


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def rig(tmp_path: Path, server: RedisServer) -> Iterator[LaneRig]:
    with LaneRig(tmp_path, server.port, LOOKUP + PUBSUB + QUEUE + LOOK_UP_RETAINED) as rig:
        rig.log.arrive("c1")
        rig.ask()
        rig.take()
        yield rig


def put(far: Any, topic: str, msgid: str, payload: str, ago: float = 0) -> str:
    far.hset(
        f"mqtt:msg:{msgid}",
        mapping={"id": msgid, "from": "s", "qos": 1, "topic": topic, "payload": payload, "ts": int(time.time() - ago)},
    )
    far.zadd(f"mqtt:msg:{topic}", {msgid: 1})
    return msgid


def ours(code: str, seq: int, epoch: int = 5) -> str:
    return message_id(1_700_000_000_000 + seq, code, epoch, seq)


def payloads(rig: LaneRig, kind: int = MESSAGE) -> list[str]:
    return [answer.payload.decode() for answer in rig.take() if answer.kind == kind]


def test_a_vector_tells_what_is_unread_of_each_gateway(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        for code in ("AAAA", "BBBB", "CCCC"):
            for seq in (1, 2, 3):
                put(far, "pubsub/a", ours(code, seq), f"{code}{seq}")
        far.hset("tidegate:position:c1:pubsub/a", mapping={"AAAA": "5:2", "BBBB": "5:3"})
    rig.log.subscribe("c1", "pubsub/a")
    rig.ask()
    assert payloads(rig) == ["CCCC1", "CCCC2", "AAAA3", "CCCC3"]


def test_who_subscribes_before_the_first_lane_is_there_is_answered(tmp_path: Path, server: RedisServer) -> None:
    """A session that ends with its connection stands nowhere but in the log."""

    def come(log: Devices) -> None:
        log.arrive("before", persistent=False)
        log.subscribe("before", "pubsub/a")
        log.leave("before")
        log.new_run(2)
        log.arrive("c1", persistent=False)
        log.subscribe("c1", "pubsub/a")

    with server.client() as far:
        put(far, "pubsub/a", "one", "one")
    with LaneRig(tmp_path, server.port, PUBSUB, before=come) as rig:
        rig.ask()
        assert [(answer.client, answer.payload) for answer in rig.answers()] == [("c1", b"one")]


def test_without_a_vector_the_single_position_counts_and_without_any_the_window(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        for name in ("order-1", "order-2", "order-3"):
            put(far, "pubsub/a", name, name)
            put(far, "pubsub/b", f"b{name}", name, ago=8000 if name == "order-1" else 0)
        far.set("mqtt:acked:c1:pubsub/a", "order-1")
    rig.log.subscribe("c1", "pubsub/a")
    rig.ask()
    assert payloads(rig) == ["order-2", "order-3"]
    rig.log.subscribe("c1", "pubsub/b")
    rig.ask()
    assert payloads(rig) == ["order-2", "order-3"]


def test_what_a_business_system_adds_reaches_who_stays_connected_once(rig: LaneRig, server: RedisServer) -> None:
    rig.log.subscribe("c1", "queue/a")
    rig.ask()
    with server.client() as far:
        put(far, "queue/a", "x1", "one")
        rig.next_round()
        assert [(a.msgid, a.queue, a.filter) for a in rig.answers()] == [("x1", True, "queue/a")]
        assert payloads(rig) == ["one"]
        put(far, "queue/a", "x2", "two")
        rig.next_round()
        assert payloads(rig) == ["two"]


def test_a_queue_longer_than_a_page_comes_whole_and_in_order(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        for number in range(1200):
            put(far, "queue/a", f"m{number:05}", str(number))
    rig.log.subscribe("c1", "queue/a")
    rig.ask()
    assert payloads(rig) == [str(number) for number in range(1200)]


def test_retained_messages_as_hash_as_pointer_and_by_wildcard(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        far.hset("mqtt:retain:r/1", mapping={"id": "i1", "from": "s", "qos": 1, "payload": "hash", "ts": 1_700_000_000})
        put(far, "r/2", "i2", "pointer")
        far.set("mqtt:retain:r/2", "i2")
        far.set("mqtt:retain:other", "i2")
    rig.log.subscribe("c1", "r/+", 0)
    rig.ask()
    assert sorted(payloads(rig, RETAINED)) == ["hash", "pointer"]
    rig.log.subscribe("c1", "r/1", 0)
    rig.ask()
    assert payloads(rig, RETAINED) == ["hash"]


def test_the_channel_makes_and_takes_away_subscriptions_and_counts_what_is_wrong(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        wish = {"type": "subscribe", "topic": "a", "clientid": "c1", "qos": "1"}
        for message in (
            json.dumps(wish), "nonsense", json.dumps(wish | {"clientid": "nobody"}), json.dumps(wish | {"type": "unsubscribe"}),
        ):  # fmt: skip
            far.publish("mqtt_channel", message)
    assert select.select([rig.lane.fileno], [], [], 10)[0]
    rig.step_until(lambda _: len(rig.answers()) == 2)
    assert [(a.kind, a.client, json.loads(a.filters)) for a in rig.answers()] == [
        (SUBSCRIBE, "c1", [["a", 1]]),
        (UNSUBSCRIBE, "c1", [["a", 1]]),
    ]
    assert rig.lane._standing.refused == 2


def test_a_channel_that_fell_silent_is_noticed_although_nobody_is_asked_for(rig: LaneRig, server: RedisServer) -> None:
    rig.log.leave("c1")
    rig.ask()
    server.freeze()
    rig.clock.now += INTERVAL
    rig.step_until(lambda _: "lookup_unreachable" in "".join(rig.said), 5)
    server.thaw()
    rig.ask()
    with server.client() as far:
        assert far.publish("mqtt_channel", json.dumps({"type": "subscribe", "topic": "a", "clientid": "c1"}))
    rig.step_until(lambda _: bool(rig.answers()))


def test_what_the_channel_says_while_it_is_checked_is_not_lost(tmp_path: Path, server: RedisServer) -> None:
    with LaneRig(tmp_path, server.port, LOOKUP) as rig, server.client() as far:
        channel = Channel(rig.pool, connect(rig.pool))
        for word in ("one", "two"):
            far.publish("mqtt_channel", word)
        channel.check()
        assert channel.heard() == [b"one", b"two"]
        channel.close()
