"""What stands in Redis for a client, read: subscriptions, messages, and how far it has come. Pure.

Ids of our layout that no vector names were never read; ids that others made, and all ids where there is no vector, are
compared as bytes with the specification's single position. Of an epoch an id holds the last digits alone, which do not order
it: `seq` does, which never restarts, and for a log that was laid back the time in the ids.

Invariant: whatever stands there, nothing here raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tidegate.store.msgid import Origin, origin

from .asking import Found

MOST = 20_000
"""Ids of one topic that one question looks through, the newest."""
MAX_MSGID = 64
_UNKNOWN = 0
_LATEST_SECONDS = 100_000_000_000
"""A time above this is in milliseconds."""


class Place(NamedTuple):
    """The last message of a gateway that was read. `at`: the time in its id, ms; None where it was not written."""

    epoch: int
    seq: int
    at: int | None


class Standing(NamedTuple):
    """How far a client has read a topic. `read`: the vector, or what the single position says of it."""

    vector: dict[str, Place]
    acked: bytes
    ours: bool
    """Whether the single position is an id of our layout."""
    read: dict[str, tuple[int, int]]

    @property
    def known(self) -> bool:
        return bool(self.vector or self.acked)

    @property
    def low(self) -> bytes:
        """No id at or below it is due, where that can be said."""
        return b"" if self.vector else self.acked

    def is_due(self, msgid: bytes, made: Origin | None) -> bool:
        if made is None or not self.vector:
            return msgid > self.acked
        place = self.vector.get(made.code)
        return place is None or made.seq > place.seq or (place.at is not None and made.at > place.at)


def subscriptions(answer: Any) -> list[tuple[str, int]]:
    """A hash topic -> QoS; what is no QoS is told as -1, and refused where it is known whose it is."""
    pairs = zip(answer[::2], answer[1::2], strict=True) if answer else ()
    return [(name.decode(errors="replace"), int(qos) if qos in (b"0", b"1", b"2") else -1) for name, qos in pairs]


def standing_of(vector: Sequence[bytes], acked: bytes) -> Standing:
    """`vector`: gateway's code -> `epoch:seq:at`; what is none of ours there is passed over."""
    found: dict[str, Place] = {}
    for code, place in zip(vector[::2], vector[1::2], strict=True):
        numbers = place.split(b":")
        if len(numbers) in (2, 3) and all(number.isdigit() for number in numbers):
            epoch, seq, *at = map(int, numbers)
            found[code.decode(errors="replace")] = Place(epoch, seq, at[0] if at else None)
    made = origin(acked.decode(errors="replace"))
    read = {code: (place.epoch, place.seq) for code, place in found.items()}
    if made is not None and not found:
        read = {made.code: (made.epoch, made.seq)}
    return Standing(found, acked, made is not None, read)


def choose(newest_first: Sequence[bytes], standing: Standing, limit: int, since: int) -> tuple[list[bytes], int]:
    """What is due, oldest first, and how many messages the limit passed over.

    Without a position only the window counts: what is older than `since` by its id was not passed over.
    """
    due: list[bytes] = []
    skipped = 0
    for msgid in newest_first:
        made = origin(msgid.decode(errors="replace"))
        if len(msgid) > MAX_MSGID or not standing.is_due(msgid, made):
            continue
        if limit and len(due) == limit:
            skipped += standing.known or made is None or made.at >= since
        else:
            due.append(msgid)
    return due[::-1], skipped


def message(answer: Sequence[bytes], msgid: bytes, topic: str) -> Found:
    """A message's hash; `msgid` where it is known better. A business system may leave out all but the payload."""
    fields = dict(zip(answer[::2], answer[1::2], strict=True))
    name = (msgid or fields.get(b"id", b"")).decode(errors="replace")
    qos = fields.get(b"qos", b"1")
    sender = fields.get(b"from", b"").decode(errors="replace")
    level = int(qos) if qos in (b"0", b"1", b"2") else 1
    return Found(name, topic, sender, level, _milliseconds(fields.get(b"ts", b"")), fields.get(b"payload", b""))


def _milliseconds(text: bytes) -> int:
    """A time in seconds, with a fraction perhaps; 0 when there is none."""
    try:
        seconds = float(text)
    except ValueError:
        return _UNKNOWN
    if not 0 <= seconds < 1e15:
        return _UNKNOWN
    return int(seconds if seconds > _LATEST_SECONDS else seconds * 1000)
