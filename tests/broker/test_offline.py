"""Stored messages for new subscriptions, positions, queues: the rules of the box's own log, step by step."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import PubAck, PubComp, PubRec, PubRel, Subscribe, Subscription, Unsubscribe
from tidegate.gateway.retaining import FOUND_AT_ONCE
from tidegate.store.entry import PUBLISH, Want
from tidegate.store.local import PUBSUB, QUEUE, FetchRule, Keep, LocalRules
from tidegate.store.trim import Plan, Trim

from tests.broker.receiver import Receiver
from tests.broker.world import Device, World

HOUR = 3_600_000


def rules(count: int = 500, span: int = 2 * HOUR, window_first: bool = True, forgets: bool = True) -> LocalRules:
    return LocalRules(
        lookup_new=True,
        fetches=(FetchRule("queue/#", True, 500, 0, True), FetchRule("pubsub/#", False, count, span, window_first)),
        acks=(("queue/#", QUEUE), ("pubsub/#", PUBSUB)),
        forgets=("pubsub/#",) if forgets else (),
        keeps=(Keep("#", 168 * HOUR),),
    )


RULES = rules()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def open_world(path: Path, local: LocalRules = RULES, limits: Limits | None = None) -> World:
    world = World(path, limits)
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)], local)
    return world


def publish(world: World, topic: str, payloads: Iterable[str], qos: int = 1) -> None:
    publisher = world.device("publisher")
    for number, payload in enumerate(payloads, 1):
        publisher.publish(topic, payload.encode(), qos, packet_id=number)
    publisher.disconnect()
    world.settle()


def take(device: Device, qos: int = 1) -> list[str]:
    """Read and acknowledge everything there is; the payloads."""
    found: list[str] = []
    while messages := device.messages():
        for _, flags, packet_id, payload in messages:
            found.append(payload.decode())
            if flags >> 1 & 3 == 1:
                device.send(PubAck(packet_id))
            elif flags >> 1 & 3 == 2:
                device.send(PubRec(packet_id))
                device.send(PubComp(packet_id))
    return found


def look(device: Device) -> list[str]:
    return [message[3].decode() for message in device.messages()]


def rows(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def positions(world: World, path: Path) -> list[tuple[str, str, str]]:
    world.wait(1)
    sql = "SELECT a.clientid, a.topic, m.payload FROM mqtt_acked a JOIN entry m ON m.seq = a.mid ORDER BY a.id"
    return [(client, topic, payload.decode()) for client, topic, payload in rows(path, sql)]


def one_to_many(world: World, client_id: str, topic_filter: str = "pubsub/#", qos: int = 1, **options: Any) -> Device:
    device = world.device(client_id, **options)
    device.subscribe(topic_filter, qos)
    return device


def trim_all(world: World) -> None:
    """Everything in the log is too old, and nobody waits for it."""
    trim, log = Trim(1 << 40, -1), world.broker.log
    while not isinstance(plan := trim.plan(world.store.connection, log.clock.at(log.mono), log.next_seq), Plan):
        assert plan is not None
    world.broker.trim(plan)
    world.settle()


# -- one to many ---------------------------------------------------------------------------------------------------------


def test_a_first_subscription_gets_what_is_stored_oldest_first_with_the_lesser_qos(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["0"], qos=0)
    publish(world, "pubsub/a", ["1"], qos=1)
    publish(world, "pubsub/b", ["2"], qos=2)
    publish(world, "other", ["x"])
    device = one_to_many(world, "s", qos=1)
    assert [(m[0], m[1] >> 1 & 3, m[1] & 1, m[3]) for m in device.messages()] == [
        ("pubsub/a", 1, 0, b"1"),
        ("pubsub/b", 1, 0, b"2"),
    ]


@pytest.mark.parametrize(("topic_filter", "qos"), [("#", 1), ("pubsub/a", 0), ("other", 1)])
def test_nothing_is_fetched_without_a_rule_or_with_qos_0(path: Path, topic_filter: str, qos: int) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1"])
    publish(world, "other", ["1"])
    assert look(one_to_many(world, "s", topic_filter, qos)) == []


def test_the_next_subscription_begins_after_the_position(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1", "2"])
    device = one_to_many(world, "s")
    assert take(device) == ["1", "2"]
    publish(world, "pubsub/a", ["3"])
    assert take(device) == ["3"]
    device.disconnect()
    publish(world, "pubsub/a", ["4", "5"])
    assert take(one_to_many(world, "s")) == ["4", "5"]
    assert take(one_to_many(world, "new")) == ["1", "2", "3", "4", "5"]
    assert positions(world, path) == [("s", "pubsub/a", "5"), ("new", "pubsub/a", "5")]


def test_topics_of_a_wildcard_have_a_position_each(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["a1", "a2"])
    device = one_to_many(world, "s", "pubsub/a")
    assert take(device) == ["a1", "a2"]
    device.disconnect()
    publish(world, "pubsub/b", ["b1"])
    publish(world, "pubsub/a", ["a3"])
    assert take(one_to_many(world, "s", "pubsub/+")) == ["b1", "a3"]


def test_a_second_subscribe_of_the_same_filter_brings_no_second_replay(path: Path) -> None:
    world = open_world(path)
    world.broker.made.add("s", "pubsub/#", 1, lambda: None)
    world.settle()
    publish(world, "pubsub/a", ["1"])
    device = world.device("s")
    assert look(device) == ["1"]
    device.subscribe("pubsub/#", 1)
    assert look(device) == []


def test_overlapping_subscriptions_bring_each_message_once(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1"])
    publish(world, "pubsub/b", ["2"])
    device = one_to_many(world, "s", "pubsub/a")
    device.subscribe("pubsub/#", 1)
    assert look(device) == ["1", "2"]
    publish(world, "pubsub/b", ["3"])
    device.subscribe("pubsub/b", 1)
    assert look(device) == ["3"]


def test_newer_messages_follow_the_older_ones(path: Path) -> None:
    world = open_world(path, limits=Limits(max_inflight=2))
    publish(world, "pubsub/a", ["1", "2", "3", "4"])
    device = one_to_many(world, "s")
    publish(world, "pubsub/a", ["5", "6"])
    assert take(device) == ["1", "2", "3", "4", "5", "6"]


def test_the_newest_n_are_taken_and_what_is_passed_over_is_counted(path: Path) -> None:
    world = open_world(path, rules(count=2))
    publish(world, "pubsub/a", ["1", "2", "3", "4", "5"])
    assert take(one_to_many(world, "s")) == ["4", "5"]
    assert world.broker.delivery.dropped["offline_opts"] == 3
    assert world.said[-1].endswith("client=s filter=pubsub/# count=2 passed_over=3")


def test_the_time_range_bounds_what_is_taken_and_counts_what_was_unread(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1"])
    device = one_to_many(world, "s")
    assert take(device) == ["1"]
    device.disconnect()
    publish(world, "pubsub/a", ["2", "3"])
    world.wait(3 * 3600)
    publish(world, "pubsub/a", ["4"])
    assert take(one_to_many(world, "s")) == ["4"]
    assert world.broker.delivery.dropped["offline_opts"] == 2
    assert take(one_to_many(world, "new")) == ["4"]
    assert world.broker.delivery.dropped["offline_opts"] == 2, "who has no position has the window, not the past"


def test_first_fetch_none_gives_a_new_client_nothing_and_an_old_one_what_it_missed(path: Path) -> None:
    world = open_world(path, rules(window_first=False))
    publish(world, "pubsub/a", ["1"])
    device = one_to_many(world, "s")
    assert look(device) == []
    publish(world, "pubsub/a", ["2"])
    assert take(device) == ["2"]
    device.disconnect()
    publish(world, "pubsub/a", ["3"])
    assert take(one_to_many(world, "s")) == ["3"]


def test_the_position_is_the_end_of_the_contiguous_prefix(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1", "2", "3"])
    publish(world, "pubsub/b", ["b1"])
    device = one_to_many(world, "s")
    messages = device.messages()
    for index in (1, 2, 3):
        device.send(PubAck(messages[index][2]))
    assert positions(world, path) == [("s", "pubsub/b", "b1")]
    device.send(PubAck(messages[0][2]))
    assert positions(world, path) == [("s", "pubsub/b", "b1"), ("s", "pubsub/a", "3")]


def test_the_position_never_passes_what_is_still_to_be_fetched(path: Path) -> None:
    world = open_world(path, limits=Limits(max_inflight=1))
    publish(world, "pubsub/a", ["1", "2", "3"])
    world.device("p").publish("pubsub/a", b"kept", retain=True)
    device = one_to_many(world, "s")
    (message,) = device.messages()
    assert message[3] == b"kept" and message[1] & 1
    device.send(PubAck(message[2]))
    assert positions(world, path) == []
    assert take(device) == ["1", "2", "3"], "and the retained one is not sent twice"
    assert positions(world, path) == [("s", "pubsub/a", "kept")]


def test_after_kill_9_the_position_waits_for_what_has_no_row(path: Path) -> None:
    world = open_world(path)
    device = one_to_many(world, "s", qos=2, clean=False)
    publish(world, "pubsub/a", ["1"], qos=1)
    publish(world, "pubsub/a", ["2"], qos=2)
    _, second = device.messages()
    device.send(PubRec(second[2]))
    device.send(PubComp(second[2]))
    world.kill()
    world = open_world(path)
    assert positions(world, path) == []
    assert take(world.device("s", clean=False)) == ["1"]
    assert positions(world, path) == [("s", "pubsub/a", "2")]


def test_unsubscribing_drops_the_position(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1", "2"])
    device = one_to_many(world, "s", "pubsub/a")
    first, second = device.messages()
    device.send(PubAck(first[2]))
    device.send(Unsubscribe(9, ("pubsub/a",), {}))
    device.send(PubAck(second[2]))
    assert positions(world, path) == []
    device.subscribe("pubsub/#", 1)
    assert take(device) == ["1", "2"]
    device.send(Unsubscribe(9, ("pubsub/#",), {}))
    assert positions(world, path) == []


def test_unsubscribing_leaves_the_position_of_a_topic_that_is_still_subscribed(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["a"])
    publish(world, "pubsub/b", ["b"])
    device = one_to_many(world, "s", "pubsub/a")
    device.subscribe("pubsub/#", 1)
    assert take(device) == ["a", "b"]
    assert len(positions(world, path)) == 2
    device.send(Unsubscribe(9, ("pubsub/#",), {}))
    assert look(device) == [], "nothing is fetched again"
    assert positions(world, path) == [("s", "pubsub/a", "a")]


def test_a_position_that_was_dropped_does_not_come_back_after_kill_9(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1", "2"], qos=2)
    device = one_to_many(world, "s", "pubsub/a", 2, clean=False)
    for message in device.messages():
        device.send(PubRec(message[2]))
    device.send(Unsubscribe(9, ("pubsub/a",), {}))
    world.kill()
    world = open_world(path)
    device = world.device("s", clean=False)
    for packet_id in (1, 2):
        device.send(PubComp(packet_id))
    assert positions(world, path) == []
    device.subscribe("pubsub/a", 2)
    assert take(device, 2) == ["1", "2"]


def test_a_fetch_waits_until_everything_before_it_is_on_the_disk(path: Path) -> None:
    world = open_world(path)
    device = world.device("s", clean=False)
    publisher = world.device("p")
    world.auto = False
    device.subscribe("pubsub/a", 1)
    publisher.publish("pubsub/b", b"on its way")
    device.subscribe("pubsub/b", 1)
    world.commit()
    while world.reads:
        world.read()
    world.auto = True
    world.settle()
    assert look(device) == ["on its way"]


def test_without_the_rule_unsubscribing_keeps_the_position(path: Path) -> None:
    world = open_world(path, rules(forgets=False))
    publish(world, "pubsub/a", ["1", "2"])
    device = one_to_many(world, "s", "pubsub/a")
    first, second = device.messages()
    device.send(PubAck(first[2]))
    device.send(Unsubscribe(9, ("pubsub/a",), {}))
    device.send(PubAck(second[2]))
    device.subscribe("pubsub/a", 1)
    assert look(device) == []


def test_a_position_whose_message_is_gone_brings_the_window(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1"])
    device = one_to_many(world, "s")
    take(device)
    device.disconnect()
    publish(world, "pubsub/a", ["2"])
    world.wait(1)
    world.kill()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DELETE FROM entry WHERE payload = CAST('1' AS BLOB)")
    assert take(one_to_many(open_world(path), "s")) == ["2"]


def test_own_messages_stay_away_with_no_local(path: Path) -> None:
    world = open_world(path)
    device = world.device("s", version=5)
    device.publish("pubsub/a", b"mine")
    publish(world, "pubsub/a", ["other"])
    device.subscribe("pubsub/a", 1, no_local=True)
    assert look(device) == ["other"]


def test_a_persistent_session_goes_on_with_its_fetch_after_a_lost_connection(path: Path) -> None:
    world = open_world(path, limits=Limits(max_inflight=2))
    publish(world, "pubsub/a", ["1", "2", "3", "4", "5"])
    device = one_to_many(world, "s", clean=False)
    first, second = device.messages()
    assert (first[3], second[3]) == (b"1", b"2")
    device.send(PubAck(first[2]))
    assert look(device) == ["3"]
    device.cut()
    publish(world, "pubsub/a", ["6"])
    assert take(world.device("s", clean=False)) == ["2", "3", "4", "5", "6"]
    assert positions(world, path) == [("s", "pubsub/a", "6")]
    assert rows(path, "SELECT * FROM fetch") == []


@pytest.mark.parametrize("clean_stop", [True, False])
def test_a_fetch_under_way_survives_a_restart(path: Path, clean_stop: bool) -> None:
    limits = Limits(max_inflight=2)
    world = open_world(path, limits=limits)
    publish(world, "pubsub/a", ["1", "2", "3", "4", "5"])
    device = one_to_many(world, "s", clean=False)
    first, _ = device.messages()
    device.send(PubAck(first[2]))
    world.wait(1)
    if clean_stop:
        world.stop()
    else:
        world.kill()
    world = open_world(path, limits=limits)
    publish(world, "pubsub/a", ["6"])
    assert take(world.device("s", clean=False)) == ["2", "3", "4", "5", "6"]
    assert positions(world, path) == [("s", "pubsub/a", "6")]
    assert rows(path, "SELECT * FROM fetch") == rows(path, "SELECT * FROM inflight") == []


@pytest.mark.parametrize("steps", range(9))
@pytest.mark.parametrize("clean_stop", [True, False])
def test_fetched_with_qos_2_each_message_arrives_once_over_a_stop_at_any_step(path: Path, steps: int, clean_stop: bool) -> None:
    limits = Limits(max_inflight=2)
    world = open_world(path, limits=limits)
    publish(world, "pubsub/a", ["1", "2", "3", "4"], qos=2)
    client = Receiver(one_to_many(world, "s", qos=2, clean=False))
    for _ in range(steps):
        client.step()
    if clean_stop:
        world.stop()
    else:
        world.kill()
    world = open_world(path, limits=limits)
    client.device = world.device("s", clean=False)
    while client.step():
        pass
    assert client.arrived == ["1", "2", "3", "4"]
    assert positions(world, path) == [("s", "pubsub/a", "4")]
    client.device.disconnect()
    assert take(one_to_many(world, "s", qos=2, clean=True)) == []


def test_qos_2_is_not_fetched_again_by_a_new_session_after_kill_9(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1", "2"], qos=2)
    device = one_to_many(world, "s", qos=2)
    (first, _) = device.messages()
    device.send(PubRec(first[2]))
    assert isinstance(device.take(PubRel), PubRel)
    world.kill()
    assert take(one_to_many(open_world(path), "s", qos=2)) == ["2"]


def test_positions_do_not_multiply_writes(path: Path) -> None:
    world = open_world(path)
    device = one_to_many(world, "s")
    before = world.store.commits
    for number in range(100):
        publish(world, "pubsub/a", [str(number)])
        assert take(device) == [str(number)]
    changes = [sql for batch, _ in world.commits for sql, _ in batch.changes]
    assert not changes
    assert positions(world, path) == [("s", "pubsub/a", "99")]
    assert world.store.commits - before <= 102, "one for each message, none for its acknowledgement"


def test_many_messages_come_in_pieces(path: Path) -> None:
    world = open_world(path, rules(count=0))
    publish(world, "pubsub/a", [str(number) for number in range(9_000)])
    assert take(one_to_many(world, "s")) == [str(number) for number in range(9_000)]


# -- one to one ----------------------------------------------------------------------------------------------------------


def test_a_queue_gives_everything_stored_until_somebody_acknowledged_it(path: Path) -> None:
    world = open_world(path)
    publish(world, "queue/a", ["1", "2", "3"])
    one = one_to_many(world, "one", "queue/a")
    messages = one.messages()
    assert [m[3] for m in messages] == [b"1", b"2", b"3"]
    one.send(PubAck(messages[1][2]))
    assert look(one_to_many(world, "two", "queue/#")) == ["1", "3"]
    assert [row[0] for row in rows(path, "SELECT payload FROM mqtt_msg")] == [b"1", b"3"], "it is removed for everyone"
    world.kill()
    world = open_world(path)
    assert take(one_to_many(world, "three", "queue/a")) == ["1", "3"]
    world.settle()
    assert take(one_to_many(world, "four", "queue/a")) == []


def test_a_live_acknowledgement_takes_from_the_queue_as_well(path: Path) -> None:
    world = open_world(path)
    one = one_to_many(world, "one", "queue/a")
    publish(world, "queue/a", ["1"])
    assert take(one) == ["1"]
    publish(world, "queue/a", ["2"], qos=2)
    one.messages()
    assert look(one_to_many(world, "two", "queue/a")) == ["2"]


def test_what_another_acknowledges_while_a_queue_waits_for_room_is_not_sent(path: Path) -> None:
    world = open_world(path, limits=Limits(max_inflight=1))
    publish(world, "queue/a", ["1", "2", "3"])
    one, two = one_to_many(world, "one", "queue/a"), one_to_many(world, "two", "queue/a")
    assert take(one) == ["1", "2", "3"]
    assert take(two) == ["1"], "it was on its way already"


def test_old_messages_of_a_queue_are_kept_as_long_as_the_storing_rule_says(path: Path) -> None:
    world = open_world(path)
    publish(world, "queue/a", ["1"])
    world.wait(3 * 24 * 3600)
    assert look(one_to_many(world, "one", "queue/a")) == ["1"]
    world.wait(5 * 24 * 3600)
    assert look(one_to_many(world, "two", "queue/a")) == []


def test_the_mark_of_a_taken_message_goes_with_it(path: Path) -> None:
    world = open_world(path)
    publish(world, "queue/a", ["1"])
    assert take(one_to_many(world, "one", "queue/a")) == ["1"]
    assert len(rows(path, "SELECT seq FROM taken")) == 1
    trim_all(world)
    assert rows(path, "SELECT seq FROM taken") == []


# -- both ----------------------------------------------------------------------------------------------------------------


def test_a_fetched_qos_2_message_that_is_done_stays_done_while_an_older_one_is_open(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1", "2"], qos=2)
    device = one_to_many(world, "s", qos=2, clean=False)
    _, second = device.messages()
    device.send(PubRec(second[2]))
    device.send(PubComp(second[2]))
    publish(world, "elsewhere", ["x"])
    world.wait(1)
    world.kill()
    assert look(world_again := open_world(path).device("s", clean=False)) == ["1"]
    assert world_again.messages() == []


def test_on_message_store_keeps_qos_0_too(path: Path) -> None:
    local = replace(RULES, keeps=(Keep("pubsub/#", HOUR, every_qos=True), Keep("#", HOUR)))
    world = World(path)
    world.broker.router.set_wants([Want(PUBLISH, "#", 0, False)], local)
    publish(world, "pubsub/a", ["0"], qos=0)
    publish(world, "pubsub/a", ["1"], qos=1)
    publish(world, "other", ["only for another backend"], qos=0)
    assert rows(path, "SELECT payload, qos FROM mqtt_msg") == [(b"0", 0), (b"1", 1)]
    assert [(m[1] >> 1 & 3, m[3]) for m in one_to_many(world, "s").messages()] == [(0, b"0"), (1, b"1")]


def test_positions_of_clients_that_are_long_gone_are_forgotten(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1"])
    for client_id, clean in (("gone", True), ("asleep", False)):
        device = one_to_many(world, client_id, clean=clean)
        assert take(device) == ["1"]
        device.disconnect()
    world.wait(40 * 24 * 3600)
    assert [client for client, *_ in rows(path, "SELECT clientid FROM mqtt_acked")] == ["gone", "asleep"]
    trim_all(world)
    publish(world, "pubsub/a", ["2"])
    world.wait(3601)
    assert [client for client, *_ in rows(path, "SELECT clientid FROM mqtt_acked")] == ["asleep"]


def test_without_rules_nothing_is_followed(path: Path) -> None:
    world = World(path)
    world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)])
    publish(world, "pubsub/a", ["1"])
    device = one_to_many(world, "s", clean=False)
    publish(world, "pubsub/a", ["2"])
    assert take(device) == ["2"]
    session = world.broker.sessions.get("s")
    assert session is not None and session.progress is None
    assert rows(path, "SELECT * FROM mqtt_acked") == rows(path, "SELECT * FROM fetch") == []


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("steps", range(7))
@pytest.mark.parametrize("end", ["cut", "kill"])
def test_a_retained_message_that_is_stored_as_well_comes_once(path: Path, qos: int, steps: int, end: str) -> None:
    limits = Limits(max_inflight=1)
    world = open_world(path, limits=limits)
    publish(world, "pubsub/a", ["1"], qos)
    world.device("p").publish("pubsub/a", b"kept", qos, retain=True)
    publish(world, "pubsub/a", ["2"], qos)
    client = Receiver(one_to_many(world, "s", qos=qos, clean=False))
    for _ in range(steps):
        client.step()
    if end == "cut":
        client.device.cut()
    else:
        world.wait(1)
        world.kill()
        world = open_world(path, limits=limits)
    client.device = world.device("s", clean=False)
    while client.step():
        pass
    if qos == 2 or end == "cut":
        assert sorted(client.arrived) == ["1", "2", "kept"]
    assert set(client.arrived) == {"1", "2", "kept"}
    assert positions(world, path) == [("s", "pubsub/a", "2")]
    assert rows(path, "SELECT * FROM fetch") == []


def test_subscribing_again_after_unsubscribing_brings_everything_again(path: Path) -> None:
    world = open_world(path)
    publish(world, "pubsub/a", ["1", "2"], qos=2)
    client = Receiver(one_to_many(world, "s", qos=2, clean=False))
    client.step()
    world.wait(1)
    world.kill()
    world = open_world(path)
    client.device = world.device("s", clean=False)
    while client.step():
        pass
    client.device.send(Unsubscribe(9, ("pubsub/#",), {}))
    client.device.subscribe("pubsub/#", 2)
    while client.step():
        pass
    assert client.arrived == ["1", "2", "1", "2"]
    world.wait(1)
    assert rows(path, "SELECT * FROM inflight") == []


def test_a_message_that_is_gone_before_it_was_acknowledged_does_not_hold_the_position(path: Path) -> None:
    world = open_world(path)
    device = one_to_many(world, "s", clean=False)
    publish(world, "pubsub/a", ["1", "2"])
    device.cut()
    trim_all(world)
    publish(world, "pubsub/a", ["3"])
    assert take(world.device("s", clean=False)) == ["3"]
    assert positions(world, path) == [("s", "pubsub/a", "3")]


def test_the_newest_n_are_found_over_several_steps(path: Path) -> None:
    world = open_world(path, rules(count=8_500))
    publish(world, "pubsub/a", [str(number) for number in range(9_000)])
    assert take(one_to_many(world, "s")) == [str(number) for number in range(500, 9_000)]
    assert world.broker.delivery.dropped["offline_opts"] == 500


def test_what_a_fetch_leaves_to_retained_messages_is_found_for_one_filter_after_the_other(path: Path) -> None:
    """A stranger may subscribe to thousands of filters at once, and a fetching rule is no reason to look for all in one go."""
    world = open_world(path)
    names = [f"pubsub/{number}" for number in range(FOUND_AT_ONCE + 1)]
    publisher = world.device("publisher")
    for name in names:
        publisher.publish(name, name.encode(), retain=True)
    filters = ("pubsub/+", "+/1/#", "pubsub/#")
    device = world.device("s", clean=False)
    world.auto = False
    device.send(Subscribe(7, tuple(Subscription(text, 1, False, False, 0) for text in filters), {}))
    world.commit()
    session = world.broker.sessions.get("s")
    assert session is not None and session.progress is not None
    assert [bool(due.through) for due in session.retained_due.values()] == [False, True, True]
    world.auto = True
    world.settle()
    assert sorted(take(device)) == sorted([*names, "pubsub/1", *names])
    world.kill()
