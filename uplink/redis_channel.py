"""The channel on which a business system asks for subscriptions: a connection of its own that only listens.

Invariant: a channel that raised NotConnected is not used again; what was said meanwhile is lost, so whoever connects again
looks up everything.
"""

from __future__ import annotations

from redis.exceptions import NoPermissionError

from .errors import Misconfigured
from .pools import Pool
from .redis_answers import answers
from .redis_wire import connect

MOST = 1_000
"""Messages taken at once."""


class Channel:
    """Subscribed when made. Raises NotConnected, Misconfigured."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._wire = connect(pool)
        name = pool.settings["channel"]
        try:
            with answers(pool, self._wire.address):
                try:
                    self._wire.ask(b"SUBSCRIBE", name.encode())
                except NoPermissionError as error:
                    hint = f"grant it with ACL SETUSER: &{name}, or listen to none: backend.redis.{pool.name}.channel ="
                    raise Misconfigured(f"Redis does not let our user listen to the channel {name}: {error}", hint) from error
        except BaseException:
            self._wire.close()
            raise

    def fileno(self) -> int:
        return self._wire.fileno()

    def heard(self) -> list[bytes]:
        """What was said since the last time, without waiting."""
        found: list[bytes] = []
        with answers(self._pool, self._wire.address):
            while len(found) < MOST and self._wire.has_answer():
                answer = self._wire.take()
                if isinstance(answer, list) and answer[0] == b"message":
                    found.append(bytes(answer[2]))
        return found

    def close(self) -> None:
        self._wire.close()
