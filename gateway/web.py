"""A small HTTP listener for machines that look after the gateway: `/healthz`, `/readyz`, `/metrics`.

Routes and answers are microdot's; what a stranger may send is bounded before microdot sees it: few connections, one request
each, a short head within a few seconds, no body. Imported only when `[http] bind` is set.

Invariant: nothing here changes the gateway, and nothing that is asked here can hold up its loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from microdot import AsyncBytesIO, Microdot, Request, Response

from .metrics import CONTENT_TYPE, exposition

CONNECTIONS = 16
HEAD_LIMIT = 8 << 10
PATIENCE = 10.0
"""Seconds in which a request must have come and its answer have been taken."""
_REQUEST = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x3e\x40-\x7e]*)(?:\?[\x21-\x7e]*)? HTTP/1\.[01]\r?\n")
BAD_REQUEST = b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\nbad request\n"
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\ntoo busy\n"

Faults = Callable[[], list[str]]
"""What is wrong, a line each; nothing when all is well."""


class Web:
    """See the module. `alive` and `ready` say what is wrong; `status` is what the metrics show."""

    def __init__(self, status: Callable[[], dict[str, Any]], alive: Faults, ready: Faults, patience: float = PATIENCE) -> None:
        self._status, self._alive, self._ready = status, alive, ready
        self._patience = patience
        self._open = 0
        self._app = Microdot()
        for path, answer in (("/healthz", self._healthz), ("/readyz", self._readyz), ("/metrics", self._metrics)):
            self._app.get(path)(answer)
        self._app.errorhandler(404)(_missing)
        self._app.errorhandler(405)(_wrong_method)

    async def _healthz(self, _: Request) -> Response:
        return _verdict(self._alive())

    async def _readyz(self, _: Request) -> Response:
        return _verdict(self._alive() + self._ready())

    async def _metrics(self, _: Request) -> Response:
        return Response(exposition(self._status()), 200, {"Content-Type": CONTENT_TYPE})

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Raises OSError."""
        return await asyncio.start_server(self._serve, host, port, limit=HEAD_LIMIT, backlog=CONNECTIONS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open > CONNECTIONS:
            writer.write(BUSY)
            return
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            head = b""
        if request := _REQUEST.match(head):
            line: Any = AsyncBytesIO(b"%b %b HTTP/1.0\r\n\r\n" % request.groups())
            stream: Any = _Writer(writer)
            await self._app.handle_request(line, stream)
        else:
            writer.write(BAD_REQUEST)
            await writer.drain()


class _Writer:
    """A stream as microdot writes to it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.get_extra_info = writer.get_extra_info

    async def awrite(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def _missing(_: Request) -> Response:
    return Response("there is /healthz, /readyz and /metrics\n", 404)


async def _wrong_method(_: Request) -> Response:
    return Response("only GET and HEAD are answered\n", 405)


def _verdict(faults: list[str]) -> Response:
    return Response("".join(f"{fault}\n" for fault in faults or ["ok"]), 503 if faults else 200)
