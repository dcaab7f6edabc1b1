"""Idle sockets of one address do not keep others out."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until


def test_an_address_has_its_own_limit(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml="[limits]\nmax_connections = 20\nmax_connections_per_address = 10\n") as gateway:
        idle = [socket.create_connection(("127.0.0.1", gateway.port), source_address=("127.0.0.2", 0)) for _ in range(30)]
        for sock in idle[10:]:
            sock.settimeout(10)
            assert sock.recv(1) == b""
        with MqttClient(gateway.port, "other") as client:
            client.publish_and_wait("t", b"x")
        assert "address_full" in gateway.log() and "address=127.0.0.2" in gateway.log()
        for sock in idle:
            sock.close()

        def connects_again() -> bool:
            with socket.create_connection(("127.0.0.1", gateway.port), source_address=("127.0.0.2", 0)) as sock:
                sock.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01a")
                return sock.recv(4) == b"\x20\x02\x00\x00"

        wait_until(connects_again, 10)


def test_who_is_turned_away_and_gone_already_leaves_nothing_behind(tmp_path: Path) -> None:
    toml = "[limits]\nmax_connections_per_address = 5\n"
    with Gateway(tmp_path, toml=toml) as gateway, MqttClient(gateway.port, "stays") as client:
        client.publish_and_wait("t", b"x")

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{gateway.pid}/fd"))

        before = descriptors()
        gateway.freeze()
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", gateway.port), source_address=("127.0.0.2", 0)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gateway.thaw()
        wait_until(lambda: "address_full" in gateway.log())
        client.publish_and_wait("t", b"y")
        wait_until(lambda: descriptors() == before)
        assert "Traceback" not in gateway.log()
