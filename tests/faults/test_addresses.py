"""Idle sockets of one address do not keep others out."""

from __future__ import annotations

import socket
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
