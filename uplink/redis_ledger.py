"""Our progress in Redis: the hash of marks (epoch -> mark), and beside it the hash of refusals whose answer may get lost.

`41` in the ledger is all through entry 41, `41+2` two writes of what follows as well. On a cluster both keys carry the same
hash tag, so that one script can change both.

Invariant: what cannot be read as a mark was written by somebody else, and is named and never overwritten.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from .backend import Mark, Refusal
from .errors import Misconfigured, Rejected

_MARK = re.compile(r"(\d+)(?:\+(\d+))?")
Ask = Callable[..., Any]
"""A command and its answer; the second argument of the command is its key. Raises our three errors."""


class Ledger:
    """The two keys of a pool; `ask` sends a command to whoever has its key."""

    def __init__(self, pool: str, ask: Ask, *, tagged: bool) -> None:
        self._suffix = "{{{}:" + pool + "}}" if tagged else "{}:" + pool
        self._ask_server = ask

    def key(self, gateway: str) -> bytes:
        """Of the hash epoch -> mark."""
        return f"tidegate:ledger:{self._suffix.format(gateway)}".encode()

    def refused_key(self, gateway: str) -> bytes:
        """Of the hash `epoch:seq:number` -> reason."""
        return f"tidegate:refused:{self._suffix.format(gateway)}".encode()

    def marks(self, gateway: str) -> dict[int, Mark]:
        """See `backend.Link`."""
        return read_marks(self.ask(b"HGETALL", self.key(gateway)))

    def refusals(self, gateway: str) -> list[Refusal]:
        """See `backend.Link`."""
        pairs = iter(self.ask(b"HGETALL", self.refused_key(gateway)))
        found: list[Refusal] = []
        for name, reason in zip(pairs, pairs, strict=True):
            epoch, seq, number = (int(part) for part in name.split(b":"))
            found.append(Refusal(epoch, seq, number, reason.decode(errors="replace")))
        return sorted(found)

    def settle(self, gateway: str, refusals: Collection[Refusal]) -> None:
        """See `backend.Link`."""
        names = [f"{refusal.epoch}:{refusal.seq}:{refusal.number}".encode() for refusal in refusals]
        self.ask(b"HDEL", self.refused_key(gateway), *names)

    def ask(self, *command: bytes) -> Any:
        """A question about our own keys; a refusal can only mean that somebody else uses them."""
        try:
            return self._ask_server(*command)
        except Rejected as error:
            key = command[1].decode()
            raise Misconfigured(
                f"the key {key} is not ours: {error}", f"rename or delete {key}, the gateway keeps its progress there"
            ) from error


def mark_text(mark: Mark) -> bytes:
    """A mark as it stands in the ledger: `41`, `41+2`, or nothing."""
    if mark.done:
        return b"%d+%d" % mark
    return b"%d" % mark.seq if mark.seq else b""


def read_marks(answer: list[bytes]) -> dict[int, Mark]:
    """Of a hash of marks as HGETALL gives it. Raises Misconfigured."""
    pairs = iter(answer)
    return {int(epoch): _mark(text.decode(errors="replace")) for epoch, text in zip(pairs, pairs, strict=True)}


def _mark(text: str) -> Mark:
    match = _MARK.fullmatch(text)
    if match is None:
        raise Misconfigured(
            f'the ledger holds "{text[:40]}" where a number belongs',
            "somebody else writes to the keys tidegate:ledger:*; restore or delete the field",
        )
    return Mark(int(match[1]), int(match[2] or 0))
