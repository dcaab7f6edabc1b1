"""Clients with random ids come once and never again: what of the box grows with them.

    .venv/bin/python bench/strangers.py [--clients N]       100,000 as a rule, in about two minutes; a million in twenty

Each connects, subscribes to a filter of its own, publishes once to a topic of its own (QoS 1), waits for its PUBACK and says
goodbye. The real gateway with a Redis pool, so that the uplink runs too, and a disk budget of 64 MiB; every answer is checked.
"""

from __future__ import annotations

import argparse
import os
import socket
import sqlite3
import struct
import sys
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import brokers
import wire

BUDGET = 64
TOGETHER = 100
ROUNDS = 10
ANSWER = b"\x20\x02\x00\x00" + b"\x90\x03\x00\x01\x01" + b"\x40\x02\x00\x02"
SHOWN = ("clients so far", "µs each", "memory of all processes, MiB", "log.db and WAL, MiB", "uplink.db, MiB")
TABLES = ("entry", "client", "topic", "session", "subscription")


def main() -> int:
    """The command; 1 if the budget was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=100_000)
    options = parser.parse_args()
    print("| " + " | ".join((*SHOWN, *(f"rows of {table}" for table in TABLES))) + " |")
    print("|" + "---:|" * (len(SHOWN) + len(TABLES)))
    most = 0.0
    port = brokers.free_port()
    with brokers.redis(port), brokers.Broker(brokers.Tidegate(True, brokers.FarEnd("redis", port), f"{BUDGET}MiB")) as broker:
        each = options.clients // ROUNDS
        for number in range(1, ROUNDS + 1):
            took = _come_and_go(broker.port, each)
            data = broker.directory / "data"
            log, uplink = _mebibytes(data, "log.db"), _mebibytes(data, "uplink.db")
            most = max(most, log)
            figures = [number * each, took * 1e6, broker.pss() / 2**20, log, uplink, *_rows(data / "log.db")]
            print("| " + " | ".join(f"{value:,.0f}" for value in figures) + " |", flush=True)
    return 1 if most > BUDGET else 0


def _come_and_go(port: int, count: int) -> float:
    """Seconds for each."""
    began = time.perf_counter()
    for start in range(0, count, TOGETHER):
        socks = [_begin(port) for _ in range(min(TOGETHER, count - start))]
        for sock in socks:
            assert wire.receive(sock, len(ANSWER)) == ANSWER
            sock.sendall(b"\xe0\x00")
        for sock in socks:
            assert not sock.recv(1), "more than the answers"
            sock.close()
    return (time.perf_counter() - began) / count


def _begin(port: int) -> socket.socket:
    name = os.urandom(12).hex().encode()
    sock = socket.create_connection(("127.0.0.1", port), timeout=wire.TIMEOUT)
    connect = b"\x00\x04MQTT\x04\x02\x00\x00" + _text(name)
    subscribe = b"\x00\x01" + _text(b"for/" + name + b"/#") + b"\x01"
    publish = _text(b"from/" + name) + b"\x00\x02" + wire.FILLER
    sock.sendall(_packet(0x10, connect) + _packet(0x82, subscribe) + _packet(0x32, publish))
    return sock


def _packet(first: int, body: bytes) -> bytes:
    assert len(body) < 128, "one byte of remaining length"
    return bytes((first, len(body))) + body


def _text(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _mebibytes(data: Path, name: str) -> float:
    return sum(path.stat().st_size for path in (data / name, data / f"{name}-wal")) / 2**20


def _rows(path: Path) -> list[int]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES]


if __name__ == "__main__":
    sys.exit(main())
