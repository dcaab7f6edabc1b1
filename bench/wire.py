"""The bytes of the benchmark: MQTT 3.1.1 packets prepared before the clock starts, and blocking handshakes.

Rules: nothing of the gateway's own codec is used, so that a mistake there cannot hide here. Every message is
unique: its 64 bytes of payload name publisher and index, the rest is filler; all packets of a stream have
one size.

Invariant: `Stream.packets[i * size:(i + 1) * size]` is the i-th PUBLISH and `Stream.acks[4 * i:4 * i + 4]`
its answer.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

PAYLOAD = 64
NAME = struct.Struct(">HI")
"""Publisher and index, the first bytes of a payload."""
FILLER = bytes(range(65, 65 + PAYLOAD - NAME.size))
PACKET_IDS = 60_000
PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"
TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Stream:
    """Everything one publisher will send, and everything the broker must answer."""

    publisher: int
    topic: bytes
    qos: int
    count: int
    size: int
    packets: bytes
    acks: bytes


def topic_of(publisher: int) -> bytes:
    """The topic that this publisher writes to; all have the same length."""
    return b"bench/%03d" % publisher


def stream(publisher: int, qos: int, count: int) -> Stream:
    """Prepare `count` messages of one publisher."""
    topic = topic_of(publisher)
    head = publish_head(topic, qos)
    name = NAME.pack
    if qos == 0:
        packets = [head + name(publisher, index) + FILLER for index in range(count)]
        return Stream(publisher, topic, qos, count, len(packets[0]), b"".join(packets), b"")
    ids = [struct.pack(">H", index % PACKET_IDS + 1) for index in range(count)]
    packets = [head + ids[index] + name(publisher, index) + FILLER for index in range(count)]
    acks = b"".join([b"\x40\x02" + packet_id for packet_id in ids])
    return Stream(publisher, topic, qos, count, len(packets[0]), b"".join(packets), acks)


def publish_head(topic: bytes, qos: int) -> bytes:
    """A PUBLISH up to its packet id."""
    remaining = 2 + len(topic) + (2 if qos else 0) + PAYLOAD
    assert remaining < 128, "one byte of remaining length"
    return bytes((0x30 | qos << 1, remaining)) + struct.pack(">H", len(topic)) + topic


def delivery(qos: int) -> struct.Struct:
    """The layout of a delivered message: head (see `publish_head`), publisher, index, filler."""
    head = len(publish_head(topic_of(0), qos))
    return struct.Struct(f">{head}s{'2x' if qos else ''}HI{len(FILLER)}s")


def connect(port: int, client_id: bytes, clean: bool = True) -> socket.socket:
    """Connect and wait for the CONNACK; ConnectionError if it is not an acceptance."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    body = b"\x00\x04MQTT\x04" + bytes((2 if clean else 0,)) + b"\x00\x00"
    body += struct.pack(">H", len(client_id)) + client_id
    sock.sendall(bytes((0x10, len(body))) + body)
    answer = receive(sock, 4)
    if answer[:2] != b"\x20\x02" or answer[3] != 0:
        sock.close()
        raise ConnectionError(f"CONNECT was answered {answer.hex()}")
    return sock


def subscribe(sock: socket.socket, topic_filter: bytes, qos: int) -> None:
    """Subscribe and wait for a SUBACK that grants `qos`."""
    body = b"\x00\x01" + struct.pack(">H", len(topic_filter)) + topic_filter + bytes((qos,))
    sock.sendall(bytes((0x82, len(body))) + body)
    answer = receive(sock, 5)
    if answer != b"\x90\x03\x00\x01" + bytes((qos,)):
        raise ConnectionError(f"SUBSCRIBE was answered {answer.hex()}")


def disconnect(sock: socket.socket) -> None:
    """Say goodbye and wait until the broker has closed."""
    sock.setblocking(True)
    sock.settimeout(TIMEOUT)
    sock.sendall(b"\xe0\x00")
    while sock.recv(65536):
        pass
    sock.close()


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes."""
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            raise ConnectionError("the broker closed the connection")
        data += chunk
    return data
