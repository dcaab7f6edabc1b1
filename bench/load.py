"""The load generator: one process, one epoll, raw sockets, prepared packets.

Rules: it checks what it counts. A publisher compares every answer with the only right one (id and order); a
subscriber checks every message (head, topic, payload, order per publisher, none missing or doubled) and
acknowledges it. Closed loop: nobody sends more than the window allows, so nothing needs to be dropped by
anyone. It knows its ceiling: the share of one CPU that it used itself is reported with each rate.

Invariant: after `Load.run` returned, everything that was to be sent was sent, answered and received exactly
once.
"""

from __future__ import annotations

import gc
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import wire

READ = 1 << 18
STALLED = 30.0


class WrongAnswer(Exception):
    """The broker lost, doubled, reordered or changed something, or stopped answering."""


class Peer(Protocol):
    """One connection of the load."""

    sock: socket.socket

    def readable(self) -> None:
        """There is something to read."""
        ...

    def writable(self) -> None:
        """The socket takes bytes again."""
        ...

    def done(self) -> bool:
        """All that this connection had to do has happened."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds that the load took, and the shares of a CPU that the generator and the broker used."""

    seconds: float
    own_cpu: float
    broker_cpu: float


class Load:
    """All connections of one measurement."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._peers: dict[int, Peer] = {}

    def add(self, peer: Peer) -> None:
        """Take over a connected socket."""
        peer.sock.setblocking(False)
        self._peers[peer.sock.fileno()] = peer
        self._epoll.register(peer.sock.fileno(), select.EPOLLIN)

    def wait_writable(self, sock: socket.socket, wanted: bool) -> None:
        """Call `writable` of this connection when its socket takes bytes."""
        self._epoll.modify(sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def run(self, broker_cpu: Callable[[], float]) -> Result:
        """Start everyone, turn until everyone is done. `broker_cpu` tells the broker's CPU seconds so far."""
        gc.collect()
        gc.disable()
        theirs = broker_cpu()
        began, ours = time.perf_counter(), time.process_time()
        try:
            self._turn()
        finally:
            gc.enable()
        seconds = time.perf_counter() - began
        for peer in self._peers.values():
            _check_quiet(peer)
        return Result(seconds, (time.process_time() - ours) / seconds, (broker_cpu() - theirs) / seconds)

    def close(self) -> None:
        """Close every connection."""
        for peer in self._peers.values():
            peer.sock.close()
        self._epoll.close()

    def _turn(self) -> None:
        peers, poll = self._peers, self._epoll.poll
        for peer in peers.values():
            peer.writable()
        waiting = list(peers.values())
        while waiting:
            while not waiting[-1].done():
                events = poll(STALLED)
                if not events:
                    raise WrongAnswer(f"nothing happened for {STALLED:.0f} s: {waiting[-1]}")
                for number, event in events:
                    if event & select.EPOLLOUT:
                        peers[number].writable()
                    if event & ~select.EPOLLOUT:
                        peers[number].readable()
            waiting.pop()


def _check_quiet(peer: Peer) -> None:
    """The answer to a ping is all that still comes."""
    peer.sock.setblocking(True)
    peer.sock.settimeout(STALLED)
    peer.sock.sendall(wire.PINGREQ)
    answer = peer.sock.recv(READ)
    if answer != wire.PINGRESP:
        raise WrongAnswer(f"{peer}: then came {answer[:40].hex() or 'the end'}")


class Publisher:
    """Sends a stream with a window. `credit` further bounds what is on its way to a subscriber.

    It sends as soon as it may, even for one answer: the peer, which answers one by one, is then at its best.
    """

    def __init__(self, load: Load, sock: socket.socket, stream: wire.Stream, window: int, credit: int = 0) -> None:
        self.sock = sock
        self.stream = stream
        self._load = load
        self._bytes = memoryview(stream.packets)
        self._size = stream.size
        self._total = stream.count * stream.size
        self._acks = stream.acks
        self._acked = 0
        self._sent = 0
        self._blocked = False
        self._window = window * stream.size if stream.qos else self._total
        self._credit = credit * stream.size if credit else self._total
        self._limit = self._window
        load.add(self)

    def __repr__(self) -> str:
        sent, acked = self._sent // self._size, self._acked // 4
        return f"publisher {self.stream.publisher}: {sent} of {self.stream.count} sent, {acked} acknowledged"

    def readable(self) -> None:
        data = self.sock.recv(READ)
        end = self._acked + len(data)
        if data != self._acks[self._acked : end] or not data:
            raise WrongAnswer(f"{self}: then came {data[:40].hex() or 'the end'}")
        self._acked = end
        if end & 3 == 0:
            self._limit = (end >> 2) * self._size + self._window
            self.writable()

    def grant(self, messages: int) -> None:
        """A subscriber has received this many messages more."""
        self._credit += messages * self._size
        self.writable()

    def writable(self) -> None:
        end = min(self._limit, self._credit, self._total)
        if end > self._sent:
            try:
                self._sent += self.sock.send(self._bytes[self._sent : end])
                blocked = self._sent < end
            except BlockingIOError:
                blocked = True
            if self._blocked != blocked:
                self._blocked = blocked
                self._load.wait_writable(self.sock, blocked)

    def done(self) -> bool:
        return self._sent == self._total and self._acked == len(self._acks)


class Subscriber:
    """Receives the messages of many publishers, in whatever order these are mixed."""

    def __init__(self, load: Load, sock: socket.socket, qos: int, expected: Sequence[int]) -> None:
        self.sock = sock
        self.publishers: Sequence[Publisher] = ()
        self._load = load
        self._qos = qos
        self._layout = wire.delivery(qos)
        topics = [wire.topic_of(publisher) for publisher in range(len(expected))]
        self._heads = [wire.publish_head(topic, qos) for topic in topics]
        self._next = [0] * len(expected)
        self._missing = sum(expected)
        self._rest = b""
        self._answers = Answers(load, sock)
        load.add(self)

    def __repr__(self) -> str:
        return f"subscriber: {self._missing} messages missing"

    def readable(self) -> None:
        chunk = self.sock.recv(READ)
        if not chunk:
            raise WrongAnswer(f"{self}: the broker closed the connection")
        data = self._rest + chunk if self._rest else chunk
        size = self._layout.size
        whole = len(data) // size * size
        self._rest = data[whole:]
        if not whole:
            return
        before = self._next[:]
        self._check(memoryview(data)[:whole])
        self._missing -= whole // size
        if self._qos:
            self._answers.acknowledge(data[:whole], size)
        for publisher in self.publishers:
            number = publisher.stream.publisher
            if self._next[number] > before[number]:
                publisher.grant(self._next[number] - before[number])

    def _check(self, messages: memoryview) -> None:
        following, heads, filler = self._next, self._heads, wire.FILLER
        for head, publisher, index, rest in self._layout.iter_unpack(messages):
            if following[publisher] != index or rest != filler or head != heads[publisher]:
                raise WrongAnswer(
                    f"publisher {publisher}: expected message {following[publisher]}, got {index}, "
                    f"head {head!r}, filler {'right' if rest == filler else 'wrong'}"
                )
            following[publisher] = index + 1

    def writable(self) -> None:
        self._answers.flush()

    def done(self) -> bool:
        return not self._missing and self._answers.flushed()


class Mirror:
    """Receives the messages of one publisher; compares whole reads at once, so that fifty are cheap."""

    def __init__(self, load: Load, sock: socket.socket, stream: wire.Stream, received: Callable[[int, int], None]) -> None:
        self.sock = sock
        self._stream = stream
        self._total = len(stream.packets)
        self._at = 0
        self._rest = b""
        self._received = received
        self._answers = Answers(load, sock)
        load.add(self)

    def __repr__(self) -> str:
        return f"subscriber: {self._at // self._stream.size} of {self._stream.count} messages"

    def readable(self) -> None:
        chunk = self.sock.recv(READ)
        if not chunk:
            raise WrongAnswer(f"{self}: the broker closed the connection")
        data = self._rest + chunk if self._rest else chunk
        size = self._stream.size
        whole = len(data) // size * size
        self._rest = data[whole:]
        if not whole:
            return
        expected: bytes | bytearray = self._stream.packets[self._at : self._at + whole]
        if len(expected) < whole:
            raise WrongAnswer(f"{self}: more came than was published")
        if self._stream.qos:
            expected = _with_ids_of(data[:whole], expected, size, len(self._stream.topic))
        if data[:whole] != expected:
            raise WrongAnswer(f"{self}: the next ones differ from what was published")
        before, self._at = self._at, self._at + whole
        if self._stream.qos:
            self._answers.acknowledge(data[:whole], size)
        self._received(before // size, self._at // size)

    def writable(self) -> None:
        self._answers.flush()

    def done(self) -> bool:
        return self._at == self._total and self._answers.flushed()


class Answers:
    """PUBACKs on their way out."""

    def __init__(self, load: Load, sock: socket.socket) -> None:
        self._load = load
        self._sock = sock
        self._waiting = b""
        self._blocked = False

    def acknowledge(self, messages: bytes, size: int) -> None:
        """Acknowledge messages of one size, which all carry a packet id."""
        at = 4 + len(wire.topic_of(0))
        acks = bytearray(b"\x40\x02\x00\x00" * (len(messages) // size))
        acks[2::4] = messages[at::size]
        acks[3::4] = messages[at + 1 :: size]
        self._waiting += acks
        self.flush()

    def flush(self) -> None:
        if self._waiting:
            with suppress(BlockingIOError):
                self._waiting = self._waiting[self._sock.send(self._waiting) :]
        if self._blocked != bool(self._waiting):
            self._blocked = not self._blocked
            self._load.wait_writable(self._sock, self._blocked)

    def flushed(self) -> bool:
        return not self._waiting


def _with_ids_of(messages: bytes, expected: bytes | bytearray, size: int, topic: int) -> bytearray:
    """`expected` with the packet ids that the broker chose."""
    at = 4 + topic
    mixed = bytearray(expected)
    mixed[at::size] = messages[at::size]
    mixed[at + 1 :: size] = messages[at + 1 :: size]
    return mixed
