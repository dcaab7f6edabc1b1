"""The fifteen packets of MQTT as frozen values.

Field names are the standard's. `properties` exist on the wire in 5.0 only. Versions are protocol levels: 3 (MQTT 3.1), 4
(3.1.1), 5 (5.0). Reasons are 5.0 reason codes in every version; `encoding` and `decoding` turn them into the older
return codes and back. Callers import these classes, `encode` and `decode` from `packets`.

Invariant: a packet that `decode` returned obeys every rule that can be checked by looking at that packet alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .properties import Properties
from .reasons import ReasonCode

PACKET_NAMES = (
    "",
    "CONNECT",
    "CONNACK",
    "PUBLISH",
    "PUBACK",
    "PUBREC",
    "PUBREL",
    "PUBCOMP",
    "SUBSCRIBE",
    "SUBACK",
    "UNSUBSCRIBE",
    "UNSUBACK",
    "PINGREQ",
    "PINGRESP",
    "DISCONNECT",
    "AUTH",
)
"""By control packet type (2.1.2); type 0 is forbidden."""


@dataclass(frozen=True, slots=True)
class Will:
    """The message that the server publishes when the client is lost (3.1.2.5)."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Connect:
    """3.1. `clean_start` is Clean Session in 3.1.1."""

    version: int
    client_id: str
    clean_start: bool = True
    keep_alive: int = 0
    username: str | None = None
    password: bytes | None = None
    will: Will | None = None
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConnAck:
    """3.2."""

    session_present: bool
    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Publish:
    """3.3. `packet_id` is 0 with QoS 0; `topic` is empty only beside a topic alias."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PubAck:
    """3.4."""

    packet_id: int
    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PubRec:
    """3.5."""

    packet_id: int
    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PubRel:
    """3.6."""

    packet_id: int
    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PubComp:
    """3.7."""

    packet_id: int
    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subscription:
    """One topic filter of a SUBSCRIBE with its options (3.8.3.1); all but `qos` are 5.0's."""

    filter: str
    qos: int = 0
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


@dataclass(frozen=True, slots=True)
class Subscribe:
    """3.8."""

    packet_id: int
    subscriptions: tuple[Subscription, ...]
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SubAck:
    """3.9; one reason per filter."""

    packet_id: int
    reasons: tuple[ReasonCode, ...]
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """3.10."""

    packet_id: int
    filters: tuple[str, ...]
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UnsubAck:
    """3.11; one reason per filter in 5.0, none before."""

    packet_id: int
    reasons: tuple[ReasonCode, ...] = ()
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PingReq:
    """3.12."""


@dataclass(frozen=True, slots=True)
class PingResp:
    """3.13."""


@dataclass(frozen=True, slots=True)
class Disconnect:
    """3.14."""

    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Auth:
    """3.15; 5.0 only."""

    reason: ReasonCode = ReasonCode.SUCCESS
    properties: Properties = field(default_factory=dict)


Packet = (
    Connect
    | ConnAck
    | Publish
    | PubAck
    | PubRec
    | PubRel
    | PubComp
    | Subscribe
    | SubAck
    | Unsubscribe
    | UnsubAck
    | PingReq
    | PingResp
    | Disconnect
    | Auth
)
