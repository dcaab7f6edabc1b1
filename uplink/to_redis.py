"""Redis as a far end: the connection, the script that applies a batch, and what Redis' answers mean for us.

One connection of redis-py, driven by hand, because a batch is written as bytes that are packed already. The driver's own
retrying is off: the worker retries. Every answer that is not a yes becomes `NotConnected`, `Rejected` or `Misconfigured`
here and nowhere else. A server that allows us no script gets WATCH and MULTI instead (`redis_multi.py`).

Invariant: a link that raised NotConnected is not used again; the worker closes it and makes another.
"""

from __future__ import annotations

import re
import select
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from redis import Connection
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterCrossSlotError,
    ClusterError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from .backend import Batch, Mark, Packed, Refusal
from .errors import Misconfigured, NotConnected, Rejected
from .pools import Pool
from .redis_actions import actions, gap_action, pack, unpack
from .redis_multi import write_in_transaction
from .redis_script import ENVIRONMENT, RIGHTS, SHA, SOURCE

__all__ = ["actions", "connect", "gap_action"]

_MARK = re.compile(r"(\d+)(?:\+(\d+))?")
_NO_SCRIPTS = "no right to run scripts: batches go through WATCH and MULTI, which is slower"


def connect(pool: Pool) -> RedisLink:
    """Open a connection. Raises NotConnected or Misconfigured."""
    ((host, port),) = pool.settings["server"]
    timeout = pool.settings["timeout"]
    connection: Any = Connection(  # type: ignore[no-untyped-call]
        host=host,
        port=port,
        db=pool.settings["database"],
        username=pool.settings["username"] or None,
        password=str(pool.settings["password_file"] or pool.settings["password"]) or None,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    try:
        with _answers(pool):
            connection.connect()
    except BaseException:
        connection.disconnect()
        raise
    return RedisLink(connection, pool)


class RedisLink:
    """See `backend.Link`."""

    largest = 1000

    def __init__(self, connection: Any, pool: Pool) -> None:
        self.warning = ""
        self._connection = connection
        self._knows_script = False
        self._pool = pool

    def marks(self, gateway: str) -> dict[int, Mark]:
        pairs = iter(self._ask(b"HGETALL", self._ledger(gateway)))
        return {int(epoch): _mark(text.decode()) for epoch, text in zip(pairs, pairs, strict=True)}

    def refusals(self, gateway: str) -> list[Refusal]:
        pairs = iter(self._ask(b"HGETALL", self._refused(gateway)))
        found: list[Refusal] = []
        for name, reason in zip(pairs, pairs, strict=True):
            epoch, seq, number = (int(part) for part in name.split(b":"))
            found.append(Refusal(epoch, seq, number, reason.decode(errors="replace")))
        return sorted(found)

    def settle(self, gateway: str, refusals: Collection[Refusal]) -> None:
        names = [f"{refusal.epoch}:{refusal.seq}:{refusal.number}".encode() for refusal in refusals]
        self._ask(b"HDEL", self._refused(gateway), *names)

    def write(self, batch: Batch) -> list[Refusal] | None:
        ledger, refused = self._ledger(batch.gateway), self._refused(batch.gateway)
        with _answers(self._pool):
            if self.warning:
                return write_in_transaction(self._exchange, ledger, refused, batch, _is_ours)
            try:
                reply = self._run_script(ledger, refused, batch)
            except (NoPermissionError, ResponseError) as error:
                if not _forbids_scripts(error):
                    raise
                self.warning = _NO_SCRIPTS
                return write_in_transaction(self._exchange, ledger, refused, batch, _is_ours)
        return _read_reply(reply, batch)

    def repack(self, data: bytes) -> Packed:
        return Packed(data, len(unpack(Packed(data, 0))))

    def fileno(self) -> int:
        return int(self._connection._sock.fileno())

    def gone(self) -> bool:
        # Nobody asked anything: what can be read now is the end.
        readable, _, _ = select.select([self.fileno()], [], [], 0)
        return bool(readable)

    def close(self) -> None:
        self._connection.disconnect()

    def _run_script(self, ledger: bytes, refused: bytes, batch: Batch) -> Any:
        references = " ".join([f"{operation.seq}:{operation.number}" for operation in batch.operations])
        head = (ledger, refused, b"%d" % batch.epoch, mark_text(batch.expected), b"%d" % batch.through, references.encode())
        # What comes back here is what `redis_actions` made.
        packed = cast(list[Packed], [operation.packed for operation in batch.operations])
        body = b"".join([one.data for one in packed])
        count = sum([one.arguments for one in packed]) + len(head) + 3
        tail = b"$1\r\n2\r\n" + pack(head)
        if self._knows_script:
            try:
                return self._send(b"*%d\r\n" % count + pack((b"EVALSHA", SHA.encode())) + tail + body)
            except NoScriptError:
                pass
        reply = self._send(b"*%d\r\n" % count + pack((b"EVAL", SOURCE.encode())) + tail + body)
        self._knows_script = True
        return reply

    def _send(self, data: bytes) -> Any:
        self._connection.send_packed_command([data], check_health=False)
        return self._connection.read_response(disable_decoding=True)

    def _exchange(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        """Send all commands, then read all answers; a command's error is its answer."""
        self._connection.send_packed_command(
            [b"*%d\r\n" % len(command) + pack(command) for command in commands], check_health=False
        )
        answers: list[Any] = []
        for _ in commands:
            try:
                answers.append(self._connection.read_response(disable_decoding=True))
            except ResponseError as error:
                answers.append(error)
        return answers

    def _ask(self, *command: bytes) -> Any:
        """A question about our own keys; a refusal can only mean that somebody else uses them."""
        try:
            with _answers(self._pool):
                return self._send(b"*%d\r\n" % len(command) + pack(command))
        except Rejected as error:
            key = command[1].decode()
            raise Misconfigured(
                f"the key {key} is not ours: {error}", f"rename or delete {key}, the gateway keeps its progress there"
            ) from error

    def _ledger(self, gateway: str) -> bytes:
        return f"tidegate:ledger:{gateway}:{self._pool.name}".encode()

    def _refused(self, gateway: str) -> bytes:
        return f"tidegate:refused:{gateway}:{self._pool.name}".encode()


def mark_text(mark: Mark) -> bytes:
    """A mark as it stands in the ledger: `41`, `41+2`, or nothing."""
    if mark.done:
        return b"%d+%d" % mark
    return b"%d" % mark.seq if mark.seq else b""


def _mark(text: str) -> Mark:
    match = _MARK.fullmatch(text)
    if match is None:
        raise Misconfigured(
            f'the ledger holds "{text[:40]}" where a number belongs',
            "somebody else writes to the keys tidegate:ledger:*; restore or delete the field",
        )
    return Mark(int(match[1]), int(match[2] or 0))


def _read_reply(reply: list[Any], batch: Batch) -> list[Refusal] | None:
    status = reply[0]
    if status == b"moved":
        return None
    if status == b"stopped":
        raise _meaning_of_ours(reply[2].decode(errors="replace"))
    return [
        Refusal(batch.epoch, operation.seq, operation.number, reason.decode(errors="replace"))
        for number, reason in zip(reply[1::2], reply[2::2], strict=True)
        for operation in (batch.operations[number - 1],)
    ]


@contextmanager
def _answers(pool: Pool) -> Iterator[None]:
    """Turn what the driver raises into our three words."""
    try:
        yield
    except AuthenticationError as error:
        raise Misconfigured(
            f"Redis refused the login: {error}",
            f"set backend.redis.{pool.name}.password (and username, if the server has users) to what the server expects",
        ) from error
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise NotConnected(_where(pool, str(error) or type(error).__name__)) from error
    except NoPermissionError as error:
        raise _rights(str(error)) from error
    except (MovedError, AskError, ClusterError, ClusterCrossSlotError) as error:
        raise _cluster() from error
    except ResponseError as error:
        if type(error) is ResponseError:
            raise _meaning(str(error), pool) from error
        # The driver names what servers say of themselves: read-only, out of memory, try again. Its text has no code.
        raise NotConnected(_where(pool, str(error))) from error
    except RedisError as error:
        raise NotConnected(_where(pool, str(error))) from error


def _where(pool: Pool, text: str) -> str:
    ((host, port),) = pool.settings["server"]
    return text if f"{host}:{port}" in text else f"{host}:{port}: {text}"


def _meaning(text: str, pool: Pool) -> Exception:
    if "DB index" in text:
        return Misconfigured(
            f"Redis has no database {pool.settings['database']}: {text}",
            f"set backend.redis.{pool.name}.database to one the server has (0 always exists)",
        )
    return _meaning_of_ours(text) if _is_ours(text) else Rejected(text)


def _meaning_of_ours(text: str) -> Exception:
    code = text.split(" ", 1)[0]
    if code in ("MOVED", "ASK", "CROSSSLOT"):
        return _cluster()
    if code in ("NOPERM", "NOAUTH") or any(sign in text for sign in RIGHTS):
        return _rights(text)
    return NotConnected(text)


def _is_ours(text: str) -> bool:
    return text.split(" ", 1)[0] in ENVIRONMENT or any(sign in text for sign in RIGHTS)


def _rights(text: str) -> Misconfigured:
    return Misconfigured(
        f"Redis refuses a command to our user: {text}",
        "grant it with ACL SETUSER: keys ~mqtt:* ~tidegate:* and those of your own commands, with +@read +@write +@scripting",
    )


def _cluster() -> Misconfigured:
    return Misconfigured("the server is part of a Redis Cluster", "clusters come with a later version; use a single server now")


def _forbids_scripts(error: ResponseError) -> bool:
    text = str(error).lower()
    return "'eval" in text and ("no permissions" in text or "unknown command" in text)
