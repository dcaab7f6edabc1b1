"""The next stretch of the log as one batch: read, ended where another life of the gateway begins, and made into operations.

While the far end works on a batch the next stretch is made ready (`look_ahead`), so that both are at work; only when the batch
was as large as it may be, because a small one means that little waits, and what comes meanwhile goes together better.

Invariant: what was made ready is used only where cursor and mark then stand as they were thought to; else it is read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from tidegate.store.entry import Entry
from tidegate.store.reader import READ_BYTES

from . import cancelling
from .backend import Mark, Operation
from .plan import Asked, Plan

Key = tuple[str, int]
"""(gateway, epoch)"""


class Log(cancelling.Log, Protocol):
    """What this needs of `store.reader.LogReader`."""

    def read(self, after: int, limit: int) -> tuple[list[Entry], int]: ...


class Stretch(NamedTuple):
    """Entries of one (gateway, epoch) beyond `after`, and what those beyond the mark ask for."""

    after: int
    through: int
    entries: list[Entry]
    mark: Mark
    operations: list[Operation]
    wanted: int
    """Entries that ask for anything."""
    left_out: int
    """Entries that no longer do, because they were cancelled."""
    is_full: bool
    """It ended because it was large enough, not because nothing followed."""

    @property
    def key(self) -> Key:
        return self.entries[0].gateway, self.entries[0].epoch


class Stretches:
    """See the module."""

    def __init__(self, plan: Plan, log: Log) -> None:
        self._plan = plan
        self._log = log
        self._cancelling = cancelling.Cancelling(plan, log)
        self._ahead: Stretch | None = None

    def next(self, after: int, limit: int, marks: Mapping[Key, Mark], begun: int, whole: bool) -> Stretch | None:
        """What follows `after`, None when nothing does. Entries before `begun` ask for nothing; `whole`: see `backend.Link`."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead.after == after and ahead.mark == marks.get(ahead.key, Mark()) and len(ahead.entries) <= limit:
            return ahead
        return self._make(after, limit, marks, begun, whole)

    def look_ahead(self, sent: Stretch, limit: int, marks: Mapping[Key, Mark], begun: int, whole: bool) -> None:
        """Make ready what follows a stretch that the far end is at work on."""
        # What cancels what is decided when it is sent, so that an acknowledgement that comes until then counts.
        if sent.is_full and not self._plan.has_queues:
            self._ahead = self._make(sent.through, limit, {**marks, sent.key: Mark(sent.through)}, begun, whole)

    def forget(self) -> None:
        """It may take long until there is a use for what was made ready."""
        self._ahead = None

    def _make(self, after: int, limit: int, marks: Mapping[Key, Mark], begun: int, whole: bool) -> Stretch | None:
        entries, through = self._log.read(after, limit)
        if not entries:
            return None
        first = entries[0]
        is_full = len(entries) == limit or sum([len(entry.payload) for entry in entries]) > READ_BYTES
        for number, entry in enumerate(entries):
            if entry.epoch != first.epoch or entry.gateway != first.gateway:
                entries, through, is_full = entries[:number], entry.seq - 1, True
                break
        mark = marks.get((first.gateway, first.epoch), Mark())
        cancelled = self._cancelling.among(entries, mark, whole)
        asked = self._plan.ask(entries, mark.seq, cancelled) if first.seq >= begun else Asked([], 0, 0)
        if mark.done:
            asked = asked._replace(operations=asked.operations[mark.done :])
        return Stretch(after, through, entries, mark, *asked, is_full)
