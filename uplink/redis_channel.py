"""The channel on which a business system asks for subscriptions: a connection of its own that only listens.

Invariant: a channel that raised NotConnected is not used again; what was said meanwhile is lost, so whoever connects again
looks up everything.
"""

from __future__ import annotations

from redis.exceptions import NoPermissionError

from .errors import Misconfigured
from .pools import Pool
from .redis_answers import answers
from .redis_wire import Wire, packed

MOST = 1_000
"""Messages taken at once."""


class Channel:
    """Subscribed when made, over a connection that is its own from then on. Raises NotConnected, Misconfigured."""

    def __init__(self, pool: Pool, wire: Wire) -> None:
        self._pool = pool
        self._wire = wire
        self._said: list[bytes] = []
        name = pool.settings["channel"]
        try:
            with answers(pool, self._wire.address):
                try:
                    self._wire.ask(b"SUBSCRIBE", name.encode())
                except NoPermissionError as error:
                    hint = (
                        f"grant it with ACL SETUSER: +subscribe &{name}, or listen to none: backend.redis.{pool.name}.channel ="
                    )
                    raise Misconfigured(f"Redis does not let our user listen to the channel {name}: {error}", hint) from error
        except BaseException:
            self._wire.close()
            raise

    def fileno(self) -> int:
        return self._wire.fileno()

    def heard(self) -> list[bytes]:
        """What was said since the last time, without waiting."""
        with answers(self._pool, self._wire.address):
            while len(self._said) < MOST and self._wire.has_answer():
                self._take()
        said, self._said = self._said, []
        return said

    def check(self) -> None:
        """Raises NotConnected when nobody answers: a line that fell silent is like one that has no news."""
        with answers(self._pool, self._wire.address):
            self._wire.put([packed((b"PING",))])
            while self._take() != b"pong":
                pass

    def _take(self) -> bytes:
        """What kind the next answer is; a message is kept."""
        answer = self._wire.take()
        if isinstance(answer, Exception):
            raise answer
        kind, *_, text = answer
        if kind == b"message":
            self._said.append(bytes(text))
        return bytes(kind)

    def close(self) -> None:
        self._wire.close()
