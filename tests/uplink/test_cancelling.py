"""What cancels or overtakes each other while it is still on the box: less is sent, and the far end is right in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate.store.entry import PUBLISH, RETAIN
from tidegate.store.reader import LogReader
from tidegate.uplink.backend import Mark, Operation, Packed
from tidegate.uplink.cancelling import Cancelling
from tidegate.uplink.plan import TAKES
from tidegate.uplink.redis_actions import coalesced, pack, unpack

from tests.support.redis_cluster import Cluster
from tests.support.redis_server import RedisServer

from .logfile import START
from .rig import LIST, MESSAGES, PRESENCE, Rig

QUEUE = f'backend.redis.hook.message.acked.1 = {{"topic": "queue/#", "action": {{"function": "{TAKES}"}}, "pool": "pool1"}}\n'
OWN = LIST.replace("publish.9", "publish.8").replace('{"action', '{"topic": "queue/#", "action')
MINUTE = 60_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def far(server: RedisServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


@pytest.fixture
def rig(tmp_path: Path, server: RedisServer) -> Iterator[Rig]:
    with Rig(tmp_path, server.port, MESSAGES + QUEUE) as rig:
        yield rig


def calls(far: Any, *names: str) -> int:
    """How often Redis ran these commands."""
    stats = far.info("commandstats")
    return sum(stats[f"cmdstat_{name}"]["calls"] for name in names if f"cmdstat_{name}" in stats)


def balanced(rig: Rig) -> dict[str, int]:
    rig.worker.stop()
    account = rig.standing().account
    delivered, cursor = rig.standing().delivered, rig.standing().cursor
    assert cursor + account.again == delivered + account.passed + account.missing + account.cancelled
    return {"delivered": delivered, "cancelled": account.cancelled}


def test_a_message_and_its_acknowledgement_that_are_both_here_are_not_sent(rig: Rig, far: Any) -> None:
    gone, stays = rig.log.publish("queue/1", b"x"), rig.log.publish("queue/1", b"y")
    rig.log.acked("c", "queue/1", gone)
    rig.drain()
    assert far.zrange("mqtt:msg:queue/1", 0, -1) == [rig.published()[1]]
    assert calls(far, "zadd") == 1 and calls(far, "del", "zrem") == 0
    assert stays == 2 and balanced(rig) == {"delivered": 1, "cancelled": 2}


def test_far_apart_in_the_log_too(rig: Rig, far: Any) -> None:
    gone = rig.log.publish("queue/1", b"x")
    rig.log.publish_many(1500)
    rig.log.acked("c", "queue/1", gone)
    rig.drain()
    assert not far.exists("mqtt:msg:queue/1") and calls(far, "del", "zrem") == 0
    assert balanced(rig) == {"delivered": 1500, "cancelled": 2}


def test_the_halves_of_a_batch_cancel_what_the_whole_did(rig: Rig) -> None:
    """It is halved when something in it is refused."""
    rig.log.acked("c", "queue/1", rig.log.publish("queue/1", b"x"))
    with closing(LogReader(rig.data / "log.db")) as log:
        cancelling = Cancelling(rig.plan, log)
        both, _ = log.read(0, 10)
        assert cancelling.among(both, Mark(), 0) == {1, 2}
        assert cancelling.among(both[:1], Mark(), 0) == {1} and cancelling.among(both[1:], Mark(1), 0) == {2}


def test_what_was_sent_before_is_taken_out(rig: Rig, far: Any) -> None:
    gone = rig.log.publish("queue/1", b"x")
    rig.drain()
    assert far.zcard("mqtt:msg:queue/1") == 1
    rig.log.acked("c", "queue/1", gone)
    rig.drain()
    assert far.keys("mqtt:msg:*") == []
    assert balanced(rig) == {"delivered": 2, "cancelled": 0}


def test_only_storing_and_taking_out_cancel(tmp_path: Path, server: RedisServer, far: Any) -> None:
    with Rig(tmp_path, server.port, MESSAGES + QUEUE + OWN) as rig:
        kept = rig.log.append(PUBLISH, "c1", "queue/state", 1 | RETAIN, b"value")
        other = rig.log.publish("other", b"x")
        rig.log.acked("c", "queue/state", kept)
        rig.log.acked("c", "other", other)
        rig.drain()
        first, second = rig.published()
        assert far.hget("mqtt:retain:queue/state", "id") == first
        assert far.lrange("list", 0, -1) == [first]
        assert not far.exists(f"mqtt:msg:{first}") and far.exists(f"mqtt:msg:{second}"), "no rule takes that out"
        assert balanced(rig) == {"delivered": 2, "cancelled": 1}


def test_a_message_that_was_half_sent_when_it_was_acknowledged_is_gone_in_the_end(
    tmp_path: Path, server: RedisServer, far: Any
) -> None:
    """The right to the second write is missing: the mark stands between the two."""
    with Rig(tmp_path, server.port, MESSAGES + QUEUE + OWN) as rig:
        far.execute_command("ACL SETUSER default -rpush")
        gone = rig.log.publish("queue/1", b"x")
        rig.step_until(lambda: rig.standing().state == "misconfigured", 5)
        assert far.zcard("mqtt:msg:queue/1") == 1
        rig.log.acked("c", "queue/1", gone)
        far.execute_command("ACL SETUSER default +rpush")
        rig.drain()
        assert far.keys("mqtt:msg:*") == [] and far.lrange("list", 0, -1) == rig.published()


# -- queues on a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


def commands(cluster: Cluster, *names: str) -> int:
    found = 0
    for node in cluster.nodes:
        with node.client() as far:
            found += calls(far, *names)
    return found


def allow(cluster: Cluster, *rules: str) -> None:
    for node in cluster.nodes:
        with node.client() as far:
            far.execute_command("ACL SETUSER default", *rules)


def test_on_a_cluster_both_are_left_out_too(tmp_path: Path, cluster: Cluster) -> None:
    with Rig(tmp_path, cluster.port, MESSAGES + QUEUE, "type = cluster") as rig, cluster.client() as far:
        before = commands(cluster, "del", "zrem")
        rig.log.publish("queue/1", b"stays")
        gone = rig.log.publish("queue/1", b"x")
        rig.log.publish_many(1500)
        rig.log.acked("c", "queue/1", gone)
        rig.drain()
        assert far.zrange("mqtt:msg:queue/1", 0, -1) == rig.published()[:1]
        assert commands(cluster, "del", "zrem") == before
        assert balanced(rig) == {"delivered": 1501, "cancelled": 2}


@pytest.mark.parametrize("restarted", [True, False])
def test_on_a_cluster_what_an_attempt_left_there_is_taken_out(tmp_path: Path, cluster: Cluster, restarted: bool) -> None:
    """Messages are stored by commands of their own: without the right to scripts the batch ends behind them."""
    with Rig(tmp_path, cluster.port, MESSAGES + QUEUE, "type = cluster") as rig, cluster.client() as far:
        allow(cluster, "-eval", "-evalsha")
        gone = rig.log.publish("queue/1", b"x")
        rig.step_until(lambda: rig.standing().state == "misconfigured", 5)
        assert far.zcard("mqtt:msg:queue/1") == 1
        rig.log.acked("c", "queue/1", gone)
        later = rig.log.publish("queue/1", b"y")
        rig.log.acked("c", "queue/1", later)
        allow(cluster, "+eval", "+evalsha")
        if restarted:
            rig.restart()
        rig.drain()
        assert not far.exists("mqtt:msg:queue/1") and not far.exists(f"mqtt:msg:{rig.published()[0]}")
        assert balanced(rig) == {"delivered": 1, "cancelled": 3}, "of what was tried the acknowledgement is sent"


# -- presence ----------------------------------------------------------------------------------------------------------

CHANGES = 10_000
"""In a week, one a minute: 5,000 times there and away again."""


def test_a_week_of_flapping_is_one_hash_with_the_last_true_times_and_few_writes(
    tmp_path: Path, server: RedisServer, far: Any
) -> None:
    with Rig(tmp_path, server.port, PRESENCE) as rig:
        last = rig.log.flap("c", CHANGES // 2, MINUTE)
        rig.drain()
        assert far.hgetall("mqtt:client:c") == {
            "state": "0",
            "online_at": str((last - MINUTE) // 1000),
            "offline_at": str(last // 1000),
        }
        assert not far.exists("mqtt:node:barn")
        batches = calls(far, "eval", "evalsha")
        assert batches < 20 and calls(far, "hset") <= 5 * batches
        assert balanced(rig) == {"delivered": CHANGES, "cancelled": 0}


def test_what_a_command_of_the_user_may_read_is_there_when_it_runs(tmp_path: Path, server: RedisServer, far: Any) -> None:
    copy = PRESENCE.splitlines()[1].replace("connected.1", "connected.2")
    copy = copy.replace('"function": "on_client_connected"', '"commands": ["COPY mqtt:client:${clientid} before"]') + "\n"
    with Rig(tmp_path, server.port, PRESENCE + copy) as rig:
        rig.log.connected("c", START)
        rig.log.disconnected("c", START + MINUTE)
        rig.log.connected("c", START + 2 * MINUTE)
        rig.drain()
        assert far.hget("before", "online_at") == str(START // 1000)
        assert far.hget("mqtt:client:c", "online_at") == str((START + 2 * MINUTE) // 1000)


@given(st.lists(st.tuples(st.sampled_from("CD"), st.sampled_from("ab")), max_size=12))
def test_leaving_out_what_is_void_leaves_the_same(events: list[tuple[str, str]]) -> None:
    made = [
        Operation(number, 0, "", Packed(pack([letter.encode(), name.encode(), b"n", b"%d" % number, b"k", b"s"]), 6))
        for number, (letter, name) in enumerate(events)
    ]
    few = coalesced(made)
    assert left_by(few) == left_by(made) and len(few) <= 4


def left_by(operations: Sequence[Operation]) -> dict[bytes, dict[str, object]]:
    """State and times of each client."""
    found: dict[bytes, dict[str, object]] = {}
    for operation in operations:
        letter, client, _, seconds, *_ = unpack(operation.packed)
        field = "online" if letter == b"C" else "offline"
        found[client] = found.get(client, {}) | {"state": letter, field: seconds}
        if letter == b"C":
            found[client].pop("offline", None)
    return found
