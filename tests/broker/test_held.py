"""What no trim may take is bounded: retained messages, sessions, subscriptions and names, each by its share of the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.held import shares
from tidegate.gateway.mqtt.packets import ConnAck, PubAck, SubAck, Will
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.mqtt.reasons import ReasonCode

from .world import World

Make = Callable[[Limits], World]
EXPIRY = {Property.SESSION_EXPIRY_INTERVAL: 3600}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda limits: World(tmp_path / "log.db", limits)


def retained(world: World, text: str = "#") -> list[bytes]:
    device = world.device("reader")
    device.subscribe(text, 0)
    got = [message[3] for message in device.messages()]
    device.disconnect()
    return got


def test_a_retained_message_above_the_share_is_delivered_acknowledged_and_not_kept(make: Make) -> None:
    world = make(Limits(max_retained_bytes=200_000))
    other = world.device("s")
    other.subscribe("#", 1)
    device = world.device("p", 5)
    for number in range(10):
        device.publish(f"t/{number}", b"%d".ljust(50_000) % number, retain=True, packet_id=number + 1)
    acks = [packet.reason for packet in device.got if isinstance(packet, PubAck)]
    assert acks == [ReasonCode.SUCCESS] * 10
    assert len(other.messages()) == 10
    kept = retained(world)
    assert 2 <= len(kept) <= 4 and world.broker.retained.refused == 10 - len(kept)
    assert world.broker.retained.bytes <= 200_000
    assert "not kept" in world.said[-1]
    assert world.store.connection.execute("SELECT count(*) FROM retained").fetchone() == (len(kept),)


def test_a_retained_message_may_take_the_place_of_the_one_before_and_what_does_not_fit_leaves_none(make: Make) -> None:
    world = make(Limits(max_retained_bytes=60_000))
    device = world.device("p")
    for number in range(5):
        device.publish("t", b"%d".ljust(50_000) % number, retain=True)
    assert [payload[:1] for payload in retained(world)] == [b"4"]
    device.publish("t", bytes(60_000), retain=True)
    assert retained(world) == [] and world.broker.retained.bytes == 0
    device.publish("t", b"small", 0, retain=True)
    assert retained(world) == [b"small"]
    device.publish("t", b"", retain=True)
    assert world.broker.retained.bytes == 0


def test_what_is_held_is_the_same_after_a_restart(make: Make) -> None:
    world = make(Limits())
    device = world.device("p", clean=False)
    for number in range(10):
        device.publish(f"t/{number}", bytes(number * 1000 + 1), retain=True, packet_id=number + 1)
        device.subscribe(f"{'long' * number * 100}/{number}")
    device.publish("t/3", b"", retain=True)
    device.subscribe("/0", 2)
    before = world.broker.retained.bytes, world.broker.sessions.bytes
    world.kill()
    again = make(Limits())
    assert (again.broker.retained.bytes, again.broker.sessions.bytes) == before
    again.device("p")
    assert again.broker.sessions.bytes == 0, "a clean start took it back"


@pytest.mark.parametrize(("version", "code"), [(4, ReasonCode.SERVER_UNAVAILABLE), (5, ReasonCode.QUOTA_EXCEEDED)])
def test_a_new_session_above_the_share_is_refused_and_those_that_are_there_go_on(
    make: Make, version: int, code: ReasonCode
) -> None:
    world = make(Limits(max_session_bytes=1_000_000))
    properties = EXPIRY if version == 5 else {}
    for number in range(20):
        device = world.device(str(number).rjust(30_000, "x"), version, clean=False, properties=properties)
        device.cut()
    assert world.broker.sessions.bytes <= 1_000_000
    there = len(world.broker.sessions)
    assert 10 <= there < 20 and world.broker.connecting.refused["quota_exceeded"] == 20 - there
    assert device.take(ConnAck).reason == code
    assert "session_expiry" in world.said[-1]
    back = world.device("0".rjust(30_000, "x"), version, clean=False, properties=properties)
    assert back.take(ConnAck).session_present
    passing = world.device("passing")
    assert passing.take(ConnAck).reason == ReasonCode.SUCCESS


def test_connected_clients_without_a_session_cannot_fill_the_disk_with_their_names(make: Make) -> None:
    world = make(Limits(max_session_bytes=1_000_000))
    devices = [world.device(str(number).rjust(30_000, "x")) for number in range(20)]
    taken = [device.take(ConnAck).reason for device in devices]
    assert taken.count(ReasonCode.SUCCESS) == len(world.broker.sessions) < 10
    devices[0].disconnect()
    assert world.device("y" * 30_000).take(ConnAck).reason == ReasonCode.SUCCESS


@pytest.mark.parametrize(("version", "code"), [(4, ReasonCode.UNSPECIFIED_ERROR), (5, ReasonCode.QUOTA_EXCEEDED)])
@pytest.mark.parametrize(
    "limits", [Limits(max_subscriptions=100), Limits(max_session_bytes=20_000), Limits(max_subscriptions_together=60_000)]
)
def test_a_subscription_above_the_limit_is_refused_in_the_suback(
    make: Make, limits: Limits, version: int, code: ReasonCode
) -> None:
    world = make(limits)
    device = world.device("c", version, clean=False, properties=EXPIRY if version == 5 else {})
    answers = []
    for number in range(200):
        device.subscribe(f"filter/{number}")
        answers.append(device.take(SubAck).reasons[0])
    made = answers.count(ReasonCode.GRANTED_QOS_1)
    assert answers == [ReasonCode.GRANTED_QOS_1] * made + [code] * (200 - made)
    assert 90 < made < 180
    assert world.broker.counters["refused_subscriptions"] == 200 - made
    assert "is used up" in world.said[-1]
    device.subscribe("filter/0", 2)
    assert device.take(SubAck).reasons == (ReasonCode.GRANTED_QOS_2,), "one that is there may change"


def test_subscriptions_take_bounded_memory_without_a_lasting_session_too(make: Make) -> None:
    world = make(Limits(max_subscriptions_together=1_000_000))
    answers = []
    for number in range(20):
        device = world.device(str(number))
        device.subscribe(f"{number}/".ljust(60_000, "x"), 0)
        answers.append(device.take(SubAck).reasons[0])
    assert answers == [ReasonCode.GRANTED_QOS_0] * 8 + [ReasonCode.UNSPECIFIED_ERROR] * 12
    device = world.device("0")  # takes the first one over, whose session ends
    device.subscribe("0/".ljust(60_000, "x"), 0)
    assert device.take(SubAck).reasons == (ReasonCode.GRANTED_QOS_0,)
    assert world.broker.router.subscription_bytes < 1_000_000


def will(size: int, delay: int = 0) -> Will:
    return Will("w", bytes(size), 1, False, {Property.WILL_DELAY_INTERVAL: delay} if delay else {})


@pytest.mark.parametrize(("version", "reason"), [(5, ReasonCode.QUOTA_EXCEEDED), (4, ReasonCode.SERVER_UNAVAILABLE)])
def test_a_will_that_all_wills_leave_no_room_for_is_refused_and_counted(make: Make, version: int, reason: int) -> None:
    world = make(Limits(max_wills_together=100_000))
    first = world.device("a", version, will=will(60_000))
    assert world.device("b", version, will=will(60_000)).take(ConnAck).reason == reason
    assert world.broker.connecting.refused == {"quota_exceeded": 1}
    assert "max_wills_together is used up" in world.said[-1]
    assert world.device("c", version).take(ConnAck).reason == 0, "without a will"
    first.disconnect()
    assert world.broker.connecting.wills.bytes == 0
    assert world.device("b", version, will=will(60_000)).take(ConnAck).reason == 0


def test_a_client_that_comes_back_has_room_for_the_will_that_it_had(make: Make) -> None:
    world = make(Limits(max_wills_together=100_000))
    world.device("a", 5, will=will(60_000), properties=EXPIRY)
    again = world.device("a", 5, will=will(60_000, delay=100), properties=EXPIRY)
    assert again.take(ConnAck).reason == 0, "it took its own connection over"
    again.cut()
    assert world.device("b", 5, will=will(60_000)).take(ConnAck).reason == ReasonCode.QUOTA_EXCEEDED, "the delayed one counts"
    again = world.device("a", 5, clean=False, will=will(60_000, delay=100), properties=EXPIRY)
    assert again.take(ConnAck).reason == 0
    again.cut()
    world.wait(200)
    assert world.broker.connecting.wills.bytes == 0


def test_shares_leave_room_for_messages() -> None:
    for budget in (16 << 20, 64 << 20, 1 << 30):
        retained, sessions, exchanges = shares(budget)
        assert retained + sessions * 3 // 2 + exchanges <= max(budget - (16 << 20), budget // 2) // 2
    assert shares(1 << 30, 5, 6, 7) == (5, 6, 7)


def test_retained_messages_that_are_read_for_very_many_at_once_share_the_memory(make: Make) -> None:
    limit, size, many = 4 << 20, 64 << 10, 60
    world = make(Limits(max_queued_together=limit))
    publisher = world.device("p")
    for number in range(32):
        publisher.publish(f"t/{number}", bytes(size), retain=True, packet_id=number + 1)
    world.auto = False
    devices = [world.device(f"d{number}") for number in range(many)]
    world.settle()
    for device in devices:
        device.subscribe("t/#", 0)
    while world.commits:
        world.commit()
    found = world.read_all()
    assert len(found) == many
    assert sum(len(message[3]) for got in found for message in got.messages) <= limit + many * size
    world.settle()
    assert {len(device.messages()) for device in devices} == {32}
