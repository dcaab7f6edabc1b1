"""Cuts after the commit and before the reply, and proof that they were: the mark had moved and its answer never passed.

Before each answer passes, the mark is read past the proxy. If it differs from what stood there when the last answer passed,
a batch has been committed since, and every connection is reset instead: whatever was to tell the gateway of it is lost. A
blind cut comes at some answer, wherever the batch is; it counts only if the mark had moved all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .far_end import Door


class Watch:
    """The condition of one cut; `moved` after it: it came between a commit and its reply."""

    def __init__(self, marks: Callable[[], object], blind: int | None) -> None:
        self.moved = False
        self._marks = marks
        self._blind = blind
        self._last: object = None

    def __call__(self) -> bool:
        """Whether the answer that has just come is cut off; the first one only shows where the mark stands."""
        now = self._marks()
        before, self._last = self._last, now
        if before is None:
            return False
        self.moved = before != now
        if self._blind is None or self.moved:
            return self.moved
        self._blind -= 1
        return self._blind < 0


@contextmanager
def armed(doors: Sequence[Door], blind: int | None) -> Iterator[Callable[[], bool | None]]:
    """The next fitting answer at any of the doors is cut off; gives a function: None not yet, else whether it counts."""
    watches = [(door, Watch(door.marks, blind)) for door in doors]
    for door, watch in watches:
        door.proxy.cut_when(watch)

    def outcome() -> bool | None:
        done = [watch.moved for door, watch in watches if door.proxy.held.is_set()]
        return any(done) if done else None

    try:
        yield outcome
    finally:
        for door, _ in watches:
            door.proxy.cut_when(None)
