"""Free ports for the servers that tests start.

Drawn from 20000-29999: an outgoing connection may take a port above 32767 between our look and the server's bind.
"""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 29_999


def free_port() -> int:
    """A port of 127.0.0.1 that is free for TCP and UDP."""
    for _ in range(200):
        port = random.randint(FIRST, LAST)
        if _is_free(port, socket.SOCK_STREAM) and _is_free(port, socket.SOCK_DGRAM):
            return port
    raise RuntimeError(f"no free port in {FIRST}-{LAST}")


def _is_free(port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
