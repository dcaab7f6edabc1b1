"""A connection to one Redis server: plain or TLS, named in the file or found by asking the sentinels.

One connection of redis-py, driven by hand, because a batch is written as bytes that are packed already. The driver's own
retrying is off: the worker retries.

Invariant: a wire that raised anything but a ResponseError is not used again.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from typing import Any

from redis import Connection
from redis.backoff import NoBackoff
from redis.connection import SSLConnection
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.retry import Retry

from .backend import Meanwhile, nothing
from .errors import Misconfigured, NotConnected
from .pools import Pool
from .redis_actions import pack
from .redis_answers import answers

_KEEPALIVE = {socket.TCP_KEEPIDLE: 20, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
"""Who only listens learns within a minute that the other host is gone; the system's own times are hours."""


class Wire:
    """Commands out, answers back, in order; the driver's errors come through."""

    def __init__(self, connection: Any, address: str) -> None:
        self.address = address
        self._connection = connection

    def send(self, data: bytes, meanwhile: Meanwhile = nothing) -> Any:
        """One packed command and its answer."""
        self._connection.send_packed_command([data], check_health=False)
        meanwhile()
        return self._connection.read_response(disable_decoding=True)

    def ask(self, *command: bytes) -> Any:
        """One command and its answer."""
        return self.send(packed(command))

    def put(self, commands: Sequence[bytes]) -> None:
        """Send packed commands; each has an answer to be read with `take`."""
        self._connection.send_packed_command(commands, check_health=False)

    def take(self) -> Any:
        """The next answer; a command's error is its answer."""
        try:
            return self._connection.read_response(disable_decoding=True)
        except ResponseError as error:
            return error

    def exchange(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        """Send all commands, then read all answers."""
        self.put([packed(command) for command in commands])
        return [self.take() for _ in commands]

    def fileno(self) -> int:
        return int(self._connection._sock.fileno())

    def has_answer(self) -> bool:
        """Whether something can be read now, an error or the end too."""
        return bool(self._connection.can_read(timeout=0))

    def gone(self) -> bool:
        """Nobody asked anything: what can be read now is the end."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self._connection.disconnect()


def packed(command: Sequence[bytes]) -> bytes:
    """A command as Redis reads it."""
    return b"*%d\r\n" % len(command) + pack(command)


def connect(pool: Pool) -> Wire:
    """The pool's only server, or the master that its sentinels name. Raises NotConnected, Misconfigured."""
    if pool.settings["type"] != "sentinel":
        ((host, port),) = pool.settings["server"]
        return connect_to(pool, host, port)
    wire = connect_to(pool, *_master(pool))
    try:
        _check_office(pool, wire)
    except BaseException:
        wire.close()
        raise
    return wire


def connect_to(pool: Pool, host: str, port: int) -> Wire:
    """A certain server of the pool. Raises NotConnected, Misconfigured."""
    settings = pool.settings
    kind: Any = SSLConnection if settings["ssl"] else Connection
    connection = kind(
        host=host,
        port=port,
        db=settings["database"],
        username=settings["username"] or None,
        password=str(settings["password_file"] or settings["password"]) or None,
        protocol=2,
        **_link_options(pool),
    )
    address = f"{host}:{port}"
    try:
        with answers(pool, address):
            connection.connect()
    except BaseException:
        connection.disconnect()
        raise
    return Wire(connection, address)


def _check_office(pool: Pool, wire: Wire) -> None:
    """A sentinel that lags behind the others names a master that is none any more; who only reads would stay there."""
    with answers(pool, wire.address):
        (answer,) = wire.exchange([(b"ROLE",)])
    if not isinstance(answer, Exception) and answer[0] != b"master":
        raise NotConnected(f"{wire.address} is no master any more")


def _link_options(pool: Pool) -> dict[str, Any]:
    settings = pool.settings
    options: dict[str, Any] = {
        "socket_timeout": settings["timeout"],
        "socket_connect_timeout": settings["timeout"],
        "socket_keepalive": True,
        "socket_keepalive_options": _KEEPALIVE,
        "retry": Retry(NoBackoff(), 0),
    }
    if settings["ssl"]:
        options |= {
            "ssl_ca_certs": settings["cacertfile"] or None,
            "ssl_certfile": settings["certfile"] or None,
            "ssl_keyfile": settings["keyfile"] or None,
        }
    return options


def _master(pool: Pool) -> tuple[str, int]:
    from redis.sentinel import MasterNotFoundError, Sentinel

    settings = pool.settings
    options = _link_options(pool) | {"password": str(settings["sentinel_password"]) or None, "ssl": settings["ssl"]}
    address = ", ".join(f"{host}:{port}" for host, port in settings["server"])
    asked: Any = Sentinel(settings["server"], sentinel_kwargs=options)  # type: ignore[no-untyped-call]
    try:
        with answers(pool, address):
            try:
                host, port = asked.discover_master(settings["sentinel"])
            except MasterNotFoundError as error:
                _name_the_mistake(pool, asked)
                raise NotConnected(f"the sentinels {address} name no living master: {error}") from error
    finally:
        asked.close()
    return host, int(port)


def _name_the_mistake(pool: Pool, asked: Any) -> None:
    """A sentinel that answers and does not know the name will not learn it by waiting."""
    for sentinel in asked.sentinels:
        try:
            known = sorted(sentinel.sentinel_masters())
        except AuthenticationError as error:
            raise Misconfigured(
                f"a sentinel refused the login: {error}",
                f"set backend.redis.{pool.name}.sentinel_password to what the sentinels expect",
            ) from error
        except (RedisError, OSError):
            continue
        if pool.settings["sentinel"] not in known:
            raise Misconfigured(
                f"the sentinels watch no master named {pool.settings['sentinel']!r}, but {', '.join(known) or 'none'}",
                f"set backend.redis.{pool.name}.sentinel to the name in the sentinels' `sentinel monitor` line",
            )
