"""Latency of PUBACK at a fixed rate.

Rules: messages are sent at their planned moments whatever the answers do (an open loop), and latency counts
from the planned moment: a broker that stalls cannot hide it by slowing us down. Waiting is `select` with
microseconds, not a busy loop, which would take a CPU from a broker with two threads.

Invariant: exactly one answer, in order, for each message that was sent.
"""

from __future__ import annotations

import gc
import select
import time

import wire
from load import WrongAnswer

STALLED = 30.0


class _Client:
    """One connection and the planned moments of its unanswered messages."""

    def __init__(self, port: int, number: int, count: int) -> None:
        self.sock = wire.connect(port, b"publisher-%d" % number)
        self.stream = wire.stream(number, 1, count)
        self.sent = 0
        self.acked = 0
        self.planned: list[float] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, planned: float) -> None:
        at = self.sent * self.stream.size
        self.sock.sendall(self.stream.packets[at : at + self.stream.size])
        self.sent += 1
        self.planned.append(planned)

    def receive(self) -> list[float]:
        """Latencies of what was answered now."""
        data = self.sock.recv(4096)
        if not data or len(data) % 4 or data != self.stream.acks[4 * self.acked : 4 * self.acked + len(data)]:
            raise WrongAnswer(f"publisher {self.stream.publisher}: wrong answer {data[:40].hex() or '(end)'}")
        now = time.perf_counter()
        before, self.acked = self.acked, self.acked + len(data) // 4
        return [now - planned for planned in self.planned[before : self.acked]]


def percentiles(port: int, messages: int, rate: int, clients: int) -> tuple[float, float]:
    """(p50, p99) in seconds."""
    peers = [_Client(port, number, messages // clients) for number in range(clients)]
    gc.collect()
    gc.disable()
    try:
        latencies = sorted(_drive(peers, messages // clients * clients, rate))
    finally:
        gc.enable()
    for peer in peers:
        peer.sock.close()
    return latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100]


def _drive(peers: list[_Client], messages: int, rate: int) -> list[float]:
    latencies: list[float] = []
    sent = 0
    began = time.perf_counter() + 0.01
    while len(latencies) < messages:
        due = began + sent / rate - time.perf_counter() if sent < messages else STALLED
        if due > 0:
            ready: list[_Client]
            ready, _, _ = select.select(peers, (), (), due)
            if not ready and sent == messages:
                raise WrongAnswer(f"{messages - len(latencies)} of {messages} messages were never answered")
            for peer in ready:
                latencies += peer.receive()
        else:
            peers[sent % len(peers)].send(began + sent / rate)
            sent += 1
    return latencies
