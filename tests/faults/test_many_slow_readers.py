"""Very many subscribers that never read: what waits for all of them is bounded together, and others are served."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway

SLEEPERS = 150
LIMIT = 4 << 20
PAYLOAD = 4096
BOUND = LIMIT + (24 << 20)
"""Above what waits: the memory for recent messages, and what 150 connections cost. Unbounded it would be 150 MiB and more."""


def status(gateway: Gateway) -> Any:
    command = [sys.executable, "-m", "tidegate.gateway.cli", "status", "--json", "--data", str(gateway.data)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def never_reads(port: int, number: int, topic: str, qos: int) -> MqttClient:
    client = MqttClient(port, f"never reads {number}")
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.subscribe((topic, qos))
    return client


@pytest.mark.parametrize("qos", [0, 1])
def test_what_waits_for_all_of_them_is_bounded_and_a_reader_gets_everything(tmp_path: Path, qos: int) -> None:
    with Gateway(tmp_path, toml='[limits]\nmax_queued_together = "4MiB"\n') as gateway:
        reader, publisher = MqttClient(gateway.port, "reader"), MqttClient(gateway.port, "publisher")
        reader.subscribe(("flood", qos))
        before = gateway.rss()
        sleepers = [never_reads(gateway.port, number, "flood", qos) for number in range(SLEEPERS)]
        most = 0
        for number in range(1_500):
            publisher.publish_and_wait("flood", b"%08d" % number + bytes(PAYLOAD - 8), qos)
            packet = reader.expect(Kind.PUBLISH)
            assert packet.payload[:8] == b"%08d" % number
            if qos:
                reader.answer(Kind.PUBACK, packet.packet_id)
            if not number % 500:
                most = max(most, gateway.rss() - before)
        assert max(most, gateway.rss() - before) < BOUND
        found = status(gateway)["clients"]
        assert 0 < found["queued_bytes"] <= LIMIT
        for sleeper in sleepers:
            sleeper.sock.close()


def test_retained_messages_for_them_are_bounded_too(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml='[limits]\nmax_queued_together = "4MiB"\n') as gateway:
        publisher = MqttClient(gateway.port, "publisher")
        for number in range(64):
            publisher.publish_and_wait(f"kept/{number}", bytes(64 << 10), retain=True)
        before = gateway.rss()
        sleepers = [never_reads(gateway.port, number, "kept/#", 0) for number in range(SLEEPERS)]
        publisher.ping()
        assert gateway.rss() - before < BOUND
        reader = MqttClient(gateway.port, "reader")
        reader.subscribe(("kept/#", 0))
        assert len({reader.expect(Kind.PUBLISH).topic for _ in range(64)}) == 64
        assert status(gateway)["clients"]["queued_bytes"] <= LIMIT
        for sleeper in sleepers:
            sleeper.sock.close()


def test_at_the_limit_whoever_holds_the_most_is_disconnected_counted_and_told(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml='[limits]\nmax_queued_together = "1MiB"\nmax_packet_size = "8MiB"\n') as gateway:
        sleeper = never_reads(gateway.port, 1, "large", 1)
        publisher = MqttClient(gateway.port, "publisher")
        for _ in range(3):
            publisher.publish_and_wait("large", bytes(7 << 20))
        found = status(gateway)["clients"]
        assert found["slow_readers"] == 1 and found["queued_bytes"] == 0
        assert "slow_reader: max_queued_together is used up" in gateway.log() and 'client="never reads 1"' in gateway.log()
        sleeper.sock.close()
