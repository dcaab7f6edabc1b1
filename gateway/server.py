"""The wire: one asyncio protocol per connection, thin, with the broker behind it.

asyncio reads and writes; every byte goes straight to the broker's core and what comes back is one write per turn. A client
that does not read is noticed by the transport's marks, and one that must be cut off while its buffer is full is aborted.

Invariant: after `connection_lost` the broker is not called for this client again.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

from .broker import Broker
from .session import Client

HIGH_WATER = 256 << 10
LINGER = 5.0
"""Seconds that a closed connection has to take what it was sent last."""


class MqttProtocol(asyncio.Protocol):
    """Implements `session.Link` over an asyncio transport."""

    __slots__ = ("_broker", "_client", "_clock", "_listener", "_transport")

    def __init__(self, broker: Broker, listener: Any, clock: Any) -> None:
        self._broker = broker
        self._listener = listener
        self._clock = clock
        self._client: Client | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        if (sock := transport.get_extra_info("socket")) is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = transport.get_extra_info("peername")
        self._clock()
        self._client = self._broker.opened(self, f"{peer[0]}:{peer[1]}" if peer else "?", self._listener)

    def data_received(self, data: bytes) -> None:
        if self._client is not None:
            self._clock()
            self._broker.receive(self._client, data)

    def connection_lost(self, error: Exception | None) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._clock()
            client.closing = True
            self._broker.lost(client)

    def pause_writing(self) -> None:
        if self._client is not None:
            self._broker.writable(self._client, False)

    def resume_writing(self) -> None:
        if self._client is not None:
            self._clock()
            self._broker.writable(self._client, True)

    # -- session.Link ----------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def close(self) -> None:
        if self._client is not None and self._client.blocked:
            self._transport.abort()
        else:
            self._transport.close()
            asyncio.get_running_loop().call_later(LINGER, self._transport.abort)

    def pause(self) -> None:
        self._transport.pause_reading()

    def resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def buffered(self) -> int:
        return self._transport.get_write_buffer_size()
