"""What a far end is asked on behalf of clients: the reading functions of the specification, one question a value.

A backend that answers has `connect_asker(pool) -> Asker` in its module. An asker is a second
connection beside the one that writes; like a link it raises nothing but `NotConnected`, `Rejected` and `Misconfigured`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from .pools import Pool


class Fetch(NamedTuple):
    """`on_message_fetch…`: messages of one literal topic for a client, after its position at the far end."""

    client: str
    topic: str
    queue: bool
    limit: int
    """Of one to many the newest so many; 0: all."""
    span: int
    """ms: of one to many none older; 0: of any age."""
    window_first: bool
    """Whether a client without a position gets the window, or nothing."""
    after: int = 0
    """The rest of an answer: what its `further` said; 0: from the beginning."""


class Found(NamedTuple):
    """A message as the far end has it. `at`: ms since 1970."""

    msgid: str
    topic: str
    sender: str
    qos: int
    at: int
    payload: bytes


class Fetched(NamedTuple):
    """Oldest first; `skipped` were due and beyond the limit. `positions`: a gateway's code in ids -> (epoch, seq) read."""

    messages: Sequence[Found]
    skipped: int
    positions: dict[str, tuple[int, int]]
    further: int = 0
    """Not 0: one answer does not hold all; the same question with this in `after` brings the next part."""


class Asker(Protocol):
    """A connection that only reads."""

    def subscriptions(self, clients: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
        """`on_subscribe_lookup` of many clients in one query: client -> its (filter, QoS) as they stand, faulty ones too."""
        ...

    def fetch(self, question: Fetch) -> Fetched: ...

    def retained(self, topic_filter: str) -> list[Found]:
        """`on_retain_lookup`: what matches the filter; wildcards may be answered with [] where the far end cannot search."""
        ...

    def fileno(self) -> int:
        """Readable when the far end says something unasked (a channel) or goes away; -1 if nothing does."""
        ...

    def heard(self) -> list[bytes]:
        """What the channel said since it was asked last; empty where there is no channel."""
        ...

    def check(self) -> None:
        """Raises NotConnected if the far end can say nothing unasked any more, which no question would show."""
        ...

    def close(self) -> None: ...


class AskingBackend(Protocol):
    """The module of a far end that can be asked."""

    def connect_asker(self, pool: Pool) -> Asker: ...
