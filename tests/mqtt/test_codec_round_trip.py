"""What was encoded comes back, whole, cut off anywhere, or byte by byte."""

from __future__ import annotations

import pytest
from tidegate.gateway.mqtt.errors import MqttError
from tidegate.gateway.mqtt.packets import Connect, Disconnect, decode, encode
from tidegate.gateway.mqtt.properties import TABLE, Property
from tidegate.gateway.mqtt.reasons import ALLOWED, ReasonCode
from tidegate.gateway.mqtt.wire import read_varint

from .cases import CASES, NEWER, OLDER, SAMPLES, Case, case_id
from .ends import as_received, packets_of, receiver_of

SMALL = [case for case in CASES if len(encode(case.packet, case.version)) < 1000]
each_case = pytest.mark.parametrize("case", CASES, ids=case_id)
each_small_case = pytest.mark.parametrize("case", SMALL, ids=case_id)


def body_of(data: bytes) -> bytes:
    length, start = read_varint(data, 1, len(data))
    assert start + length == len(data), "the remaining length is the body's"
    return data[start:]


@each_case
def test_decoding_gives_back_what_was_encoded(case: Case) -> None:
    data = encode(case.packet, case.version)
    version = 0 if isinstance(case.packet, Connect) else case.version
    assert decode(data[0], body_of(data), version) == case.packet


@pytest.mark.parametrize("case", OLDER, ids=case_id)
def test_bytes_are_those_of_the_standard(case: Case) -> None:
    assert encode(case.packet, case.version) == bytes.fromhex(case.wire)


@each_small_case
def test_every_truncated_body_is_an_error_or_another_legal_packet(case: Case) -> None:
    """A body that ends early is refused, unless what is left is complete by itself and says less."""
    data = encode(case.packet, case.version)
    body = body_of(data)
    for size in range(len(body)):
        try:
            packet = decode(data[0], body[:size], case.version)
        except MqttError:
            continue
        again = body_of(encode(packet, case.version))
        assert again.rstrip(b"\0") == body[:size].rstrip(b"\0"), f"{size} bytes were not read to their end"


@each_small_case
def test_a_packet_cut_off_anywhere_is_waited_for(case: Case) -> None:
    data = encode(case.packet, case.version)
    for cut in range(1, len(data)):
        end = receiver_of(case.packet, case.version)
        assert end.receive(data[:cut]) == []
        assert packets_of(end.receive(data[cut:])) == [as_received(case.packet)]


@each_small_case
def test_a_packet_arrives_byte_by_byte(case: Case) -> None:
    end = receiver_of(case.packet, case.version)
    data = encode(case.packet, case.version)
    for place in range(len(data) - 1):
        assert end.receive(data[place : place + 1]) == []
    assert packets_of(end.receive(data[-1:])) == [as_received(case.packet)]


@each_case
def test_packets_that_follow_are_not_touched(case: Case) -> None:
    """Two packets in one read; a DISCONNECT or a CONNACK that refuses is the last word, CONNECT comes once."""
    end = receiver_of(case.packet, case.version)
    data = encode(case.packet, case.version)
    last = isinstance(case.packet, Disconnect) or getattr(case.packet, "reason", 0) >= 0x80
    if type(case.packet).__name__ in ("Connect", "ConnAck"):
        follower = encode(CASES[[c.id for c in CASES].index("PubAck: 3.1.1")].packet, 4)
        got = packets_of(end.receive(data + follower))
        assert got[0] == case.packet and len(got) == (1 if last else 2)
        return
    got = packets_of(end.receive(data + data))
    closes = isinstance(case.packet, Disconnect)
    assert got == [as_received(case.packet)] * (1 if closes else 2)


def test_every_property_reason_and_packet_is_in_the_list() -> None:
    assert set(SAMPLES) == set(TABLE) == set(Property)
    assert {type(case.packet).__name__.upper() for case in NEWER} == {
        name for row in TABLE.values() for name in row.packets if name != "WILL"
    } | {"PINGREQ", "PINGRESP"}
    assert {reason for allowed in ALLOWED.values() for reason in allowed.values()} == set(ReasonCode)
