"""A Redis that is more than one server is asked: a cluster whose slots move and whose nodes die, a master that fails over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tidegate.store.inbox import MESSAGE, POSITION, RETAINED, SUBSCRIBE
from tidegate.store.msgid import message_id

from tests.support.certificates import make_certificates
from tests.support.redis_cluster import Cluster, Watched
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .lane_rig import LOOKUP, PUBSUB, QUEUE, LaneRig, subscriptions
from .lane_rig import RETAINED as LOOK_UP_RETAINED
from .rig import MESSAGES, PRESENCE, Rig

RULES = LOOKUP + PUBSUB + QUEUE + LOOK_UP_RETAINED
CLIENTS = [f"c{number}" for number in range(12)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def rig(tmp_path: Path, cluster: Cluster) -> Iterator[LaneRig]:
    with LaneRig(tmp_path, cluster.port, RULES, "type = cluster") as rig:
        yield rig


def put(far: Any, topic: str, msgid: str, payload: str) -> None:
    """A stored message, as a business system or another gateway writes it."""
    fields = {"id": msgid, "from": "s", "qos": 1, "topic": topic, "payload": payload, "ts": int(time.time())}
    far.hset(f"mqtt:msg:{msgid}", mapping=fields)
    far.zadd(f"mqtt:msg:{topic}", {msgid: 1})


def ours(seq: int) -> str:
    return message_id(1_700_000_000_000 + seq, "AAAA", 5, seq)


def fill(far: Any) -> None:
    """For each client a subscription, three messages of which one was read, two of a queue, and a retained one."""
    for client in CLIENTS:
        far.hset(f"mqtt:sub:{client}", f"down/{client}", 1)
        for seq in (1, 2, 3):
            put(far, f"pubsub/{client}", ours(seq), str(seq))
        far.hset(f"tidegate:position:{client}:pubsub/{client}", "AAAA", "5:1")
        for number in (1, 2):
            put(far, f"queue/{client}", f"{client}-{number}", f"{client}-{number}")
        far.hset(f"mqtt:retain:r/{client}", mapping={"id": "i", "from": "s", "qos": 1, "payload": client, "ts": 1_700_000_000})


def arrive(rig: LaneRig) -> None:
    """Every client comes with its subscriptions."""
    for client in CLIENTS:
        rig.log.arrive(client)
        for topic in (f"pubsub/{client}", f"queue/{client}", f"r/{client}"):
            rig.log.subscribe(client, topic)


def assert_everybody_is_answered_once(rig: LaneRig) -> None:
    found = rig.answers()
    known = sorted(subscriptions(one) for one in found if one.kind not in (MESSAGE, RETAINED, POSITION))
    assert known == sorted((client, {f"down/{client}": 1}) for client in CLIENTS)
    for client in CLIENTS:
        mine = [one for one in found if one.client == client]
        assert [one.payload for one in mine if one.kind == MESSAGE and not one.queue] == [b"2", b"3"]
        given = [one.payload.decode() for one in mine if one.kind == MESSAGE and one.queue]
        assert given == [f"{client}-1", f"{client}-2"]
        assert [one.payload.decode() for one in mine if one.kind == RETAINED] == [client]


def state(rig: LaneRig) -> str:
    standing = rig.book.standing(rig.pool_name)
    assert standing is not None
    return standing.state


def ask_in_time(rig: LaneRig) -> None:
    """Servers that elect need time, which no clock of ours moves."""
    wait_until(lambda: _step(rig))


def _step(rig: LaneRig) -> bool:
    wait = rig.lane.step()
    if not wait.for_news:
        rig.clock.now += wait.seconds or 0.0
    return wait.for_news and wait.seconds != 0 and not rig.waiting()


def test_a_cluster_answers_every_kind_of_question(rig: LaneRig, cluster: Cluster) -> None:
    with cluster.client() as far:
        fill(far)
    arrive(rig)
    rig.ask()
    assert_everybody_is_answered_once(rig)
    assert state(rig) == "connected"


def test_a_cluster_behind_tls_with_a_password_is_asked(tmp_path: Path) -> None:
    authority, _, _ = make_certificates(tmp_path)
    with Cluster(tmp_path, password="secret", certificates=tmp_path) as cluster:
        with cluster.client() as far:
            fill(far)
        settings = f"type = cluster\nssl = true\ncacertfile = {authority}\npassword = secret"
        with LaneRig(tmp_path, cluster.port, RULES, settings) as rig:
            arrive(rig)
            rig.ask()
            assert_everybody_is_answered_once(rig)


def test_retained_messages_are_found_by_wildcard_on_every_node(rig: LaneRig, cluster: Cluster) -> None:
    with cluster.client() as far:
        fill(far)
        far.set("mqtt:retain:r/pointer", "p")
        put(far, "r/pointer", "p", "pointer")
    rig.log.arrive("c0")
    rig.log.subscribe("c0", "r/+")
    rig.ask()
    assert sorted(one.payload.decode() for one in rig.answers() if one.kind == RETAINED) == sorted([*CLIENTS, "pointer"])


def test_nodes_that_do_not_tell_their_host_are_found(tmp_path: Path) -> None:
    with (
        Cluster(tmp_path, "--cluster-preferred-endpoint-type", "unknown-endpoint") as cluster,
        LaneRig(tmp_path, cluster.port, RULES, "type = cluster") as rig,
    ):
        key = "mqtt:sub:c0"
        source, target = cluster.begin_move(key)
        rig.log.arrive("c0")
        rig.ask()  # the old node answers ASK, because the key is not there
        assert subscriptions(rig.take()[-1]) == ("c0", {})
        cluster.end_move(key, source, target)
        with target.client() as new:
            new.hset(key, "down/c0", 1)
        rig.next_round()
        assert subscriptions(rig.take()[-1]) == ("c0", {"down/c0": 1})


def test_a_named_node_that_left_the_cluster_is_passed_over(tmp_path: Path, cluster: Cluster) -> None:
    with cluster.client() as far, RedisServer(tmp_path, "--cluster-enabled", "yes") as left:
        fill(far)
        servers = f"type = cluster\nserver = 127.0.0.1:{left.port}, 127.0.0.1:{cluster.port}"
        with LaneRig(tmp_path, 1, RULES, servers) as rig:
            arrive(rig)
            rig.ask()
            assert_everybody_is_answered_once(rig)


def test_answers_that_are_lost_on_any_node_are_asked_for_again(rig: LaneRig, cluster: Cluster) -> None:
    with cluster.client() as far:
        fill(far)
    arrive(rig)
    for proxy in cluster.proxies:
        for after in (1, 3):
            proxy.set("cut_down", after)
            rig.step_until(lambda _, proxy=proxy: proxy.held.is_set())  # type: ignore[misc]
            proxy.set("pass")
    rig.ask()
    assert_everybody_is_answered_once(rig)


def test_a_slot_that_moves_is_asked_for_where_its_keys_are(rig: LaneRig, cluster: Cluster) -> None:
    with cluster.client() as far:
        fill(far)
    rig.log.arrive("c0")
    rig.ask()
    assert [subscriptions(one) for one in rig.take()] == [("c0", {"down/c0": 1})]
    key = "mqtt:sub:c0"
    source, target = cluster.begin_move(key)
    with source.client() as old:
        old.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        old.close()
    with cluster.client() as far:
        far.hset(key, "down/more", 2)
    rig.next_round()  # the old node answers ASK
    assert [subscriptions(one) for one in rig.take()] == [("c0", {"down/c0": 1, "down/more": 2})]
    cluster.end_move(key, source, target)
    with target.client() as new:
        new.hdel(key, "down/c0")
    rig.next_round()  # and now MOVED
    assert [subscriptions(one) for one in rig.take()] == [("c0", {"down/more": 2})]
    assert state(rig) == "connected"
    arrive(rig)
    rig.ask()
    assert len([one for one in rig.answers() if one.kind == MESSAGE]) == 4 * len(CLIENTS)


@pytest.mark.parametrize("coverage", ["yes", "no"])
def test_a_node_that_is_away_is_waited_for(tmp_path: Path, coverage: str) -> None:
    """With `yes`, as Redis ships it, those that are there answer CLUSTERDOWN."""
    with (
        Cluster(tmp_path, "--cluster-require-full-coverage", coverage) as cluster,
        LaneRig(tmp_path, cluster.port, RULES, "type = cluster") as rig,
    ):
        rig.ask()
        _, node = cluster.owner("mqtt:sub:c0")
        node.dump()
        with cluster.client() as far:
            fill(far)
        node.dump()
        node.kill()
        others = [other for other in cluster.nodes if other is not node]
        wait_until(lambda: all(info(other, "cluster_slots_fail") for other in others))
        if coverage == "yes":
            wait_until(lambda: all(info(other, "cluster_state") == "fail" for other in others))
            there = next(one for one in CLIENTS if cluster.owner(f"mqtt:sub:{one}")[1] is not node)
            rig.log.arrive(there)
            rig.step_until(lambda _: state(rig) != "connected", 20)
            assert state(rig) == "unreachable", rig.book.standing(rig.pool_name)
        arrive(rig)
        rig.step_until(lambda _: state(rig) == "unreachable", 20)
        for _ in range(20):
            wait = rig.lane.step()
            rig.clock.now += wait.seconds or 0.0
            assert state(rig) == "unreachable", rig.book.standing(rig.pool_name)
        node.start()
        ask_in_time(rig)
        assert_everybody_is_answered_once(rig)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with Watched(tmp_path) as watched:
        yield watched


def say_subscribe(server: RedisServer, topic: str) -> int:
    """How many heard it."""
    with server.client() as far:
        wish = {"type": "subscribe", "topic": topic, "clientid": "c0", "qos": 1}
        return int(far.publish("mqtt_channel", json.dumps(wish)))


def heard(rig: LaneRig) -> list[str]:
    return [json.loads(one.filters)[0][0] for one in rig.answers() if one.kind == SUBSCRIBE]


def test_what_is_said_at_any_node_of_a_cluster_is_heard(rig: LaneRig, cluster: Cluster) -> None:
    rig.log.arrive("c0")
    rig.ask()
    rig.take()
    for number, node in enumerate(cluster.nodes):
        say_subscribe(node, f"at/{number}")
    wait_until(lambda: rig.lane.step() and sorted(heard(rig)) == ["at/0", "at/1", "at/2"])
    rig.take()
    with cluster.client() as far:
        far.hset("mqtt:sub:c0", "while/away", 1)
    for node in cluster.nodes:
        with node.client() as at_node:
            at_node.client_kill_filter(_type="pubsub")
    ask_in_time(rig)
    wait_until(lambda: _step(rig) and bool(rig.answers()))
    assert subscriptions(rig.take()[-1]) == ("c0", {"while/away": 1})
    say_subscribe(cluster.nodes[0], "after")
    wait_until(lambda: rig.lane.step() and heard(rig) == ["after"])


@pytest.mark.parametrize("fault", ["kill", "freeze", "failover"])
def test_after_a_fail_over_the_new_master_is_asked_and_listened_to(tmp_path: Path, watched: Watched, fault: str) -> None:
    with watched.master.client() as far, LaneRig(tmp_path, 1, RULES, watched.settings()) as rig:
        fill(far)
        far.wait(1, 5000)
        rig.log.arrive("c0")
        rig.ask()
        assert say_subscribe(watched.master, "before")
        wait_until(lambda: rig.lane.step() and heard(rig) == ["before"])
        rig.take()
        if fault == "failover":
            with watched.sentinels[0].client() as sentinel:
                sentinel.execute_command("SENTINEL FAILOVER mymaster")
            with watched.replica.client() as new:
                wait_until(lambda: new.info("replication")["role"] == "master")
            far.replicaof("127.0.0.1", watched.replica.port)  # as a sentinel does when it next looks, up to 10 s later
            far.client_kill_filter(_type="normal")
            far.client_kill_filter(_type="pubsub")
        else:
            getattr(watched.master, fault)()
        with watched.replica.client() as new:
            wait_until(lambda: new.info("replication")["role"] == "master")
            new.hset("mqtt:sub:c0", "while/away", 1)
        rig.clock.now += 60
        ask_in_time(rig)
        wait_until(lambda: rig.lane.step() and any(one.client == "c0" for one in rig.answers()))
        assert subscriptions(rig.take()[-1]) == ("c0", {"down/c0": 1, "while/away": 1})
        wait_until(lambda: _step(rig) and say_subscribe(watched.replica, "after"))
        wait_until(lambda: rig.lane.step() and "after" in heard(rig))
        assert state(rig) == "connected"
        rig.take()
        arrive(rig)
        ask_in_time(rig)
        assert len([one for one in rig.answers() if one.kind == MESSAGE]) == 4 * len(CLIENTS)
        if fault == "freeze":
            watched.master.thaw()


def test_sentinels_and_servers_behind_tls_with_passwords_are_asked(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    (tmp_path / "secret").write_text("data\n")
    with Watched(tmp_path, password="data", sentinel_password="watch", certificates=tmp_path) as watched:
        with watched.master.client() as far:
            fill(far)
            far.wait(1, 5000)
        settings = f"{watched.settings()}\nssl = true\ncacertfile = ca.pem\npassword_file = secret\n"
        with LaneRig(tmp_path, 1, RULES, settings + "sentinel_password = watch") as rig:
            arrive(rig)
            rig.ask()
            assert_everybody_is_answered_once(rig)
            watched.master.kill()
            ask_in_time(rig)
            wait_until(lambda: _step(rig) and say_subscribe(watched.replica, "after"))
            wait_until(lambda: rig.lane.step() and heard(rig) == ["after"])
        (tmp_path / "wrong").mkdir()
        wrong = settings.replace(
            "cacertfile = ca.pem\npassword_file = secret", f"cacertfile = {tmp_path}/ca.pem\npassword = data"
        )
        with LaneRig(tmp_path / "wrong", 1, RULES, wrong + "sentinel_password = nonsense") as rig:
            rig.step_until(lambda _: state(rig) == "misconfigured", 5)
            assert "sentinel_password" in rig.book.standing(rig.pool_name).hint  # type: ignore[union-attr]


RIGHTS = "ACL SETUSER gate on >pw ~mqtt:* ~tidegate:* +@read +@write +@scripting +@connection"


@pytest.mark.parametrize("kind", ["single", "sentinel", "cluster"])
def test_the_rights_that_the_documents_name_are_enough(tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        more, settings, port = "+subscribe &mqtt_channel", f"type = {kind}", 1
        servers: list[RedisServer]
        if kind == "cluster":
            cluster = stack.enter_context(Cluster(tmp_path))
            more, servers, port = f"{more} +cluster|slots", cluster.nodes, cluster.port
        elif kind == "sentinel":
            watched = stack.enter_context(Watched(tmp_path))
            servers, settings = [watched.master], watched.settings()
        else:
            servers = [stack.enter_context(RedisServer(tmp_path))]
            port = servers[0].port
        for server in servers:
            with server.client() as client:
                client.execute_command(f"{RIGHTS} {more}")
        settings += "\nusername = gate\npassword = pw"
        (tmp_path / "writes").mkdir()
        writer = stack.enter_context(Rig(tmp_path / "writes", port, PRESENCE + MESSAGES, settings))
        writer.log.publish_many(5)
        writer.drain()
        assert (writer.standing().state, writer.standing().warning, writer.quarantine()) == ("connected", "", [])
        rig = stack.enter_context(LaneRig(tmp_path, port, RULES, settings))
        arrive(rig)
        rig.ask()
        assert state(rig) == "connected"


def test_a_certificate_that_nobody_vouches_for_is_named(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    with RedisServer(tmp_path, certificates=tmp_path) as server, LaneRig(tmp_path, server.port, RULES, "ssl = true") as rig:
        rig.step_until(lambda _: state(rig) == "misconfigured", 5)
        assert "cacertfile" in rig.book.standing(rig.pool_name).hint  # type: ignore[union-attr]


def info(node: Any, name: str) -> Any:
    with node.client() as client:
        found = client.execute_command("CLUSTER INFO")[name]
        return int(found) if str(found).isdigit() else found
