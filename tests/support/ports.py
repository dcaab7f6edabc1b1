"""Free ports for the servers that tests start.

Drawn from 20000-29999: an outgoing connection may take a port above 32767 between our look and the server's bind.
"""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 29_999
BUS = 10_000
"""So much above its port a node of a Redis cluster has another one."""


def free_port() -> int:
    """A port of 127.0.0.1 that is free for TCP and UDP."""
    for _ in range(200):
        port = random.randint(FIRST, LAST)
        if _is_free(port, socket.SOCK_STREAM) and _is_free(port, socket.SOCK_DGRAM):
            return port
    raise RuntimeError(f"no free port in {FIRST}-{LAST}")


def free_ports_of_nodes(count: int) -> list[int]:
    """Ports below FIRST that are free like those of their buses."""
    found: list[int] = []
    for port in random.sample(range(FIRST - BUS, LAST - BUS), 200):
        if _is_free(port, socket.SOCK_STREAM) and _is_free(port + BUS, socket.SOCK_STREAM):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports for nodes")


def _is_free(port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
