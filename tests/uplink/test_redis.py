"""What arrives in Redis, key by key; by script, and by WATCH and MULTI where the server allows no script."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from tidegate.uplink.backend import Batch, Mark

from tests.support.proxy import Proxy
from tests.support.redis_server import RedisServer

from .logfile import GATEWAY, START
from .rig import LEDGER, LIST, MESSAGES, PRESENCE, REFUSED, Rig, assert_holds_everything

ALL = PRESENCE + MESSAGES + LIST
NOW = START // 1000


def command(number: int, text: str, event: str = "message.publish", topic: str = "#") -> str:
    return (
        f'backend.redis.hook.{event}.{number} = {{"topic": "{topic}", "action": {{"commands": ["{text}"]}}, "pool": "pool1"}}\n'
    )


@pytest.fixture(params=["script", "transaction"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def far(server: RedisServer, way: str) -> Iterator[redis.Redis]:
    with server.client() as client:
        client.execute_command("ACL SETUSER noscript on >pw ~* +@all -@scripting")
        yield client


@pytest.fixture
def rig(tmp_path: Path, server: RedisServer, far: redis.Redis, way: str) -> Iterator[Rig]:
    with Rig(tmp_path, server.port, ALL, settings(way)) as rig:
        yield rig


def settings(way: str) -> str:
    return "username = noscript\npassword = pw" if way == "transaction" else ""


def test_there_is_time_for_something_else_while_redis_works(tmp_path: Path, server: RedisServer) -> None:
    with Rig(tmp_path, server.port, LIST) as rig, server.client() as far:
        rig.log.publish_many(10)
        operations = rig.plan.ask(rig.log.entries()).operations
        there: list[int] = []
        with closing(rig.connect()) as link:
            assert link.write(Batch(GATEWAY, 1, Mark(), 5, operations[:5])) == []
            assert link.write(Batch(GATEWAY, 1, Mark(5), 10, operations[5:]), lambda: there.append(rig.log.publish("t"))) == []
        assert there == [11]
        assert far.lrange("list", 0, -1) == rig.published()[:10]


def test_a_message_has_the_specification_s_keys(rig: Rig, far: redis.Redis) -> None:
    rig.log.publish("a/b c", b'with "quotes",\r\nlines and \x00', qos=2, client="me")
    rig.drain()
    (msgid,) = rig.published()
    assert far.hgetall(f"mqtt:msg:{msgid}") == {
        "id": msgid,
        "from": "me",
        "qos": "2",
        "topic": "a/b c",
        "retain": "false",
        "payload": 'with "quotes",\r\nlines and \x00',
        "ts": str(NOW),
    }
    assert far.zrange("mqtt:msg:a/b c", 0, -1, withscores=True) == [(msgid, 1.0)]
    assert 7100 < far.ttl(f"mqtt:msg:{msgid}") <= 7200


def test_qos_0_and_retain_clears_are_not_stored_as_messages(rig: Rig, far: redis.Redis) -> None:
    rig.log.publish("a", b"x", qos=0)
    rig.log.publish("a", b"", qos=1, retain=True)
    rig.drain()
    assert far.keys("mqtt:msg:*") == []
    assert far.lrange("list", 0, -1) == rig.published(), "commands see every message"


def test_on_message_store_stores_every_qos_and_each_message_once(
    rig: Rig, far: redis.Redis, server: RedisServer, way: str
) -> None:
    store = MESSAGES.splitlines()[1].replace("publish.1", "publish.4").replace("on_message_publish", "on_message_store")
    rig.configure(server.port, MESSAGES + store.replace("{", '{"topic": "a", "expired_time": 60, ', 1) + "\n", settings(way))
    rig.log.publish("a", b"0", qos=0)
    rig.log.publish("a", b"1", qos=1)
    rig.log.publish("a", b"", qos=1, retain=True)
    rig.log.publish("b", b"0", qos=0)
    rig.log.publish("b", b"1", qos=1)
    rig.drain()
    first, second, _, _, third = rig.published()
    assert far.zrange("mqtt:msg:a", 0, -1) == [first, second]
    assert far.zrange("mqtt:msg:b", 0, -1) == [third]
    assert 0 < far.ttl(f"mqtt:msg:{second}") <= 60, "stored by on_message_store alone"
    assert far.hget(f"mqtt:msg:{first}", "qos") == "0"


def test_presence_follows_the_events_not_the_sync(rig: Rig, far: redis.Redis) -> None:
    rig.log.connected("c", START)
    rig.drain()
    assert far.hgetall("mqtt:client:c") == {"state": "1", "online_at": str(NOW), "offline_at": "undefined"}
    assert far.hgetall("mqtt:node:barn") == {"c": str(NOW)}
    rig.log.disconnected("c", START + 5000)
    rig.drain()
    assert far.hgetall("mqtt:client:c") == {"state": "0", "online_at": str(NOW), "offline_at": str(NOW + 5)}
    assert far.hgetall("mqtt:node:barn") == {}


def test_a_late_presence_does_not_overwrite_a_newer_one_of_another_gateway(rig: Rig, far: redis.Redis) -> None:
    far.hset("mqtt:client:c", mapping={"state": 1, "online_at": NOW + 60, "offline_at": "undefined"})
    far.set("tidegate:stamp:{mqtt:client:c}", f"{START + 60_000} ffff 7 9")
    rig.log.connected("c", START)
    rig.log.disconnected("c", START + 30_000)
    rig.drain()
    assert far.hget("mqtt:client:c", "state") == "1"
    assert far.hget("mqtt:client:c", "online_at") == str(NOW + 60)
    rig.log.disconnected("c", START + 61_000)
    rig.drain()
    assert far.hget("mqtt:client:c", "state") == "1", "it had gone to the other one when this one noticed"
    rig.log.connected("c", START + 62_000)
    rig.log.disconnected("c", START + 63_000)
    rig.drain()
    assert far.hget("mqtt:client:c", "state") == "0"


def test_without_a_stamp_the_specification_s_time_decides(rig: Rig, far: redis.Redis) -> None:
    far.hset("mqtt:client:c", mapping={"state": 1, "online_at": NOW + 60, "offline_at": "undefined"})
    far.hset("mqtt:retain:r", mapping={"payload": "newer", "ts": NOW + 60})
    rig.log.connected("c", START)
    rig.log.publish("r", b"older", retain=True, at=START)
    rig.log.publish("s", b"first", retain=True, at=START)
    rig.drain()
    assert far.hget("mqtt:client:c", "online_at") == str(NOW + 60)
    assert far.hget("mqtt:retain:r", "payload") == "newer"
    assert far.hget("mqtt:retain:s", "payload") == "first"


def test_one_gateway_s_own_order_counts_even_when_its_clock_was_set_back(rig: Rig, far: redis.Redis) -> None:
    rig.log.publish("r", b"before", retain=True, at=START + 90_000)
    rig.log.new_run(2)
    rig.log.publish("r", b"after", retain=True, at=START)
    rig.log.publish("r", b"last", retain=True, at=START)
    rig.drain()
    assert far.hget("mqtt:retain:r", "payload") == "last"
    assert far.get("tidegate:stamp:{mqtt:retain:r}") == f"{START} {GATEWAY} 2 3"


def test_a_retained_message_and_its_deletion(rig: Rig, far: redis.Redis) -> None:
    rig.log.publish("r", b"keep", qos=0, retain=True, at=START)
    rig.drain()
    (msgid,) = rig.published()
    assert far.hgetall("mqtt:retain:r") == {
        "id": msgid,
        "from": "c1",
        "qos": "0",
        "topic": "r",
        "retain": "true",
        "payload": "keep",
        "ts": str(NOW),
    }
    assert far.ttl("mqtt:retain:r") == -1
    rig.log.publish("r", b"", retain=True, at=START + 10_000)
    rig.drain()
    assert not far.exists("mqtt:retain:r")
    assert 29 * 86_400 < far.ttl("tidegate:stamp:{mqtt:retain:r}") <= 30 * 86_400


def test_a_deleted_retained_message_does_not_come_back_from_the_dead(rig: Rig, far: redis.Redis) -> None:
    far.set("tidegate:stamp:{mqtt:retain:r}", f"{START + 60_000} ffff 1 1")
    rig.log.publish("r", b"a week old", retain=True, at=START)
    rig.drain()
    assert not far.exists("mqtt:retain:r")
    rig.log.publish("r", b"today", retain=True, at=START + 61_000)
    rig.drain()
    assert far.hget("mqtt:retain:r", "payload") == "today"


def test_a_late_deletion_leaves_a_newer_value(rig: Rig, far: redis.Redis) -> None:
    far.hset("mqtt:retain:r", mapping={"payload": "newer", "ts": NOW + 60})
    far.set("tidegate:stamp:{mqtt:retain:r}", f"{START + 60_000} ffff 1 1")
    rig.log.publish("r", b"", retain=True, at=START)
    rig.drain()
    assert far.hget("mqtt:retain:r", "payload") == "newer"


def test_a_pointer_left_by_emqx_4_gives_way(rig: Rig, far: redis.Redis) -> None:
    far.set("mqtt:retain:r", "5C4C8A8B8C8D")
    rig.log.publish("r", b"one", retain=True)
    rig.log.publish("r", b"two", retain=True)
    rig.drain()
    assert far.hget("mqtt:retain:r", "payload") == "two"
    assert rig.quarantine() == []


def test_a_stamp_stands_in_the_slot_of_its_key(rig: Rig, far: redis.Redis) -> None:
    rig.log.publish("a{b}c", b"x", retain=True)
    rig.drain()
    assert far.exists("tidegate:stamp:mqtt:retain:a{b}c")


def test_expired_time_counts_from_the_writing_also_for_retained(
    rig: Rig, far: redis.Redis, server: RedisServer, way: str
) -> None:
    rules = ALL.replace('"pool"', '"expired_time": 99, "pool"')
    rig.configure(server.port, rules.replace(LIST, ""), settings(way))
    rig.log.publish("r", b"x", retain=True)
    rig.drain()
    (msgid,) = rig.published()
    assert 90 < far.ttl(f"mqtt:msg:{msgid}") <= 99
    assert 90 < far.ttl("mqtt:retain:r") <= 99


def test_refused_records_go_to_quarantine_and_the_others_through(
    rig: Rig, far: redis.Redis, server: RedisServer, way: str
) -> None:
    far.set("mqtt:msg:t/0", "not an index")
    rig.configure(server.port, ALL + command(7, "RPUSHH x ${payload}", topic="t/1"), settings(way))
    for number in range(10):
        rig.log.publish(f"t/{number % 5}", b"%d" % number)
    rig.drain()
    rows = [(row.seq, row.target, row.reason.split(" ", 1)[0]) for row in rig.quarantine()]
    assert [(seq, target) for seq, target, _ in rows] == [
        (1, "message.publish.1 on_message_publish"),
        (2, "message.publish.7 RPUSHH x ${payload}"),
        (6, "message.publish.1 on_message_publish"),
        (7, "message.publish.7 RPUSHH x ${payload}"),
    ]
    assert "WRONGTYPE" in rows[0][2] or "WRONGTYPE" in rig.quarantine()[0].reason
    assert b"RPUSHH\r\n$1\r\nx\r\n$1\r\n1\r\n" in rig.quarantine()[1].original
    assert far.lrange("list", 0, -1) == rig.published()
    assert far.zcard("mqtt:msg:t/1") == 2
    assert far.exists(REFUSED) == 0, "settled at the far end"
    assert rig.standing().refused == 4


def test_templates_are_filled_per_argument(rig: Rig, far: redis.Redis, server: RedisServer, way: str) -> None:
    rules = (
        command(1, "HMSET copy:${msgid} ${message}")
        + command(2, "RPUSH pub:${clientid}:${topic} ${payload}")
        + command(3, "SET facts ${qos}/${retain}/${timestamp}")
        + command(1, "SET conn:${clientid} ${clientid}", "client.connected")
    )
    rig.configure(server.port, rules, settings(way))
    rig.log.connected("c 1")
    rig.log.publish("a/b", b"two words\nand a line", qos=1, client="c 1", at=START)
    rig.drain()
    (msgid,) = rig.published()
    assert far.hget(f"copy:{msgid}", "payload") == "two words\nand a line"
    assert far.lrange("pub:c 1:a/b", 0, -1) == ["two words\nand a line"]
    assert far.get("facts") == f"1/false/{NOW}"
    assert far.get("conn:c 1") == "c 1"


def test_the_way_of_writing_is_said_and_shown(rig: Rig, far: redis.Redis, way: str) -> None:
    rig.log.publish_many(30)
    rig.drain()
    warning = rig.standing().warning
    assert ("no right to run scripts" in warning) == (way == "transaction")
    assert rig.said == ([f"pool_warning: {warning}"] if warning else [])


def test_a_lot_arrives_in_order_either_way(rig: Rig, far: redis.Redis, server: RedisServer) -> None:
    rig.log.publish_many(3000)
    rig.drain()
    assert_holds_everything(rig, server)
    assert far.hgetall(LEDGER) == {"1": "3000"}


def test_a_mark_that_moved_meanwhile_stops_the_batch(rig: Rig, far: redis.Redis) -> None:
    rig.log.publish_many(50)
    rig.step()
    far.hset(LEDGER, "1", 20)
    rig.drain()
    assert far.lrange("list", 0, -1) == rig.published()[20:]


def test_a_missing_right_stops_the_pool_and_is_named(rig: Rig, far: redis.Redis) -> None:
    command: Any = far.execute_command
    command("ACL SETUSER noscript -hset")
    command("ACL SETUSER default -hset")
    rig.log.publish_many(5)
    for _ in range(3):
        rig.step()
    assert rig.standing().state == "misconfigured"
    assert "ACL SETUSER" in rig.standing().hint
    command("ACL SETUSER noscript +hset")
    command("ACL SETUSER default +hset")
    rig.drain()
    assert far.lrange("list", 0, -1) == rig.published()


def test_index_entries_go_when_their_hash_is_gone(tmp_path: Path, server: RedisServer) -> None:
    with Rig(tmp_path, server.port, MESSAGES) as rig, server.client() as far:
        for number in range(4):
            rig.log.publish("t", b"%d" % number)
        rig.drain()
        ids = rig.published()
        far.delete(*[f"mqtt:msg:{msgid}" for msgid in ids[:3]])
        rig.log.publish("t", b"next")
        rig.drain()
        rig.log.publish("t", b"next")
        rig.drain()
        assert far.zrange("mqtt:msg:t", 0, -1) == rig.published()[3:]


def test_a_refusal_whose_answer_was_lost_is_found_on_the_next_connect(tmp_path: Path, server: RedisServer) -> None:
    with Proxy(server.port) as proxy, Rig(tmp_path, proxy.port, ALL) as rig, server.client() as far:
        rig.log.publish("first", b"so that the server knows the script")
        rig.drain()
        far.set("mqtt:msg:t/0", "not an index")
        rig.log.publish_many(20, topics=2)
        proxy.set("cut_down")
        rig.step()
        assert far.hget(LEDGER, "1") == "21"
        assert far.hlen(REFUSED) == 10
        proxy.set("pass")
        rig.drain()
        assert [row.seq for row in rig.quarantine()] == list(range(2, 22, 2))
        assert not far.exists(REFUSED)
        assert (rig.standing().refused, rig.standing().delivered) == (10, 21)
