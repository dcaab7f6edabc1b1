"""What the far end and the link can do to a batch, with a real redis-server: nothing is lost, nothing is doubled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.support.proxy import Proxy
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .logfile import GATEWAY
from .rig import LEDGER, LIST, MESSAGES, Rig, assert_holds_everything


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def rig(tmp_path: Path, proxy: Proxy) -> Iterator[Rig]:
    with Rig(tmp_path, proxy.port) as rig:
        rig.log.publish_many(300)
        yield rig


def mark(server: RedisServer) -> str | None:
    with server.client() as client:
        found: str | None = client.hget(LEDGER, "1")
        return found


def scripts_run(server: RedisServer) -> int:
    with server.client() as client:
        stats = client.info("commandstats")
    return sum(stats[name]["calls"] for name in ("cmdstat_evalsha", "cmdstat_eval") if name in stats)


def test_everything_arrives_once_and_in_order(rig: Rig, server: RedisServer) -> None:
    rig.drain()
    assert_holds_everything(rig, server)
    standing = rig.standing()
    assert (standing.state, standing.delivered, standing.refused, standing.cursor) == ("connected", 300, 0, 300)


def test_late_tail_before_the_worker_writes_again_is_not_applied_twice(rig: Rig, server: RedisServer, proxy: Proxy) -> None:
    rig.step_until(lambda: mark(server) == "100")
    proxy.hold_up()
    rig.step()
    assert proxy.held.is_set()
    assert rig.standing().state == "unreachable"
    rig.step()
    proxy.release()
    wait_until(lambda: mark(server) != "100")
    rig.drain()
    assert_holds_everything(rig, server)
    assert rig.standing().delivered == 300


def test_late_tail_after_the_worker_wrote_again_is_not_applied_twice(rig: Rig, server: RedisServer, proxy: Proxy) -> None:
    rig.step_until(lambda: mark(server) == "100")
    proxy.hold_up()
    rig.step()
    rig.drain()
    before = scripts_run(server)
    proxy.release()
    wait_until(lambda: scripts_run(server) == before + 1)
    assert_holds_everything(rig, server)


def test_a_batch_whose_answer_is_lost_counts_once(rig: Rig, server: RedisServer, proxy: Proxy) -> None:
    rig.step()
    for _ in range(3):
        proxy.set("cut_down")
        rig.step_until(proxy.held.is_set)
        proxy.set("pass")
        rig.step()
    rig.drain()
    assert_holds_everything(rig, server)
    assert rig.standing().delivered == 300


@pytest.mark.parametrize("mode", ["refuse", "reset", "hold_down"])
def test_a_link_that_fails_and_comes_back_loses_nothing(rig: Rig, server: RedisServer, proxy: Proxy, mode: str) -> None:
    rig.step_until(lambda: mark(server) == "100")
    proxy.set(mode)
    for _ in range(3):
        rig.step()
    assert rig.standing().state == "unreachable"
    assert f"127.0.0.1:{proxy.port}" in rig.standing().error
    proxy.set("pass")
    rig.drain()
    assert_holds_everything(rig, server)
    assert rig.standing().state == "connected"


def test_a_frozen_server_applies_each_batch_once_when_it_thaws(rig: Rig, server: RedisServer) -> None:
    rig.step_until(lambda: mark(server) == "100")
    server.freeze()
    for _ in range(4):
        rig.step()
    assert rig.standing().state == "unreachable"
    server.thaw()
    rig.drain()
    assert_holds_everything(rig, server)


def test_a_killed_server_without_a_disk_is_filled_again(rig: Rig, server: RedisServer) -> None:
    rig.step_until(lambda: mark(server) == "300")
    server.kill()
    rig.step()
    server.start()
    rig.drain()
    assert_holds_everything(rig, server)
    assert "stands=0 confirmed=300" in "".join(rig.said)


def test_a_server_restored_from_an_older_dump_gets_what_it_lost(rig: Rig, server: RedisServer) -> None:
    rig.step_until(lambda: mark(server) == "100")
    server.dump()
    rig.drain()
    rig.log.publish("t/1", b"after")
    rig.drain()
    server.kill()
    server.start()
    assert mark(server) == "100"
    rig.drain()
    assert_holds_everything(rig, server)


def test_what_the_log_holds_no_more_is_not_waited_for(rig: Rig, server: RedisServer) -> None:
    rig.drain()
    rig.log.trim(200)
    server.kill()
    server.start()
    rig.restart()
    rig.drain()
    assert_holds_everything(rig, server)


def test_a_lost_uplink_db_repeats_nothing(rig: Rig, server: RedisServer, tmp_path: Path, proxy: Proxy) -> None:
    rig.drain()
    rig.progress.keep_only([])
    rig.restart()
    rig.drain()
    assert_holds_everything(rig, server)


def test_a_new_epoch_at_numbers_already_seen_is_sent(rig: Rig, server: RedisServer) -> None:
    rig.drain()
    rig.log.lose_tail(250)
    rig.log.new_run(2)
    for number in range(20):
        rig.log.publish("again", b"%d" % number)
    rig.restart()
    rig.drain()
    with server.client() as client:
        assert client.hgetall(LEDGER) == {"1": "300", "2": "270"}
        assert client.lrange("list", 300, -1) == rig.published()[250:]


def test_a_batch_ends_where_an_epoch_ends(rig: Rig, server: RedisServer) -> None:
    rig.log.new_run(2)
    rig.log.publish("t/1", b"of the second epoch")
    rig.log.new_run(3, gateway="another")
    rig.log.publish("t/1", b"of another gateway")
    rig.drain()
    assert_holds_everything(rig, server)
    with server.client() as client:
        assert client.hgetall(LEDGER) == {"1": "300", "2": "301"}
        assert client.hgetall("tidegate:ledger:another:pool1") == {"3": "302"}


def test_a_server_that_forgot_the_script_is_told_it_again(rig: Rig, server: RedisServer) -> None:
    rig.step_until(lambda: mark(server) == "100")
    with server.client() as client:
        client.script_flush()
    rig.drain()
    assert_holds_everything(rig, server)


def test_a_server_out_of_memory_or_read_only_applies_nothing_and_then_all(rig: Rig, server: RedisServer) -> None:
    with server.client() as client:
        rig.step_until(lambda: mark(server) == "100")
        client.config_set("maxmemory", "1")
        rig.step()
        assert rig.standing().state == "unreachable"
        assert "memory" in rig.standing().error
        client.config_set("maxmemory", "0")
        client.replicaof("127.0.0.1", "1")
        for _ in range(3):
            rig.step()
        assert rig.standing().state == "unreachable"
        assert mark(server) == "100"
        client.replicaof("NO", "ONE")
    rig.drain()
    assert_holds_everything(rig, server)


def test_a_replica_that_has_lost_its_master_is_waited_for(rig: Rig, server: RedisServer) -> None:
    with server.client() as client:
        rig.step_until(lambda: mark(server) == "100")
        client.config_set("replica-serve-stale-data", "no")
        client.replicaof("127.0.0.1", "1")
        for _ in range(3):
            rig.step()
        assert (rig.standing().state, rig.standing().hint) == ("unreachable", "")
        client.replicaof("NO", "ONE")
    rig.drain()
    assert_holds_everything(rig, server)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [("", "set backend.redis.pool1.password"), ("password = wrong", "set backend.redis.pool1.password")],
)
def test_wrong_credentials_stop_the_pool_with_a_hint_and_mended_ones_go_on(tmp_path: Path, settings: str, hint: str) -> None:
    with RedisServer(tmp_path, password="right") as server, Rig(tmp_path, server.port, settings=settings) as rig:
        rig.log.publish_many(10)
        wait = rig.step()
        standing = rig.standing()
        assert (wait.seconds, wait.for_news) == (60.0, False)
        assert standing.state == "misconfigured"
        assert hint in standing.hint
        assert "wrong" not in standing.error
        rig.configure(server.port, MESSAGES + LIST, "password = right")
        rig.drain()
        assert_holds_everything(rig, server)


def test_a_password_where_none_is_needed_and_a_database_that_is_not_there(tmp_path: Path, server: RedisServer) -> None:
    with Rig(tmp_path, server.port, settings="password = x") as rig:
        rig.step()
        assert rig.standing().state == "misconfigured"
        rig.configure(server.port, LIST, "database = 99")
        rig.step()
        assert (rig.standing().state, "database" in rig.standing().hint) == ("misconfigured", True)


def test_a_right_that_is_missing_for_one_command_repeats_none_of_the_others(
    rig: Rig, server: RedisServer, proxy: Proxy
) -> None:
    with server.client() as client:
        client.execute_command("ACL SETUSER gate on >pw ~* +@all -rpush")
        second = LIST.replace(".9", ".10").replace("RPUSH list", "LPUSH other")
        first = LIST.replace(".9", ".8").replace("RPUSH list", "LPUSH before")
        rig.configure(proxy.port, first + LIST + second, "username = gate\npassword = pw")
        for _ in range(4):
            rig.step()
        assert rig.standing().state == "misconfigured"
        assert "ACL SETUSER" in rig.standing().hint
        assert client.hget(LEDGER, "1") == "0+1"
        assert client.llen("before") == 1
        client.execute_command("ACL SETUSER gate +rpush")
        rig.drain()
        assert client.lrange("list", 0, -1) == rig.published()
        assert client.lrange("before", 0, -1) == client.lrange("other", 0, -1) == rig.published()[::-1]


def test_somebody_else_s_key_in_place_of_our_ledger_is_named(rig: Rig, server: RedisServer) -> None:
    with server.client() as client:
        client.set(LEDGER, "x")
        rig.step()
        assert rig.standing().state == "misconfigured"
        assert f"rename or delete {LEDGER}" in rig.standing().hint
        client.delete(LEDGER)
    rig.drain()
    assert_holds_everything(rig, server)


def test_gaps_are_told_once(rig: Rig, server: RedisServer) -> None:
    rig.log.gap('{"first_seq": 7, "last_seq": 9, "reason": "disk_budget", "count": 3}')
    rig.drain()
    with server.client() as client:
        ((_, fields),) = client.xrange(f"tidegate:gap:{GATEWAY}")
    assert fields == {"first_seq": "7", "last_seq": "9", "reason": "disk_budget", "count": "3"}


def test_redis_py_is_not_left_with_open_connections(rig: Rig, server: RedisServer) -> None:
    rig.drain()
    rig.worker.stop()
    with server.client() as client:
        wait_until(lambda: len(client.client_list()) == 1)
        assert isinstance(client, redis.Redis)
