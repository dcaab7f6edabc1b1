"""Random and damaged bytes: only declared errors come out, and the cut into reads changes nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tidegate.gateway.mqtt.connection import CLIENT, SERVER, Acks, Connection, Fault, Side
from tidegate.gateway.mqtt.errors import MalformedPacket, MqttError, ProtocolError
from tidegate.gateway.mqtt.packets import decode, encode
from tidegate.gateway.mqtt.properties import TABLE, Property, decode_properties, encode_properties
from tidegate.gateway.mqtt.reasons import ALLOWED
from tidegate.gateway.mqtt.wire import MAX_VARINT, read_varint, write_varint

from .cases import CASES, SAMPLES
from .ends import opened

ENCODED = [encode(case.packet, case.version) for case in CASES]
SHORT = [data for data in ENCODED if len(data) < 400]
versions = st.sampled_from([3, 4, 5])
sides = st.sampled_from([SERVER, CLIENT])
thorough = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def settled(end: Connection[str], reads: list[bytes]) -> list[Any]:
    """All events, PUBACKs one by one, a fault as its text."""
    events: list[Any] = []
    for read in reads:
        for event in end.receive(read):
            if isinstance(event, Acks):
                events += [("ack", packet_id) for packet_id in event.packet_ids]
            else:
                events.append(str(event.error) if isinstance(event, Fault) else event)
    return events


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A few legal packets in a row, with some bytes changed, taken out or put in."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(SHORT), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        data[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


@thorough
@given(st.integers(0, 255), st.binary(max_size=60), versions)
def test_decode_raises_nothing_but_its_errors(first_byte: int, body: bytes, version: int) -> None:
    try:
        packet = decode(first_byte, body, version)
    except (MalformedPacket, ProtocolError) as error:
        assert error.reason >= 0x80 and error.text
    else:
        assert type(packet).__module__.startswith("tidegate.gateway.mqtt")


@thorough
@given(st.sampled_from(ENCODED), versions, st.data())
def test_decode_of_a_damaged_packet_raises_nothing_but_its_errors(data: bytes, version: int, draw: st.DataObject) -> None:
    _, start = read_varint(data, 1, len(data))
    body = bytearray(data[start:])
    if body:
        place = draw.draw(st.integers(0, min(len(body), 300) - 1))
        body[place] = draw.draw(st.integers(0, 255))
    try:
        packet = decode(data[0], bytes(body), version)
    except MqttError as error:
        assert error.reason >= 0x80 and error.text
    else:
        # What was accepted can be said again; a CONNECT names its own version.
        again = encode(packet, version)
        _, start = read_varint(again, 1, len(again))
        assert decode(again[0], again[start:], version) == packet


@thorough
@given(damaged() | st.binary(max_size=200), versions, sides, st.data())
def test_the_cut_into_reads_changes_nothing(data: bytes, version: int, side: Side, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    whole = settled(opened(side, version), [data])
    assert settled(opened(side, version), pieces) == whole
    assert settled(opened(side, version), [bytes((byte,)) for byte in data]) == whole


@thorough
@given(st.binary(max_size=200), versions, sides)
def test_a_fault_is_last_and_final(data: bytes, version: int, side: Side) -> None:
    end = opened(side, version)
    events = end.receive(data)
    faults = [number for number, event in enumerate(events) if isinstance(event, Fault)]
    assert faults in ([], [len(events) - 1])
    if faults:
        assert end.receive(b"\xc0\x00\xd0\x00") == []


@given(st.integers(0, MAX_VARINT))
def test_variable_byte_integers_come_back(value: int) -> None:
    data = write_varint(value)
    assert read_varint(data, 0, len(data)) == (value, len(data))
    assert len(data) == 1 + sum(value > limit for limit in (127, 16_383, 2_097_151))


@thorough
@given(st.sampled_from([*sorted(ALLOWED), "CONNECT", "PUBLISH", "SUBSCRIBE", "UNSUBSCRIBE", "WILL"]), st.data())
def test_any_legal_set_of_properties_comes_back(packet: str, draw: st.DataObject) -> None:
    legal = sorted(found for found, row in TABLE.items() if packet in row.packets)
    chosen: list[Property] = draw.draw(st.lists(st.sampled_from(legal), unique=True)) if legal else []
    properties = {found: SAMPLES[found] for found in chosen}
    data = encode_properties(properties)
    assert decode_properties(data, 0, None, packet) == (properties, len(data))
