"""The connection: what needs more than one packet, and the shapes of the hot path."""

from __future__ import annotations

from typing import Any

import pytest
from tidegate.gateway.mqtt.connection import CLIENT, SERVER, Acks, Connection, Fault, Terms, TopicNames
from tidegate.gateway.mqtt.errors import MalformedPacket, ProtocolError
from tidegate.gateway.mqtt.packets import (
    Auth,
    ConnAck,
    Connect,
    Disconnect,
    PingReq,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Subscription,
    Unsubscribe,
    encode,
)
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.mqtt.reasons import ReasonCode

from .ends import fault_of, fresh, opened

CONTENT = {Property.CONTENT_TYPE: "t"}
CONTENT_BLOCK = bytes.fromhex("03000174")


def aliased(topic: str, alias: int, payload: bytes = b"x") -> bytes:
    return encode(Publish(topic, payload, properties={Property.TOPIC_ALIAS: alias, **CONTENT}), 5)


def acks(*packet_ids: int) -> bytes:
    return b"".join(encode(PubAck(packet_id), 4) for packet_id in packet_ids)


# -- the hot path's shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_publish_is_a_tuple_with_the_flags_of_its_first_byte(version: int) -> None:
    end = opened(SERVER, version)
    data = encode(Publish("a", b"0"), version)
    data += encode(Publish("a", b"1", 1, packet_id=258), version)
    data += encode(Publish("a", b"2", 2, True, True, 65535), version)
    assert end.receive(data) == [("a", 0, 0, b"0", b""), ("a", 2, 258, b"1", b""), ("a", 13, 65535, b"2", b"")]


def test_properties_are_given_raw_and_without_length() -> None:
    end = opened(SERVER, 5)
    data = encode(Publish("a", b"x", properties=CONTENT), 5)
    for _ in range(3):  # checked once, then known
        assert end.receive(data) == [("a", 0, 0, b"x", CONTENT_BLOCK)]


def test_a_known_property_block_does_not_excuse_a_missing_topic() -> None:
    end = opened(SERVER, 5)
    assert len(end.receive(encode(Publish("a", b"x", properties=CONTENT), 5))) == 1
    nameless = bytes.fromhex("3008 0000 04") + CONTENT_BLOCK + b"x"
    assert "neither topic name nor topic alias" in fault_of(end.receive(nameless)).text


def test_more_property_blocks_than_are_remembered() -> None:
    end = opened(SERVER, 5)
    for _ in range(2):
        for number in range(100):
            packet = Publish("a", b"x", properties={Property.MESSAGE_EXPIRY_INTERVAL: number})
            assert end.receive(encode(packet, 5)) == [("a", 0, 0, b"x", b"\x02" + number.to_bytes(4, "big"))]


def test_topics_come_from_the_mapping_by_their_raw_bytes() -> None:
    end: Connection[int] = Connection(Terms({"é".encode(): 42}, 1000))
    events = end.receive(encode(Connect(4, "c"), 4) + encode(Publish("é", b""), 4))
    assert events[1:] == [(42, 0, 0, b"", b"")]


def test_an_error_of_the_mapping_becomes_the_fault() -> None:
    class Choosy(TopicNames):
        def __missing__(self, raw: bytes) -> str:
            raise ProtocolError(ReasonCode.TOPIC_NAME_INVALID, "not this one")

    end = Connection(Terms(Choosy(), 1000))
    events = end.receive(encode(Connect(4, "c"), 4) + encode(Publish("a", b""), 4))
    assert fault_of(events).reason == ReasonCode.TOPIC_NAME_INVALID


def test_topic_names_are_the_same_object_each_time_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.gateway.mqtt.connection.MAX_TOPIC_NAMES", 10)
    names = TopicNames()
    assert names[b"long/enough/to/be/no/constant"] is names[b"long/enough/to/be/no/constant"]
    for number in range(100):
        assert names[b"t/%d" % number] == f"t/{number}"
    assert len(names) <= 10


# -- runs of PUBACK ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 20, 21, 100, 5000])
def test_a_run_of_pubacks_is_one_event(version: int, count: int) -> None:
    ids = tuple(range(1, count + 1))
    assert opened(SERVER, version).receive(acks(*ids)) == [Acks(ids)]


@pytest.mark.parametrize("count", [1, 4, 5, 40])
def test_a_run_ends_at_another_packet_and_goes_on_after_it(count: int) -> None:
    run = tuple(range(0x4002, 0x4002 + count))  # ids that look like the head of a PUBACK
    data = acks(*run) + encode(PingReq(), 4) + acks(*run) + encode(PubRec(7), 4) + acks(7)
    assert opened(SERVER, 4).receive(data) == [Acks(run), PingReq(), Acks(run), PubRec(7), Acks((7,))]


def test_a_puback_with_a_reason_stands_alone() -> None:
    refused = PubAck(2, ReasonCode.QUOTA_EXCEEDED)
    assert opened(SERVER, 5).receive(acks(1) + encode(refused, 5) + acks(3)) == [Acks((1,)), refused, Acks((3,))]


@pytest.mark.parametrize("before", [1, 3, 30])
def test_a_zero_in_a_run_is_a_fault_after_those_before_it(before: int) -> None:
    good = tuple(range(1, before + 1))
    events = opened(SERVER, 4).receive(acks(*good) + b"\x40\x02\0\0" + acks(9))
    assert events[:-1] == [Acks(good)]
    assert fault_of(events).text == "PUBACK: packet id 0"


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_run_cut_inside_a_puback(cut: int) -> None:
    end = opened(SERVER, 4)
    data = acks(1, 2)
    got = [*end.receive(data[:cut]), *end.receive(data[cut:])]
    assert [packet_id for event in got if isinstance(event, Acks) for packet_id in event.packet_ids] == [1, 2]


# -- order ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 4, 5])
def test_everything_after_connect_may_come_in_the_same_read(version: int) -> None:
    """Clients need not wait for the CONNACK (3.1.4)."""
    hello, message = Connect(version, "c"), encode(Publish("a", b"x"), version)
    wanted = Subscribe(1, (Subscription("a"),))
    end = fresh(SERVER, version)
    events = end.receive(encode(hello, version) + message + encode(wanted, version) + encode(Disconnect(), version))
    assert events == [hello, ("a", 0, 0, b"x", b""), wanted, Disconnect()]
    assert end.version == version


def test_nothing_is_read_after_disconnect() -> None:
    end = opened(SERVER, 4)
    assert end.receive(encode(Disconnect(), 4) + b"\0\0\0") == [Disconnect()]
    assert end.receive(encode(PingReq(), 4)) == []


def test_what_came_before_a_fault_is_delivered() -> None:
    events = opened(SERVER, 4).receive(encode(Publish("a", b"x"), 4) + acks(1) + b"\0\0" + acks(2))
    assert events[:2] == [("a", 0, 0, b"x", b""), Acks((1,))]
    assert len(events) == 3 and isinstance(events[2], Fault)


def test_a_client_may_be_asked_to_authenticate_before_connack() -> None:
    challenge = Auth(ReasonCode.CONTINUE_AUTHENTICATION, {Property.AUTHENTICATION_METHOD: "m"})
    end = fresh(CLIENT, 5)
    assert end.receive(encode(challenge, 5) + encode(ConnAck(False), 5)) == [challenge, ConnAck(False)]


def test_a_refusing_connack_is_the_last_word() -> None:
    end = fresh(CLIENT, 4)
    refusal = ConnAck(False, ReasonCode.NOT_AUTHORIZED)
    assert end.receive(encode(refusal, 4) + encode(Publish("a", b""), 4)) == [refusal]


@pytest.mark.parametrize(
    ("first", "hint"), [(b"GET / HTTP/1.1\r\n", "HTTP"), (b"\x16\x03\x01\x02\x00", "TLS"), (b"\xc0\x00", "0xC0")]
)
def test_a_stranger_is_named(first: bytes, hint: str) -> None:
    assert hint in fault_of(fresh(SERVER, 0).receive(first)).text


# -- topic aliases -------------------------------------------------------------------------------------------------------


def test_an_alias_stands_for_its_topic_until_it_is_set_again() -> None:
    end = opened(SERVER, 5)
    data = aliased("one", 1) + aliased("two", 10) + aliased("", 1) + aliased("three", 1) + aliased("", 1) + aliased("", 10)
    events = end.receive(data)
    assert [event[0] for event in events if isinstance(event, tuple)] == ["one", "two", "one", "three", "three", "two"]
    assert {event[4] for event in events if isinstance(event, tuple)} == {CONTENT_BLOCK}


def test_an_alias_is_not_there_when_the_maximum_is_zero() -> None:
    end = Connection(Terms(TopicNames(), 1000))
    assert fault_of(end.receive(encode(Connect(5, "c"), 5) + aliased("a", 1))).reason == ReasonCode.TOPIC_ALIAS_INVALID


def test_a_bad_topic_never_becomes_an_alias() -> None:
    data = bytes.fromhex("3007 0001 23 03 230001")
    assert isinstance(fault_of(opened(SERVER, 5).receive(data)), MalformedPacket)


# -- size ----------------------------------------------------------------------------------------------------------------


def publish_of(size: int, version: int) -> bytes:
    """A PUBLISH of this size; of one byte more where there is none (130 and 16,387 bytes fit no length)."""
    for header in (2, 3, 4):
        data = encode(Publish("a", bytes(size - header - (3 if version == 4 else 4))), version)
        if len(data) == size:
            return data
    return publish_of(size + 1, version)


@pytest.mark.parametrize("limit", [60, 127, 128, 129, 131, 200, 1000, 16_384, 16_385, 16_386, 16_388, 70_000])
@pytest.mark.parametrize("version", [4, 5])
def test_the_largest_packet_passes_and_one_byte_more_does_not(limit: int, version: int) -> None:
    assert len(opened(SERVER, version, limit).receive(publish_of(limit, version))) == 1
    too_large = publish_of(limit + 1, version)
    for data in (too_large, too_large[:4]):
        error = fault_of(opened(SERVER, version, limit).receive(data))
        assert error.reason == ReasonCode.PACKET_TOO_LARGE
        assert str(len(too_large)) in error.text and str(limit) in error.text


def test_a_packet_too_large_is_refused_by_its_header_alone() -> None:
    for header in (b"\x82\xff\xff\xff\x7f", b"\x32\xff\xff\xff\x7f"):
        assert fault_of(opened(SERVER, 4).receive(header)).reason == ReasonCode.PACKET_TOO_LARGE


@pytest.mark.parametrize("version", [4, 5])
def test_ten_thousand_topic_filters_pass_and_one_more_does_not(version: int) -> None:
    """A megabyte of them would stop everybody else for seconds."""
    most = [f"f/{number}" for number in range(10_000)]
    for filters in (most, [*most, "one more"]):
        for packet in (Subscribe(1, tuple(map(Subscription, filters))), Unsubscribe(1, tuple(filters))):
            events = opened(SERVER, version).receive(encode(packet, version))
            if filters is most:
                assert events == [packet]
            else:
                assert fault_of(events).reason == ReasonCode.QUOTA_EXCEEDED


def test_a_connect_too_large_is_refused() -> None:
    data = encode(Connect(4, "c" * 200), 4)
    assert fault_of(fresh(SERVER, 4, 100).receive(data[:3])).reason == ReasonCode.PACKET_TOO_LARGE


def test_what_waits_is_bounded_by_the_largest_packet_and_one_read() -> None:
    end = opened(SERVER, 4, 100_000)
    data = encode(Publish("a", bytes(99_000)), 4)
    largest = 0
    for start in range(0, len(data) * 3, 4096):
        end.receive((data * 3)[start : start + 4096])
        largest = max(largest, len(end._buffer))
    assert 0 < largest <= 100_000


def test_a_large_packet_in_small_pieces_is_copied_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is looked at once: the scan runs when the packet is whole, not at every piece."""
    end = opened(SERVER, 4, 1 << 20)
    scans: list[int] = []
    scan = Connection._scan

    def counted(self: Connection[str], data: bytes, events: list[Any]) -> int:
        scans.append(len(data))
        return scan(self, data, events)

    monkeypatch.setattr(Connection, "_scan", counted)
    data = encode(Publish("a", bytes(500_000)), 4)
    events = [event for start in range(0, len(data), 1000) for event in end.receive(data[start : start + 1000])]
    assert events == [("a", 0, 0, bytes(500_000), b"")]
    assert scans == [1000, len(data)]


# -- refusals ------------------------------------------------------------------------------------------------------------


def refusal(end: Connection[str], data: bytes) -> bytes:
    return end.refusal(fault_of(end.receive(data)))


def test_a_bad_level_is_answered_with_a_connack() -> None:
    """[MQTT-3.1.2-2] of both versions; older levels understand the older CONNACK."""
    packet = encode(Connect(4, "c"), 4)
    for level in (2, 6, 0x84):
        assert refusal(fresh(SERVER, 4), packet.replace(b"MQTT\x04", b"MQTT" + bytes((level,)))) == bytes.fromhex("2002 00 01")
    assert refusal(fresh(SERVER, 4), packet.replace(b"MQTT\x04", b"MQTT\x85")) == bytes.fromhex("2003 00 84 00")
    assert refusal(fresh(SERVER, 4), packet.replace(b"MQTT\x04", b"MQTX\x04")) == b""


def test_a_malformed_connect_is_answered_in_5_0_only() -> None:
    broken = encode(Connect(5, "c"), 5).replace(b"MQTT\x05\x02", b"MQTT\x05\x03")
    assert refusal(fresh(SERVER, 5), broken) == bytes.fromhex("2003 00 81 00")
    assert refusal(fresh(SERVER, 4), broken.replace(b"MQTT\x05", b"MQTT\x04")) == b""


def test_a_fault_is_answered_with_disconnect_in_5_0_only() -> None:
    assert refusal(opened(SERVER, 5), b"\x36\x00") == encode(Disconnect(ReasonCode.MALFORMED_PACKET), 5)
    assert refusal(opened(SERVER, 4), b"\x36\x00") == b""
    assert refusal(opened(CLIENT, 5), b"\x36\x00") == encode(Disconnect(ReasonCode.MALFORMED_PACKET), 5)


def test_strangers_get_no_answer() -> None:
    assert refusal(fresh(SERVER, 0), b"GET / HTTP/1.1\r\n") == b""
    assert refusal(fresh(CLIENT, 5), b"HTTP/1.1 400\r\n") == b""


# -- a whole exchange, two ends in memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
def test_qos_2_between_two_ends(version: int) -> None:
    server, client = opened(SERVER, version), opened(CLIENT, version)
    assert server.receive(encode(Publish("a", b"x", 2, packet_id=1), version)) == [("a", 4, 1, b"x", b"")]
    assert client.receive(encode(PubRec(1), version)) == [PubRec(1)]
    assert server.receive(encode(PubRel(1), version)) == [PubRel(1)]
    assert client.receive(encode(PubComp(1), version)) == [PubComp(1)]
