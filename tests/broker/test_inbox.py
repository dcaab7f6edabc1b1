"""What far ends know becomes subscriptions of devices: once, durable, and only of the pool that says so."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tidegate.gateway.cli_sub import sub
from tidegate.gateway.connecting import Limits
from tidegate.gateway.inbox import Inbox
from tidegate.gateway.mqtt.packets import PubAck, Unsubscribe
from tidegate.store.entry import ACKED, DELIVERED, PUBLISH, SUBSCRIBED, UNSUBSCRIBED, Want
from tidegate.store.inbox import MESSAGE, POSITION, RETAINED, SUBSCRIBE, SUBSCRIPTIONS, UNSUBSCRIBE, Answer
from tidegate.store.local import PUBSUB, FetchRule, Keep, LocalRules
from tidegate.store.reader import LogReader

from tests.broker.inbox_file import answer, make_inbox, put
from tests.broker.receiver import Receiver
from tests.broker.test_offline import trim_all
from tests.broker.world import NOW, World

WANTS = [Want(PUBLISH, "#", 1, False), Want(SUBSCRIBED, "#", 0, False), Want(UNSUBSCRIBED, "#", 0, False)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_inbox(tmp_path / "uplink.db")
    return tmp_path / "log.db"


def open_world(path: Path, limits: Limits | None = None) -> tuple[World, Inbox]:
    world = World(path, limits)
    world.broker.router.set_wants(WANTS, LocalRules(pools_new=frozenset({"redis.pool1", "pgsql.pool1"})))
    return world, Inbox(world.broker, path.with_name("uplink.db"))


def tell(world: World, inbox: Inbox, *answers: Any) -> None:
    put(world.store.path.with_name("uplink.db"), *answers)
    inbox.look()
    world.settle()


def payloads(device: Any) -> list[bytes]:
    return [message[3] for message in device.messages()]


def rows(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def fired(path: Path) -> list[tuple[int, str]]:
    return [(e.kind, e.topic) for e in LogReader(path).read(0, 1000)[0] if e.kind in (SUBSCRIBED, UNSUBSCRIBED)]


def test_an_answer_becomes_a_subscription_of_a_connected_client_once(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    world.device("p").publish("far/kept", b"retained", retain=True)
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("far/+", 1)))
    world.device("p").publish("far/x", b"live", qos=2)
    assert payloads(device) == [b"retained", b"live"]
    assert fired(path) == [(SUBSCRIBED, "far/+")]
    world.kill()
    world, inbox = open_world(path)
    inbox.look()
    world.settle()
    assert fired(path) == [(SUBSCRIBED, "far/+")], "it is not applied a second time"
    assert rows(path, "SELECT clientid, topic, qos, source FROM proxy_subscription") == [("s", "far/+", 1, "redis.pool1")]
    device = world.device("s")
    assert fired(path) == [(SUBSCRIBED, "far/+")] * 2, "of a new session, from what is known here"
    world.device("p").publish("far/x", b"again")
    assert payloads(device) == [b"retained", b"again"]


@pytest.mark.parametrize("commits", range(3))
def test_killed_at_any_commit_it_takes_effect_once(path: Path, commits: int) -> None:
    world, inbox = open_world(path)
    world.device("s", clean=False)
    world.auto = False
    put(path.with_name("uplink.db"), answer(SUBSCRIPTIONS, "s", ("far/a", 1)), answer(SUBSCRIBE, "s", ("far/b", 1)))
    inbox.look()
    world.read()
    for _ in range(commits):
        if world.commits:
            world.commit()
    world.kill()
    world, inbox = open_world(path)
    inbox.look()
    world.settle()
    device = world.device("s", clean=False)
    for topic in ("far/a", "far/b"):
        world.device("p").publish(topic, topic.encode())
    assert payloads(device) == [b"far/a", b"far/b"]
    assert fired(path) == [(SUBSCRIBED, "far/a"), (SUBSCRIBED, "far/b")]


def test_the_difference_is_applied_to_rows_of_that_pool_only(path: Path) -> None:
    world, inbox = open_world(path)
    world.broker.router.set_wants(WANTS, LocalRules(lookup_new=True, pools_new=frozenset({"redis.pool1", "pgsql.pool1"})))
    world.broker.made.add("s", "mine", 1, lambda: None)
    device = world.device("s")
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 1), ("b", 1), ("mine", 1)))
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("b", 1), ("c", 1), pool="pgsql.pool1"))
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("d", 1)))
    for topic in ("mine", "a", "b", "c", "d"):
        world.device("p").publish(topic, topic.encode())
    assert payloads(device) == [b"mine", b"b", b"c", b"d"], "b stands in PostgreSQL too"
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", pool="pgsql.pool1"), answer(SUBSCRIPTIONS, "s"))
    assert [row[0] for row in rows(path, "SELECT topic FROM mqtt_sub")] == ["mine"]


def test_a_channel_adds_and_takes_away(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    tell(world, inbox, answer(SUBSCRIBE, "s", ("a", 0)), answer(SUBSCRIBE, "s", ("b", 1)), answer(UNSUBSCRIBE, "s", ("a", 0)))
    for topic in ("a", "b"):
        world.device("p").publish(topic, topic.encode())
    assert payloads(device) == [b"b"]


def test_another_qos_at_the_far_end_is_taken_over(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    for qos in (0, 2):
        tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", qos)))
        world.device("p").publish("a", b"m", qos=2)
        assert [message[1] >> 1 & 3 for message in device.messages()] == [qos]


def test_who_subscribed_itself_keeps_its_own_options(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    device.subscribe("a", 2)
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 0)))
    world.device("p").publish("a", b"m", qos=2)
    assert [message[1] >> 1 & 3 for message in device.messages()] == [2]


def test_what_can_be_no_subscription_is_refused_counted_and_holds_nothing_up(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 3), ("a/#/b", 1), ("$share/g/t", 1), ("good", 1)))
    world.device("p").publish("good", b"m")
    assert payloads(device) == [b"m"]
    assert world.broker.counters["lookup_refused"] == 3


def test_many_answers_come_in_pieces(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    tell(world, inbox, *[answer(SUBSCRIBE, "s", (f"t/{number}", 1)) for number in range(500)])
    assert len(fired(path)) == 500
    world.device("p").publish("t/499", b"m")
    assert payloads(device) == [b"m"]


def test_another_file_begins_at_its_beginning(path: Path) -> None:
    world, inbox = open_world(path)
    tell(world, inbox, answer(SUBSCRIBE, "s", ("a", 1)), answer(SUBSCRIBE, "s", ("b", 1)))
    path.with_name("uplink.db").unlink()
    inbox.look()
    world.settle()
    make_inbox(path.with_name("uplink.db"), "another")
    tell(world, inbox, answer(SUBSCRIBE, "s", ("c", 1)))
    assert [row[0] for row in rows(path, "SELECT topic FROM mqtt_sub")] == ["a", "b", "c"]
    assert rows(path, "SELECT * FROM cursor") == [("inbox:another", 1)]


def test_a_file_that_cannot_be_read_is_read_later(path: Path) -> None:
    world, inbox = open_world(path)
    device = world.device("s")
    uplink = path.with_name("uplink.db")
    whole = uplink.read_bytes()
    uplink.write_bytes(b"no database" * 1000)
    inbox.look()
    world.settle()
    assert any(line.startswith("inbox_unreadable") for line in world.said)
    uplink.write_bytes(whole)
    put(uplink, answer(SUBSCRIPTIONS, "s", ("a", 1)))
    world.wait(6)
    inbox.tick()
    world.settle()
    world.device("p").publish("a", b"m")
    assert payloads(device) == [b"m"]


def test_a_pool_whose_rule_is_gone_makes_no_subscriptions(path: Path) -> None:
    world, inbox = open_world(path)
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 1), pool="mysql.pool1"))
    device = world.device("s")
    world.device("p").publish("a", b"m")
    assert payloads(device) == []


def test_the_list_says_where_a_subscription_comes_from(path: Path) -> None:
    world, inbox = open_world(path)
    world.broker.made.add("s", "a", 1, lambda: None)
    tell(world, inbox, answer(SUBSCRIPTIONS, "s", ("a", 2)))
    world.stop()
    arguments = ["list", "--data", str(path.parent), "s"]
    assert CliRunner().invoke(sub, arguments).output == "s  a  QoS 1\ns  a  QoS 2  from redis.pool1\n"
    shutil.copy(Path(__file__).parent.parent / "store" / "log-v1.db", path)
    assert CliRunner().invoke(sub, arguments).output == "none for s\n"


# -- messages for one client ---------------------------------------------------------------------------------------------


def message(client: str, number: int, qos: int = 1, text: str = "far/#", kind: int = MESSAGE, at: int = NOW) -> Answer:
    payload = f"m{number}".encode()
    return Answer(0, "redis.pool1", kind, client, text, "far/x", "[]", f"foreign-{number}", "elsewhere", qos, at, payload)


def subscriber(world: World, name: str = "s", qos: int = 2, **options: Any) -> Any:
    device = world.device(name, **options)
    device.subscribe("far/#", qos)
    return device


def test_a_message_goes_to_the_client_that_asked_alone_with_its_foreign_id(path: Path) -> None:
    world, inbox = open_world(path)
    world.broker.router.set_wants([*WANTS, Want(DELIVERED, "#", 0, False), Want(ACKED, "#", 0, False)])
    device, other = subscriber(world, qos=1, version=5), subscriber(world, "other")
    tell(world, inbox, message("s", 1, 2), message("s", 2, 1))
    found = device.ack_all()
    assert [(m[1] >> 1 & 3, m[3]) for m in found] == [(1, b"m1"), (1, b"m2")]
    assert payloads(other) == []
    ids = [(e.kind, e.clientid, e.payload) for e in LogReader(path).read(0, 100)[0] if e.kind in (DELIVERED, ACKED)]
    assert ids == [(kind, "s", name) for kind in (DELIVERED, ACKED) for name in (b"foreign-1", b"foreign-2")]
    assert rows(path, "SELECT * FROM mqtt_msg") == []
    assert not any(e.kind == PUBLISH for e in LogReader(path).read(0, 100)[0])


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("clean_stop", [True, False])
def test_with_qos_2_each_message_arrives_once_and_in_order_over_a_stop_at_any_step(
    path: Path, steps: int, clean_stop: bool
) -> None:
    world, inbox = open_world(path, Limits(max_inflight=2))
    client = Receiver(subscriber(world, clean=False))
    tell(world, inbox, *[message("s", number, 2) for number in range(1, 5)])
    for _ in range(steps):
        client.step()
    if clean_stop:
        world.stop()
    else:
        world.kill()
    world, inbox = open_world(path, Limits(max_inflight=2))
    tell(world, inbox, message("s", 1, 2), message("s", 4, 2))
    client.device = world.device("s", clean=False)
    while client.step():
        pass
    assert client.arrived == ["m1", "m2", "m3", "m4"]
    tell(world, inbox, message("s", 2, 2))
    assert not client.step()
    assert rows(path, "SELECT count(*) FROM addressed WHERE acked") == [(4,)]


def test_a_sleeping_session_gets_it_when_it_returns(path: Path) -> None:
    world, inbox = open_world(path)
    subscriber(world, clean=False).disconnect()
    subscriber(world, "other", clean=False).disconnect()
    tell(world, inbox, message("s", 1))
    world.device("p").publish("far/x", b"for both")
    assert payloads(world.device("other", clean=False)) == [b"for both"]
    world.kill()
    world, inbox = open_world(path)
    assert payloads(world.device("s", clean=False)) == [b"m1", b"for both"]


def test_a_session_that_ended_before_its_acknowledgement_leaves_it_for_the_next(path: Path) -> None:
    world, inbox = open_world(path)
    device = subscriber(world)
    tell(world, inbox, message("s", 1), message("s", 2))
    first, _ = device.messages()
    device.send(PubAck(first[2]))
    device.cut()
    device = subscriber(world)
    tell(world, inbox, message("s", 1), message("s", 2))
    assert payloads(device) == [b"m2"]


def test_a_subscription_that_is_made_anew_may_have_it_again(path: Path) -> None:
    world, inbox = open_world(path, Limits(max_inflight=1))
    device = subscriber(world)
    tell(world, inbox, message("s", 1), message("s", 2))
    device.send(Unsubscribe(9, ("far/#",), {}))
    tell(world, inbox, message("s", 3))
    assert [m[3] for m in device.ack_all()] == [b"m1"]
    device.subscribe("far/#", 1)
    tell(world, inbox, message("s", 2))
    assert payloads(device) == [b"m2"]


def test_an_acknowledgement_is_remembered_when_the_entry_is_gone(path: Path) -> None:
    world, inbox = open_world(path)
    device = subscriber(world)
    tell(world, inbox, message("s", 1))
    device.ack_all()
    trim_all(world)
    assert rows(path, "SELECT count(*) FROM entry WHERE kind = 10") == [(0,)]
    tell(world, inbox, message("s", 1))
    assert payloads(device) == []
    world.wait(8 * 86_400)
    inbox.tick()
    world.broker.turn_over()
    world.settle()
    assert rows(path, "SELECT count(*) FROM addressed") == [(0,)]


def test_what_was_lost_before_it_was_delivered_may_come_again(path: Path) -> None:
    world, inbox = open_world(path)
    subscriber(world, clean=False).disconnect()
    tell(world, inbox, message("s", 1))
    trim_all(world)
    world.broker.delivery.forget_tail()
    tell(world, inbox, message("s", 1))
    assert payloads(world.device("s", clean=False)) == [b"m1"]


def test_of_what_waits_only_its_own_counts_against_a_session(path: Path) -> None:
    world, inbox = open_world(path, Limits(max_waiting_messages=2))
    for name in ("s", "other"):
        subscriber(world, name, clean=False).disconnect()
    tell(world, inbox, *[message("other", number) for number in range(1, 9)], message("s", 9), message("s", 10))
    for _ in range(5):
        world.wait(1)
    assert payloads(world.device("s", clean=False)) == [b"m9", b"m10"]
    assert payloads(world.device("other", clean=False)) == [b"m7", b"m8"]


def test_with_qos_0_it_is_delivered_from_memory(path: Path) -> None:
    world, inbox = open_world(path)
    device = subscriber(world)
    tell(world, inbox, message("s", 1, 0))
    assert [(m[1] >> 1 & 3, m[3]) for m in device.messages()] == [(0, b"m1")]
    assert rows(path, "SELECT count(*) FROM addressed") == [(0,)]


def test_what_was_published_here_comes_from_here(path: Path) -> None:
    world, inbox = open_world(path)
    hour = 3_600_000
    local = LocalRules(
        fetches=(FetchRule("far/#", False, 500, hour, True),), acks=(("far/#", PUBSUB),), keeps=(Keep("#", hour),)
    )
    world.broker.router.set_wants(WANTS, local)
    world.device("p").publish("far/x", b"mine")
    (entry,) = [e for e in LogReader(path).read(0, 10)[0] if e.kind == PUBLISH]
    device = subscriber(world)
    tell(world, inbox, message("s", 1)._replace(msgid=entry.msgid))
    assert payloads(device) == [b"mine"]


def test_an_answer_that_is_no_message_is_passed_over(path: Path) -> None:
    world, inbox = open_world(path)
    device = subscriber(world)
    bad = message("s", 1)
    tell(world, inbox, bad._replace(topic="a/#"), bad._replace(topic="b"), bad._replace(qos=3), message("s", 2))
    assert payloads(device) == [b"m2"]
    assert world.broker.counters["answers_refused"] == 3


# -- retained messages and positions -------------------------------------------------------------------------------------


def retained(at: int, number: int = 1) -> Answer:
    return message("s", number, kind=RETAINED, at=at)


def test_a_newer_retained_message_is_taken_over_and_sent_to_who_asked(path: Path) -> None:
    world, inbox = open_world(path)
    world.device("p").publish("far/x", b"ours", retain=True)
    device, other = subscriber(world), subscriber(world, "other")
    assert payloads(device) == payloads(other) == [b"ours"]
    tell(world, inbox, retained(NOW + 5000, 1), retained(NOW - 5000, 2))
    assert [(m[1] & 1, m[3]) for m in device.messages()] == [(1, b"m1")]
    assert payloads(other) == []
    world.kill()
    world, inbox = open_world(path)
    assert payloads(subscriber(world)) == [b"m1"]
    assert rows(path, "SELECT topic, sender, payload FROM mqtt_retain") == [("far/x", "elsewhere", b"m1")]


def test_a_retained_message_that_was_deleted_here_stays_deleted(path: Path) -> None:
    world, inbox = open_world(path)
    world.broker.router.set_wants(WANTS, LocalRules(retained=("far/#",)))
    device = subscriber(world)
    world.device("p").publish("far/x", b"", retain=True)
    device.ack_all()
    tell(world, inbox, retained(NOW - 5000))
    assert payloads(device) == [] and rows(path, "SELECT * FROM retained") == []


def test_a_position_moves_forward_and_never_back(path: Path) -> None:
    world, inbox = open_world(path)
    publisher = world.device("p")
    for number in range(5):
        publisher.publish("far/x", b"%d" % number)
    epoch = world.store.identity.epoch
    for seq in (3, 2, 99):
        tell(world, inbox, Answer(0, "redis.pool1", POSITION, "s", "far/x", "far/x", epoch=epoch % 62**3, seq=seq))
    assert rows(path, "SELECT clientid, topic, mid FROM mqtt_acked") == [("s", "far/x", 3)]
