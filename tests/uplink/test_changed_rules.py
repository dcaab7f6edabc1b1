"""Rules change while messages wait: what waits goes by the rules in force when it is carried, and no mistake loses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.store.entry import CONNECTED, DISCONNECTED, PUBLISH, Want
from tidegate.uplink import to_redis
from tidegate.uplink.backend import Batch, Mark
from tidegate.uplink.child import take_rules
from tidegate.uplink.plan import Plan
from tidegate.uplink.pools import Pool
from tidegate.uplink.progress import Progress, Quarantined, Standing, cursors, held, read_dead, read_pools
from tidegate.uplink.rule import RuleFile, load, wants
from tidegate.uplink.worker import CHANGED_RULE

from tests.support.redis_server import RedisServer
from tests.support.said import Said

from .logfile import GATEWAY
from .rig import LEDGER, LIST, MESSAGES, REFUSED, Rig
from .test_redis import command, settings

TWO_POOLS = """\
backend.redis.pool1.server = 127.0.0.1:1
backend.redis.pool2.server = 127.0.0.1:2
backend.redis.hook.message.publish.1 = {"action": {"function": "on_message_publish"}, "pool": "pool1"}
backend.redis.hook.message.publish.2 = {"action": {"function": "on_message_publish"}, "pool": "pool2"}
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def progress(tmp_path: Path) -> Iterator[Progress]:
    with closing(Progress(tmp_path)) as progress:
        yield progress


def test_what_waits_goes_by_the_new_rules_and_what_is_through_is_not_sent_again(tmp_path: Path, server: RedisServer) -> None:
    with Rig(tmp_path, server.port, LIST) as rig, server.client() as far:
        rig.log.publish_many(3)
        rig.drain()
        rig.log.publish_many(4)
        rig.configure(server.port, command(9, "RPUSH other ${msgid}"))
        rig.drain()
        assert far.lrange("list", 0, -1) == rig.published()[:3]
        assert far.lrange("other", 0, -1) == rig.published()[3:]


def test_what_the_rules_passed_over_does_not_come_after_a_later_epoch(tmp_path: Path, server: RedisServer) -> None:
    with Rig(tmp_path, server.port, command(9, "RPUSH list ${payload}", topic="b")) as rig, server.client() as far:
        rig.log.publish("b", b"0")
        rig.drain()
        rig.log.publish("a", b"1")
        rig.log.new_run(7)
        rig.log.publish("b", b"2")
        rig.step_until(lambda: far.llen("list") == 2)
        rig.configure(server.port, command(9, "RPUSH list ${payload}"))  # killed before it saved its cursor
        assert rig.standing().cursor == 1
        rig.log.publish("a", b"3")
        rig.drain()
        assert far.lrange("list", 0, -1) == ["0", "2", "3"]


def test_the_mark_of_a_lost_life_with_the_same_epoch_hides_nothing(tmp_path: Path, server: RedisServer) -> None:
    with Rig(tmp_path, server.port, LIST) as rig, server.client() as far:
        rig.log.publish_many(3)
        rig.log.new_run(7)
        rig.log.publish_many(2)
        far.hset(LEDGER, "7", 2)
        rig.drain()
        assert far.lrange("list", 0, -1) == rig.published()


def test_an_epoch_whose_mark_was_set_back_is_sent_again_though_a_later_one_has_a_mark(
    tmp_path: Path, server: RedisServer
) -> None:
    with Rig(tmp_path, server.port, LIST) as rig, server.client() as far:
        rig.log.publish_many(30)
        rig.log.new_run(7)
        rig.log.publish_many(5)
        rig.drain()
        far.hset(LEDGER, "1", 20)
        rig.progress.save("redis.pool1", rig.standing()._replace(cursor=10, epoch=1), {}, 0)
        rig.restart()
        rig.drain()
        assert far.lrange("list", 35, -1) == rig.published()[20:30]


def test_a_far_end_that_was_set_back_is_remembered_before_anything_is_sent_again(tmp_path: Path, server: RedisServer) -> None:
    """Else, killed then, it would be set back once more: what other rules passed over meanwhile would come after later ones."""
    with Rig(tmp_path, server.port, LIST) as rig, server.client() as far:
        rig.log.publish_many(3)
        rig.drain()
        far.hset(LEDGER, "1", 1)
        rig.restart()
        rig.step()
        assert far.llen("list") == 3
        assert rig.progress.marks("redis.pool1") == {(GATEWAY, 1): 1}


@pytest.mark.parametrize("way", ["script", "transaction"])
def test_what_was_refused_is_kept_as_it_was_though_the_rules_have_changed(
    tmp_path: Path, server: RedisServer, way: str
) -> None:
    with server.client() as far:
        far.execute_command("ACL SETUSER noscript on >pw ~* +@all -@scripting")
        with Rig(tmp_path, server.port, MESSAGES + command(7, "RPUSHH x ${payload}"), settings(way)) as rig:
            rig.log.publish("t", b"refused")
            (entry,) = rig.log.entries()
            operations = Plan(load(rig.conf, "redis").rules, to_redis, "barn").operations(entry)
            with closing(to_redis.connect(rig.pool)) as link:
                assert link.write(Batch(GATEWAY, 1, Mark(), 1, operations)), "an answer that nobody hears"
            rig.configure(server.port, command(7, "RPUSH y ${payload}"), settings(way))
            rig.drain()
            (row,) = rig.quarantine()
            assert row.target == CHANGED_RULE
            assert b"RPUSHH\r\n$1\r\nx\r\n$7\r\nrefused\r\n" in row.original
            assert "unknown" in row.reason.lower()
            assert not far.exists("y", REFUSED)


def test_a_refusal_noted_by_an_older_version_is_looked_up_in_the_rules(tmp_path: Path, server: RedisServer) -> None:
    with Rig(tmp_path, server.port, LIST) as rig, server.client() as far:
        rig.log.publish("t", b"x")
        far.hset(REFUSED, "1:1:0", "WRONGTYPE it was")
        rig.drain()
        (row,) = rig.quarantine()
        assert (row.target, row.reason) == ("message.publish.9 RPUSH list ${msgid}", "WRONGTYPE it was")
        assert b"RPUSH" in row.original


def test_what_other_rules_make_of_an_entry_replaces_what_is_parked_of_it(progress: Progress, tmp_path: Path) -> None:
    old = Quarantined("g", 1, 5, 0, "id", "publish.1", "wrong", b"old")
    assert progress.quarantine("redis.pool1", [old], 1) == 1
    assert progress.quarantine("redis.pool1", [old], 2) == 0
    progress.quarantine("redis.pool1", [old._replace(original=b"new", target="publish.2")], 3)
    assert [(row.original, row.target, row.at) for row in read_dead(tmp_path)] == [(b"new", "publish.2", 3)]


@pytest.mark.parametrize("mistake", ["pool1.sever = 127.0.0.1:1", "pool1.server = nowhere", ""])
def test_a_pool_that_a_mistake_hides_keeps_its_place(progress: Progress, tmp_path: Path, mistake: str) -> None:
    (tmp_path / "log.db").touch()
    path = tmp_path / "emqx_backend_redis.conf"
    path.write_text(TWO_POOLS)
    assert [pool.name for _, pool in _take(tmp_path, progress)] == ["pool1", "pool2"]
    progress.save("redis.pool1", Standing(cursor=5), {("g", 1): 5}, 0)
    progress.save("redis.pool2", Standing(cursor=9), {}, 0)
    path.write_text(TWO_POOLS.replace("pool1.server = 127.0.0.1:1", mistake))
    assert _take(tmp_path, progress) == []
    assert cursors(tmp_path) == {"redis.pool1": 5, "redis.pool2": 9}
    assert progress.marks("redis.pool1") == {("g", 1): 5}
    path.write_text(TWO_POOLS)
    assert [progress.standing(pool.full_name).cursor for _, pool in _take(tmp_path, progress)] == [5, 9]


def test_a_pool_left_out_of_a_good_file_is_forgotten(progress: Progress, tmp_path: Path) -> None:
    progress.save("redis.pool1", Standing(cursor=5), {}, 0)
    progress.save("redis.old", Standing(cursor=5), {}, 0)
    (tmp_path / "emqx_backend_redis.conf").write_text(TWO_POOLS)
    _take(tmp_path, progress)
    assert list(cursors(tmp_path)) == ["redis.pool1"]


def test_a_pool_holds_the_log_from_the_moment_the_rules_name_it(progress: Progress, tmp_path: Path) -> None:
    assert held(tmp_path, []) == [0]
    progress.save("redis.pool1", Standing(cursor=5), {}, 0)
    assert held(tmp_path, ["redis.pool1"]) == [5]
    assert sorted(held(tmp_path, ["redis.pool1", "redis.new"])) == [0, 5]
    assert held(tmp_path, []) == [5], "still there until the uplink has read the file"
    assert read_pools(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("backend.redis.hook.mesage.publish.1 = {}", {PUBLISH}),
        ("backend.redis.hook.client.conected.1 = {}", {CONNECTED, DISCONNECTED}),
        ("backend.redis.hook.client.disconected.1 = {}", {CONNECTED, DISCONNECTED}),
        ("backend.redis.hook.message.publish = {}", {PUBLISH}),
        ('backend.redis.hook.message.publish.1 {"pool": "pool1"}', {PUBLISH}),
        ("bakend.redis.hook.message.publish.1: {}", {PUBLISH}),
        ("backend.redis.hook.what.1 = {}", {PUBLISH, CONNECTED, DISCONNECTED}),
    ],
)
def test_a_rule_whose_event_cannot_be_read_wants_what_it_looks_like(tmp_path: Path, line: str, kinds: set[int]) -> None:
    path = tmp_path / "emqx_backend_redis.conf"
    path.write_text(TWO_POOLS.split("backend.redis.hook")[0] + line + "\n")
    file = load(path, "redis")
    assert file.mistakes
    assert {want.kind for want in wants([file])} == kinds
    assert all(want.topic_filter == "" and not want.min_qos for want in wants([file]))


def test_a_file_with_a_mistake_keeps_what_number_sign_does_not_match(tmp_path: Path) -> None:
    path = tmp_path / "emqx_backend_redis.conf"
    reserved = 'backend.redis.hook.message.publish.3 = {"topic": "$x/#", "action": {"commands": ["A b"]}, "pool": "pool1"}\n'
    path.write_text(TWO_POOLS + reserved + "backend.redis.pool1.database = one\n")
    assert set(wants([load(path, "redis")])) == {Want(PUBLISH, "", 0, False)}


def _take(directory: Path, progress: Progress) -> list[tuple[RuleFile, Pool]]:
    return take_rules(directory, ["redis"], progress, Said())
