"""A session whose new connection waits for its CONNACK gets nothing before it, and then everything once."""

from __future__ import annotations

from pathlib import Path

from tidegate.gateway.mqtt.packets import PubAck, encode
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.outlet import TURN_BYTES

from .world import World

WINDOW = 3
EXPIRY = {Property.SESSION_EXPIRY_INTERVAL: 3600}


def test_what_the_connection_before_was_to_get_in_this_turn_does_not_come_twice(tmp_path: Path) -> None:
    world = World(tmp_path / "log.db")
    before = world.device("s", 5, clean=False, properties=EXPIRY | {Property.RECEIVE_MAXIMUM: WINDOW}, auto_ack=False)
    before.subscribe("t", 1)
    publisher = world.device("p")
    for number in range(3 * WINDOW):
        publisher.publish("t", bytes(TURN_BYTES // 2) + b"%d" % number)
    got = before.messages()
    assert len(got) == WINDOW
    world.auto = False
    publisher.publish("t", b"under way")
    world.broker.receive(before.client, b"".join([encode(PubAck(packet_id), 5) for _, _, packet_id, _ in got]))
    after = world.device("s", 5, clean=False, properties=EXPIRY)  # in the same turn
    while world.reads:
        world.read()
    assert after.got == []
    world.settle()
    payloads = [payload.lstrip(b"\0") for *_, payload in after.messages()]
    assert payloads == sorted({*payloads}), "one came twice"
    assert payloads[-1] == b"under way"
