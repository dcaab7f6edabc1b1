"""Our own mistakes are `ValueError`s, before a byte is written."""

from __future__ import annotations

from typing import Any

import pytest
from tidegate.gateway.mqtt.packets import (
    Auth,
    Connect,
    Packet,
    PubAck,
    Publish,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
    encode,
)
from tidegate.gateway.mqtt.properties import Property, encode_properties
from tidegate.gateway.mqtt.reasons import ReasonCode, connect_return_code

MISTAKES: list[tuple[str, int, Packet]] = [
    ("Connect: level 6", 6, Connect(6, "c")),
    ("Connect: 3.1.1 with a password alone", 4, Connect(4, "c", password=b"p")),
    ("Connect: keep alive of 65536", 5, Connect(5, "c", keep_alive=65_536)),
    ("Connect: client id with U+0000", 4, Connect(4, "c\0")),
    ("Connect: client id is a surrogate", 4, Connect(4, "\ud800")),
    ("Connect: will QoS 3", 4, Connect(4, "c", will=Will("w", b"", 3))),
    ("Connect: password of 65536 bytes", 4, Connect(4, "c", username="u", password=bytes(65_536))),
    ("Publish: QoS 1 without packet id", 4, Publish("a", b"", 1)),
    ("Publish: QoS 0 with packet id", 4, Publish("a", b"", 0, packet_id=1)),
    ("Publish: QoS 0 with DUP", 5, Publish("a", b"", dup=True)),
    ("Publish: QoS 3", 5, Publish("a", b"", 3, packet_id=1)),
    ("Publish: packet id 65536", 5, Publish("a", b"", 1, packet_id=65_536)),
    ("Publish: topic of 65536 bytes", 5, Publish("a" * 65_536, b"")),
    ("Publish: 256 MiB", 4, Publish("a", bytes(268_435_455))),
    ("PubAck: packet id 0", 4, PubAck(0)),
    ("Subscribe: no filter", 4, Subscribe(1, ())),
    ("Subscribe: QoS 3", 4, Subscribe(1, (Subscription("a", 3),))),
    ("Unsubscribe: no filter", 5, Unsubscribe(1, ())),
    ("Auth: 3.1.1", 4, Auth()),
]


@pytest.mark.parametrize(("version", "packet"), [mistake[1:] for mistake in MISTAKES], ids=[mistake[0] for mistake in MISTAKES])
def test_a_packet_that_cannot_be_is_not_written(version: int, packet: Packet) -> None:
    with pytest.raises(ValueError):
        encode(packet, version)


@pytest.mark.parametrize(
    ("found", "value"),
    [
        (Property.RECEIVE_MAXIMUM, 65_536),
        (Property.RECEIVE_MAXIMUM, -1),
        (Property.MESSAGE_EXPIRY_INTERVAL, 1 << 32),
        (Property.MAXIMUM_QOS, 256),
        (Property.SUBSCRIPTION_IDENTIFIER, [268_435_456]),
        (Property.CONTENT_TYPE, "a\0"),
        (Property.CORRELATION_DATA, bytes(65_536)),
    ],
)
def test_a_property_that_does_not_fit_is_not_written(found: Property, value: Any) -> None:
    with pytest.raises(ValueError, match=r"fit|variable byte integer|U\+0000"):
        encode_properties({found: value})


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (ReasonCode.SUCCESS, 0),
        (ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, 1),
        (ReasonCode.CLIENT_IDENTIFIER_NOT_VALID, 2),
        (ReasonCode.SERVER_BUSY, 3),
        (ReasonCode.QUOTA_EXCEEDED, 3),
        (ReasonCode.BAD_USER_NAME_OR_PASSWORD, 4),
        (ReasonCode.NOT_AUTHORIZED, 5),
        (ReasonCode.BANNED, 5),
    ],
)
def test_every_refusal_has_a_return_code_of_3_1_1(reason: ReasonCode, code: int) -> None:
    assert connect_return_code(reason) == code
