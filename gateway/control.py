"""The control socket `DATA/control.sock`: one line of JSON in, one line out. What the command line asks goes through here.

Mode 0660: who may use it is who may read the data directory's group. The server side is asyncio, the client side plain
blocking, because a command line has no loop.

Invariant: a request that cannot be understood gets an answer that says so, and never stops the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

Answer = dict[str, Any] | Awaitable[dict[str, Any]]
"""One that must be durable first comes later."""
Handler = Callable[[dict[str, Any]], Answer]
LIMIT = 1 << 20
PATIENCE = 10.0
"""Seconds in which a request must have come."""


class NotRunning(Exception):
    """No gateway answers there; the text is for the user."""


class NoRight(NotRunning):
    """One may be running, but this user must not ask it."""


class NoAnswer(NotRunning):
    """Something is there, but it did not answer as a gateway does."""


async def serve(path: Path, handler: Handler, patience: float = PATIENCE) -> asyncio.Server:
    """Listen; a socket left by a gateway that was killed is replaced. Raises OSError."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            async with asyncio.timeout(patience):
                line = await reader.readline()
            reply = _reply(handler, line)
            if not isinstance(reply, dict):
                reply = await reply
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        writer.close()

    path.unlink(missing_ok=True)
    with _short(path) as place:
        server = await asyncio.start_unix_server(answer, place, limit=LIMIT)
    os.chmod(path, 0o660)
    return server


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for the socket that fits into the 107 bytes of an address, however deep its directory is."""
    if len(os.fsencode(path)) <= 100:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _reply(handler: Handler, line: bytes) -> Answer:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"error": f"not a line of JSON: {error}"}
    if not isinstance(request, dict):
        return {"error": "a request is a JSON object"}
    try:
        return handler(request)
    except Exception as error:  # noqa: BLE001 - a question must never stop the gateway; who asked is told
        return {"error": f"{type(error).__name__}: {error}"}


def ask(path: Path, request: dict[str, Any], timeout: float = 5.0) -> dict[str, Any]:
    """Send one request and return the answer. Raises NotRunning."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, _short(path) as place:
            sock.settimeout(timeout)
            sock.connect(place)
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as answers:
                line = answers.readline()
    except PermissionError:
        raise NoRight(f"no right to use {path}: run this as the user of the gateway, or join its group") from None
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise NotRunning(f"no gateway is running on {path.parent} (tidegate run --data {path.parent})") from None
    except OSError as error:
        raise NoAnswer(f"the gateway on {path.parent} does not answer: {error}") from None
    try:
        answer = json.loads(line or b"{}")
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise NoAnswer(f"{path} is not answered by a gateway")
    if "error" in answer or not answer:
        raise NoAnswer(f"the gateway on {path.parent} answers: {answer.get('error', 'nothing')}")
    return answer
