"""A subscriber that does one thing at a time, so that a test may end the world after any of them."""

from __future__ import annotations

from tidegate.gateway.mqtt.packets import ConnAck, PubAck, PubComp, PubRec, PubRel

from tests.broker.world import Device


class Receiver:
    """A client that keeps the packet ids of QoS 2 over its connections, as it must, and does one thing at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.arrived: list[str] = []
        self._open: set[int] = set()

    def step(self) -> bool:
        for event in list(self.device.got):
            self.device.got.remove(event)
            if isinstance(event, ConnAck) and not event.session_present:
                self._open.clear()
            if isinstance(event, tuple):
                _, flags, packet_id, payload = event
                if flags >> 1 & 3 == 1:
                    self.arrived += [] if flags & 8 and payload.decode() in self.arrived else [payload.decode()]
                    self.device.send(PubAck(packet_id))
                    return True
                if packet_id not in self._open:
                    self._open.add(packet_id)
                    self.arrived.append(payload.decode())
                self.device.send(PubRec(packet_id))
                return True
            if isinstance(event, PubRel):
                self._open.discard(event.packet_id)
                self.device.send(PubComp(event.packet_id))
                return True
        return False
