"""A device of the simulation: an MQTT client as the standard wants it, on a wire that loses what is on its way when it breaks.

It keeps its own session state as a good client library does: QoS 1 and 2 messages until they are complete, sent again in
order with DUP after a reconnect, packet ids of QoS 2 messages received and not released. What it observes goes to the model.

Invariant: it never breaks the standard itself, so every fault the broker reports is the broker's own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tidegate.gateway.mqtt.connection import Acks, Connection, Fault, Side, Terms, TopicNames
from tidegate.gateway.mqtt.packets import (
    ConnAck,
    Connect,
    Disconnect,
    PingReq,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    Subscription,
    Unsubscribe,
    encode,
)
from tidegate.gateway.mqtt.packets import Will as WillOf
from tidegate.gateway.mqtt.properties import Property, decode_block
from tidegate.gateway.session import NEVER, Client

from tests.broker.world import World

from .model import LARGE, Model
from .wills import Will, Wills

TOPICS = ("a/x", "a/y", "b/x", "b/y/z", "c")
FILTERS = (("#", 2), ("a/+", 1), ("+/x", 2), ("b/#", 0), ("c", 1), ("a/x", 0))
"""Each filter with the QoS it is always subscribed with, so that what is due does not depend on when."""
CAPACITY = 3_000
"""Bytes a wire takes before the broker is told that its client does not read."""
WINDOW = 20
"""Publishes a device leaves unacknowledged."""
SMALL_PACKETS = 150
"""The packet size that a device with a limit takes: below a large payload, far above the others."""


class Wire:
    """One network connection: bytes under way in both directions. Implements `session.Link`."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.paused = False
        self.broker_is_done = False
        """The broker has closed its end, or has been told that the other is gone."""
        self.world: World
        self.on_end: Callable[[Wire], None] = lambda wire: None
        """Called when the broker knows that the connection is over."""
        self.connect_left = 0
        """Bytes of the CONNECT that the broker has not read."""
        self.met_at = 0
        """When the broker had read it."""
        self.now: Callable[[], int]
        self.has_said_goodbye = False
        self.will = b""

    def read(self, data: bytes) -> None:
        """The broker reads this."""
        if self.connect_left:
            self.connect_left = max(0, self.connect_left - len(data))
            self.met_at = self.now()
        assert self.client is not None
        self.world.broker.receive(self.client, data)

    def write(self, data: bytes) -> None:
        assert not self.broker_is_done, "written to a closed socket"
        self.down.append(data)
        if self.buffered() > CAPACITY and self.client is not None and not self.client.blocked:
            self.world.broker.writable(self.client, False)

    def close(self) -> None:
        self.broker_is_done = True
        self.on_end(self)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def buffered(self) -> int:
        return sum(map(len, self.down))


@dataclass(frozen=True, slots=True)
class Kind:
    """What a device is like. `expiry` of its session in seconds, 0: it begins anew with each connection."""

    version: int = 4
    expiry: int = NEVER
    small_packets: bool = False
    receive_maximum: int = 65_535


KINDS = (
    Kind(),
    Kind(5),
    Kind(expiry=0),
    Kind(5, small_packets=True, receive_maximum=5),
    Kind(5, expiry=3),
    Kind(5, expiry=0),
    Kind(5, expiry=3),
)


class Device:
    """Persistent devices keep their session; the others promise nothing. `now` is the simulation's time in ms."""

    def __init__(
        self, name: str, kind: Kind, chance: random.Random, model: Model, wills: Wills, now: Callable[[], int]
    ) -> None:
        self.name = name
        self.kind = kind
        self.persistent = kind.expiry > 0
        self.version = kind.version
        self.wire: Wire | None = None
        self.connected = False
        self.in_doubt = False
        """The wall clock was moved: after a restart nobody can say when the session ends."""
        self.ended: int | None = None
        """When the broker knew of the last connection's end; None if nobody can say."""
        self._begins_anew = False
        self._unheard = False
        """A connection was tried and no CONNACK came: the session that is there may be a new one."""
        self._left = 0
        """When the last connection ended here."""
        self._chance = chance
        self._model = model
        self._wills = wills
        self._now = now
        self._connection: Connection[str]
        self._next_id = 0
        self._numbers = 0
        self._unfinished: dict[int, tuple[Any, bool]] = {}
        """Packet id -> (PUBLISH, released) of what was published and is not complete."""
        self._unreleased: set[int] = set()
        self._outstanding: set[int] = set()
        """Packet ids of what came on this connection and was not answered to the end (4.9)."""
        self._owed: deque[Any] = deque()
        self._asked: dict[int, tuple[str, ...]] = {}

    # -- the network -----------------------------------------------------------------------------------------------

    def connect(self, world: World) -> None:
        """Open a connection; one that is still open is left to die by itself."""
        self.drop()
        wire = self.wire = Wire()
        wire.world = world
        wire.now = self._now
        self._connection = Connection(Terms(TopicNames(), 1 << 28, 0, Side.CLIENT), self.version)
        wire.client = world.broker.opened(wire, self.name, None)
        wire.will = self._new_will()
        wire.on_end = self._broker_knows
        self._owed.clear()
        self._asked.clear()
        self._outstanding.clear()
        clean = self._begins_anew = not self.persistent or self._unheard
        self._unheard = self.kind.expiry != NEVER
        packet = Connect(self.version, self.name, clean, 0, None, None, self._will_packet(wire.will), self._properties())
        data = encode(packet, self.version)
        wire.connect_left = len(data)
        wire.up.append(data)

    def _properties(self) -> dict[Property, Any]:
        if self.version < 5:
            return {}
        found: dict[Property, Any] = {Property.RECEIVE_MAXIMUM: self.kind.receive_maximum}
        if self.persistent:
            found[Property.SESSION_EXPIRY_INTERVAL] = self.kind.expiry
        if self.kind.small_packets:
            found[Property.MAXIMUM_PACKET_SIZE] = SMALL_PACKETS
        return found

    def _new_will(self) -> bytes:
        """The payload of a new will, empty if there is none."""
        if self._chance.random() < 0.6:
            return b""
        qos, retain = self._chance.randrange(3), self._chance.random() < 0.2
        delay = self._chance.choice((0, 3)) if self.version == 5 else 0
        will = Will(self.name, self._payload(qos), self._chance.choice(TOPICS), qos, retain, delay)
        self._wills.made(will)
        return will.payload

    def _will_packet(self, payload: bytes) -> WillOf | None:
        if not payload:
            return None
        will = self._wills.of(payload)
        properties = {Property.WILL_DELAY_INTERVAL: will.delay} if will.delay else {}
        return WillOf(will.topic, payload, will.qos, will.retain, properties)

    def _broker_knows(self, wire: Wire) -> None:
        properly = wire.has_said_goodbye and not wire.up
        self._wills.ended(wire.will, not wire.connect_left, properly, self.persistent)
        self.ended = self._now()

    def drop(self) -> None:
        """The network breaks: what is under way is lost, and the broker may hear of it late or never."""
        wire, self.wire = self.wire, None
        self._leave()
        if wire is not None:
            wire.up.clear()
            wire.down.clear()

    def listen(self) -> bool:
        """Take a part of what has come; whether there was anything."""
        wire = self.wire
        if wire is None or not wire.down:
            return False
        data = wire.down.popleft()
        if len(data) > 3 and self._chance.random() < 0.2:
            cut = self._chance.randrange(1, len(data))
            wire.down.appendleft(data[cut:])
            data = data[:cut]
        for event in self._connection.receive(data):
            self._hear(event)
        client = wire.client
        if client is not None and client.blocked and wire.buffered() <= CAPACITY // 4 and not wire.broker_is_done:
            wire.world.broker.writable(client, True)
            wire.world.broker.turn_over()
        return True

    def answer(self) -> bool:
        """Send one acknowledgement that is owed; PUBACKs may overtake each other, as careless clients have them."""
        if not self.connected or not self._owed:
            return False
        if self._chance.random() < 0.1:
            self._owed.rotate(-1)
        packet = self._owed.popleft()
        if isinstance(packet, (PubAck, PubComp)):
            self._outstanding.discard(packet.packet_id)
        self._send(packet)
        return True

    def _send(self, packet: Any) -> None:
        assert self.wire is not None
        self.wire.up.append(encode(packet, self.version))

    # -- what it does by itself ------------------------------------------------------------------------------------

    def publish(self) -> None:
        if not self.connected or len(self._unfinished) >= WINDOW:
            return
        qos = self._chance.choice((0, 1, 1, 2, 2))
        retain = self._chance.random() < 0.1
        payload = b"" if retain and self._chance.random() < 0.3 else self._payload(qos)
        if payload and self._chance.random() < 0.05:
            payload = payload.ljust(LARGE, b".")
        packet_id = self._free_id() if qos else 0
        expires = self.version == 5 and not retain and self._chance.random() < 0.15
        expiry = self._chance.choice((1, 4)) if expires else None
        properties = {} if expiry is None else {Property.MESSAGE_EXPIRY_INTERVAL: expiry}
        packet = Publish(self._chance.choice(TOPICS), payload, qos, retain, False, packet_id, properties)
        if payload:
            self._model.sent(payload, packet.topic, qos, retain, expiry)
        if qos:
            self._unfinished[packet_id] = (packet, False)
        self._send(packet)

    def subscribe(self) -> None:
        if self.connected:
            chosen = self._chance.sample(FILTERS, self._chance.randrange(1, 3))
            packet_id = self._free_id()
            self._asked[packet_id] = tuple(text for text, _ in chosen)
            self._send(Subscribe(packet_id, tuple(Subscription(text, qos) for text, qos in chosen)))

    def unsubscribe(self) -> None:
        if self.connected:
            text, _ = self._chance.choice(FILTERS)
            self._model.unsubscribed(self.name, text)
            self._asked = {key: tuple(t for t in texts if t != text) for key, texts in self._asked.items()}
            self._send(Unsubscribe(self._free_id(), (text,)))

    def ping(self) -> None:
        if self.connected:
            self._send(PingReq())

    def disconnect(self) -> None:
        if self.connected and self.wire is not None:
            self._send(Disconnect())
            wire, self.wire = self.wire, None
            wire.has_said_goodbye = True
            wire.down.clear()
            self._leave()

    def _leave(self) -> None:
        if self.connected:
            self._left = self._now()
        self.connected = False
        if not self.persistent:
            self._unfinished.clear()
            self._unreleased.clear()
            self._model.forget(self.name)

    @property
    def is_quiet(self) -> bool:
        """Nothing of its own is unfinished."""
        return not (self._unfinished or self._unreleased or self._owed)

    # -- what it hears ---------------------------------------------------------------------------------------------

    def _hear(self, event: Any) -> None:
        if isinstance(event, tuple):
            self._on_message(*event)
        elif isinstance(event, Acks):
            for packet_id in event.packet_ids:
                self._complete(packet_id)
        else:
            handlers: dict[type, Callable[[Any], None]] = {
                ConnAck: self._on_connack,
                PubAck: lambda packet: self._complete(packet.packet_id),
                PubRec: self._on_pubrec,
                PubRel: self._on_pubrel,
                PubComp: lambda packet: self._complete(packet.packet_id),
                SubAck: self._on_suback,
                Disconnect: self._on_disconnect,
                Fault: self._on_fault,
            }
            handlers.get(type(event), lambda packet: None)(event)

    def _on_fault(self, fault: Fault) -> None:
        raise AssertionError(f"{self.name}: the broker broke the standard: {fault.error}")

    def _on_disconnect(self, packet: Disconnect) -> None:
        self._model.told(self.name, packet.reason)

    def _on_connack(self, packet: ConnAck) -> None:
        assert packet.reason == 0, f"{self.name}: refused with {packet.reason}"
        self._check_expiry(packet.session_present)
        expires = self.kind.expiry != NEVER
        may_have_expired = self._begins_anew or self._may_have_expired()
        self._model.connected(self.name, self.persistent, packet.session_present, may_have_expired, expires)
        self._wills.connected(self.name, packet.session_present, self.wire.will if self.wire else b"")
        self.connected, self.in_doubt, self.ended, self._unheard = True, False, None, False
        if not packet.session_present:
            self._unreleased.clear()
            self._unfinished.clear()  # 3.2.2.1.1
        for packet_id, (publish, released) in list(self._unfinished.items()):
            if released:
                self._send(PubRel(packet_id))
            else:
                if publish.payload:
                    self._model.sent(publish.payload, publish.topic, publish.qos)
                self._send(
                    Publish(
                        publish.topic, publish.payload, publish.qos, publish.retain, True, packet_id, publish.properties
                    )
                )  # fmt: skip

    def _may_have_expired(self) -> bool:
        if self.kind.expiry == NEVER:
            return False
        return self.in_doubt or self.wire is None or self.wire.met_at - self._left >= self.kind.expiry * 1000

    def _check_expiry(self, present: bool) -> None:
        if self.kind.expiry == NEVER or self.ended is None or self.in_doubt or self.wire is None:
            return
        over = self.wire.met_at - self.ended > self.kind.expiry * 1000
        assert not (over and present), f"{self.name}: its session outlived its expiry"

    def _on_message(self, topic: str, flags: int, packet_id: int, payload: bytes, properties: bytes) -> None:
        left = decode_block(properties, 0, len(properties), "PUBLISH").get(Property.MESSAGE_EXPIRY_INTERVAL)
        qos = flags >> 1 & 3
        if qos:
            self._outstanding.add(packet_id)
            assert len(self._outstanding) <= self.kind.receive_maximum, f"{self.name}: more than its receive maximum"
        if qos == 2:
            self._owed.append(PubRec(packet_id))
            if packet_id in self._unreleased:
                self._model.repeated(self.name, payload, bool(flags & 8))
                return
            self._unreleased.add(packet_id)
        elif qos == 1:
            self._owed.append(PubAck(packet_id))
        self._model.received(self.name, topic, payload, qos, bool(flags & 8), bool(flags & 1), left)

    def _on_pubrec(self, packet: PubRec) -> None:
        publish, released = self._unfinished.get(packet.packet_id, (None, False))
        if publish is not None and not released:
            self._model.acknowledged(publish.payload)
            self._unfinished[packet.packet_id] = (publish, True)
        self._owed.append(PubRel(packet.packet_id))

    def _on_pubrel(self, packet: PubRel) -> None:
        self._unreleased.discard(packet.packet_id)
        self._owed.append(PubComp(packet.packet_id))

    def _complete(self, packet_id: int) -> None:
        publish, released = self._unfinished.pop(packet_id, (None, False))
        if publish is not None:
            assert publish.qos == 1 or released, f"{self.name}: PUBCOMP before PUBREC"
            self._model.acknowledged(publish.payload)

    def _on_suback(self, packet: SubAck) -> None:
        assert self.wire is not None
        for text in self._asked.pop(packet.packet_id, ()):
            self._model.subscribed(self.name, text, self.wire.world.broker.log.next_seq)

    def _free_id(self) -> int:
        while True:
            self._next_id = self._next_id % 65_535 + 1
            if self._next_id not in self._unfinished and self._next_id not in self._asked:
                return self._next_id

    def _payload(self, qos: int) -> bytes:
        self._numbers += 1
        return b"%b-%d-q%d" % (self.name.encode(), self._numbers, qos)
