"""While a commit takes long: who sends what is answered after it is read no further, before the answers fill the memory."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from tidegate.gateway.mqtt.packets import (
    PubAck,
    Publish,
    PubRec,
    SubAck,
    Subscribe,
    Subscription,
    UnsubAck,
    Unsubscribe,
    encode,
)

from .world import World

LIMIT = 100_000
TOGETHER = 100
FILTERS = tuple(f"{number}/{'x' * 100}" for number in range(20))
WAITING: dict[str, Publish | Unsubscribe | Subscribe] = {
    "PUBLISH that nobody stores": Publish("nobody", b"", 1, False, False, 7, {}),
    "the same PUBLISH with QoS 2": Publish("nobody", b"", 2, False, False, 7, {}),
    "UNSUBSCRIBE": Unsubscribe(7, FILTERS, {}),
    "SUBSCRIBE": Subscribe(7, tuple(Subscription(text, 0, False, False, 0) for text in FILTERS), {}),
}
ANSWERS = {Publish: (PubAck, PubRec), Unsubscribe: (UnsubAck,), Subscribe: (SubAck,)}
AT_ONCE = ("UNSUBSCRIBE", False)
"""Answered without waiting, and leads to nothing that waits."""


@pytest.mark.parametrize(("what", "persistent"), [case for case in product(WAITING, (False, True)) if case != AT_ONCE])
def test_what_waits_for_a_commit_is_bounded(tmp_path: Path, what: str, persistent: bool) -> None:
    world = World(tmp_path / "log.db")
    world.broker.hold(LIMIT)
    world.device("keeper", clean=False).subscribe("stored", 1)
    device, packet = world.device("flood", clean=not persistent), WAITING[what]
    world.auto = False
    device.publish("stored", b"", packet_id=1)
    data = encode(packet, device.version) * TOGETHER
    sent = 0
    while sent < LIMIT // 10 and not device.paused:
        device.send_bytes(data)
        sent += TOGETHER
    assert device.paused
    world.settle()
    assert not device.paused
    assert sum(isinstance(got, ANSWERS[type(packet)]) for got in device.got) >= sent
