"""What the broker promises, step by step: commit, then acknowledge, then deliver; sessions; retained; wills; bounds."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import (
    ConnAck,
    Disconnect,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    Subscription,
    UnsubAck,
    Unsubscribe,
    Will,
)
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.mqtt.reasons import ReasonCode
from tidegate.store.clock import CONFIRMED
from tidegate.store.entry import ACKED, CONNECTED, DISCONNECTED, PUBLISH, SUBSCRIBED, Want
from tidegate.store.reader import LogReader
from tidegate.store.trim import Plan, Trim

from tests.broker.world import NOW, World

STORE_ALL = [Want(PUBLISH, "#", 1, False), Want(CONNECTED, "#", 0, False), Want(DISCONNECTED, "#", 0, False)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def world(path: Path) -> World:
    world = World(path)
    world.broker.router.set_wants(iter(STORE_ALL))
    return world


def payloads(messages: list) -> list[bytes]:  # type: ignore[type-arg]
    return [message[3] for message in messages]


def stored(path: Path) -> list[bytes]:
    return [e.payload for e in LogReader(path).read(0, 10_000)[0] if e.kind == PUBLISH]


def test_a_puback_leaves_only_after_its_commit_and_the_message_only_then_too(world: World, path: Path) -> None:
    subscriber = world.device("s")
    subscriber.subscribe("t", 1)
    publisher = world.device("p")
    publisher.take(ConnAck)
    world.auto = False
    publisher.publish("t", b"one")
    assert publisher.got == []
    assert subscriber.messages() == []
    world.commit()
    assert publisher.got == [PubAck(1)]
    assert payloads(subscriber.messages()) == [b"one"]
    assert stored(path) == [b"one"]


def test_while_a_commit_runs_the_next_batch_fills_and_goes_as_one(world: World) -> None:
    publisher = world.device("p")
    publisher.take(ConnAck)
    world.auto = False
    for number in range(1, 6):
        publisher.publish("t", b"x", packet_id=number)
    assert [len(batch.rows) for batch, _ in world.commits] == [1]
    world.commit()
    assert [len(batch.rows) for batch, _ in world.commits] == [4]
    assert publisher.got == [PubAck(1)]
    world.commit()
    assert publisher.got == [PubAck(n) for n in range(1, 6)]


def test_qos0_flows_at_once_and_touches_no_disk(world: World, path: Path) -> None:
    subscriber = world.device("s")
    subscriber.subscribe("t", 2)
    publisher = world.device("p")
    world.auto = False
    publisher.publish("t", b"now", qos=0)
    assert payloads(subscriber.messages()) == [b"now"]
    assert world.commits == []


def test_a_failing_disk_withholds_acknowledgements_and_recovers_by_itself(world: World, path: Path) -> None:
    publisher = world.device("p")
    publisher.take(ConnAck)
    subscriber = world.device("s")
    subscriber.subscribe("q0", 0)
    world.auto = False
    world.fault = sqlite3.OperationalError("database or disk is full")
    publisher.publish("t", b"kept", packet_id=9)
    world.commit()
    publisher.publish("q0", b"flows", qos=0)
    late = world.device("late")
    late.subscribe("q0", 0)
    assert [type(packet) for packet in late.got] == [ConnAck, SubAck], "clean sessions need no disk"
    assert publisher.got == []
    assert payloads(subscriber.messages()) == [b"flows"]
    assert "disk is full" in world.broker.store_fault
    world.fault = None
    world.timers.pop()()
    world.commit()
    assert publisher.got == [PubAck(9)]
    assert world.broker.store_fault == ""
    assert stored(path) == [b"kept"]


def test_a_message_that_nobody_wants_is_acknowledged_and_never_stored(world: World, path: Path) -> None:
    world.broker.router.set_wants([])
    publisher = world.device("p")
    publisher.publish("t", b"x")
    assert publisher.take(PubAck) == PubAck(1)
    assert stored(path) == []


@pytest.mark.parametrize("version", [4, 5])
def test_qos2_arrives_once_however_often_it_is_sent(world: World, version: int, path: Path) -> None:
    expiry = {Property.SESSION_EXPIRY_INTERVAL: 100} if version == 5 else {}
    publisher = world.device("p", version, clean=version == 5, properties=expiry)
    publisher.publish("t", b"x", qos=2, packet_id=5)
    publisher.send(Publish("t", b"x", 2, False, True, 5))
    assert [publisher.take(PubRec), publisher.take(PubRec)] == [PubRec(5), PubRec(5)]
    publisher.cut()
    again = world.device("p", version, clean=False, properties=expiry)
    again.send(Publish("t", b"x", 2, False, True, 5))
    again.send(PubRel(5))
    assert again.take(PubComp) == PubComp(5)
    assert stored(path) == [b"x"]
    again.publish("t", b"y", qos=2, packet_id=5)
    assert stored(path) == [b"x", b"y"]


def test_the_qos2_guard_survives_kill_9(world: World, path: Path) -> None:
    publisher = world.device("p", clean=False)
    publisher.publish("t", b"x", qos=2, packet_id=5)
    world.kill()
    world = World(path)
    world.broker.router.set_wants(STORE_ALL)
    publisher = world.device("p", clean=False)
    publisher.send(Publish("t", b"x", 2, False, True, 5))
    publisher.send(PubRel(5))
    assert stored(path) == [b"x"]


def test_a_sleeping_session_gets_what_it_missed_in_order_after_kill_9(world: World, path: Path) -> None:
    sleeper = world.device("s", clean=False)
    sleeper.subscribe("t/+", 1)
    sleeper.cut()
    publisher = world.device("p")
    for number in range(2_500):
        publisher.publish("t/a", b"%d" % number, packet_id=number + 1)
    world.kill()
    world = World(path)
    sleeper = world.device("s", clean=False)
    assert sleeper.take(ConnAck).session_present
    got: list[bytes] = []
    while messages := sleeper.ack_all():
        got += payloads(messages)
    assert got == [b"%d" % number for number in range(2_500)]


def test_a_restart_does_not_send_again_what_was_acknowledged(world: World, path: Path) -> None:
    sleeper = world.device("s", clean=False)
    sleeper.subscribe("t", 1)
    publisher = world.device("p")
    for number in range(5):
        publisher.publish("t", b"%d" % number, packet_id=number + 1)
    messages = sleeper.messages()
    for message in (messages[0], messages[3]):
        sleeper.send(PubAck(message[2]))
    world.stop()
    world = World(path)
    sleeper = world.device("s", clean=False)
    again = sleeper.messages()
    assert [(m[3], m[2], bool(m[1] & 8)) for m in again] == [(messages[n][3], messages[n][2], True) for n in (1, 2, 4)]


def test_unacknowledged_messages_are_sent_again_with_their_packet_ids_when_a_session_resumes(world: World) -> None:
    sleeper = world.device("s", clean=False)
    sleeper.subscribe("t", 1)
    publisher = world.device("p")
    publisher.publish("t", b"a")
    publisher.publish("t", b"b")
    first = sleeper.messages()
    sleeper.send(PubAck(first[0][2]))
    sleeper.cut()
    publisher.publish("t", b"c")
    sleeper = world.device("s", clean=False)
    again = sleeper.messages()
    assert payloads(again) == [b"b", b"c"]
    assert again[0][2] == first[1][2] and again[0][1] & 8 and not again[1][1] & 8


def test_qos2_to_a_subscriber_is_exactly_once_over_kill_9(world: World, path: Path) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 2)
    publisher = world.device("p")
    for number in range(3):
        publisher.publish("t", b"%d" % number, qos=2, packet_id=number + 1)
    messages = subscriber.messages()
    assert [m[1] >> 1 & 3 for m in messages] == [2, 2, 2]
    ids = [m[2] for m in messages]
    subscriber.send(PubRec(ids[0]))
    subscriber.send(PubComp(ids[0]))
    subscriber.send(PubRec(ids[1]))
    world.kill()
    world = World(path)
    subscriber = world.device("s", clean=False)
    again = subscriber.messages()
    assert [(m[3], m[2], bool(m[1] & 8)) for m in again] == [(b"2", ids[2], True)]
    assert subscriber.take(PubRel) == PubRel(ids[1])


def test_a_full_window_holds_messages_back_and_they_follow_in_order(path: Path) -> None:
    world = World(path, Limits(max_inflight=10))
    world.broker.router.set_wants(STORE_ALL)
    subscriber = world.device("s")
    subscriber.subscribe("#", 1)
    publisher = world.device("p")
    for number in range(200):
        publisher.publish("t", b"%d" % number, packet_id=number + 1)
    got: list[bytes] = []
    while messages := subscriber.ack_all():
        assert len(messages) <= 200
        got += payloads(messages)
    assert got == [b"%d" % number for number in range(200)]
    publisher.publish("t", b"live")
    assert payloads(subscriber.ack_all()) == [b"live"]


def test_receive_maximum_is_kept(world: World) -> None:
    subscriber = world.device("s", 5, properties={Property.RECEIVE_MAXIMUM: 3})
    subscriber.subscribe("#", 2)
    publisher = world.device("p")
    for number in range(9):
        publisher.publish("t", b"%d" % number, packet_id=number + 1, qos=1 + number % 2)
    assert len(subscriber.messages()) == 3


def test_a_subscriber_that_never_reads_costs_a_bounded_queue_and_gets_its_qos1_later(world: World) -> None:
    subscriber = world.device("s")
    subscriber.subscribe("#", 1)
    publisher = world.device("p")
    world.broker.writable(subscriber.client, False)
    subscriber.full = 1 << 20
    for number in range(500):
        publisher.publish("t", b"%d" % number, packet_id=number + 1)
        publisher.publish("t", b"zero", qos=0)
    assert subscriber.messages() == []
    assert world.broker.delivery.dropped["queue_full"] == 500
    subscriber.full = 0
    world.broker.writable(subscriber.client, True)
    world.broker.turn_over()
    world.settle()
    got: list[bytes] = []
    while messages := subscriber.ack_all():
        got += payloads(messages)
    assert got == [b"%d" % number for number in range(500)]


def test_retained_is_set_replaced_cleared_and_survives_a_restart(world: World, path: Path) -> None:
    publisher = world.device("p")
    publisher.publish("a/b", b"old", retain=True)
    publisher.publish("a/b", b"new", retain=True)
    publisher.publish("a/c", b"zero", qos=0, retain=True)
    publisher.publish("a/d", b"gone", retain=True)
    publisher.publish("a/d", b"", retain=True)
    world.stop()
    world = World(path)
    late = world.device("s")
    late.subscribe("a/+", 1)
    assert sorted((m[0], m[3], m[1] & 1, m[1] >> 1 & 3) for m in late.messages()) == [
        ("a/b", b"new", 1, 1),
        ("a/c", b"zero", 1, 0),
    ]


def test_retain_handling_and_retain_as_published(world: World) -> None:
    world.device("p").publish("t", b"r", retain=True)
    device = world.device("s", 5)
    device.subscribe("t", 1, rh=2)
    assert device.messages() == []
    device.subscribe("t", 1, rh=1)
    assert device.messages() == [], "not new"
    device.subscribe("t", 1, rh=0, rap=True)
    assert payloads(device.ack_all()) == [b"r"]
    world.device("p").publish("t", b"live", retain=True)
    assert [(m[3], m[1] & 1) for m in device.messages()] == [(b"live", 1)]


def test_many_retained_messages_respect_the_window(path: Path) -> None:
    world = World(path, Limits(max_inflight=5))
    publisher = world.device("p")
    for number in range(40):
        publisher.publish(f"r/{number}", b"x", retain=True, packet_id=number + 1)
    device = world.device("s")
    device.subscribe("r/#", 1)
    topics = [m[0] for m in device.messages()]
    assert len(topics) == 5
    for packet_id in range(1, 6):
        device.send(PubAck(packet_id))
    while messages := device.ack_all():
        topics += [m[0] for m in messages]
    assert len(set(topics)) == 40 == len(topics)


def test_a_will_is_sent_when_the_network_is_gone_and_not_after_disconnect(world: World) -> None:
    watcher = world.device("w")
    watcher.subscribe("will/#", 1)
    world.device("a", will=Will("will/a", b"a is gone", 1)).cut()
    world.device("b", will=Will("will/b", b"b is gone", 1)).disconnect()
    assert payloads(watcher.messages()) == [b"a is gone"]


def test_a_delayed_will_waits_and_is_cancelled_by_the_clients_return(world: World) -> None:
    watcher = world.device("w")
    watcher.subscribe("will/#", 1)
    options: dict[str, Any] = {
        "version": 5,
        "properties": {Property.SESSION_EXPIRY_INTERVAL: 100},
        "will": Will("will/a", b"gone", 1, False, {Property.WILL_DELAY_INTERVAL: 10}),
    }
    world.device("a", **options).cut()
    world.wait(5)
    back = world.device("a", **options, clean=False)
    world.wait(20)
    assert watcher.messages() == []
    back.cut()
    world.wait(11)
    assert payloads(watcher.messages()) == [b"gone"]


def test_a_takeover_ends_the_old_connection_and_presence_ends_online(world: World, path: Path) -> None:
    first = world.device("same", 5)
    world.device("same", 5)
    assert first.closed
    assert first.take(Disconnect).reason == ReasonCode.SESSION_TAKEN_OVER
    world.broker.lost(first.client)
    world.broker.turn_over()
    world.settle()
    kinds = [e.kind for e in LogReader(path).read(0, 10)[0]]
    assert kinds == [CONNECTED, DISCONNECTED, CONNECTED]
    assert world.store.connection.execute("SELECT state FROM mqtt_client").fetchone() == ("1",)


def test_keep_alive_is_one_and_a_half_times_what_was_asked(world: World) -> None:
    device = world.device("d", 5, keep_alive=10)
    world.wait(14)
    device.send(PingReq())
    assert device.take(PingResp) == PingResp()
    world.wait(14)
    assert not device.closed
    world.wait(2)
    assert device.closed
    assert device.take(Disconnect).reason == ReasonCode.KEEP_ALIVE_TIMEOUT


def test_a_clean_start_throws_the_old_session_away(world: World, path: Path) -> None:
    world.device("s", clean=False).subscribe("t", 1)
    assert not world.device("s", clean=True).take(ConnAck).session_present
    world.device("s", clean=True).cut()
    for table in ("session", "subscription", "inflight", "received"):
        assert world.store.connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_a_session_expires_when_its_time_has_come(world: World) -> None:
    device = world.device("s", 5, properties={Property.SESSION_EXPIRY_INTERVAL: 60})
    device.subscribe("t", 1)
    device.cut()
    world.wait(59)
    assert world.broker.sessions.get("s") is not None
    world.wait(2)
    assert world.broker.sessions.get("s") is None


def test_a_new_persistent_session_is_confirmed_after_its_commit_and_early_packets_wait(world: World) -> None:
    world.auto = False
    device = world.device("s", clean=False)
    device.send(PingReq())
    assert device.got == []
    world.settle()
    assert isinstance(device.got[0], ConnAck)
    assert device.got[1] == PingResp()


def test_overlapping_subscriptions_deliver_once_with_the_greater_qos_and_all_identifiers(world: World) -> None:
    device = world.device("s", 5)
    device.subscribe("t/#", 0, properties={Property.SUBSCRIPTION_IDENTIFIER: [1]})
    device.subscribe("t/+", 1, properties={Property.SUBSCRIPTION_IDENTIFIER: [2]})
    world.device("p").publish("t/x", b"once")
    assert [(m[3], m[1] >> 1 & 3) for m in device.messages()] == [(b"once", 1)]


def test_no_local_keeps_ones_own_messages_away(world: World) -> None:
    device = world.device("s", 5)
    device.subscribe("t", 1, no_local=True)
    device.publish("t", b"mine")
    world.device("other").publish("t", b"theirs")
    assert payloads(device.messages()) == [b"theirs"]


def test_unsubscribe_stops_delivery_and_says_what_was_there(world: World) -> None:
    device = world.device("s", 5)
    device.subscribe("t", 1)
    device.send(Unsubscribe(3, ("t", "never")))
    answer = device.take(UnsubAck)
    assert answer.reasons == (ReasonCode.SUCCESS, ReasonCode.NO_SUBSCRIPTION_EXISTED)
    world.device("p").publish("t", b"x")
    assert device.messages() == []


def test_shared_subscriptions_are_refused_alone_until_they_come(world: World) -> None:
    device = world.device("s", 5)
    device.send(Subscribe(1, (Subscription("ok/#", 1), Subscription("$share/g/t", 1))))
    reasons = device.take(SubAck).reasons
    assert reasons == (ReasonCode.GRANTED_QOS_1, ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED)


def test_a_message_that_expired_while_the_session_slept_is_not_sent(world: World) -> None:
    device = world.device("s", 5, properties={Property.SESSION_EXPIRY_INTERVAL: 1000})
    device.subscribe("t", 1)
    device.cut()
    publisher = world.device("p", 5)
    publisher.send(Publish("t", b"short", 1, False, False, 1, {Property.MESSAGE_EXPIRY_INTERVAL: 5}))
    publisher.send(Publish("t", b"long", 1, False, False, 2, {Property.MESSAGE_EXPIRY_INTERVAL: 500}))
    world.wait(10)
    device = world.device("s", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 1000})
    assert payloads(device.messages()) == [b"long"]
    assert world.broker.delivery.dropped["expired"] == 1


def test_refused_clients_are_told_and_counted(world: World) -> None:
    device = world.device("d", 5, username="mallory")
    assert device.take(ConnAck).reason == ReasonCode.NOT_AUTHORIZED
    assert device.closed
    assert sum(world.broker.connecting.refused.values()) == 1


def test_garbage_closes_one_connection_and_no_other(world: World) -> None:
    good, bad = world.device("g"), world.device("b", 5)
    bad.send_bytes(b"\xff\xff\xff\xff\xff")
    assert bad.closed and not good.closed
    good.send(PingReq())
    assert good.take(PingResp)


def test_events_that_rules_want_are_logged_with_the_message_they_are_about(world: World, path: Path) -> None:
    world.broker.router.set_wants([*STORE_ALL, Want(ACKED, "#", 0, False), Want(SUBSCRIBED, "t/#", 0, False)])
    device = world.device("s")
    device.subscribe("t/+", 1)
    world.device("p").publish("t/x", b"x")
    device.ack_all()
    entries = LogReader(path).read(0, 100)[0]
    message = next(e for e in entries if e.kind == PUBLISH)
    acked = next(e for e in entries if e.kind == ACKED)
    assert (acked.payload.decode(), acked.topic, acked.clientid) == (message.msgid, "t/x", "s")
    subscribed = next(e for e in entries if e.kind == SUBSCRIBED)
    assert (subscribed.topic, subscribed.qos, subscribed.clientid) == ("t/+", 1, "s")


def test_after_a_crash_what_may_have_been_delivered_before_carries_the_dup_flag(world: World, path: Path) -> None:
    subscriber = world.device("s", clean=False)
    subscriber.subscribe("t", 1)
    world.device("p").publish("t", b"before")
    assert payloads(subscriber.ack_all()) == [b"before"]
    world.kill()
    world = World(path)
    subscriber = world.device("s", clean=False)
    world.device("p").publish("t", b"after")
    assert [(m[3], bool(m[1] & 8)) for m in subscriber.messages()] == [(b"before", True), (b"after", False)]


def test_a_session_that_reconnects_while_its_log_is_being_read_still_gets_everything_once(path: Path) -> None:
    world = World(path)
    world.broker.router.set_wants(STORE_ALL)
    sleeper = world.device("s", clean=False)
    sleeper.subscribe("t", 1)
    sleeper.cut()
    publisher = world.device("p")
    for number in range(20):
        publisher.publish("t", b"%d" % number, packet_id=number + 1)
    world.kill()
    world = World(path)
    world.auto = False
    first = world.device("s", clean=False)
    world.commit()
    first.cut()
    again = world.device("s", clean=False)
    while world.commits:
        world.commit()
    assert world.reads
    world.settle()
    assert payloads(again.messages()) == [b"%d" % number for number in range(20)]


def test_numbers_go_on_after_the_log_was_trimmed_empty(world: World, path: Path) -> None:
    sleeper = world.device("s", clean=False)
    sleeper.subscribe("t", 1)
    publisher = world.device("p")
    for number in range(50):
        publisher.publish("t", b"%d" % number, packet_id=number + 1)
    sleeper.ack_all()
    world.wait(2)
    while isinstance(plan := Trim(1 << 30, 0).plan(world.store.connection, world.broker.log.clock.at(10**9), 10**9), Plan):
        world.broker.trim(plan)
        world.settle()
    world.stop()
    world = World(path)
    world.broker.router.set_wants(STORE_ALL)
    world.device("p").publish("t", b"new")
    assert payloads(world.device("s", clean=False).messages()) == [b"new"]


def test_a_wall_clock_that_jumps_ends_no_session(world: World) -> None:
    device = world.device("s", 5, properties={Property.SESSION_EXPIRY_INTERVAL: 600})
    device.cut()
    world.broker.log.step(NOW + 10 * 365 * 86_400_000 - world.mono, CONFIRMED)
    world.wait(3)
    assert world.broker.sessions.get("s") is not None
    world.wait(600)
    assert world.broker.sessions.get("s") is None


def test_a_clean_start_ends_the_session_and_its_delayed_will_is_due(world: World) -> None:
    watcher = world.device("w")
    watcher.subscribe("will/#", 1)
    options = {"properties": {Property.SESSION_EXPIRY_INTERVAL: 100}}
    will = Will("will/a", b"gone", 1, False, {Property.WILL_DELAY_INTERVAL: 60})
    world.device("a", 5, will=will, **options).cut()
    world.device("a", 5, **options)
    assert payloads(watcher.messages()) == [b"gone"]


def test_a_second_subscribe_gets_what_was_retained_after_the_first(world: World) -> None:
    device = world.device("s")
    device.subscribe("t", 0)
    world.device("p").publish("t", b"r", retain=True)
    device.messages()
    device.subscribe("t", 0)
    assert [(m[3], m[1] & 1) for m in device.messages()] == [(b"r", 1)]


def test_expiry_cannot_be_raised_from_zero_at_disconnect(world: World) -> None:
    device = world.device("s", 5, properties={Property.SESSION_EXPIRY_INTERVAL: 100})
    device.cut()
    device = world.device("s", 5, clean=False)
    device.send(Disconnect(ReasonCode.SUCCESS, {Property.SESSION_EXPIRY_INTERVAL: 100}))
    assert device.take(Disconnect).reason == ReasonCode.PROTOCOL_ERROR


def test_resent_messages_keep_to_a_smaller_receive_maximum(world: World) -> None:
    expiry = {Property.SESSION_EXPIRY_INTERVAL: 100}
    device = world.device("s", 5, properties=expiry)
    device.subscribe("t", 1)
    publisher = world.device("p")
    for number in range(50):
        publisher.publish("t", b"%d" % number, packet_id=number + 1)
    device.cut()
    device = world.device("s", 5, clean=False, properties=expiry | {Property.RECEIVE_MAXIMUM: 5})
    got: list[bytes] = []
    while messages := device.messages():
        assert len(messages) <= 5
        got += payloads(messages)
        for message in messages:
            device.send(PubAck(message[2]))
    assert got == [b"%d" % number for number in range(50)]


def test_a_retained_message_above_the_clients_packet_size_is_left_out_and_counted(world: World) -> None:
    world.device("p").publish("t", bytes(1000), retain=True)
    device = world.device("s", 5, properties={Property.MAXIMUM_PACKET_SIZE: 200})
    device.subscribe("t", 1)
    assert device.messages() == []
    assert world.broker.delivery.dropped["packet_too_large"] == 1


def test_an_acknowledgement_of_the_wrong_kind_ends_the_connection(world: World) -> None:
    device = world.device("s", 5)
    device.subscribe("t", 1)
    world.device("p").publish("t", b"x")
    device.send(PubRec(device.messages()[0][2]))
    assert device.take(Disconnect).reason == ReasonCode.PROTOCOL_ERROR


def test_a_session_with_more_than_one_turn_holds_goes_on_without_an_acknowledgement(world: World) -> None:
    device = world.device("s", clean=False)
    device.subscribe("t", 1)
    publisher = world.device("p")
    for number in range(40):
        publisher.publish("t", b"%02d" % number + bytes(100_000), packet_id=number + 1)
    device.cut()
    device = world.device("s", clean=False)
    assert [m[3][:2] for m in device.messages()] == [b"%02d" % number for number in range(40)]
    other = world.device("o")
    other.subscribe("t", 1)
    world.auto = False
    for number in range(40):
        publisher.publish("t", b"%02d" % number + bytes(100_000), packet_id=number + 1)
    world.settle()
    assert [m[3][:2] for m in other.messages()] == [b"%02d" % number for number in range(40)]


def test_a_client_that_leaves_before_it_has_read_its_retained_messages_leaves_nothing(world: World) -> None:
    """Its session is let go of at once, not when the collector comes by."""
    publisher = world.device("p")
    for number in range(5):
        publisher.publish(f"r/{number}", bytes(1000), retain=True)
    world.auto = False
    device = world.device("s")
    world.settle()
    device.subscribe("r/#", 1)
    session = world.broker.sessions.get("s")
    assert session is not None and session.retained_due
    device.cut()
    world.settle()
    assert not (session.retained or session.retained_due or session.backlog)


def test_retained_messages_are_found_for_one_filter_after_the_other(world: World) -> None:
    """All at once, ten thousand filters on as many retained messages would stop everybody."""
    publisher = world.device("p")
    for number in range(150):
        publisher.publish(f"r/{number}/a", b"%d" % number, retain=True)
    filters = ["#", "+/#", "r/+/a", "r/#", "+/+/a", "none/#", "+/+/+", "r/7/a", "+/x/#"]
    world.auto = False
    device = world.device("s")
    world.settle()
    for text in filters:
        device.subscribe(text, 1)
    session = world.broker.sessions.get("s")
    assert session is not None and len(session.retained_due) > 7
    assert sum(len(due.seqs) for due in session.retained_due.values()) == 150
    publisher.publish("r/8/a", b"new", retain=True)
    world.settle()
    assert not session.retained_due
    got = Counter(message[3] for message in device.messages())
    assert got == Counter({b"%d" % number: 6 for number in range(150)}) + Counter([b"7"]) + Counter({b"new": 1}) - Counter(
        {b"8": 5}
    )
