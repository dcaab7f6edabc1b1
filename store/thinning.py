"""Taking the lowest priority out of the middle of the log, oldest first, a bounded stretch at a time.

No index says which entry has which priority: a walker for each class of policies goes through the log once, from its oldest
entry on, and what it has passed is gone or may not go. What stays of a stretch is written anew: SQLite joins pages only when
they are less than a third full, so taking single rows out of them would free nothing. *Measured*, 64-byte messages of three
priorities: taking a third of the rows frees no page at all; written anew, nine tenths of what was theirs, for 1 µs a row looked
at. Each entry is written anew at most once for each class below its own.

Invariant: of a class, everything before its walker is gone, or is a gap record, or was retained when the walker passed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .entry import ADDRESSED, GAP, KIND_NAMES, PUBLISH, QOS_MASK
from .policy import Policies, Policy

STRETCH = 10_000
STRETCH_BYTES = 2 << 20
"""A stretch: so many rows, or so many bytes of them."""
SMALL = 2048
"""Bytes of an entry: what is larger leaves pages behind that are free by themselves."""
ROW_ON_DISK = 30
SIZE = f"({ROW_ON_DISK} + ifnull(length(payload), 0) + ifnull(length(properties), 0))"
MAY_GO = f"(kind <> {GAP} OR seq <= ?) AND seq NOT IN (SELECT seq FROM retained)"

_TEMPORARY = (
    "CREATE TEMP TABLE IF NOT EXISTS class (topic INTEGER PRIMARY KEY, class INTEGER NOT NULL)",
    "CREATE TEMP TABLE IF NOT EXISTS stretch (seq INTEGER PRIMARY KEY, at, kind, client, topic, flags, size, goes)",
    "CREATE TEMP TABLE IF NOT EXISTS kept AS SELECT * FROM entry WHERE 0",
)
_LOOK = (
    "INSERT INTO temp.stretch SELECT seq, at, kind, client, topic, flags, size, goes FROM (SELECT *,"
    " sum(size) OVER (ORDER BY seq) - size AS before, sum(size * goes) OVER (ORDER BY seq) - size * goes AS freed FROM"
    f" (SELECT seq, at, kind, client, e.topic, flags, ifnull({SIZE}, {ROW_ON_DISK}) AS size,"
    f" (kind <> {GAP} AND ifnull(c.class, ?) = ? AND seq NOT IN (SELECT seq FROM retained)) AS goes"
    " FROM entry e LEFT JOIN temp.class c ON c.topic = e.topic WHERE seq > ? ORDER BY seq LIMIT ?))"
    " WHERE before < ? AND freed < ?"
)
_SUMS = (
    "SELECT min(seq), max(seq), sum(size), sum(goes), ifnull(avg(size) FILTER (WHERE NOT goes), 0),"
    " json_group_array(seq) FILTER (WHERE goes) FROM temp.stretch"
)
_LOST = (
    "SELECT s.kind, ifnull(t.name, ''), min(seq), max(seq), min(at), max(at), count(*) FROM temp.stretch s"
    " LEFT JOIN topic t ON t.id = s.topic WHERE goes GROUP BY s.kind, s.topic ORDER BY min(seq)"
)
_MESSAGES = (
    f"SELECT t.name, iif(s.kind = {ADDRESSED}, s.client, 0) AS only, json_group_array(seq), json_group_array(s.client)"
    f" FROM temp.stretch s JOIN topic t ON t.id = s.topic"
    f" WHERE goes AND s.kind IN ({PUBLISH}, {ADDRESSED}) AND flags & {QOS_MASK} > 0 GROUP BY s.topic, only"
)
_TAKE = "DELETE FROM entry WHERE seq IN (SELECT value FROM json_each(?))"
_KEEP = "INSERT INTO temp.kept SELECT * FROM entry WHERE seq BETWEEN ? AND ? AND seq NOT IN (SELECT value FROM json_each(?))"
_CLEAR = "DELETE FROM entry WHERE seq BETWEEN ? AND ?"
_PUT = "INSERT INTO entry SELECT * FROM temp.kept ORDER BY seq"
_FORGET = "DELETE FROM temp.kept"


@dataclass(frozen=True, slots=True)
class Lost:
    """Of one topic, everything of this kind from `first_seq` to `last_seq`: so many entries.

    `topic` is the filter of a policy when there were too many topics; `policy` is that filter in any case.
    """

    event: str
    topic: str
    policy: str
    reason: str
    first_seq: int
    last_seq: int
    first_at: int
    last_at: int
    count: int


class Taken(NamedTuple):
    """Messages of one topic that sessions may be waiting for, by seq, and who published each; clients by their numbers."""

    topic: str
    only: int
    """The client they are addressed to; 0: all who subscribed."""
    seqs: list[int]
    senders: list[int]


class Plan(NamedTuple):
    """`changes` carry a step out, in one transaction; `lost` is what somebody still wanted of it."""

    changes: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    cost: int = 0
    """Bytes of what is touched, and so written, about."""
    lost: tuple[Lost, ...] = ()
    messages: tuple[Taken, ...] = ()
    """Of those, what is for sessions, number by number: some of them may be past it."""


class Thinning:
    """See the module; used by the committer's thread only."""

    def __init__(self, policies: Policies) -> None:
        self._policies = policies
        self._default = policies.class_of(Policy())
        self._passed = [0 for _ in policies.classes]
        self._topics = 0
        self.level = policies.classes[0][0]
        """The priority that is being taken; above all of them when nothing is left."""

    def begin_again(self) -> None:
        """Walk through the whole log again."""
        self._passed = [0 for _ in self._passed]

    def step(self, db: sqlite3.Connection, need: int, reason: str) -> Plan | None:
        """What frees so many bytes, or the next stretch of it; None if nothing may go. Raises sqlite3.Error."""
        for sql in _TEMPORARY:
            db.execute(sql)
        self._learn(db)
        (top,) = db.execute("SELECT ifnull(max(seq), 0) FROM entry").fetchone()
        for number, (priority, rejects) in enumerate(self._policies.classes):
            self.level = priority
            if not rejects and self._passed[number] < top:
                return self._walk(db, number, need, reason)
        self.level = priority + 1
        return None

    def _learn(self, db: sqlite3.Connection) -> None:
        """Classes of topics that are new; those of the default class need no row."""
        while self._policies.given:
            new = db.execute("SELECT id, name FROM topic WHERE id > ? ORDER BY id LIMIT 1000", (self._topics,)).fetchall()
            if not new:
                return
            self._topics = new[-1][0]
            classes = [(number, self._policies.class_of(self._policies.of(name))) for number, name in new]
            db.executemany("INSERT OR IGNORE INTO temp.class VALUES (?,?)", [row for row in classes if row[1] != self._default])
            db.execute("DELETE FROM temp.class WHERE topic NOT IN (SELECT id FROM topic)")

    def _walk(self, db: sqlite3.Connection, number: int, need: int, reason: str) -> Plan:
        passed = self._passed[number]
        db.execute("DELETE FROM temp.stretch")
        db.execute(_LOOK, (self._default, number, passed, STRETCH, STRETCH_BYTES, need))
        first, last, cost, count, kept_size, seqs = db.execute(_SUMS).fetchone()
        self._passed[number] = last
        if not count:
            return Plan()
        changes: tuple[tuple[str, tuple[Any, ...]], ...] = ((_TAKE, (seqs,)),)
        if 0 < kept_size < SMALL:
            changes = (_KEEP, (first, last, seqs)), (_CLEAR, (first, last)), (_PUT, ()), (_FORGET, ())
        return Plan(changes, cost, self._lost(db, reason), tuple([_taken(*row) for row in db.execute(_MESSAGES).fetchall()]))

    def _lost(self, db: sqlite3.Connection, reason: str) -> tuple[Lost, ...]:
        found = [
            Lost(KIND_NAMES[kind], topic, self._policies.of(topic).topic if topic else "#", reason, *rest)
            for kind, topic, *rest in db.execute(_LOST).fetchall()
        ]
        return tuple(found)


def _taken(topic: str, only: int, seqs: str, senders: str) -> Taken:
    both = sorted(zip(json.loads(seqs), json.loads(senders), strict=True))
    return Taken(topic, only, [seq for seq, _ in both], [sender for _, sender in both])


def by_policy(found: Iterable[Lost]) -> tuple[Lost, ...]:
    """The same, with the policies' filters instead of the topics."""
    joined: dict[tuple[str, str], Lost] = {}
    for lost in found:
        name = lost.policy if lost.topic else ""
        key = (lost.event, name)
        joined[key] = join(joined[key], lost) if key in joined else replace(lost, topic=name)
    return tuple(joined.values())


def join(one: Lost, other: Lost) -> Lost:
    """Both in one, under the name of the first."""
    return replace(
        one,
        first_seq=min(one.first_seq, other.first_seq),
        last_seq=max(one.last_seq, other.last_seq),
        first_at=min(one.first_at, other.first_at),
        last_at=max(one.last_at, other.last_at),
        count=one.count + other.count,
    )
