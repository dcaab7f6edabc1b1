"""What Redis' answers mean for us: every one that is not a yes becomes `NotConnected`, `Rejected` or `Misconfigured` here.

Invariant: outside of `answers` no error of the driver is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterCrossSlotError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .errors import Misconfigured, NotConnected, Rejected
from .pools import Pool
from .redis_script import ENVIRONMENT, RIGHTS


@contextmanager
def answers(pool: Pool, address: str) -> Iterator[None]:
    """Turn what the driver raises into our three words; `address` is whom we talk to."""
    try:
        yield
    except AuthenticationError as error:
        raise Misconfigured(
            f"Redis refused the login: {error}",
            f"set backend.redis.{pool.name}.password (and username, if the server has users) to what the server expects",
        ) from error
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise _certificate(pool, address, str(error)) from error
        raise NotConnected(_where(address, str(error) or type(error).__name__)) from error
    except NoPermissionError as error:
        raise _rights(str(error)) from error
    except ClusterDownError as error:
        if pool.settings["type"] != "cluster" and not isinstance(error, MasterDownError):
            raise _other_type(pool) from error
        raise NotConnected(_where(address, str(error))) from error
    except (MovedError, AskError, ClusterCrossSlotError) as error:
        raise _other_type(pool) from error
    except ResponseError as error:
        if type(error) is ResponseError:
            raise _meaning(str(error), pool) from error
        # The driver names what servers say of themselves: read-only, out of memory, try again. Its text has no code.
        raise NotConnected(_where(address, str(error))) from error
    except RedisError as error:
        raise NotConnected(_where(address, str(error))) from error


def meaning_of_ours(text: str, pool: Pool) -> Exception:
    """Of an answer that says something about the server or our rights."""
    code = text.split(" ", 1)[0]
    if code in ("MOVED", "ASK", "CROSSSLOT"):
        return _other_type(pool)
    if code in ("NOPERM", "NOAUTH") or any(sign in text for sign in RIGHTS):
        return _rights(text)
    return NotConnected(text)


def is_ours(text: str) -> bool:
    """Whether an error says something about the server or our rights, not about the record."""
    return text.split(" ", 1)[0] in ENVIRONMENT or any(sign in text for sign in RIGHTS)


def forbids_scripts(error: ResponseError) -> bool:
    """Whether the server knows no EVAL, or not for us."""
    text = str(error).lower()
    return "'eval" in text and ("no permissions" in text or "unknown command" in text)


def _where(address: str, text: str) -> str:
    return text if address in text else f"{address}: {text}"


def _meaning(text: str, pool: Pool) -> Exception:
    if "DB index" in text:
        return Misconfigured(
            f"Redis has no database {pool.settings['database']}: {text}",
            f"set backend.redis.{pool.name}.database to one the server has (0 always exists)",
        )
    if "cluster support disabled" in text:
        return _other_type(pool)
    return meaning_of_ours(text, pool) if is_ours(text) else Rejected(text)


def _rights(text: str) -> Misconfigured:
    return Misconfigured(
        f"Redis refuses a command to our user: {text}",
        "grant it with ACL SETUSER: keys ~mqtt:* ~tidegate:* and those of your own commands, with"
        " +@read +@write +@scripting +@connection, on a cluster +cluster|slots too, for a channel +subscribe and &its name",
    )


def _certificate(pool: Pool, address: str, text: str) -> Misconfigured:
    return Misconfigured(
        f"the certificate of {address} is not trusted: {text}",
        f"set backend.redis.{pool.name}.cacertfile to the certificate of who signed it; the certificate must name the host",
    )


def _other_type(pool: Pool) -> Misconfigured:
    if pool.settings["type"] == "cluster":
        return Misconfigured("the server is not part of a Redis Cluster", f"set backend.redis.{pool.name}.type = single")
    return Misconfigured("the server is part of a Redis Cluster", f"set backend.redis.{pool.name}.type = cluster")
