"""The balance of a campaign: what clients were acknowledged, what the log holds, what the far end holds, row by row.

Acknowledged must be in the log, and the far end must hold what the log holds: every row equal, in the log's order, once. A
message stands twice in the log only where its sender sent it again with DUP after QoS 1. Retained messages and presence must
end as the clients left them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

from tidegate.store.entry import CONNECTED, DISCONNECTED, PUBLISH, Entry
from tidegate.store.reader import LogReader

from .far_end import Contents, Presence, Row
from .people import Keeper, Key, Publisher, Visitor


@dataclass
class Balance:
    """The figures; those after `stored_again_explained` must be 0."""

    published: int = 0
    resent_with_dup: int = 0
    acknowledged: int = 0
    stored: int = 0
    at_the_far_end: int = 0
    retained_at_the_end: int = 0
    clients_at_the_far_end: int = 0
    stored_again_explained: int = 0
    missing_in_the_log: int = 0
    stored_again_unexplained: int = 0
    missing_at_the_far_end: int = 0
    extra_at_the_far_end: int = 0
    out_of_order: int = 0
    rows_that_differ: int = 0
    counter_wrong_by: int = 0
    retained_wrong: int = 0
    presence_wrong: int = 0
    refused: int = 0
    faults_of_the_program: int = 0

    def mistakes(self) -> dict[str, int]:
        """What must not be; empty is good."""
        names = [field.name for field in fields(self)]
        must_be_none = names[names.index("stored_again_explained") + 1 :]
        found = {name: getattr(self, name) for name in must_be_none if getattr(self, name)}
        return found if self.published else found | {"published": 0}


def read_log(data: Path) -> list[Entry]:
    """Every entry, as the uplink reads them."""
    entries: list[Entry] = []
    with closing(LogReader(data / "log.db")) as reader:
        while True:
            found, _ = reader.read(entries[-1].seq if entries else 0, 10_000)
            if not found:
                return entries
            entries += found


def expected(entries: Iterable[Entry]) -> Contents:
    """What a far end must hold when it has everything."""
    messages: list[Row] = []
    listed: list[str] = []
    retained: dict[str, Row] = {}
    presence: dict[str, Presence] = {}
    for entry in entries:
        if entry.kind in (CONNECTED, DISCONNECTED):
            presence[entry.clientid] = _moved(presence.get(entry.clientid), entry)
        elif entry.kind == PUBLISH:
            listed.append(entry.msgid)
            row = Row(entry.msgid, entry.topic, entry.clientid, entry.qos, entry.retain, entry.payload)
            if entry.retain and not entry.payload:
                retained.pop(entry.topic, None)
                continue
            messages.append(row)
            if entry.retain:
                retained[entry.topic] = row
    return Contents(messages, listed, retained, presence, len(listed))


def write_down(path: Path, side: Contents) -> None:
    """One line for each thing, for `diff`."""
    lists: list[Sequence[object]] = [
        side.messages,
        side.listed,
        sorted(side.retained.items()),
        sorted(side.presence.items()),
        [side.counted],
    ]
    path.write_text("".join(f"{thing}\n" for things in lists for thing in things))


def balance(entries: Sequence[Entry], far: Contents, publishers: Sequence[Publisher], visitors: Sequence[Visitor]) -> Balance:
    """Compare everything with everything."""
    log = expected(entries)
    sheet = Balance(stored=len(log.listed), at_the_far_end=len(far.listed))
    _acknowledged(sheet, entries, publishers)
    _rows(sheet, log, far)
    sheet.counter_wrong_by = abs(log.counted - far.counted)
    sheet.retained_at_the_end, sheet.clients_at_the_far_end = len(far.retained), len(far.presence)
    sheet.retained_wrong = _differing(log.retained, far.retained) + _differing(
        {topic: payload for one in publishers if isinstance(one, Keeper) for topic, payload in one.end_state().items()},
        {topic: row.payload for topic, row in far.retained.items()},
    )
    sheet.presence_wrong = _differing(log.presence, far.presence) + _differing(
        {person.name: person.client is not None for person in [*publishers, *visitors]},
        {name: seen.online for name, seen in far.presence.items()},
    )
    return sheet


def _acknowledged(sheet: Balance, entries: Sequence[Entry], publishers: Sequence[Publisher]) -> None:
    stored: Counter[Key] = Counter((entry.topic, entry.payload) for entry in entries if entry.kind == PUBLISH)
    for person in publishers:
        sent, again, acknowledged = person.keys()
        sheet.published += sent.total()
        sheet.resent_with_dup += again.total()
        sheet.acknowledged += acknowledged.total()
        for key, count in sent.items():
            sheet.missing_in_the_log += max(0, acknowledged[key] - stored[key])
            extra = max(0, stored.pop(key, 0) - count)
            allowed = min(extra, again[key]) if person.qos == 1 else 0
            sheet.stored_again_explained += allowed
            sheet.stored_again_unexplained += extra - allowed
    sheet.stored_again_unexplained += stored.total()  # nobody published these


def _rows(sheet: Balance, log: Contents, far: Contents) -> None:
    """Both lists must be equal; how they are not is counted once for each message and reason."""
    wanted, found = Counter(log.listed), Counter(far.listed)
    rows, there = {row.msgid: row for row in log.messages}, Counter(row.msgid for row in far.messages)
    missing = set(wanted).difference(found) | set(rows).difference(there)
    sheet.missing_at_the_far_end = len(missing)
    sheet.extra_at_the_far_end = (found - wanted).total() + (there - Counter(rows.keys())).total()
    sheet.rows_that_differ = sum(1 for row in far.messages if row.msgid in rows and rows[row.msgid] != row)
    sheet.out_of_order = _inversions(log.listed, far.listed) + _inversions(
        [row.msgid for row in log.messages], [row.msgid for row in far.messages]
    )


def _inversions(wanted: Sequence[str], found: Sequence[str]) -> int:
    """Neighbours that stand the wrong way round."""
    place = {msgid: number for number, msgid in enumerate(wanted)}
    known = [place[msgid] for msgid in found if msgid in place]
    return sum(1 for before, after in pairwise(known) if after < before)


def _differing(wanted: Mapping[str, object], found: Mapping[str, object]) -> int:
    return sum(1 for name in {*wanted, *found} if wanted.get(name) != found.get(name))


def _moved(before: Presence | None, entry: Entry) -> Presence:
    seconds = entry.when // 1000
    if entry.kind == CONNECTED:
        return Presence(True, seconds, None)
    return Presence(False, before.online_at if before else 0, seconds)
