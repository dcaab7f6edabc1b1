"""Free ports for the servers that tests start.

Drawn from 20000-29999: an outgoing connection may take a port above 32767 between our look and the server's bind. For the same
reason none is given twice before all were, and tests that run side by side draw from different ones.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator

FIRST, LAST = 20_000, 29_999
BUS = 10_000
"""So much above its port a node of a Redis cluster has another one."""
TRIES = 200


def _draw() -> Iterator[int]:
    worker, of = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = list(range(FIRST + int(worker.removeprefix("gw")), LAST + 1, of))
    random.shuffle(ports)
    return itertools.cycle(ports)


_ports = _draw()


def free_port() -> int:
    """A port of 127.0.0.1 that is free for TCP and UDP."""
    for port in itertools.islice(_ports, TRIES):
        if _is_free(port, socket.SOCK_STREAM) and _is_free(port, socket.SOCK_DGRAM):
            return port
    raise RuntimeError(f"no free port in {FIRST}-{LAST}")


def free_ports_of_nodes(count: int) -> list[int]:
    """Ports below FIRST that are free like those of their buses."""
    buses = (bus for bus in itertools.islice(_ports, TRIES) if _is_free(bus, socket.SOCK_STREAM))
    found = list(itertools.islice((bus - BUS for bus in buses if _is_free(bus - BUS, socket.SOCK_STREAM)), count))
    if len(found) < count:
        raise RuntimeError(f"no {count} free ports for nodes")
    return found


def _is_free(port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
