"""The demo's far end: a Redis of its own, and the line to it, which can be cut.

A real `redis-server` where the machine has one, else the TCP server of `fakeredis` in a process of its own; its name is for the
screen, so that nobody takes the stand-in for the real thing. A Redis that already runs on the machine is never touched. The
uplink reaches it only through `Line`; the demo itself looks at it directly, so it sees what arrived while the line is cut.

Invariant: after `stop` the server is gone, and its data with the demo's directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .demo_remains import bound

START_DEADLINE = 15.0
_CHUNK = 1 << 16


class FarEnd:
    """A Redis server as a child process; `name` says which kind."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        program = shutil.which("redis-server")
        if program:
            self.name = f"redis-server ({program})"
            command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
        else:
            self.name = "fakeredis, a stand-in (no redis-server on this machine)"
            command = [sys.executable, "-m", __name__, str(self.port)]
        self._log = directory / "far-end.log"
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C is for the demo, which stops things in the right order.
            self._process = subprocess.Popen(
                bound(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    async def start(self) -> None:
        """Wait until it answers. Raises RuntimeError with what it said."""
        deadline = time.monotonic() + START_DEADLINE
        while not accepts(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not start:\n{self._log.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(0.02)

    def client(self) -> Any:
        """A client that looks at it directly, not through the line."""
        import redis

        return redis.Redis(port=self.port, socket_timeout=10.0)

    def stop(self) -> None:
        """Stop the server."""
        self._process.kill()
        self._process.wait()


class Line:
    """A TCP relay to the far end; while it is cut, connections are torn down as soon as they are made."""

    def __init__(self, far_port: int) -> None:
        self._far_port = far_port
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen on a port of its own."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Tear down what is connected and whatever tries to."""
        self._open = False
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        """Let connections through again."""
        self._open = True

    def stop(self) -> None:
        """Close everything."""
        self.cut()
        if self._server is not None:
            self._server.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._far_port)
            ends = {writer, far_writer}
            self._writers |= ends
            try:
                await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
            finally:
                self._writers -= ends
                far_writer.transport.abort()
        writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.transport.abort()


def accepts(port: int) -> bool:
    """Whether something takes connections on this port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """A free port, below those that outgoing connections get: one of them could take it before the server does."""
    for _ in range(200):
        port = random.randint(20_000, 29_999)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port in 20000-29999")


def _serve_stand_in(port: int) -> None:
    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", port))
    server.RequestHandlerClass = _answering_errors(server.RequestHandlerClass)
    server.serve_forever()


def _answering_errors(handler: Any) -> Any:
    """fakeredis closes the connection after each error; Redis answers with it, and the uplink counts on NOSCRIPT."""
    import redis

    def setup(self: Any) -> None:
        handler.setup(self)
        read = self.current_client.read_response

        def read_response() -> Any:
            try:
                return read()
            except redis.ResponseError as error:
                return error

        self.current_client.read_response = read_response

    return type("AnsweringErrors", (handler,), {"setup": setup})


if __name__ == "__main__":
    _serve_stand_in(int(sys.argv[1]))
