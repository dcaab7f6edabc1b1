"""A small strict MQTT client for tests: 3.1.1 and 5.0, over one blocking socket.

Rules: it shares nothing with the gateway's codec, so that one misunderstanding cannot hide in both. It does
nothing by itself: no acknowledgement, no ping, no resend. Every packet from the broker is checked to the
last bit and must be one a server may send; anything else is an AssertionError that shows the bytes.

Invariant: what `receive` returns is exactly what the broker sent, in order, each packet once.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from types import TracebackType
from typing import Self

from .packets import Decoder, Kind, Packet, Properties, binary, encode_properties, frame, text

__all__ = ["Closed", "Kind", "MqttClient", "Packet"]

DEADLINE = 10.0


class Closed(Exception):
    """The broker closed the connection."""


class MqttClient:
    """One connection. The constructor connects and waits for the CONNACK, which is kept in `connack`.

    With `refused=True` a CONNACK that refuses is accepted, else it is an AssertionError.
    """

    def __init__(
        self,
        port: int,
        client_id: str = "",
        *,
        version: int = 4,
        clean: bool = True,
        keep_alive: int = 0,
        username: str | None = None,
        password: bytes | None = None,
        will: tuple[str, bytes, int, bool] | None = None,
        will_properties: Properties | None = None,
        properties: Properties | None = None,
        refused: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        self.version = version
        self.sock = socket.create_connection((host, port), timeout=DEADLINE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._decoder = Decoder(version)
        self._packets: deque[Packet] = deque()
        self._next_id = 0
        flags = clean << 1 | (username is not None) << 7 | (password is not None) << 6
        body = text(client_id)
        if will is not None:
            topic, payload, qos, retain = will
            flags |= 4 | qos << 3 | retain << 5
            body += self._properties(will_properties) + text(topic) + binary(payload)
        body += b"" if username is None else text(username)
        body += b"" if password is None else binary(password)
        head = text("MQTT") + struct.pack(">BBH", version, flags, keep_alive)
        try:
            self.send(frame(Kind.CONNECT << 4, head + self._properties(properties) + body))
            self.connack = self.expect(Kind.CONNACK)
            assert refused or self.connack.reason == 0, f"CONNECT was refused: {self.connack}"
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.sock.close()

    def __del__(self) -> None:
        """A test may simply let go of a client."""
        if hasattr(self, "sock"):
            self.sock.close()

    def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self.sock.sendall(data)

    def publish(
        self,
        topic: str,
        payload: bytes,
        qos: int = 0,
        *,
        retain: bool = False,
        dup: bool = False,
        packet_id: int | None = None,
        properties: Properties | None = None,
    ) -> int:
        """Send a PUBLISH without waiting for anything; returns its packet id, 0 for QoS 0."""
        if packet_id is None:
            packet_id = self.new_id() if qos else 0
        head = text(topic) + (struct.pack(">H", packet_id) if qos else b"")
        first = Kind.PUBLISH << 4 | dup << 3 | qos << 1 | retain
        self.send(frame(first, head + self._properties(properties) + payload))
        return packet_id

    def publish_and_wait(self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False) -> None:
        """Publish and go through the whole exchange."""
        packet_id = self.publish(topic, payload, qos, retain=retain)
        if qos == 1:
            assert self.expect(Kind.PUBACK).packet_id == packet_id
        elif qos == 2:
            assert self.expect(Kind.PUBREC).packet_id == packet_id
            self.answer(Kind.PUBREL, packet_id)
            assert self.expect(Kind.PUBCOMP).packet_id == packet_id

    def answer(self, kind: Kind, packet_id: int) -> None:
        """Send a PUBACK, PUBREC, PUBREL or PUBCOMP."""
        self.send(frame(kind << 4 | (2 if kind is Kind.PUBREL else 0), struct.pack(">H", packet_id)))

    def subscribe(self, *subscriptions: tuple[str, int], properties: Properties | None = None) -> tuple[int, ...]:
        """Subscribe to (filter, options) and return the SUBACK's codes.

        What the broker sends before the SUBACK stays to be received.
        """
        body = b"".join(text(name) + bytes((options,)) for name, options in subscriptions)
        return self._request(Kind.SUBSCRIBE, Kind.SUBACK, body, properties).reasons

    def unsubscribe(self, *filters: str, properties: Properties | None = None) -> tuple[int, ...]:
        """Unsubscribe and return the UNSUBACK's codes (none in 3.1.1)."""
        body = b"".join(text(name) for name in filters)
        return self._request(Kind.UNSUBSCRIBE, Kind.UNSUBACK, body, properties).reasons

    def ping(self) -> list[Packet]:
        """Send a PINGREQ; returns what was received before its answer: the way to see that nothing came."""
        self.send(frame(Kind.PINGREQ << 4, b""))
        before = []
        while (packet := self.receive()).kind is not Kind.PINGRESP:
            before.append(packet)
        return before

    def receive(self, timeout: float = DEADLINE) -> Packet:
        """The next packet; Closed when there will be none, TimeoutError when none came in time."""
        self.sock.settimeout(timeout)
        while not self._packets:
            self._read()
        return self._packets.popleft()

    def expect(self, kind: Kind) -> Packet:
        """The next packet, which must be of this kind."""
        packet = self.receive()
        assert packet.kind is kind, f"expected {kind.name}, got {packet}"
        return packet

    def expect_closed(self) -> list[Packet]:
        """Wait until the broker closes; returns what it said before."""
        packets = []
        try:
            while True:
                packets.append(self.receive())
        except (Closed, ConnectionError):
            return packets

    def available(self) -> list[Packet]:
        """All packets that have arrived, without waiting; Closed when it ended and nothing is left."""
        self.sock.setblocking(False)
        try:
            while True:
                self._read()
        except BlockingIOError:
            pass
        except Closed:
            if not self._packets:
                raise
        finally:
            self.sock.settimeout(DEADLINE)
        packets = list(self._packets)
        self._packets.clear()
        return packets

    def disconnect(self, reason: int = 0, properties: Properties | None = None) -> None:
        """Say goodbye and wait until the broker has closed."""
        body = b""
        if self.version == 5 and (reason or properties):
            body = bytes((reason,)) + self._properties(properties)
        self.send(frame(Kind.DISCONNECT << 4, body))
        self.expect_closed()
        self.sock.close()

    def new_id(self) -> int:
        """A packet id that this connection has not used lately."""
        self._next_id = self._next_id % 65535 + 1
        return self._next_id

    def _request(self, kind: Kind, answer: Kind, body: bytes, properties: Properties | None) -> Packet:
        packet_id = self.new_id()
        head = struct.pack(">H", packet_id) + self._properties(properties)
        self.send(frame(kind << 4 | 2, head + body))
        earlier = []
        while (packet := self.receive()).kind is not answer:
            earlier.append(packet)
        self._packets.extendleft(reversed(earlier))
        assert packet.packet_id == packet_id, f"{answer.name} for another request: {packet}"
        return packet

    def _properties(self, properties: Properties | None) -> bytes:
        if self.version < 5:
            assert not properties, "properties exist in MQTT 5.0 only"
            return b""
        return encode_properties(properties or {})

    def _read(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise Closed
        self._packets.extend(self._decoder.feed(data))
