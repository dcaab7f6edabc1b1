"""Every packet in every shape: the one list behind the codec's tests.

`CASES` serves round trip, truncation, byte by byte feeding, the other libraries, mutation and the property-based tests. Ids
are sentences. `wire` is the packet in hex, written by hand from the standard, where no other library vouches for the bytes
(MQTT 3.1 and 3.1.1); bytes of MQTT 5.0 are compared with those of `mqtt5` in `test_other_codecs`.

Invariant: every packet type, every property in every packet that may hold it, and every reason code appears.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tidegate.gateway.mqtt.packets import (
    Auth,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
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
from tidegate.gateway.mqtt.properties import TABLE, Properties, Property
from tidegate.gateway.mqtt.reasons import ALLOWED, ReasonCode

P, R = Property, ReasonCode


class Case(NamedTuple):
    """A packet, the protocol level it is sent with, and its bytes in hex (empty: compared elsewhere)."""

    id: str
    version: int
    packet: Packet
    wire: str = ""


USERS = [("unit", "°C"), ("unit", "K"), ("", "")]

SAMPLES: dict[Property, Any] = {
    P.PAYLOAD_FORMAT_INDICATOR: 1,
    P.MESSAGE_EXPIRY_INTERVAL: 3600,
    P.CONTENT_TYPE: "application/json",
    P.RESPONSE_TOPIC: "answers/1",
    P.CORRELATION_DATA: b"\x00\xff",
    P.SUBSCRIPTION_IDENTIFIER: [268_435_455],
    P.SESSION_EXPIRY_INTERVAL: 4_294_967_295,
    P.ASSIGNED_CLIENT_IDENTIFIER: "auto-1",
    P.SERVER_KEEP_ALIVE: 30,
    P.AUTHENTICATION_METHOD: "SCRAM-SHA-256",
    P.AUTHENTICATION_DATA: b"n,,n=user",
    P.REQUEST_PROBLEM_INFORMATION: 0,
    P.WILL_DELAY_INTERVAL: 5,
    P.REQUEST_RESPONSE_INFORMATION: 1,
    P.RESPONSE_INFORMATION: "answers/",
    P.SERVER_REFERENCE: "other:1883",
    P.REASON_STRING: "because",
    P.RECEIVE_MAXIMUM: 20,
    P.TOPIC_ALIAS_MAXIMUM: 10,
    P.TOPIC_ALIAS: 3,
    P.MAXIMUM_QOS: 1,
    P.RETAIN_AVAILABLE: 0,
    P.USER_PROPERTY: USERS,
    P.MAXIMUM_PACKET_SIZE: 1_048_576,
    P.WILDCARD_SUBSCRIPTION_AVAILABLE: 0,
    P.SUBSCRIPTION_IDENTIFIER_AVAILABLE: 0,
    P.SHARED_SUBSCRIPTION_AVAILABLE: 0,
}
"""One legal value that is not the default, for each property."""

FILTERS = (
    Subscription("a/+/b", 0),
    Subscription("#", 1, no_local=True),
    Subscription("$share/group/t/#", 2, retain_as_published=True, retain_handling=1),
    Subscription("/", 2, True, True, 2),
)

OLDER: list[Case] = [
    Case("Connect: 3.1 by its old name", 3, Connect(3, "c"), "100f 0006 4d5149736470 03 02 0000 0001 63"),
    Case("Connect: 3.1.1 with an empty client id", 4, Connect(4, ""), "100c 0004 4d515454 04 02 0000 0000"),
    Case(
        "Connect: 3.1.1 with everything",
        4,
        Connect(4, "dev", False, 60, "ü", b"\x00\xff", Will("w/t", b"gone", 2, True)),
        "1022 0004 4d515454 04 f4 003c 0003 646576 0003 772f74 0004 676f6e65 0002 c3bc 0002 00ff",
    ),
    Case("Connect: 3.1.1 empty user name", 4, Connect(4, "d", username=""), "100f 0004 4d515454 04 82 0000 0001 64 0000"),
    Case("ConnAck: 3.1.1 session present", 4, ConnAck(True), "2002 01 00"),
    Case("ConnAck: 3.1.1 bad version", 4, ConnAck(False, R.UNSUPPORTED_PROTOCOL_VERSION), "2002 00 01"),
    Case("ConnAck: 3.1.1 bad client id", 4, ConnAck(False, R.CLIENT_IDENTIFIER_NOT_VALID), "2002 00 02"),
    Case("ConnAck: 3.1.1 unavailable", 4, ConnAck(False, R.SERVER_UNAVAILABLE), "2002 00 03"),
    Case("ConnAck: 3.1.1 bad password", 4, ConnAck(False, R.BAD_USER_NAME_OR_PASSWORD), "2002 00 04"),
    Case("ConnAck: 3.1.1 not authorized", 4, ConnAck(False, R.NOT_AUTHORIZED), "2002 00 05"),
    Case("Publish: 3.1.1 QoS 0", 4, Publish("a/b", b"x"), "3006 0003 612f62 78"),
    Case("Publish: 3.1.1 QoS 0, one letter, no payload", 4, Publish("a", b""), "3003 0001 61"),
    Case("Publish: 3.1.1 QoS 1 retained", 4, Publish("é", b"\x00", 1, True, False, 1), "3307 0002 c3a9 0001 00"),
    Case("Publish: 3.1.1 QoS 1, no payload", 4, Publish("a", b"", 1, packet_id=258), "3205 0001 61 0102"),
    Case("Publish: 3.1.1 QoS 2 sent again", 4, Publish("a", b"yy", 2, False, True, 65535), "3c07 0001 61 ffff 7979"),
    Case("Publish: 3.1.1 length in two bytes", 4, Publish("a", bytes(125)), "308001 0001 61" + "00" * 125),
    Case("Publish: 3.1.1 length in three bytes", 4, Publish("a", bytes(16381)), "30808001 0001 61" + "00" * 16381),
    Case("PubAck: 3.1.1", 4, PubAck(16448), "4002 4040"),
    Case("PubRec: 3.1.1", 4, PubRec(1), "5002 0001"),
    Case("PubRel: 3.1.1", 4, PubRel(1), "6202 0001"),
    Case("PubComp: 3.1.1", 4, PubComp(1), "7002 0001"),
    Case(
        "Subscribe: 3.1.1 two filters",
        4,
        Subscribe(9, (Subscription("a/+", 1), Subscription("#", 2))),
        "820c 0009 0003 612f2b 01 0001 23 02",
    ),
    Case("SubAck: 3.1.1", 4, SubAck(9, tuple(map(R, (0, 1, 2, 0x80)))), "9006 0009 00010280"),
    Case("Unsubscribe: 3.1.1 two filters", 4, Unsubscribe(9, ("a/+", "#")), "a20a 0009 0003 612f2b 0001 23"),
    Case("UnsubAck: 3.1.1", 4, UnsubAck(9), "b002 0009"),
    Case("PingReq: 3.1.1", 4, PingReq(), "c000"),
    Case("PingResp: 3.1.1", 4, PingResp(), "d000"),
    Case("Disconnect: 3.1.1", 4, Disconnect(), "e000"),
]


def properties_of(packet: str) -> Properties:
    """All properties that `packet` may hold, each with its sample."""
    return {found: SAMPLES[found] for found in SAMPLES if packet in TABLE[found].packets}


NEWER: list[Case] = [
    Case("Connect: 5.0 bare", 5, Connect(5, "")),
    Case(
        "Connect: 5.0 with everything",
        5,
        Connect(
            5, "dev", False, 65535, "ü", b"\xff", Will("w", b"gone", 1, True, properties_of("WILL")), properties_of("CONNECT")
        ),
    ),
    Case("Connect: 5.0 with a password only", 5, Connect(5, "dev", password=b"token")),
    Case("Connect: 5.0 with an empty will", 5, Connect(5, "dev", will=Will("w", b""))),
    Case("ConnAck: 5.0 session present", 5, ConnAck(True)),
    Case("ConnAck: 5.0 with everything", 5, ConnAck(False, R.SUCCESS, properties_of("CONNACK"))),
    Case("Publish: 5.0 QoS 0", 5, Publish("a/b", b"x")),
    Case("Publish: 5.0 QoS 1, no payload", 5, Publish("a", b"", 1, packet_id=1)),
    Case("Publish: 5.0 QoS 2 sent again, retained", 5, Publish("é", b"yy", 2, True, True, 65535)),
    Case("Publish: 5.0 with everything", 5, Publish("a", b"yy", 1, packet_id=7, properties=properties_of("PUBLISH"))),
    Case("Publish: 5.0 by alias alone", 5, Publish("", b"yy", 1, packet_id=8, properties={P.TOPIC_ALIAS: 3})),
    Case("Publish: 5.0 two subscription identifiers", 5, Publish("a", b"", properties={P.SUBSCRIPTION_IDENTIFIER: [1, 128]})),
    Case("Publish: 5.0 length in two bytes", 5, Publish("a", bytes(300), 1, packet_id=9)),
    Case("Publish: 5.0 properties of 200 bytes", 5, Publish("a", b"x", properties={P.CORRELATION_DATA: bytes(197)})),
    Case("Subscribe: 5.0", 5, Subscribe(2, FILTERS)),
    Case("Subscribe: 5.0 with everything", 5, Subscribe(2, FILTERS, properties_of("SUBSCRIBE"))),
    Case("SubAck: 5.0 every code", 5, SubAck(2, tuple(ALLOWED["SUBACK"].values()), properties_of("SUBACK"))),
    Case("Unsubscribe: 5.0", 5, Unsubscribe(3, ("a/+/b", "$share/g/x"))),
    Case("Unsubscribe: 5.0 with everything", 5, Unsubscribe(3, ("#",), properties_of("UNSUBSCRIBE"))),
    Case("UnsubAck: 5.0 every code", 5, UnsubAck(3, tuple(ALLOWED["UNSUBACK"].values()), properties_of("UNSUBACK"))),
    Case("PingReq: 5.0", 5, PingReq()),
    Case("PingResp: 5.0", 5, PingResp()),
    Case("Disconnect: 5.0 bare", 5, Disconnect()),
    Case("Disconnect: 5.0 with everything", 5, Disconnect(R.PROTOCOL_ERROR, properties_of("DISCONNECT"))),
    Case("Auth: 5.0 bare", 5, Auth()),
    Case("Auth: 5.0 with everything", 5, Auth(R.CONTINUE_AUTHENTICATION, properties_of("AUTH"))),
]
NEWER += [
    Case(f"{made.__name__}: 5.0 {shape}", 5, made(5, reason, properties))
    for made in (PubAck, PubRec, PubRel, PubComp)
    for shape, reason, properties in (
        ("bare", R.SUCCESS, {}),
        ("reason only", max(ALLOWED[made.__name__.upper()].values()), {}),
        ("with everything", R.SUCCESS, properties_of(made.__name__.upper())),
    )
]
NEWER += [Case(f"ConnAck: 5.0 {reason.label}", 5, ConnAck(False, reason)) for reason in ALLOWED["CONNACK"].values() if reason]
NEWER += [Case(f"Disconnect: 5.0 {reason.label}", 5, Disconnect(reason)) for reason in ALLOWED["DISCONNECT"].values() if reason]

CASES: list[Case] = OLDER + NEWER


def case_id(case: Case) -> str:
    """For `pytest.mark.parametrize(..., ids=case_id)`."""
    return case.id
