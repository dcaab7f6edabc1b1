"""Our bytes and those of two other codecs: `mqtt5` (written in Rust) and paho.

Every case of MQTT 5.0 goes through `mqtt5` in both directions: it must read what we wrote, and what it writes then we must
read as the packet we began with. paho's tables of reason codes and properties are compared with ours row by row, and a paho
client, its socket a pair in memory, talks to our two codecs in all three versions.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import mqtt5
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.reasoncodes import ReasonCode as PahoReason
from paho.mqtt.subscribeoptions import SubscribeOptions
from tidegate.gateway.mqtt.connection import Acks, Connection, Terms, TopicNames
from tidegate.gateway.mqtt.packet_types import PACKET_NAMES
from tidegate.gateway.mqtt.packets import (
    ConnAck,
    Connect,
    Disconnect,
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
    decode,
    encode,
)
from tidegate.gateway.mqtt.properties import TABLE, Property
from tidegate.gateway.mqtt.reasons import ALLOWED, ReasonCode
from tidegate.gateway.mqtt.wire import read_varint

from .cases import NEWER, Case, case_id

# -- mqtt5 ---------------------------------------------------------------------------------------------------------------

NARROWER = {
    "Auth: 5.0 bare": "mqtt5 wants a property length where 3.15.2.1 lets it be left out",
    "Disconnect: 5.0 bad authentication method": "2.4 permits this code, 3.14.2.1 does not repeat it",
}


def read_by_mqtt5(data: bytes) -> Any:
    packet, size = mqtt5.read(memoryview(data))
    assert size == len(data)
    return packet


def decoded(data: bytes, version: int) -> Any:
    length, start = read_varint(data, 1, len(data))
    assert start + length == len(data)
    return decode(data[0], data[start:], version)


@pytest.mark.parametrize("case", [case for case in NEWER if case.id not in NARROWER], ids=case_id)
def test_mqtt5_reads_our_bytes_and_writes_them_back(case: Case) -> None:
    theirs = read_by_mqtt5(encode(case.packet, 5)).write()
    assert decoded(theirs, 5) == case.packet


@pytest.mark.parametrize("case", [case for case in NEWER if case.id in NARROWER], ids=case_id)
def test_what_mqtt5_does_not_read_is_known(case: Case) -> None:
    with pytest.raises(ValueError, match=r"Missing property length|Invalid DisconnectReasonCode"):
        read_by_mqtt5(encode(case.packet, 5))


def test_a_connect_made_by_mqtt5_has_its_fields_where_we_read_them() -> None:
    will = mqtt5.Will("w/t", payload=b"gone", qos=mqtt5.QoS.EXACTLY_ONCE, retain=True, will_delay_interval=9)
    data = mqtt5.ConnectPacket(
        "dev",
        username="me",
        password=b"pw",
        clean_start=True,
        will=will,
        keep_alive=30,
        session_expiry_interval=60,
        receive_max=7,
    ).write()
    packet = decoded(data, 0)
    assert isinstance(packet, Connect)
    assert packet.will == Will("w/t", b"gone", 2, True, {Property.WILL_DELAY_INTERVAL: 9})
    assert (packet.version, packet.client_id, packet.username, packet.password) == (5, "dev", "me", b"pw")
    assert (packet.clean_start, packet.keep_alive) == (True, 30)
    assert packet.properties == {Property.SESSION_EXPIRY_INTERVAL: 60, Property.RECEIVE_MAXIMUM: 7}


def test_a_publish_made_by_mqtt5_has_its_fields_where_we_read_them() -> None:
    data = mqtt5.PublishPacket(
        "a/b", b"x", qos=mqtt5.QoS.EXACTLY_ONCE, retain=True, packet_id=515, duplicate=True, topic_alias=4, content_type="t"
    ).write()
    properties = {Property.TOPIC_ALIAS: 4, Property.CONTENT_TYPE: "t"}
    assert decoded(data, 5) == Publish("a/b", b"x", 2, True, True, 515, properties)


def test_a_subscribe_made_by_mqtt5_has_its_fields_where_we_read_them() -> None:
    wanted = mqtt5.TopicFilter(
        "a/#",
        max_qos=mqtt5.QoS.AT_LEAST_ONCE,
        no_local=True,
        retain_as_published=False,
        retain_handling=mqtt5.RetainHandling.SEND_NEVER,
    )
    data = mqtt5.SubscribePacket(7, [wanted], subscription_id=300).write()
    expected = Subscribe(7, (Subscription("a/#", 1, True, False, 2),), {Property.SUBSCRIPTION_IDENTIFIER: [300]})
    assert decoded(data, 5) == expected


# -- paho's tables -------------------------------------------------------------------------------------------------------

PAHO_NAMES = {number: PACKET_NAMES[number] for number in PacketTypes.indexes} | {PacketTypes.WILLMESSAGE: "WILL"}


def paho_properties(packet: int) -> Any:
    made: Any = PahoProperties  # untyped there
    return made(packet)


def test_our_table_of_properties_is_the_one_of_paho() -> None:
    theirs = {
        number: {PAHO_NAMES[packet] for packet in packets}
        for number, (_, packets) in paho_properties(PacketTypes.CONNECT).properties.items()
    }
    assert {int(found): set(row.packets) for found, row in TABLE.items()} == theirs


def test_our_names_of_properties_are_those_of_paho() -> None:
    theirs = {name.upper().replace(" ", "_"): number for name, number in paho_properties(PacketTypes.CONNECT).names.items()}
    assert {found.name: int(found) for found in Property} == theirs


def test_our_table_of_reason_codes_is_the_one_of_paho() -> None:
    theirs: dict[str, set[int]] = {}
    for code, names in PahoReason.names.items():
        for packet in [packet for packets in names.values() for packet in packets]:
            theirs.setdefault(PAHO_NAMES[packet], set()).add(code)
    theirs["CONNACK"].add(ReasonCode.PAYLOAD_FORMAT_INVALID)  # 3.2.2.2 has it, for a will; paho does not
    assert {packet: set(allowed) for packet, allowed in ALLOWED.items()} == theirs


# -- paho's client -------------------------------------------------------------------------------------------------------


class Paho:
    """A paho client whose socket is one half of a pair; the other half is read by our `Connection`."""

    def __init__(self, version: int, clean: bool = True) -> None:
        ours, theirs = socket.socketpair()
        self.sock = ours
        self.version = version
        self.end: Connection[str] = Connection(Terms(TopicNames(), 1 << 20, 10))
        self.heard: list[tuple[Any, ...]] = []
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            "paho",
            clean_session=clean if version < 5 else None,
            protocol=MQTTProtocolVersion(version),
        )
        setattr(self.client, "_create_socket", lambda: theirs)  # noqa: B010 - its only door for a socket of ours
        self.client.on_connect = lambda client, data, flags, reason, properties: self.heard.append(
            ("connect", flags.session_present, reason.value)
        )
        self.client.on_message = lambda client, data, message: self.heard.append(
            ("message", message.topic, message.payload, message.qos, message.retain)
        )
        self.client.on_publish = lambda client, data, mid, reason, properties: self.heard.append(("published", mid))
        self.client.on_subscribe = lambda client, data, mid, reasons, properties: self.heard.append(
            ("subscribed", [reason.value for reason in reasons])
        )
        self.client.on_unsubscribe = lambda client, data, mid, reasons, properties: self.heard.append(("unsubscribed",))

    def said(self) -> list[Any]:
        """What the client sent since the last call."""
        while self.client.want_write():
            assert self.client.loop_write() == paho.MQTT_ERR_SUCCESS
        return self.end.receive(self.sock.recv(1 << 16))

    def hears(self, *packets: Any) -> list[tuple[Any, ...]]:
        """The callbacks that these packets cause."""
        self.heard.clear()
        for packet in packets:
            self.sock.sendall(encode(packet, self.version))
            assert self.client.loop_read() == paho.MQTT_ERR_SUCCESS
        return list(self.heard)

    def connected(self, **more: Any) -> Any:
        """Connect; the CONNECT as we read it."""
        self.client.connect("unused", 1883, 60, **more)
        (packet,) = self.said()
        assert self.hears(ConnAck(False)) == [("connect", False, 0)]
        return packet


@pytest.fixture(params=[3, 4, 5], ids=["3.1", "3.1.1", "5.0"])
def peer(request: pytest.FixtureRequest) -> Iterator[Paho]:
    made = Paho(request.param)
    yield made
    made.client._sock_close()
    made.sock.close()


def test_paho_connects_and_disconnects(peer: Paho) -> None:
    peer.client.username_pw_set("me", "pässword")
    peer.client.will_set("w/t", b"gone", 1, True)
    packet = peer.connected()
    will = Will("w/t", b"gone", 1, True)
    clean = True
    assert packet == Connect(peer.version, "paho", clean, 60, "me", "pässword".encode(), will)
    peer.client.disconnect()
    assert peer.said() == [Disconnect()]


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_paho_publishes(peer: Paho, qos: int) -> None:
    peer.connected()
    mid = peer.client.publish("a/é", b"x" * 200, qos, True).mid
    heard = [("published", mid)]
    assert peer.said() == [("a/é", qos << 1 | 1, mid if qos else 0, b"x" * 200, b"")]
    if qos == 1:
        assert peer.hears(PubAck(mid)) == heard
    elif qos == 2:
        assert peer.hears(PubRec(mid)) == []
        assert peer.said() == [PubRel(mid)]
        assert peer.hears(PubComp(mid)) == heard


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_paho_is_published_to(peer: Paho, qos: int) -> None:
    peer.connected()
    message = ("message", "a/é", b"\0x", qos, True)
    packet = Publish("a/é", b"\0x", qos, True, False, 9 if qos else 0)
    if qos < 2:
        assert peer.hears(packet) == [message]
        if qos:
            assert peer.said() == [Acks((9,))]
        return
    assert peer.hears(packet) == []
    assert peer.said() == [PubRec(9)]
    assert peer.hears(PubRel(9)) == [message]
    assert peer.said() == [PubComp(9)]


def test_paho_subscribes_and_unsubscribes(peer: Paho) -> None:
    peer.connected()
    _, mid = peer.client.subscribe(
        [("a/#", 1), ("b", 2)]
        if peer.version < 5
        else [("a/#", SubscribeOptions(1, noLocal=True, retainAsPublished=True, retainHandling=2)), ("b", SubscribeOptions(2))]
    )
    assert mid is not None
    options = (True, True, 2) if peer.version == 5 else (False, False, 0)
    assert peer.said() == [Subscribe(mid, (Subscription("a/#", 1, *options), Subscription("b", 2)))]
    answer = (ReasonCode.GRANTED_QOS_1, ReasonCode.NOT_AUTHORIZED)
    granted = [1, 0x80 if peer.version < 5 else 0x87]
    assert peer.hears(SubAck(mid, answer)) == [("subscribed", granted)]
    _, mid = peer.client.unsubscribe(["a/#", "b"])
    assert mid is not None
    assert peer.said() == [Unsubscribe(mid, ("a/#", "b"))]
    assert peer.hears(UnsubAck(mid, (ReasonCode.SUCCESS, ReasonCode.NO_SUBSCRIPTION_EXISTED))) == [("unsubscribed",)]


def test_paho_sends_every_property_of_a_message() -> None:
    peer = Paho(5)
    peer.connected()
    properties = paho_properties(PacketTypes.PUBLISH)
    properties.PayloadFormatIndicator = 1
    properties.MessageExpiryInterval = 70_000
    properties.ContentType = "text"
    properties.ResponseTopic = "r"
    properties.CorrelationData = b"\0\1"
    properties.UserProperty = [("a", "1"), ("a", "2")]
    mid = peer.client.publish("t", b"x", 1, properties=properties).mid
    peer.client.publish("t", b"y", 0, properties=properties)
    block = bytes.fromhex("0101 0200011170 03000474657874 08000172 0900020001 2600016100 0131 26000161000132")
    assert peer.said() == [("t", 2, mid, b"x", block), ("t", 0, 0, b"y", block)]
    peer.client._sock_close()
    peer.sock.close()
