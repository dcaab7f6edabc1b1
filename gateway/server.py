"""The wire: every TCP connection in one epoll, which the event loop watches as if it were one socket.

A transport per connection costs several times what a message does when hundreds of clients send one each. Here a turn reads
every socket that has something, tells the broker, and the broker writes once to each client that is to get something; only
then the turn is over and what was gathered goes to the disk. What a socket does not take waits in its `Link`.

Invariant: after `Broker.lost` the broker is not called for this client again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import select
import socket
import sys
from collections.abc import Callable
from typing import Any

from tidegate.store.report import ERROR, WARNING, Say, brief

from .broker import Broker
from .config_keys import join_address
from .session import Client

READ = 64 << 10
"""Bytes of one read; a client that has more waits for the others."""
LEAST_READ = 256
TURN = 0.05
"""Seconds that a turn may take before the next ones read less: a hundred clients that flood it with packets of two bytes would
have all others wait for millions of them."""
POLLED_AT_ONCE = 16
READS_AT_ONCE = 128
"""Sockets of one turn; then what they brought goes to the disk while the next are read."""
ACCEPTS_AT_ONCE = 100
HIGH_WATER = 256 << 10
"""Bytes that wait for a socket: above, the client counts as not reading; below a quarter of it, as reading again."""
LINGER = 2.0
"""Seconds that a closed connection has to take what it was sent last, and to end on its side."""
ACCEPT_PAUSE = 1.0
"""Seconds without new connections when file descriptors or memory have run out."""
OUT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
RESERVED = 40
"""Descriptors that connections leave to the store, the uplink, the command line and health checks."""
_IN = select.EPOLLIN
_OUT = select.EPOLLOUT


class Sockets:
    """Listening and connected sockets of the gateway. `clock` sets the broker's time; it is called once in a turn."""

    def __init__(self, broker: Broker, clock: Callable[[], None], report: Say) -> None:
        self._broker = broker
        self._clock = clock
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._links: dict[int, Link] = {}
        self._listening: dict[int, tuple[socket.socket, Any]] = {}
        self._queued = broker.delivery.queued
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._room = limit - RESERVED if limit != resource.RLIM_INFINITY else sys.maxsize
        self._most = READ
        """Bytes of one read, as long as turns are short."""
        self._full: list[int] = []
        """Listening sockets that wait until a connection ends."""
        self._loop.add_reader(self._epoll.fileno(), self._turn)

    def listen(self, listener: Any) -> list[tuple[str, int]]:
        """Accept connections for `listener` (its `host` and `port`); the addresses. Raises OSError."""
        found = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = []
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
                sock.listen(1024)
            except OSError:
                sock.close()
                raise
            self._listening[sock.fileno()] = (sock, listener)
            self._epoll.register(sock.fileno(), _IN)
            addresses.append(sock.getsockname()[:2])
        return addresses

    @property
    def listening(self) -> bool:
        return bool(self._listening)

    def stop_listening(self) -> None:
        """No new connections from now on."""
        for sock, _ in self._listening.values():
            self._epoll.unregister(sock.fileno())
            sock.close()
        self._listening.clear()

    def _turn(self) -> None:
        self._clock()
        broker, began = self._broker, self._broker.now
        for _ in range(READS_AT_ONCE // POLLED_AT_ONCE):
            events = self._epoll.poll(0, POLLED_AT_ONCE)  # who is not among them stands first the next time
            self._serve(events)
            if len(events) < POLLED_AT_ONCE:
                break
            self._clock()
            if broker.now - began > TURN:
                break
        broker.turn_over()
        self._clock()
        if (took := broker.now - began) > TURN:
            self._most = max(LEAST_READ, int(self._most * TURN / took))
        elif self._most < READ and took < TURN / 4:
            self._most = min(READ, 2 * self._most)

    def _serve(self, events: list[tuple[int, int]]) -> None:
        links, receive, most = self._links, self._broker.receive, self._most
        for number, event in events:
            link = links.get(number)
            if link is None:
                if number in self._listening:
                    self._accept(*self._listening[number])
                continue
            try:
                if event & _OUT:
                    link.writable()
                if event & ~_OUT and (data := link.read(most)) and link.client is not None:
                    receive(link.client, data)
            except Exception as error:  # noqa: BLE001 - a bug that one client's bytes find must not stop the others
                text = "a fault in the program; the connection is closed"
                self._report("internal_error", text, ERROR, fault=brief(error))
                link.drop()

    def _gone(self, client: Client) -> None:
        self._clock()
        client.closing = True
        self._broker.lost(client)
        self._broker.turn_over()

    def _drop_slow(self, link: Any) -> None:
        """It holds the most of what waits, which is too much."""
        client = link.client
        self._broker.counters["slow_readers"] += 1
        name = client.session.name.text if client is not None and client.session is not None else ""
        text = "max_queued_together is used up: the client that holds the most of it does not read and is disconnected"
        peer = client.peer if client is not None else ""
        self._report("slow_reader", text, WARNING, peer=peer, client=name, bytes=link.buffered())
        link.drop()

    def _accept(self, listening: socket.socket, listener: Any) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            if len(self._links) >= self._room:
                self._pause_accepting(listening, errno.EMFILE)
                self._full.append(listening.fileno())
                return
            try:
                sock, peer = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in OUT_OF:
                    self._pause_accepting(listening, error.errno)
                    self._loop.call_later(ACCEPT_PAUSE, self._accept_again, listening.fileno())
                return
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(self, sock.detach())
            self._links[link.number] = link
            self._epoll.register(link.number, _IN)  # first: who is turned away may be gone already
            link.client = self._broker.opened(link, join_address(*peer[:2]), listener)

    def _pause_accepting(self, listening: socket.socket, number: int) -> None:
        self._report("accept_failed", "cannot accept connections", WARNING, reason=os.strerror(number))
        self._epoll.modify(listening.fileno(), 0)

    def _accept_again(self, number: int) -> None:
        if number in self._listening:
            self._epoll.modify(number, _IN)

    def _has_room(self) -> None:
        """A connection has ended: who waits need not wait for a clock."""
        while self._full:
            self._accept_again(self._full.pop())


class Link:
    """One connection's socket; implements `session.Link`. It has the descriptor alone: an object costs 96 bytes."""

    __slots__ = ("_closing", "_mask", "_sockets", "_waiting", "client", "number")

    def __init__(self, sockets: Sockets, number: int) -> None:
        self.client: Client | None = None
        self.number = number
        """The descriptor, -1 when it is closed."""
        self._sockets = sockets
        self._mask = _IN
        self._waiting: bytearray | None = None
        """What the socket did not take yet; None when it takes."""
        self._closing = False

    def read(self, most: int = READ) -> bytes:
        """What came; nothing if the connection has ended or is being closed."""
        try:
            data = os.read(self.number, most)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError:
            data = b""
        if not data:
            self.drop()
        return b"" if self._closing else data

    def writable(self) -> None:
        """The socket takes bytes again."""
        waiting = self._waiting
        if waiting is None:
            return
        try:
            sent = os.write(self.number, waiting)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.drop()
            return
        del waiting[:sent]
        queued = self._sockets._queued
        queued.bytes -= sent
        if not waiting:
            self._waiting = None
            queued.end(self)
            self._watch(self._mask & ~_OUT)
            if self._closing:
                self._say_end()
                return
        if len(waiting) <= min(HIGH_WATER, queued.share) // 4 and self.client is not None and self.client.blocked:
            self._sockets._broker.writable(self.client, True)

    def drop(self) -> None:
        """Close the socket at once; the broker is told after this turn."""
        number, self.number = self.number, -1
        if number < 0:
            return
        self._sockets._epoll.unregister(number)
        del self._sockets._links[number]
        os.close(number)
        self._sockets._has_room()
        self._sockets._queued.bytes -= self.buffered()
        self._sockets._queued.end(self)
        self._waiting = None
        if self.client is not None:
            self._sockets._loop.call_soon(self._sockets._gone, self.client)
            self.client = None

    def _watch(self, mask: int) -> None:
        if mask != self._mask and self.number >= 0:
            self._mask = mask
            self._sockets._epoll.modify(self.number, mask)

    # -- session.Link ----------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self.number < 0:
            return
        queued = self._sockets._queued
        if self._waiting is None:
            try:
                sent = os.write(self.number, data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                return  # nobody gets it; reading tells that the connection is lost
            if sent == len(data):
                return
            self._waiting = bytearray(memoryview(data)[sent:])
            self._watch(self._mask | _OUT)
            queued.begin(self)
            queued.bytes += len(self._waiting)
        else:
            self._waiting += data
            queued.bytes += len(data)
        while link := queued.largest():
            self._sockets._drop_slow(link)
        if self._waiting is None:
            return
        if len(self._waiting) > min(HIGH_WATER, queued.share) and self.client is not None and not self.client.blocked:
            self._sockets._broker.writable(self.client, False)

    def close(self) -> None:
        """Send what is there, then the end, and wait for the client's; at once if it does not read.

        To close a socket with bytes unread would reset it, and the client might never see why (a DISCONNECT, a CONNACK).
        """
        if self.client is not None and self.client.blocked:
            self.drop()
        elif not self._closing:
            self._closing = True
            self._sockets._loop.call_later(LINGER, self.drop)
            self._watch(self._mask | _IN)
            if self._waiting is None:
                self._say_end()

    def _say_end(self) -> None:
        if self.number < 0:
            return
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=self.number)
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.drop()
        finally:
            sock.detach()

    def pause(self) -> None:
        self._watch(self._mask & ~_IN)

    def resume(self) -> None:
        self._watch(self._mask | _IN)

    def buffered(self) -> int:
        return len(self._waiting or b"")
