"""Telling systemd how we are (sd_notify), without a library: one datagram to the socket it names.

Invariant: without `NOTIFY_SOCKET` nothing happens, and no failure here ever stops the gateway.
"""

from __future__ import annotations

import contextlib
import os
import socket


def ready() -> None:
    """We listen."""
    _tell(f"READY=1\nMAINPID={os.getpid()}")


def stopping() -> None:
    _tell("STOPPING=1")


def watchdog() -> None:
    """The loop turns and the disk answers; systemd restarts us when this does not come in time."""
    _tell("WATCHDOG=1")


def _tell(message: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(message.encode(), address)
