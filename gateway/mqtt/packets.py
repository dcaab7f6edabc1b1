"""The packets of MQTT and their bytes: the face of the codec for everything but the hot path.

`encode(packet, version) -> bytes` and `decode(first_byte, body, version) -> packet`, and the fifteen classes. What a server
does per message (PUBLISH in, PUBACK in) goes through `connection` instead, which makes none of these objects.

Invariant: `decode` of what `encode` wrote is the same packet, as far as the version can say it.
"""

from __future__ import annotations

from .decoding import decode
from .encoding import encode
from .packet_types import (
    PACKET_NAMES,
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

__all__ = [
    "PACKET_NAMES",
    "Auth",
    "ConnAck",
    "Connect",
    "Disconnect",
    "Packet",
    "PingReq",
    "PingResp",
    "PubAck",
    "PubComp",
    "PubRec",
    "PubRel",
    "Publish",
    "SubAck",
    "Subscribe",
    "Subscription",
    "UnsubAck",
    "Unsubscribe",
    "Will",
    "decode",
    "encode",
]
