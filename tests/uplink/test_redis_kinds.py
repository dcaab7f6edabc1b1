"""Redis that is more than one server, or behind TLS: a cluster whose slots move, a master that fails over, a certificate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate.uplink.retry import Due, send_again
from tidegate.uplink.to_redis import connect
from tidegate.uplink.worker import Wait

from tests.support.certificates import make_certificates
from tests.support.redis_cluster import Cluster, Watched
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .logfile import GATEWAY, START
from .rig import LIST, MESSAGES, PRESENCE, Rig, assert_holds_everything

ALL = PRESENCE + MESSAGES + LIST
LEDGER = f"tidegate:ledger:{{{GATEWAY}:pool1}}"


def command(number: int, text: str) -> str:
    return f'backend.redis.hook.message.publish.{number} = {{"action": {{"commands": ["{text}"]}}, "pool": "pool1"}}\n'


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def rig(tmp_path: Path, cluster: Cluster) -> Iterator[Rig]:
    with Rig(tmp_path, cluster.port, ALL, "type = cluster") as rig:
        yield rig


def drain_in_time(rig: Rig) -> None:
    """Servers that elect need time, which no clock of ours moves."""
    wait_until(lambda: rig.step() == Wait(None, True), say=rig.standing)


def test_everything_arrives_on_a_cluster_once_and_in_order(rig: Rig, cluster: Cluster) -> None:
    rig.log.connected("c", START)
    rig.log.connected("d", START)
    rig.log.publish_many(300)
    rig.log.publish("r", b"value", retain=True)
    rig.log.disconnected("d", START + 5000)
    rig.drain()
    assert_holds_everything(rig, cluster)
    with cluster.client() as client:
        assert client.hget("mqtt:client:c", "state") == "1" and client.hget("mqtt:client:d", "state") == "0"
        assert client.hgetall("mqtt:node:barn") == {"c": str(START // 1000)}
        assert client.hget("mqtt:retain:r", "payload") == "value"
    rig.log.publish("r", b"", retain=True)
    rig.drain()
    with cluster.client() as client:
        assert not client.exists("mqtt:retain:r")
    assert rig.standing().state == "connected"


def test_on_message_store_stores_every_qos_on_a_cluster(tmp_path: Path, cluster: Cluster) -> None:
    store = MESSAGES.splitlines(keepends=True)[1].replace("on_message_publish", "on_message_store")
    with Rig(tmp_path, cluster.port, store, "type = cluster") as rig, cluster.client() as client:
        for qos in range(3):
            rig.log.publish("t", b"%d" % qos, qos=qos)
        rig.drain()
        found = [client.hget(f"mqtt:msg:{msgid}", "qos") for msgid in client.zrange("mqtt:msg:t", 0, -1)]
        assert found == ["0", "1", "2"]


def test_answers_that_are_lost_on_any_node_double_nothing(rig: Rig, cluster: Cluster) -> None:
    rig.log.publish_many(300)
    rig.step()
    for proxy in cluster.proxies * 2:
        proxy.set("cut_down")
        rig.step_until(proxy.held.is_set)
        proxy.set("pass")
    rig.drain()
    assert_holds_everything(rig, cluster)


def test_the_late_tail_of_a_batch_given_up_is_applied_once(rig: Rig, cluster: Cluster) -> None:
    rig.log.publish_many(300)
    _, owner = cluster.owner("list")
    proxy = cluster.proxies[cluster.nodes.index(owner)]
    rig.step()
    proxy.hold_up()
    rig.step()
    assert proxy.held.is_set() and rig.standing().state == "unreachable"
    rig.drain()
    with owner.client() as client:
        before = client.info("commandstats")["cmdstat_rpush"]["calls"]
        assert before == 300
        proxy.release()
        wait_until(lambda: not proxy.held.is_set() or client.info("clients")["connected_clients"] <= 3)
    assert_holds_everything(rig, cluster)


def test_a_slot_that_moves_while_we_write_keeps_its_order(rig: Rig, cluster: Cluster) -> None:
    rig.log.publish_many(300)
    rig.step_until(lambda: rig.standing().delivered > 0)
    assert rig.standing().delivered < 300
    source, target = cluster.begin_move("list")
    rig.step()
    cluster.end_move("list", source, target)
    rig.drain()
    assert_holds_everything(rig, cluster)
    assert cluster.owner("list")[1] is target


def test_keys_made_while_their_slot_is_on_its_way_wait_for_its_arrival(rig: Rig, cluster: Cluster) -> None:
    source, target = cluster.begin_move("list")
    rig.log.publish_many(20)
    for _ in range(5):
        rig.step()
    assert "rehashing" in rig.standing().error
    cluster.end_move("list", source, target)
    rig.drain()
    assert_holds_everything(rig, cluster)


def test_a_node_that_comes_back_empty_is_filled_again(rig: Rig, cluster: Cluster) -> None:
    rig.log.publish_many(300)
    rig.drain()
    for node in cluster.nodes:
        node.kill()
        rig.log.publish("meanwhile", b"x")
        rig.step_until(lambda: rig.standing().state == "unreachable")
        node.start()
        drain_in_time(rig)
        assert_holds_everything(rig, cluster)


def test_a_node_that_is_filled_again_gets_batches_that_grow(rig: Rig, cluster: Cluster) -> None:
    """Although the ledger on another stands further on, and trouble before has made them small."""
    rig.log.publish_many(300)
    rig.drain()
    keeper = cluster.owner(LEDGER)[1]
    with next(node for node in cluster.nodes if node is not keeper).client() as other:
        other.flushall()
    for proxy in cluster.proxies:
        proxy.set("refuse")
    for _ in range(10):
        rig.step()
    for proxy in cluster.proxies:
        proxy.set("pass")
    rig.drain(40)
    assert_holds_everything(rig, cluster)


def test_a_cluster_that_is_down_for_want_of_one_node_is_waited_for(tmp_path: Path) -> None:
    """As Redis ships it, all nodes refuse when one is away."""
    with Cluster(tmp_path, "--cluster-require-full-coverage", "yes") as cluster:
        _, owner = cluster.owner(LEDGER)
        away = next(node for node in cluster.nodes[1:] if node is not owner)
        with Rig(tmp_path, cluster.port, LIST, "type = cluster") as rig:
            rig.drain()
            away.kill()
            with owner.client() as client:
                wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "fail")
            rig.log.publish_many(10)
            for _ in range(20):
                rig.step()
            assert rig.standing().state == "unreachable"
            assert not [line for line in rig.said if line.startswith("pool_misconfigured")]
            away.start()
            drain_in_time(rig)
            with cluster.client() as far:
                assert far.lrange("list", 0, -1) == rig.published()


def test_what_a_cluster_refuses_goes_to_quarantine_alone_and_can_be_sent_again(tmp_path: Path, cluster: Cluster) -> None:
    rules = MESSAGES + command(7, "SADD wrong ${msgid}") + command(8, "MSET one ${msgid} two ${msgid}") + LIST
    with cluster.client() as client, Rig(tmp_path, cluster.port, rules, "type = cluster") as rig:
        client.set("wrong", "type")
        rig.log.publish_many(3)
        rig.drain()
        assert_holds_everything(rig, cluster)
        kept = rig.quarantine()
        assert [row.target.split()[:2] for row in kept] == [["message.publish.7", "SADD"], ["message.publish.8", "MSET"]] * 3
        assert kept[0].reason.startswith("WRONGTYPE") and kept[1].reason.startswith("CROSSSLOT")
        client.delete("wrong")
        link = connect(rig.pool)
        for _ in range(2):  # the second time as after an answer that was lost
            assert send_again(link, Due(1, GATEWAY, 77, kept[0].target, kept[0].original)) is None
        link.close()
        assert client.smembers("wrong") == {rig.published()[0]}
        assert client.get("one") is None and client.hgetall(f"tidegate:refused:{{{GATEWAY}:pool1}}") == {}


@pytest.mark.parametrize("kind", ["single", "cluster"])
def test_a_server_of_another_type_is_named(tmp_path: Path, kind: str) -> None:
    options = ("--cluster-enabled", "yes") if kind == "single" else ()
    with RedisServer(tmp_path, *options) as server, Rig(tmp_path, server.port, ALL, f"type = {kind}") as rig:
        if kind == "single":
            with server.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
                wait_until(lambda: client.execute_command("CLUSTER INFO").get("cluster_state") == "ok")
        rig.log.publish_many(3)
        rig.step_until(lambda: rig.standing().state == "misconfigured", 5)
        other = "cluster" if kind == "single" else "single"
        assert rig.standing().hint == f"set backend.redis.pool1.type = {other}"


def test_a_cluster_that_is_down_for_a_moment_is_waited_for(rig: Rig, cluster: Cluster) -> None:
    rig.log.publish_many(100)
    rig.drain()
    slot, owner = cluster.owner("list")
    with owner.client() as client:
        client.execute_command("CLUSTER DELSLOTS", slot)
        rig.log.publish_many(100)
        for _ in range(3):
            rig.step()
        assert (rig.standing().state, rig.standing().hint) == ("unreachable", "")
        client.execute_command("CLUSTER ADDSLOTS", slot)
    drain_in_time(rig)
    assert_holds_everything(rig, cluster)


def test_the_master_fails_over_while_we_write(tmp_path: Path) -> None:
    with Watched(tmp_path) as watched, Rig(tmp_path, 1, ALL, watched.settings()) as rig:
        rig.log.connected("c", START)
        rig.log.publish_many(300)
        rig.step_until(lambda: rig.standing().delivered > 0)
        watched.master.kill()
        rig.log.publish_many(100)
        rig.log.disconnected("c", START + 5000)
        drain_in_time(rig)
        with watched.replica.client() as client:
            assert client.hgetall("mqtt:client:c") == {
                "state": "0",
                "online_at": str(START // 1000),
                "offline_at": str(START // 1000 + 5),
            }
        assert_holds_everything(rig, watched.replica)
        assert rig.standing().state == "connected"


def test_a_master_that_lost_its_office_is_written_no_further(tmp_path: Path) -> None:
    with Watched(tmp_path) as watched, Rig(tmp_path, 1, ALL, watched.settings()) as rig:
        rig.log.publish_many(100)
        rig.drain()
        with watched.sentinels[0].client() as client:
            client.execute_command("SENTINEL FAILOVER mymaster")
        with watched.replica.client() as new, watched.master.client() as old:
            wait_until(lambda: new.info("replication")["role"] == "master")
            old.replicaof("127.0.0.1", watched.replica.port)  # as a sentinel does when it next looks, up to 10 s later
        rig.log.publish_many(100)
        drain_in_time(rig)
        assert_holds_everything(rig, watched.replica)


def test_a_master_s_name_that_no_sentinel_knows_is_named(tmp_path: Path) -> None:
    with Watched(tmp_path) as watched:
        wrong = watched.settings().replace("mymaster", "mymastre")
        with Rig(tmp_path, 1, ALL, wrong) as rig:
            rig.log.publish_many(3)
            rig.step_until(lambda: rig.standing().state == "misconfigured", 5)
            assert rig.standing().error == "the sentinels watch no master named 'mymastre', but mymaster"
        for sentinel in watched.sentinels:
            sentinel.freeze()
        (tmp_path / "again").mkdir()
        with Rig(tmp_path / "again", 1, ALL, wrong) as rig:
            rig.step()
            assert rig.standing().state == "unreachable", "who does not answer may know it"


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """The directory with ca.pem, which signed the server's."""
    return make_certificates(tmp_path)[0].parent


@pytest.fixture
def secure(tmp_path: Path, certificates: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path, certificates=certificates) as server:
        yield server


def test_a_server_behind_tls_gets_everything(tmp_path: Path, secure: RedisServer, certificates: Path) -> None:
    settings = f"ssl = true\ncacertfile = {certificates / 'ca.pem'}"
    with Rig(tmp_path, secure.port, ALL, settings) as rig:
        rig.log.publish_many(300)
        rig.drain()
        assert_holds_everything(rig, secure)
        secure.kill()
        rig.step_until(lambda: rig.standing().state == "unreachable")
        secure.start()
        rig.drain()
        assert_holds_everything(rig, secure)


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, secure: RedisServer) -> None:
    with Rig(tmp_path, secure.port, ALL, "ssl = true") as rig:
        rig.log.publish_many(3)
        rig.step()
        assert rig.standing().state == "misconfigured"
        assert "cacertfile" in rig.standing().hint


def test_no_plain_connection_is_made_to_a_server_with_tls(tmp_path: Path, secure: RedisServer) -> None:
    with Rig(tmp_path, secure.port, ALL) as rig:
        rig.log.publish_many(3)
        rig.step()
        assert rig.standing().state == "unreachable"
