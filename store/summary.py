"""Which topics stand where in the log, so that a reader passes over what it has no use for.

For every block of some thousand numbers it is remembered, once somebody had to look, which topics have messages there and how
many. Entries never change and numbers of topics are never used again, so that stays true; what the trim removes only makes it
too much. Nothing of this is on disk: it costs no write, and the first walk after a start finds it anew.

Invariant: only blocks that are complete are remembered, and at most MAX_LISTED topics in all of them.
"""

from __future__ import annotations

import sqlite3
from array import array
from typing import NamedTuple

from .entry import ADDRESSED, PUBLISH, QOS_MASK
from .topic import FilterTree

BLOCK = 4_096
STRETCH = 50_000
"""Numbers that one read looks through, or looks at to remember."""
MAX_LISTED = 200_000
"""About 2 MiB: 3,000 blocks, or 12 million messages, of fifty topics each."""
BLOCK_COST = 20
"""Topics that a block counts for besides its own."""
MAX_TOPICS_IN_QUERY = 500
MAX_KNOWN = 20_000
MAX_CHOICES = 8
TRUSTED = 8
"""Stretches read whole without looking first after one of which everything was wanted."""


class Run(NamedTuple):
    """The next stretch worth reading; empty if `first` is above `last`."""

    first: int
    """Nothing wanted stands below it."""
    last: int
    topics: list[int] | None
    """Those that are wanted there; None: read all."""


class Block(NamedTuple):
    """What one block of the log holds: topics, and how many messages of each."""

    topics: array[int]
    counts: array[int]


class Summary:
    """Used by one thread, within its transactions."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._blocks: dict[int, Block] = {}
        self._listed = 0
        self._choices: dict[frozenset[str], Choice] = {}

    def run(self, first: int, live: int, filters: frozenset[str], rows: int) -> Run:
        """The next stretch from `first` through `live` at most, with about `rows` messages that the filters match."""
        choice = self._choice(filters)
        if choice.trusted():
            return Run(first, min(first + STRETCH - 1, live), None)
        at, looked = first, 0
        while at <= live and looked < STRETCH:
            looked += 0 if at // BLOCK in self._blocks else BLOCK
            block, end = self._block(at, live)
            if choice.of(block.topics, self._db):
                return self._extended(at, live, choice, rows)
            at = end + 1
        return Run(at, at - 1, None)

    def _extended(self, first: int, live: int, choice: Choice, rows: int) -> Run:
        """The run that begins in the block of `first`, which holds something."""
        at, found, topics, all_wanted = first, 0, set[int](), True
        while at <= min(live, first + STRETCH - 1) and found < rows:
            block, end = self._block(at, live)
            wanted = choice.of(block.topics, self._db)
            all_wanted &= len(wanted) == len(block.topics)
            topics |= wanted
            found += sum(count for topic, count in zip(*block, strict=True) if topic in wanted)
            at = end + 1
        choice.trust = TRUSTED if all_wanted else 0
        everything = all_wanted or len(topics) > MAX_TOPICS_IN_QUERY
        return Run(first, at - 1, None if everything else sorted(topics))

    def _choice(self, filters: frozenset[str]) -> Choice:
        choice = self._choices.pop(filters, None) or Choice(filters)
        self._choices[filters] = choice
        while len(self._choices) > MAX_CHOICES:
            del self._choices[next(iter(self._choices))]
        return choice

    def _block(self, at: int, live: int) -> tuple[Block, int]:
        """The block around `at`, and where it ends."""
        number = at // BLOCK
        last = number * BLOCK + BLOCK - 1
        block = self._blocks.pop(number, None)
        if block is None:
            block = self._look(number * BLOCK, min(last, live))
            if last > live:
                return block, live
            self._listed += len(block.topics) + BLOCK_COST
        self._blocks[number] = block
        while self._listed > MAX_LISTED and len(self._blocks) > 1:
            self._listed -= len(self._blocks.pop(next(iter(self._blocks))).topics) + BLOCK_COST
        return block, min(last, live)

    def _look(self, first: int, last: int) -> Block:
        messages = f"entry WHERE seq BETWEEN {first} AND {last} AND kind IN ({PUBLISH}, {ADDRESSED}) AND flags & {QOS_MASK} > 0"
        topics, counts = self._db.execute(
            f"SELECT group_concat(topic), group_concat(n) FROM (SELECT topic, count(*) AS n FROM {messages} GROUP BY topic)"
        ).fetchone()
        if topics is None:
            return Block(array("q"), array("H"))
        return Block(array("q", map(int, topics.split(","))), array("H", map(int, counts.split(","))))


class Choice:
    """What a set of filters makes of topics, by their numbers."""

    def __init__(self, filters: frozenset[str]) -> None:
        self.trust = 0
        self._all = "#" in filters
        """What begins with `$` comes along and is passed over later."""
        self._tree: FilterTree[None, None] = FilterTree()
        for text in () if self._all else filters:
            self._tree.put(text, None, None)
        self._known: dict[int, bool] = {}

    def trusted(self) -> bool:
        """Whether all is wanted, or was so lately."""
        self.trust -= self.trust > 0
        return self._all or self.trust > 0

    def of(self, topics: array[int], db: sqlite3.Connection) -> set[int]:
        """Those of the topics that are wanted."""
        known = self._known
        unknown = [number for number in topics if number not in known]
        if unknown:
            if len(known) + len(unknown) > MAX_KNOWN:
                known.clear()
                unknown = topics.tolist()
            for number, name in db.execute(f"SELECT id, name FROM topic WHERE id IN ({','.join(map(str, unknown))})"):
                known[number] = any(True for _ in self._tree.find(name))
        return {number for number in topics if known.get(number)}
