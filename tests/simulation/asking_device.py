"""A device of `asking`: it subscribes, takes what comes one packet at a time, and loses its connection.

Invariant: it keeps to the standard: packet ids of QoS 2 survive a connection, and a session that is not there any more is gone.
"""

from __future__ import annotations

import random

from tidegate.gateway.mqtt.packets import ConnAck, PubAck, PubComp, PubRec, PubRel, SubAck, Unsubscribe
from tidegate.uplink.asking import Found

from tests.broker.world import Device, World

from .business import FAR, KEPT, QUEUE, Business

OWN = (FAR, QUEUE, *KEPT)
RETAINED = 1


class Line(Device):
    """What is sent to a device that is gone goes nowhere."""

    gone = False

    def write(self, data: bytes) -> None:
        if not self.gone:
            super().write(data)

    def cut(self) -> None:
        self.gone = True
        super().cut()

    def disconnect(self) -> None:
        self.gone = True
        super().disconnect()


class Subscriber:
    """`arrived`: every payload it has seen. A device that is not `lasting` begins anew with each connection."""

    def __init__(self, name: str, qos: int, lasting: bool, chance: random.Random, far: Business) -> None:
        self.name = name
        self.qos = qos
        self.lasting = lasting
        self.device: Device | None = None
        self.up = False
        self.arrived: set[bytes] = set()
        self.subscribed: set[str] = set()
        """What its SUBACKs say and it has not taken back."""
        self.asked: dict[str, int] = {}
        """Topic -> time of the value that the far end had retained when the subscription was made."""
        self._complete: set[bytes] = set()
        self._open: dict[int, bytes] = {}
        self._waiting = ""
        self._standing: Found | None = None
        self._chance = chance
        self._far = far

    def act(self, world: World) -> None:
        """Something of its own accord."""
        device = self.device
        if device is None or device.closed:
            self.connect(world)
        elif self.up:
            draw = self._chance.random()
            if draw < 0.5:
                self._subscribe(device)
            elif draw < 0.7:
                self._unsubscribe(device)
            elif draw < 0.85:
                self.leave()

    def connect(self, world: World) -> None:
        self.up, self._waiting = False, ""
        self.device = Line(world, self.name, clean=not self.lasting)

    def leave(self) -> None:
        """With a word or without."""
        device, self.device = self.device, None
        self.up = False
        if device is not None and not device.closed:
            device.disconnect() if self._chance.random() < 0.5 else device.cut()

    def set_here(self, topic: str) -> None:
        """Somebody else sets the retained value of this topic: that may be the newest, whatever the clocks say."""
        self.asked.pop(topic, None)
        if topic == self._waiting:
            self._standing = None

    def lose(self) -> None:
        """The gateway is gone."""
        self.device, self.up = None, False

    def _subscribe(self, device: Device) -> None:
        if not self._waiting:
            self._waiting = self._chance.choice(OWN)
            self._standing = self._far.retained.get(self._waiting)
            device.subscribe(self._waiting, self.qos)

    def _unsubscribe(self, device: Device) -> None:
        text = self._chance.choice(OWN)
        if text != self._waiting:
            self.subscribed.discard(text)
            self.asked.pop(text, None)
            device.send(Unsubscribe(9, (text,)))

    def listen(self) -> bool:
        """Take one packet and answer it; whether there was any."""
        device = self.device
        if device is None or device.closed or not device.got:
            return False
        event = device.got.pop(0)
        if isinstance(event, tuple):
            self._message(device, *event)
        elif isinstance(event, ConnAck):
            self._connected(event.session_present)
        elif isinstance(event, SubAck):
            self._made()
        elif isinstance(event, PubRel):
            self._complete.add(self._open.pop(event.packet_id, b""))
            device.send(PubComp(event.packet_id))
        return True

    def _connected(self, present: bool) -> None:
        self.up = True
        if not present:
            assert not (self.lasting and self.subscribed), f"{self.name}: its session is lost"
            self.subscribed.clear()
            self.asked.clear()
            self._open.clear()

    def _made(self) -> None:
        text, self._waiting = self._waiting, ""
        self.subscribed.add(text)
        if self._standing is not None:
            self.asked[text] = self._standing.at

    def _message(self, device: Device, topic: bytes, flags: int, packet_id: int, payload: bytes) -> None:
        qos = flags >> 1 & 3
        if qos == 2 and packet_id not in self._open:
            assert payload not in self._complete or flags & RETAINED, f"{self.name} got {payload!r} again after QoS 2"
            self._open[packet_id] = payload
        self.arrived.add(payload)
        if qos:
            device.send(PubAck(packet_id) if qos == 1 else PubRec(packet_id))
