"""A device of the simulation: an MQTT client as the standard wants it, on a wire that loses what is on its way when it breaks.

It keeps its own session state as a good client library does: QoS 1 and 2 messages until they are complete, sent again in
order with DUP after a reconnect, packet ids of QoS 2 messages received and not released. What it observes goes to the model.

Invariant: it never breaks the standard itself, so every fault the broker reports is the broker's own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from tidegate.gateway.mqtt.connection import Acks, Connection, Fault, Side, TopicNames
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
    Will,
    encode,
)
from tidegate.gateway.session import Client

from tests.broker.world import World

from .model import Model

TOPICS = ("a/x", "a/y", "b/x", "b/y/z", "c")
FILTERS = (("#", 2), ("a/+", 1), ("+/x", 2), ("b/#", 0), ("c", 1), ("a/x", 0))
"""Each filter with the QoS it is always subscribed with, so that what is due does not depend on when."""
CAPACITY = 3_000
"""Bytes a wire takes before the broker is told that its client does not read."""
WINDOW = 20
"""Publishes a device leaves unacknowledged."""


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

    def write(self, data: bytes) -> None:
        assert not self.broker_is_done, "written to a closed socket"
        self.down.append(data)
        if self.buffered() > CAPACITY and self.client is not None and not self.client.blocked:
            self.world.broker.writable(self.client, False)

    def close(self) -> None:
        self.broker_is_done = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def buffered(self) -> int:
        return sum(map(len, self.down))


class Device:
    """`persistent` devices keep their session; the others begin anew with each connection and promise nothing."""

    def __init__(self, name: str, persistent: bool, version: int, chance: random.Random, model: Model) -> None:
        self.name = name
        self.persistent = persistent
        self.version = version
        self.wire: Wire | None = None
        self.connected = False
        self._chance = chance
        self._model = model
        self._connection: Connection[str]
        self._next_id = 0
        self._numbers = 0
        self._unfinished: dict[int, tuple[Any, bool]] = {}
        """Packet id -> (PUBLISH, released) of what was published and is not complete."""
        self._unreleased: set[int] = set()
        self._owed: deque[Any] = deque()
        self._asked: dict[int, tuple[str, ...]] = {}

    # -- the network -----------------------------------------------------------------------------------------------

    def connect(self, world: World) -> None:
        """Open a connection; one that is still open is left to die by itself."""
        self.drop()
        wire = self.wire = Wire()
        wire.world = world
        self._connection = Connection(TopicNames(), 1 << 28, 0, Side.CLIENT, self.version)
        wire.client = world.broker.opened(wire, self.name, None)
        properties = {17: 0xFFFFFFFF} if self.version == 5 and self.persistent else {}
        will = Will(f"will/{self.name}", self._payload(0), 0, False, {}) if self._chance.random() < 0.3 else None
        self._owed.clear()
        self._asked.clear()
        packet = Connect(self.version, self.name, not self.persistent, 0, None, None, will, properties)  # type: ignore[arg-type]
        wire.up.append(encode(packet, self.version))

    def drop(self) -> Wire | None:
        """The network breaks: what is under way is lost, and the broker may hear of it late or never."""
        wire, self.wire, self.connected = self.wire, None, False
        if wire is not None:
            wire.up.clear()
            wire.down.clear()
        if not self.persistent:
            self._unfinished.clear()
            self._unreleased.clear()
            self._model.forget(self.name)
        return wire

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
        self._send(self._owed.popleft())
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
        packet_id = self._free_id() if qos else 0
        packet = Publish(self._chance.choice(TOPICS), payload, qos, retain, False, packet_id)
        if payload:
            self._model.sent(payload, self.name)
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
            self.connected = False
            wire = self.wire
            self.wire = None
            if not self.persistent:
                self._unfinished.clear()
                self._unreleased.clear()
                self._model.forget(self.name)
            wire.down.clear()

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
        self._model.connected(self.name, self.persistent, packet.session_present)
        self.connected = True
        if not packet.session_present:
            self._unreleased.clear()
        for packet_id, (publish, released) in list(self._unfinished.items()):
            if released:
                self._send(PubRel(packet_id))
            else:
                self._model.sent(publish.payload, self.name)
                self._send(Publish(publish.topic, publish.payload, publish.qos, publish.retain, True, packet_id))

    def _on_message(self, topic: str, flags: int, packet_id: int, payload: bytes, properties: bytes) -> None:
        assert not properties
        qos = flags >> 1 & 3
        if qos == 2:
            self._owed.append(PubRec(packet_id))
            if packet_id in self._unreleased:
                self._model.repeated(self.name, payload, bool(flags & 8))
                return
            self._unreleased.add(packet_id)
        elif qos == 1:
            self._owed.append(PubAck(packet_id))
        self._model.received(self.name, topic, payload, qos, bool(flags & 8), bool(flags & 1))

    def _on_pubrec(self, packet: PubRec) -> None:
        publish, released = self._unfinished.get(packet.packet_id, (None, False))
        if publish is not None and not released:
            self._model.acknowledged(publish.payload, 2)
            self._unfinished[packet.packet_id] = (publish, True)
        self._owed.append(PubRel(packet.packet_id))

    def _on_pubrel(self, packet: PubRel) -> None:
        self._unreleased.discard(packet.packet_id)
        self._owed.append(PubComp(packet.packet_id))

    def _complete(self, packet_id: int) -> None:
        publish, released = self._unfinished.pop(packet_id, (None, False))
        if publish is not None:
            assert publish.qos == 1 or released, f"{self.name}: PUBCOMP before PUBREC"
            self._model.acknowledged(publish.payload, publish.qos)

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
