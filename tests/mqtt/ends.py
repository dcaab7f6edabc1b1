"""Two ends of a connection in memory, for the codec's tests.

`opened` gives a `Connection` that is past its CONNECT or CONNACK; `packets_of` turns its events back into packets so that
they can be compared with those of `cases`, however PUBACKs were grouped and the hot path shaped a PUBLISH.
"""

from __future__ import annotations

from typing import Any

from tidegate.gateway.mqtt.connection import CLIENT, SERVER, Acks, Connection, Fault, Side, Terms, TopicNames
from tidegate.gateway.mqtt.errors import MqttError
from tidegate.gateway.mqtt.packets import (
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PubAck,
    Publish,
    Subscribe,
    Unsubscribe,
    encode,
)
from tidegate.gateway.mqtt.properties import Properties, Property, decode_block
from tidegate.gateway.mqtt.reasons import ALLOWED, NOT_FROM_CLIENT

FROM_CLIENT = set(ALLOWED["DISCONNECT"].values()) - NOT_FROM_CLIENT["DISCONNECT"]
LARGEST = 1 << 20
ALIASES = 10


def fresh(side: Side, version: int, max_packet_size: int = LARGEST) -> Connection[str]:
    """An end that has heard nothing yet."""
    return Connection(Terms(TopicNames(), max_packet_size, ALIASES, side), 0 if side is SERVER else version)


def opened(side: Side, version: int, max_packet_size: int = LARGEST) -> Connection[str]:
    """An end that has heard CONNECT or CONNACK."""
    end = fresh(side, version, max_packet_size)
    first: Packet = Connect(version, "tester") if side is SERVER else ConnAck(False)
    assert end.receive(encode(first, version)) == [first]
    return end


def receiver_of(packet: Packet, version: int) -> Connection[str]:
    """The end that may receive this packet, ready for it."""
    to_server = isinstance(packet, Connect | Subscribe | Unsubscribe | PingReq)
    if isinstance(packet, Disconnect):
        to_server = version < 5 or packet.reason in FROM_CLIENT or Property.SESSION_EXPIRY_INTERVAL in packet.properties
    side = SERVER if to_server else CLIENT
    end = fresh(side, version) if isinstance(packet, Connect | ConnAck) else opened(side, version)
    # What an earlier PUBLISH would have set.
    end._aliases = {3: b"known/topic"}
    return end


def packets_of(events: list[Any]) -> list[Packet]:
    """Events as packets; a `Fault` raises its error."""
    packets: list[Packet] = []
    for event in events:
        if isinstance(event, Fault):
            raise event.error
        if isinstance(event, Acks):
            packets += map(PubAck, event.packet_ids)
        elif isinstance(event, tuple):
            topic, flags, packet_id, payload, block = event
            properties = decode_block(block, 0, len(block), "PUBLISH")
            packets.append(Publish(topic, payload, flags >> 1 & 3, bool(flags & 1), bool(flags & 8), packet_id, properties))
        else:
            packets.append(event)
    return packets


def as_received(packet: Packet) -> Packet:
    """What an end that knows alias 3 makes of `packet`: the alias is gone."""
    if not isinstance(packet, Publish) or Property.TOPIC_ALIAS not in packet.properties:
        return packet
    properties: Properties = {key: value for key, value in packet.properties.items() if key != Property.TOPIC_ALIAS}
    return Publish(
        packet.topic or "known/topic", packet.payload, packet.qos, packet.retain, packet.dup, packet.packet_id, properties
    )


def fault_of(events: list[Any]) -> MqttError:
    """The error of the `Fault` that must be the last event and the only one of its kind."""
    assert events, "no event at all"
    assert isinstance(events[-1], Fault), f"no fault but {events[-1]}"
    assert not any(isinstance(event, Fault) for event in events[:-1])
    error: MqttError = events[-1].error
    return error
