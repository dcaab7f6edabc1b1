"""What the campaign asks of a far end: a real server behind proxies, faults of its own, and what it holds at the end.

Invariant: `contents` reads past the proxies, with a client that shares nothing with the gateway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.support.proxy import Proxy

KILLED, FROZEN, READ_ONLY = "server killed (-9)", "server frozen", "read-only"
MEMORY, CONNECTIONS, DEADLOCK = "out of memory", "connection limit", "deadlock"
SCHEMA, PASSWORD, RESTORED = "schema missing", "wrong password", "restored from an older dump"
FAULTS = (KILLED, FROZEN, READ_ONLY, MEMORY, CONNECTIONS, DEADLOCK, SCHEMA, PASSWORD, RESTORED)
MOVED, FAILED_OVER = "slot moved", "fail-over by an operator"
"""Of a cluster and of sentinels alone."""
CONNECTED, UNREACHABLE, MISCONFIGURED = "connected", "unreachable", "misconfigured"


class Row(NamedTuple):
    """A message as both sides have it."""

    msgid: str
    topic: str
    sender: str
    qos: int
    retain: bool
    payload: bytes


class Presence(NamedTuple):
    """Seconds since 1970."""

    online: bool
    online_at: int
    offline_at: int | None


class Contents(NamedTuple):
    """`messages` in the order of the far end; `listed`: what the user's own statement wrote, in its order."""

    messages: list[Row]
    listed: list[str]
    retained: dict[str, Row]
    presence: dict[str, Presence]
    counted: int
    """What a statement that adds 1 for each message has come to."""


class Fault(NamedTuple):
    """The far end is in trouble inside of `during`; the pool comes to be in `state`, and says `words`, meanwhile."""

    name: str
    during: Callable[[], AbstractContextManager[None]]
    state: str = UNREACHABLE
    words: str = ""


class Door(NamedTuple):
    """A proxy, and the marks that stand behind it as everybody can see them."""

    proxy: Proxy
    marks: Callable[[], object]


class FarEnd(ABC):
    """Use as a context manager: the servers run inside of it. `impossible`: fault -> why it cannot be made here."""

    name: str
    backend: str
    impossible: Mapping[str, str]

    @abstractmethod
    def __init__(self, directory: Path) -> None: ...

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    @abstractmethod
    def rules(self) -> str:
        """The rule file: every function that writes, and a statement that shows order and repetition."""

    @abstractmethod
    def doors(self) -> Sequence[Door]:
        """Every way that the gateway has to it."""

    @abstractmethod
    def faults(self) -> Sequence[Fault]:
        """What can happen to it."""

    @abstractmethod
    def contents(self) -> Contents:
        """All that it holds."""

    def marks(self) -> list[object]:
        """All marks there are; they move when something was applied."""
        return [door.marks() for door in self.doors()]

    @contextmanager
    def set_back(self, keep: Callable[[], None], bring_back: Callable[[], None]) -> Iterator[None]:
        """What it holds at `keep` is all that it holds after `bring_back`, its mark too."""
        with self.closed():
            keep()
            stood = self.marks()
        yield
        with self.closed():
            moved = self.marks() != stood
            bring_back()
            assert moved and self.marks() == stood, "the dump is not older"

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nobody gets in through the doors."""
        for door in self.doors():
            door.proxy.set("refuse")
        try:
            yield
        finally:
            for door in self.doors():
                door.proxy.set("pass")

    def drop(self) -> None:
        """Reset every connection of the gateway."""
        for door in self.doors():
            door.proxy.drop()


@contextmanager
def between(begin: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    """`end` comes whatever happens."""
    begin()
    try:
        yield
    finally:
        end()
