"""The entry: one immutable row of the log, and what its numbers mean.

Kinds are the hooks of the specification (their text is the hook's name), the gap, which records what was dropped, and the
position: how far a client has read a topic, told when it moved and not for every acknowledgement.
The numbers are a promise of the file format: they never change meaning. `at` is max(last `at`, wall clock) in ms and
never goes backwards; `mono` is CLOCK_BOOTTIME in ms; `run` names the start of the gateway that wrote the row and leads to
the gateway id and epoch it was born with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from .topic import is_wild

CONNECTED = 1
DISCONNECTED = 2
SESSION_CREATED = 3
SUBSCRIBED = 4
UNSUBSCRIBED = 5
PUBLISH = 6
DELIVERED = 7
ACKED = 8
GAP = 9
ADDRESSED = 10
"""A message that a far end has for one client, which is `client` here: delivered to that client alone, and not published."""
POSITION = 11
KEPT_THERE = 12
"""A retained message that a far end had: nobody published it here, and it is only ever sent as retained message."""

KINDS = {
    "client.connected": CONNECTED,
    "client.disconnected": DISCONNECTED,
    "session.created": SESSION_CREATED,
    "session.subscribed": SUBSCRIBED,
    "session.unsubscribed": UNSUBSCRIBED,
    "message.publish": PUBLISH,
    "message.deliver": DELIVERED,
    "message.acked": ACKED,
    "gap": GAP,
    "position": POSITION,
}
KIND_NAMES = {number: name for name, number in KINDS.items()} | {ADDRESSED: "addressed", KEPT_THERE: "kept_there"}

QOS_MASK = 3
RETAIN = 4
STORED_QOS0 = 16
"""Flag of a message with QoS 0 that an `on_message_store` of sqlite keeps."""
FOREIGN = 32
"""Flag of ADDRESSED and KEPT_THERE: `properties` says how the message is known elsewhere (`store.foreign`)."""
STORED = QOS_MASK | STORED_QOS0
"""Any of these flags: the message stands in `mqtt_msg`."""


class Entry(NamedTuple):
    """An entry as its readers see it. `payload` of DELIVERED, ACKED and POSITION is the msgid of the message, of GAP a
    JSON text, of UNSUBSCRIBED see `forgotten`."""

    seq: int
    at: int
    """ms since 1970, never going backwards; part of the msgid."""
    when: int
    """ms since 1970 of the event as far as known (corrected for a clock that was wrong); what databases get."""
    kind: int
    clientid: str
    topic: str
    """Topic of a message, filter of a subscription, empty for client events."""
    qos: int
    retain: bool
    payload: bytes
    properties: bytes
    """Encoded MQTT 5.0 properties to forward (without the length), empty if none."""
    gateway: str
    epoch: int
    msgid: str
    """20 characters for every entry (`store.msgid`)."""


def forgotten(entry: Entry) -> Sequence[str]:
    """The topics whose positions an UNSUBSCRIBE drops: of a filter with wildcards those that the client had, a JSON list."""
    if not is_wild(entry.topic):
        return [entry.topic]
    topics: list[str] = json.loads(entry.payload or b"[]")
    return topics


class Want(NamedTuple):
    """What the broker must log for a rule: kind of entry, topic filter (empty: every topic), least QoS, only retained ones."""

    kind: int
    topic_filter: str
    min_qos: int
    retained_only: bool
