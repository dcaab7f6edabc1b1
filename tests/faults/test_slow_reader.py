"""A subscriber that never reads: its memory is bounded, and nobody else waits for it."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway

PAYLOAD = 4096
ROUNDS = 400
BURST = 50
"""Messages of one round; the reader has received them all before the next one begins."""
BOUND = 24 << 20
"""Far below the 80 MB that pass the slow reader by, far above the queue and buffers it may have."""
SLOWER = 2.0


def test_a_subscriber_that_never_reads_costs_bounded_memory_and_slows_nobody_qos_0(tmp_path: Path) -> None:
    _check(tmp_path, qos=0)


def test_a_subscriber_that_never_reads_costs_bounded_memory_and_slows_nobody_qos_1(tmp_path: Path) -> None:
    _check(tmp_path, qos=1)


def _check(tmp_path: Path, qos: int) -> None:
    with Gateway(tmp_path) as gateway:
        reader, publisher = MqttClient(gateway.port, "reader"), MqttClient(gateway.port, "publisher")
        reader.subscribe(("flood", qos))
        alone = _flood(publisher, reader, qos)
        before = gateway.rss()
        sleepers = [_never_reads(gateway.port, f"never reads {number}", qos) for number in range(3)]
        together = min(_flood(publisher, reader, qos) for _ in range(2))
        assert gateway.rss() - before < BOUND
        assert together < alone * SLOWER, f"{together:.2f} s instead of {alone:.2f} s"
        for sleeper in sleepers:
            sleeper.sock.close()
        assert reader.ping() == []


def _never_reads(port: int, name: str, qos: int) -> MqttClient:
    client = MqttClient(port, name)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.subscribe(("flood", qos))
    return client


def _flood(publisher: MqttClient, reader: MqttClient, qos: int) -> float:
    """Send everything in rounds; returns the seconds until the reader had it all."""
    began = time.perf_counter()
    for number in range(ROUNDS):
        payloads = [b"%08d" % (number * BURST + index) + bytes(PAYLOAD - 8) for index in range(BURST)]
        for payload in payloads:
            publisher.publish("flood", payload, qos)
        for payload in payloads:
            packet = reader.expect(Kind.PUBLISH)
            assert packet.payload == payload
            if qos:
                reader.answer(Kind.PUBACK, packet.packet_id)
        for _ in payloads if qos else ():
            publisher.expect(Kind.PUBACK)
    return time.perf_counter() - began
