"""Acknowledgements in Redis: positions as a vector and as the specification's single id, and what a queue has given away.

By script, by WATCH and MULTI where the server allows no script, and on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tidegate.store.entry import ACKED, UNSUBSCRIBED
from tidegate.store.msgid import gateway_code, message_id
from tidegate.uplink.redis_record import change, describe
from tidegate.uplink.redis_stored import standing_of

from tests.support.redis_cluster import Cluster
from tests.support.redis_server import RedisServer

from .logfile import GATEWAY, START, LogFile
from .rig import MESSAGES, Rig

OTHER = "1111111111111111"
CODE, OTHERS = gateway_code(GATEWAY), gateway_code(OTHER)
RULES = MESSAGES + "".join(
    f'backend.redis.hook.{hook} = {{"topic": "{topic}", "action": {{"function": "{function}"}}, "pool": "pool1"}}\n'
    for hook, topic, function in (
        ("message.acked.1", "queue/#", "on_message_acked_for_queue"),
        ("message.acked.2", "a/#", "on_message_acked_for_pubsub"),
        ("session.unsubscribed.1", "a/#", "on_acked_delete"),
    )
)


@pytest.fixture(params=["script", "transaction", "cluster"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, int, str]]:
    """A client, the port, and the settings."""
    if request.param == "cluster":
        with Cluster(tmp_path) as cluster, cluster.client() as client:
            yield client, cluster.port, "type = cluster"
        return
    with RedisServer(tmp_path) as server, server.client() as client:
        client.execute_command("ACL SETUSER noscript on >pw ~* +@all -@scripting")
        yield client, server.port, "username = noscript\npassword = pw" if request.param == "transaction" else ""


@pytest.fixture
def redis(far: tuple[Any, int, str]) -> Any:
    return far[0]


@pytest.fixture
def rig(tmp_path: Path, far: tuple[Any, int, str]) -> Iterator[Rig]:
    _, port, settings = far
    with Rig(tmp_path, port, RULES, settings) as rig:
        yield rig


def vector(redis: Any, topic: str = "a/b", client: str = "c") -> dict[str, tuple[int, int]]:
    """As who asks reads it."""
    found = redis.hgetall(f"tidegate:position:{client}:{topic}")
    return standing_of([part.encode() for field in found.items() for part in field], b"").read


def acked(redis: Any, topic: str = "a/b") -> str | None:
    found: str | None = redis.get(f"mqtt:acked:c:{topic}")
    return found


def ids(log: LogFile, count: int) -> list[str]:
    """Messages of this gateway."""
    first = log.seq + 1
    for _ in range(count):
        log.publish("a/b")
    return [entry.msgid for entry in log.entries() if entry.seq >= first]


def test_a_position_is_an_entry_of_the_vector_and_the_specification_s_id(rig: Rig, redis: Any) -> None:
    one, two, three = ids(rig.log, 3)
    rig.log.position("c", "a/b", one)
    rig.log.position("c", "a/b", two)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (1, 2)}, two)
    rig.log.position("c", "a/b", three)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (1, 3)}, three)
    assert rig.quarantine() == []


def test_a_position_never_goes_back(rig: Rig, redis: Any) -> None:
    one, two = ids(rig.log, 2)
    rig.log.position("c", "a/b", two)
    rig.drain()
    rig.log.position("c", "a/b", one)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (1, 2)}, two)


def test_each_gateway_s_messages_count_by_themselves_and_the_newest_is_the_single_position(rig: Rig, redis: Any) -> None:
    old, new = message_id(START - 9000, OTHERS, 4, 70), message_id(START + 9000, OTHERS, 4, 90)
    (mine,) = ids(rig.log, 1)
    rig.log.position("c", "a/b", mine)
    rig.log.position("c", "a/b", old)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (1, 1), OTHERS: (4, 70)}, mine)
    rig.log.position("c", "a/b", new)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (1, 1), OTHERS: (4, 90)}, new)


def test_a_log_that_was_laid_back_goes_on_with_lower_numbers(rig: Rig, redis: Any) -> None:
    rig.log.position("c", "a/b", message_id(START, CODE, 1, 500))
    rig.drain()
    later = message_id(START + 5000, CODE, 2, 20)
    rig.log.position("c", "a/b", later)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (2, 20)}, later)


def test_ids_that_others_made_move_the_single_position_alone_by_the_time_of_the_event(rig: Rig, redis: Any) -> None:
    (mine,) = ids(rig.log, 1)
    rig.log.position("c", "a/b", mine, START)
    rig.log.position("c", "a/b", "business-2", START + 2000)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (1, 1)}, "business-2")
    key = "tidegate:stamp:{mqtt:acked:c:a/b}"
    assert redis.get(key) == f"{START + 2000} {GATEWAY} 1 3"
    redis.set(key, f"{START + 9000} ffff 1 1")
    rig.log.position("c", "a/b", "business-1", START + 3000)
    rig.drain()
    assert acked(redis) == "business-2", "another gateway's is newer"


def test_an_unsubscribe_drops_position_and_vector_and_what_is_older_does_not_come_back(rig: Rig, redis: Any) -> None:
    one, two = ids(rig.log, 2)
    rig.log.position("c", "a/b", one)
    rig.log.append(UNSUBSCRIBED, "c", "a/b", 0, None, START + 60_000)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({}, None)
    assert 29 * 86_400 < redis.ttl("tidegate:position:c:a/b") <= 30 * 86_400
    for key, field in (("tidegate:position:c:a/b", "dropped"), ("tidegate:stamp:{mqtt:acked:c:a/b}", "")):
        value = f"{START + 60_000} ffff 7 9"
        redis.hset(key, field, value) if field else redis.set(key, value)
    rig.log.position("c", "a/b", two, START + 1000)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({}, None), "another gateway dropped it later"
    rig.log.position("c", "a/b", two, START + 61_000)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (1, 2)}, two)
    assert redis.ttl("tidegate:position:c:a/b") == -1


def test_an_unsubscribe_with_wildcards_drops_the_positions_that_it_names(rig: Rig, redis: Any) -> None:
    (one,) = ids(rig.log, 1)
    for topic in ("a/b", "a/c", "a/d"):
        rig.log.position("c", topic, one)
    rig.log.append(UNSUBSCRIBED, "c", "a/+", 0, b'["a/b", "a/c"]', START + 60_000)
    rig.log.append(UNSUBSCRIBED, "c", "a/#", 0, None, START + 60_000)
    rig.drain()
    assert [acked(redis, topic) for topic in ("a/b", "a/c", "a/d")] == [None, None, one]
    assert [vector(redis, topic) for topic in ("a/b", "a/c", "a/d")] == [{}, {}, {CODE: (1, 1)}]
    assert not redis.exists("tidegate:position:c:a/+")


def test_a_late_unsubscribe_leaves_a_newer_position(rig: Rig, redis: Any) -> None:
    (one,) = ids(rig.log, 1)
    rig.log.position("c", "a/b", one, START)
    rig.drain()
    for key, field in (("tidegate:position:c:a/b", "stamp"), ("tidegate:stamp:{mqtt:acked:c:a/b}", "")):
        value = f"{START + 60_000} ffff 7 9"
        redis.hset(key, field, value) if field else redis.set(key, value)
    rig.log.append(UNSUBSCRIBED, "c", "a/b", 0, None, START + 30_000)
    rig.drain()
    assert (vector(redis), acked(redis)) == ({CODE: (1, 1)}, one)


def test_a_queue_s_message_goes_for_everybody_when_it_is_acknowledged(rig: Rig, redis: Any) -> None:
    rig.log.publish("queue/1", b"x")
    rig.log.publish("queue/1", b"y")
    rig.drain()
    first, second = rig.published()
    for _ in range(2):
        rig.log.append(ACKED, "c", "queue/1", 0, first.encode())
        rig.drain()
    assert redis.zrange("mqtt:msg:queue/1", 0, -1) == [second]
    assert (redis.exists(f"mqtt:msg:{first}"), redis.exists(f"mqtt:msg:{second}")) == (0, 1)


def test_what_stands_in_the_way_goes_to_quarantine_and_can_be_read_there(rig: Rig, redis: Any) -> None:
    redis.set("tidegate:position:c:a/b", "no hash")
    redis.rpush("mqtt:acked:c:a/b", "no text")
    (one,) = ids(rig.log, 1)
    rig.log.position("c", "a/b", one)
    rig.drain()
    kept = rig.quarantine()
    place = f"1:1:{rig.log.entries()[0].at}".encode()
    assert [describe(row.original) for row in kept] == [
        ("position", {"clientid": b"c", "topic": b"a/b", "gateway": CODE.encode(), "place": place}),
        ("acked", {"clientid": b"c", "topic": b"a/b", "msgid": one.encode()}),
    ]  # fmt: skip
    assert all(change(row.original, {}) == row.original for row in kept)
