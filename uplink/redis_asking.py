"""Redis as a far end that is asked: subscriptions made for clients, stored and retained messages, the channel.

Layout of the specification: `mqtt:sub:{clientid}`, `mqtt:msg:{topic}` with `mqtt:msg:{msgid}`, `mqtt:acked:{clientid}:{topic}`,
`mqtt:retain:{topic}`; ours: `tidegate:position:{clientid}:{topic}`.

Invariant: outside of `answers` no error of the driver is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .asking import Fetch, Fetched, Found
from .pools import Pool
from .redis_answers import answers
from .redis_wire import Wire
from .redis_wire import connect as connect_wire


def connect_asker(pool: Pool) -> RedisAsker:
    """Open a connection for questions. Raises NotConnected or Misconfigured."""
    return RedisAsker(connect_wire(pool), pool)


class RedisAsker:
    """See `asking.Asker`."""

    def __init__(self, wire: Wire, pool: Pool) -> None:
        self._wire = wire
        self._pool = pool

    def subscriptions(self, clients: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
        found = self._exchange([(b"HGETALL", b"mqtt:sub:" + client.encode()) for client in clients])
        return {client: _rows(answer) for client, answer in zip(clients, found, strict=True)}

    def fetch(self, question: Fetch) -> Fetched:
        return Fetched((), 0, {})

    def retained(self, topic_filter: str) -> list[Found]:
        return []

    def fileno(self) -> int:
        return self._wire.fileno()

    def heard(self) -> list[bytes]:
        return []

    def close(self) -> None:
        self._wire.close()

    def _exchange(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        with answers(self._pool, self._wire.address):
            return self._wire.exchange(commands)


def _rows(answer: Any) -> list[tuple[str, int]]:
    """A hash topic -> QoS; what is no QoS is told as -1, and refused where it is known whose it is."""
    if isinstance(answer, Exception):
        return []
    pairs = zip(answer[::2], answer[1::2], strict=True)
    return [(name.decode(errors="replace"), int(qos) if qos in (b"0", b"1", b"2") else -1) for name, qos in pairs]
