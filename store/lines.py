"""Whole lines to standard error, without ever waiting for whoever reads them.

A reader may stop: a terminal on hold, a journal being restarted, a pipe nobody drains. What does not go out at once waits in
a bounded queue; when that is full, new lines are dropped and counted, and where they are missing a line says how many.

The descriptor is shared with other processes (a shell, a parent), so it is not made non-blocking itself: a socket is sent to
without waiting, a pipe or terminal is opened once more. No line is longer than what a pipe takes in one piece, so those of
two processes are not mixed.

Invariant: `put` and `push` never wait, and never raise because of the reader.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable

LINE = select.PIPE_BUF
QUEUE = 500
"""Lines that may wait: some tens of KiB, at most 2 MiB."""
CUT = b" ... (cut)\n"


class Lines:
    """`dropped` counts lines; `notice(count)` is the line that stands where so many are missing."""

    def __init__(self, notice: Callable[[int], str], descriptor: int = 2) -> None:
        self.dropped = 0
        self._notice = notice
        self._descriptor = descriptor
        self._write, self._close = _writer(descriptor)
        self._waiting: deque[tuple[bytes, int, int]] = deque()
        """What is left of each line; if it is lost: how many lines are dropped by that, how many are missing then."""
        self._missing = 0
        self._lock = threading.Lock()

    def put(self, text: str) -> None:
        """Say a line, now or later."""
        data = text.encode(errors="replace") + b"\n"
        if len(data) > LINE:
            data = data[: LINE - len(CUT)].decode(errors="ignore").encode() + CUT
        with self._lock:
            self._push()
            if len(self._waiting) < QUEUE:
                self._note_missing()
                self._waiting.append((data, 1, 1))
                self._push()
            else:
                self.dropped += 1
                self._missing += 1

    def push(self) -> bool:
        """Say what waits, as far as it is taken; whether something still waits."""
        with self._lock:
            self._push()
            return bool(self._waiting)

    def close(self, patience: float) -> None:
        """Say what waits, for so many seconds at most, and let go."""
        deadline = time.monotonic() + patience
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while self.push() and (left := deadline - time.monotonic()) > 0:
            poll.poll(left * 1000)
        self._close()

    def _push(self) -> None:
        if not self._waiting:
            self._note_missing()
        while self._waiting:
            data, dropped, missing = self._waiting[0]
            try:
                written = self._write(data)
            except BlockingIOError:
                return
            except OSError:  # closed, or a file on a full disk
                self._lose()
                return
            if written < len(data):
                self._waiting[0] = data[written:], dropped, missing
            else:
                self._waiting.popleft()

    def _note_missing(self) -> None:
        if self._missing:
            self._waiting.append((self._notice(self._missing).encode() + b"\n", 0, self._missing))
            self._missing = 0

    def _lose(self) -> None:
        """Nobody can be told: what waits is missing, and whoever can be told later learns it."""
        for _, dropped, missing in self._waiting:
            self.dropped += dropped
            self._missing += missing
        self._waiting.clear()


def _writer(descriptor: int) -> tuple[Callable[[bytes], int], Callable[[], None]]:
    """A way to write there that raises BlockingIOError instead of waiting; and to let go of it."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # closed: every write will say so
        mode = stat.S_IFREG
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(descriptor))
        return lambda data: sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL), sock.close
    if stat.S_ISREG(mode):
        return lambda data: os.write(descriptor, data), lambda: None
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # another user's, who handed it to us
        return lambda data: _write_if_taken(descriptor, data), lambda: None
    return lambda data: os.write(own, data), lambda: os.close(own)


def _write_if_taken(descriptor: int, data: bytes) -> int:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not poll.poll(0):
        raise BlockingIOError
    return os.write(descriptor, data)
