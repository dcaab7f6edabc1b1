"""A TCP proxy with faults between a worker and its far end; a thread of its own, needs no rights.

Modes: `pass`; `refuse` (nobody listens); `reset` (accepted, then reset); `hold_down` (answers are held back); `cut_down` (the
next answer, or the one after so many, cuts the connection instead of arriving). `hold_up` holds back what the connections open
now send, until `release`, also when their client is gone: the late tail of a batch. New connections are not held.
`cut_when` cuts once, at the first answer for which a condition holds, and passes everything again.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from .ports import free_port

Mode = str
Passes = Callable[[socket.socket], bool]
"""Whether what was read from there goes on; may wait."""
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Use as a context manager; listens on `port`, passes on to 127.0.0.1:`target`."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.held = threading.Event()
        """Set when something was held back or cut off."""
        self._target = target
        self._mode: Mode = "pass"
        self._passing = 0
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._condition: Callable[[], bool] | None = None
        self._held_up: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._closed = False

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._held_up = set()
            self._changed.notify_all()
        self._stop_listening()
        self.drop()

    def set(self, mode: Mode, after: int = 0) -> None:
        """Change the fault; `cut_down` lets so many answers pass first."""
        self.held.clear()
        with self._changed:
            self._mode = mode
            self._passing = after
            self._changed.notify_all()
        if mode == "refuse":
            self._stop_listening()
        elif self._listener is None:
            self._listen()
        if mode in ("refuse", "reset"):
            self.drop()

    def cut_when(self, condition: Callable[[], bool] | None) -> None:
        """Ask before each answer is passed on, one at a time; at the first yes it is lost and every connection is cut."""
        self.held.clear()
        with self._asking:
            self._condition = condition

    def hold_up(self) -> None:
        """Hold back what the connections that are open now send from here on."""
        self.held.clear()
        with self._changed:
            self._held_up = set(self._open)

    def release(self) -> None:
        """Pass on what was held back."""
        with self._changed:
            self._held_up = set()
            self._changed.notify_all()

    def drop(self) -> None:
        """Reset every open connection."""
        with self._changed:
            dropped, self._open = self._open, set()
        for sock in dropped:
            _reset(sock)

    def _listen(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="proxy accept", daemon=True).start()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if self._mode == "reset":
                _reset(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                _reset(client)
                continue
            with self._changed:
                refused = self._closed or self._mode in ("refuse", "reset")
                if not refused:
                    self._open |= {client, server}
            if refused:
                _reset(client)
                _reset(server)
                continue
            pumps = {client: self._pass_up, server: self._pass_down}
            for source, sink in ((client, server), (server, client)):
                thread = threading.Thread(target=self._pump, args=(source, sink, pumps), name="proxy pump", daemon=True)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, pumps: dict[socket.socket, Passes]) -> None:
        """An end is passed on too, a reset as an end: else the far end would keep a session, and its locks, for nobody."""
        passes = pumps[source]
        with suppress(OSError):
            while (data := source.recv(65_536)) and passes(source):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        with self._changed:
            del pumps[source]
            if pumps:
                return
            self._open -= {source, sink}
        source.close()
        sink.close()

    def _pass_up(self, source: socket.socket) -> bool:
        return self._wait_while(lambda: source in self._held_up)

    def _pass_down(self, source: socket.socket) -> bool:
        if self._condition is not None and self._is_cut():
            return False
        if self._mode == "cut_down":
            if self._passing > 0:
                self._passing -= 1
                return True
            self.held.set()
            self.drop()
            return False
        return self._wait_while(lambda: self._mode == "hold_down")

    def _is_cut(self) -> bool:
        with self._asking:
            if self._condition is None or not self._condition():
                return False
            self._condition = None
            self.held.set()
            self.drop()
            return True

    def _wait_while(self, holds: Callable[[], bool]) -> bool:
        with self._changed:
            if holds():
                self.held.set()
            self._changed.wait_for(lambda: self._closed or not holds())
            return not self._closed


def _reset(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()
