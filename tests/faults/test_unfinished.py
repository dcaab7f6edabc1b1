"""Very many clients that begin a packet and never finish it: what they hold is bounded together, and others are served."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

MANY = 150
PART = 500 << 10
"""Bytes that each of them sends of a packet of 1,000,000."""
ALIAS = 35
"""The property Topic Alias."""
LIMIT = 4 << 20
BOUND = LIMIT + (24 << 20)
"""Above what waits: one turn of the sockets, and what 150 connections cost. Unbounded it would be 75 MiB and more."""
BEGUN = b"\x30\xc0\x84\x3d\x00\x01t"


def status(gateway: Gateway) -> Any:
    command = [sys.executable, "-m", "tidegate.gateway.cli", "status", "--json", "--data", str(gateway.data)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["clients"]


def test_what_is_half_received_is_bounded_and_others_are_served(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml='[limits]\nmax_unfinished_together = "4MiB"\n') as gateway:
        before = gateway.rss()
        slow = MqttClient(gateway.port, "on a slow line")
        packet = BEGUN + bytes(1_000_000 - 3)
        slow.send(packet[:1000])
        clients = []
        most = 0
        for number in range(MANY):
            client = MqttClient(gateway.port, f"unfinished {number}", version=5 if number % 2 else 4)
            clients.append(client)
            client.send(BEGUN + bytes(PART))
            most = max(most, gateway.rss() - before)
        wait_until(lambda: status(gateway)["unfinished_packets"] >= MANY - LIMIT // PART, 20)
        found = status(gateway)
        assert 0 < found["unfinished_bytes"] <= LIMIT
        assert max(most, gateway.rss() - before) < BOUND
        told = clients[1].receive()
        assert (told.kind, told.reason) == (Kind.DISCONNECT, 0x97)
        assert "unfinished_dropped: max_unfinished_together is used up" in gateway.log()
        slow.send(packet[1000:])
        slow.publish_and_wait("t", b"served")
        for client in clients:
            client.sock.close()
        wait_until(lambda: status(gateway)["unfinished_bytes"] == 0, 10)


def test_a_packet_as_large_as_permitted_comes_through_whatever_the_limit(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml='[limits]\nmax_packet_size = "3MiB"\nmax_unfinished_together = "1MiB"\n') as gateway:
        client = MqttClient(gateway.port, "large")
        client.publish_and_wait("t", bytes(3_000_000))
        assert status(gateway)["unfinished_packets"] == 0


def test_before_a_connect_is_complete_it_counts_too(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml='[limits]\nmax_unfinished_together = "1MiB"\n') as gateway:
        sockets = [socket.create_connection(("127.0.0.1", gateway.port), timeout=10) for _ in range(4)]
        for sock in sockets:
            sock.sendall(b"\x10\xc0\x84\x3d\x00\x04MQTT\x04\x04" + bytes(PART))
        wait_until(lambda: status(gateway)["unfinished_packets"] >= 2, 10)
        assert status(gateway)["unfinished_bytes"] <= 1 << 20
        for sock in sockets:
            sock.close()


def test_long_topic_aliases_of_many_are_bounded_together(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml='[limits]\nmax_unfinished_together = "1MiB"\n') as gateway:
        clients = [MqttClient(gateway.port, f"aliases {number}", version=5) for number in range(40)]
        device = MqttClient(gateway.port, "device", version=5)
        device.publish("its/topic", b"1", 1, properties={ALIAS: 1})
        assert device.expect(Kind.PUBACK).reason == 0x10
        for number, client in enumerate(clients):
            client.publish(f"{number}/".ljust(60_000, "x"), b"", properties={ALIAS: 1})
        wait_until(lambda: status(gateway)["unfinished_packets"] >= 23, 10)
        assert 0 < status(gateway)["unfinished_bytes"] <= 1 << 20
        device.publish("", b"2", 1, properties={ALIAS: 1})
        assert device.expect(Kind.PUBACK).reason == 0x10
        for client in clients:
            client.sock.close()
        device.disconnect()
        wait_until(lambda: status(gateway)["unfinished_bytes"] == 0, 10)
