"""Rows that go with no message are bounded together: QoS 2 exchanges that nobody ends, and positions of clients without end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tidegate.gateway import rows as gateway_rows
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import PubAck, PubComp, PubRec, PubRel
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.mqtt.reasons import ReasonCode
from tidegate.gateway.rows import PAUSE, ROW
from tidegate.gateway.session import Session
from tidegate.store.log import Name

from .test_offline import open_world, publish, take
from .world import Device, World

ROWS = 40
"""Of each kind."""
LIMITS = Limits(max_exchange_bytes=2 * ROWS * ROW)
EXPIRY = {Property.SESSION_EXPIRY_INTERVAL: 3600}
Make = Callable[[], World]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda: World(tmp_path / "log.db", LIMITS)


def rows(world: World, table: str = "received") -> int:
    (count,) = world.store.connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(count)


def begin(device: Device, first: int, count: int) -> list[ReasonCode]:
    """Publish with QoS 2 and end nothing; the reasons of the PUBRECs that came."""
    for number in range(first, first + count):
        device.publish("t", b"%d" % number, 2, packet_id=number)
    reasons = [packet.reason for packet in device.got if isinstance(packet, PubRec)]
    device.got = [packet for packet in device.got if not isinstance(packet, PubRec)]
    return reasons


def test_who_begins_more_than_a_share_is_refused_and_others_go_on(make: Make) -> None:
    world = make()
    greedy, modest = world.device("greedy", 5, properties=EXPIRY), world.device("modest", 5, properties=EXPIRY)
    reasons = begin(greedy, 1, 100)
    taken = reasons.count(ReasonCode.SUCCESS)
    assert taken < ROWS and set(reasons[taken:]) == {ReasonCode.QUOTA_EXCEEDED}
    assert rows(world) == taken
    assert "max_exchange_bytes is used up" in world.said[-1] and world.broker.pressure.refused == 100 - taken
    assert begin(modest, 1, 2) == [ReasonCode.SUCCESS] * 2
    for number in range(1, taken + 1):
        greedy.send(PubRel(number))
    world.wait(PAUSE + 1)
    assert begin(greedy, 200, 5) == [ReasonCode.SUCCESS] * 5
    assert rows(world) == 7
    world.kill()


def test_at_the_limit_nobody_begins_anything_also_after_a_restart(make: Make) -> None:
    world = make()
    for number in range(100):
        begin(world.device(f"c{number}", 5, properties=EXPIRY), 1, 1)
        world.wait(PAUSE + 1)
    assert rows(world) <= ROWS
    world.stop()
    again = make()
    assert begin(again.device("another", 5, properties=EXPIRY), 1, 1) == [ReasonCode.QUOTA_EXCEEDED]
    passing = again.device("passing", 5)
    assert begin(passing, 1, 1) == [ReasonCode.SUCCESS], "without a session that lasts there is no row"
    again.kill()


def test_before_5_the_acknowledgement_is_withheld_until_there_is_room_and_then_the_client_sends_again(make: Make) -> None:
    world = make()
    device = world.device("v4", clean=False)
    taken = len(begin(device, 1, 60))
    assert taken < ROWS and not device.closed
    for number in range(1, taken + 1):
        device.send(PubRel(number))
    world.wait(PAUSE + 1)
    world.wait(1)
    assert device.closed
    again = world.device("v4", clean=False)
    assert len(begin(again, taken + 1, 5)) == 5
    world.kill()


def test_guards_in_memory_of_connections_without_a_session_are_bounded_too(make: Make) -> None:
    world = make()
    greedy, modest = world.device("greedy"), world.device("modest")
    assert len(begin(greedy, 1, 200)) < ROWS
    world.wait(1)
    assert "connections without a session" in world.said[-1]
    assert len(begin(modest, 1, 2)) == 2
    greedy.cut()
    assert world.broker.rows.passing == 2
    modest.send(PubRel(1))
    assert world.broker.rows.passing == 1
    assert len(begin(world.device("greedy"), 1, 5)) == 5
    world.kill()


def test_who_ends_no_delivery_gets_no_more_and_everything_once_it_does(make: Make) -> None:
    world = make()
    device = world.device("s", 5, clean=False, properties=EXPIRY)
    device.subscribe("t", 2)
    publisher = world.device("p")
    for number in range(100):
        publisher.publish("t", b"%d" % number, 2, packet_id=number + 1)
        publisher.send(PubRel(number + 1))
    got = device.messages()
    assert len(got) < ROWS and rows(world, "inflight") == len(got)
    payloads = [message[3] for message in got]
    while got:
        for _, _, packet_id, _ in got:
            device.send(PubRec(packet_id))
            device.send(PubComp(packet_id))
        world.wait(PAUSE + 1)
        world.wait(1)
        got = device.messages()
        payloads += [message[3] for message in got]
    assert payloads == [b"%d" % number for number in range(100)]
    world.kill()


def test_complete_deliveries_above_one_that_is_never_acknowledged_are_bounded(make: Make) -> None:
    world = make()
    device = world.device("s", 5, clean=False, properties=EXPIRY)
    device.subscribe("#", 2)
    publisher = world.device("p")
    publisher.publish("t", b"never acknowledged", 1)
    (stuck,) = device.messages()
    for number in range(100):
        publisher.publish("t", b"%d" % number, 2, packet_id=number + 1)
        publisher.send(PubRel(number + 1))
        for _, _, packet_id, _ in device.messages():
            device.send(PubRec(packet_id))
            device.send(PubComp(packet_id))
    assert rows(world, "inflight") < ROWS
    device.send(PubAck(stuck[2]))
    world.wait(PAUSE + 1)
    world.wait(PAUSE + 1)
    assert device.messages(), "and then the others come"
    world.kill()


def test_what_was_begun_is_ended_over_a_new_connection_too(make: Make) -> None:
    world = make()
    device = world.device("s", 5, clean=False, properties=EXPIRY)
    device.subscribe("t", 2)
    publisher = world.device("p")
    for number in range(60):
        publisher.publish("t", b"%d" % number, 2, packet_id=number + 1)
        publisher.send(PubRel(number + 1))
    sent = [message[3] for message in device.messages()]
    device.cut()
    again = world.device("s", 5, clean=False, properties=EXPIRY)
    assert [message[3] for message in again.messages()] == sent, "sent again, and nothing new"
    world.kill()


def test_a_clean_stop_writes_no_more_than_there_is_room_for_and_nothing_is_lost(make: Make) -> None:
    world = make()
    devices = [world.device(f"s{number}", 5, clean=False, properties=EXPIRY) for number in range(5)]
    for device in devices:
        device.subscribe("t", 1)
    publisher = world.device("p")
    for number in range(15):
        publisher.publish("t", b"%d" % number, packet_id=number + 1)
    assert [len(device.messages()) for device in devices] == [15] * 5
    world.stop()
    again = make()
    assert rows(again, "inflight") == 30 <= ROWS
    for number in range(5):
        device = again.device(f"s{number}", 5, clean=False, properties=EXPIRY)
        messages = device.messages()
        assert [message[3] for message in messages] == [b"%d" % sent for sent in range(15)]
        assert all(message[1] & 8 for message in messages), "they may be there already: DUP"
    again.kill()


def test_positions_of_clients_without_end_are_bounded_the_oldest_go(tmp_path: Path) -> None:
    world = open_world(tmp_path / "log.db", limits=LIMITS)
    publish(world, "pubsub/a", ["1"])
    last = 0
    for number in range(3 * ROWS):
        device = world.device(f"random {number}")
        device.subscribe("pubsub/#", 1)
        assert take(device) == ["1"]
        device.disconnect()
        world.wait(PAUSE + 1)
        last = number
    assert 0 < rows(world, "position") <= ROWS + 1
    assert any("the oldest positions go" in line for line in world.said)
    back = world.device(f"random {last}")
    back.subscribe("pubsub/#", 1)
    assert take(back) == [], "the newest one stays"
    world.kill()


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
def test_rows_are_counted_in_pieces_that_lose_none(make: Make, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(gateway_rows, "PIECE", piece)
    world = make()
    db = world.store.connection
    db.executemany(
        "INSERT INTO received VALUES (?, ?)", [(client, packet) for client in (1, 2, 5) for packet in (1, 9, 65_535)]
    )
    two_of_one_message = [(2, 8, 3, 1), (2, 8, 65_535, 1)]
    db.executemany(
        "INSERT INTO inflight VALUES (?, ?, ?, ?)", [*two_of_one_message, *((5, 1 << 40 | n, n, 1) for n in range(1, 21))]
    )
    db.executemany("INSERT INTO position VALUES (NULL, ?, ?, 1, 1)", [(client, 1) for client in range(1, 12)])
    world.broker.rows.load(db)
    assert (world.broker.rows.exchanges, world.broker.rows.positions) == (9 + 22, 11)
    lasting = {number: Session(Name("", number), expiry=3600, next_seq=1) for number in (1, 2, 5)}
    assert [number for number, session in lasting.items() if world.broker.rows.stalls(session)] == [5]
    world.kill()
