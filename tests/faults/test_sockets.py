"""What the network does to the gateway's sockets: resets, half-closed ends, more connections than it has descriptors."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from tidegate.gateway.control import ask

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

DESCRIPTORS = 48
CROWD = 600
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset."""
BIG = 1_000_000


def test_out_of_descriptors_those_connected_are_served_and_later_ones_wait(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, prefix=("prlimit", f"--nofile={DESCRIPTORS}", "--"))
    with gateway, MqttClient(gateway.port, "early") as early:
        crowd = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(CROWD)]
        wait_until(
            lambda: 'accept_failed: cannot accept connections reason="Too many open files"' in gateway.log(), say=gateway.log
        )
        early.publish_and_wait("t", b"served")
        assert ask(gateway.data / "control.sock", {"command": "status"})["clients"]["connected"] < DESCRIPTORS
        for sock in crowd:
            sock.close()
        with MqttClient(gateway.port, "late") as late:
            late.publish_and_wait("t", b"served too")
        assert gateway.log().count("cannot accept connections") <= 2
        assert gateway.stop() == 0


def test_a_reset_and_an_end_both_publish_the_will(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway, MqttClient(gateway.port, "watches") as watching:
        watching.subscribe(("will/#", 1))
        for name in ("reset", "end"):
            client = MqttClient(gateway.port, name, will=(f"will/{name}", b"gone", 0, False))
            if name == "reset":
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                client.sock.close()
            else:
                client.sock.shutdown(socket.SHUT_WR)
            assert watching.expect(Kind.PUBLISH).topic == f"will/{name}"


def test_what_a_socket_does_not_take_at_once_arrives_whole(tmp_path: Path) -> None:
    """Forty messages of a megabyte to a reader that reads nothing before all are acknowledged."""
    with (
        Gateway(tmp_path) as gateway,
        MqttClient(gateway.port, "reads late") as late,
        MqttClient(gateway.port, "writes") as writer,
    ):
        late.subscribe(("big", 1))
        payloads = [bytes([number]) * BIG for number in range(40)]
        for payload in payloads:
            writer.publish_and_wait("big", payload)
        for payload in payloads:
            packet = late.expect(Kind.PUBLISH)
            assert packet.payload == payload
            late.answer(Kind.PUBACK, packet.packet_id)


def test_a_client_that_is_thrown_out_while_it_sends_can_read_why(tmp_path: Path) -> None:
    """Closing a socket with bytes unread would reset it, and the DISCONNECT would be gone."""
    with Gateway(tmp_path) as gateway:
        client = MqttClient(gateway.port, "too fast", version=5)
        client.send(b"\xf0\x00")
        for _ in range(100):
            client.send(bytes(1 << 16))
        assert client.expect(Kind.DISCONNECT).reason == 0x82
        with MqttClient(gateway.port, "watches") as watching:
            assert watching.ping() == []
