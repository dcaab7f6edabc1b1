"""The uplink's side of the simulation: rule files that change, the child that reads them, one far end for each pool.

The broker reads a changed file at once, the child when it is started again, so for a while one goes by the old rules and the
other by the new ones. What must be true in the end, for each row of the log and each pool that the file names: the operations
of the row, as one of the child's starts understood them that was in force after the row was stored, were applied once or wait
in quarantine; the starts go forward along the log; a row passed over was wanted by none of them.

Invariant: a worker carries on only while the start that made it is the newest.
"""

from __future__ import annotations

import random
import sqlite3
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from zlib import crc32

from tidegate.store.log import Row
from tidegate.store.reader import LogReader
from tidegate.store.schema import StoreError
from tidegate.uplink.child import take_rules
from tidegate.uplink.plan import Plan
from tidegate.uplink.progress import Progress, Quarantined, Standing, saved_wants
from tidegate.uplink.rule import load_all, wants
from tidegate.uplink.worker import Worker

from tests.broker.world import World
from tests.support.said import Said
from tests.uplink.far_end import FarEnd
from tests.uplink.rig import TestClock

from .model import Model
from .rulebook import FILE, POOLS, RuleBook, TaggedBackend, another, untagged, whole

BAD, POISON = 23, 61
"""One operation of so many is refused by itself, or with the whole batch."""
Tagged = tuple[int, bytes]
"""(start of the uplink that made it, operation)."""
Kept = dict[int, list[Tagged]]
"""seq -> what is in quarantine of it."""


class Picky:
    """The operations that a far end refuses: always the same ones, whoever made them."""

    def __init__(self, one_of: int, calm: Callable[[], bool]) -> None:
        self._one_of = one_of
        self._calm = calm

    def __contains__(self, data: object) -> bool:
        assert isinstance(data, bytes)
        return crc32(untagged(data)[1]) % self._one_of == 0 and not self._calm()


class Book(Progress):
    """`uplink.db` on the disk that is full at times."""

    def __init__(self, directory: Path, is_full: Callable[[], bool]) -> None:
        self._is_full = is_full
        super().__init__(directory)

    def save(self, pool: str, standing: Standing, marks: dict[tuple[str, int], int], at: int) -> None:  # type: ignore[override]
        self._refuse_if_full()
        super().save(pool, standing, marks, at)

    def quarantine(self, pool: str, rows: Sequence[Quarantined], at: int) -> int:  # type: ignore[override]
        self._refuse_if_full()
        return super().quarantine(pool, rows, at)

    def keep_only(self, pools: Sequence[str]) -> None:  # type: ignore[override]
        self._refuse_if_full()
        super().keep_only(pools)

    def _refuse_if_full(self) -> None:
        if self._is_full():
            raise StoreError("uplink.db: database or disk is full")


class Uplink:
    """See the module. `book` is the file as it stands."""

    worker_type: type[Worker] = Worker
    far_type: type[FarEnd] = FarEnd
    trims = False
    """Whether the log lets go of what nobody waits for: then a pool that is left out of the file for a while loses it."""

    def __init__(self, directory: Path, chance: random.Random, model: Model, is_full: Callable[[], bool]) -> None:
        self.book = whole()
        self.starts: list[tuple[RuleBook, int]] = []
        """Each start of the child: the file it read, and how many rows were durable then."""
        self.clock = TestClock()
        self.said = Said()
        self.tells: list[tuple[RuleBook, int]] = []
        """The same of the broker."""
        self.named: list[str] = []
        """The pools that the broker knows of."""
        self.due = False
        """Whether the child is to be started again."""
        self._directory = directory
        self._chance = chance
        self.model = model
        self._write()
        self.far = {pool: self._far_end() for pool in POOLS}
        self.progress = Book(directory, is_full)
        self._workers: list[Worker] = []
        self.open_reader()

    def _far_end(self) -> FarEnd:
        return self.far_type(self._chance, Picky(BAD, lambda: False), Picky(POISON, lambda: False))

    def open_reader(self) -> None:
        self.reader = LogReader(self._directory / "log.db")

    def close(self) -> None:
        self.progress.close()
        self.reader.close()

    # -- what happens ----------------------------------------------------------------------------------------------

    def edit(self) -> None:
        """Somebody writes another file; nobody has read it yet."""
        self.book = another(self._chance, self.book)
        self._write()

    def mend(self, box: World) -> None:
        """The end: a file for everyone, read by everyone."""
        self.book = whole()
        self._write()
        self.tell(box)

    def tell(self, box: World) -> None:
        """The broker reads the file, as it does at its start and at SIGHUP; the child is to be started again."""
        files = load_all(self._directory, ["redis"])
        box.broker.router.set_wants(wants(files, saved_wants(self._directory)))
        self.named = [pool.full_name for file in files for pool in file.pools]
        self.tells.append((self.book, len(self.model.rows)))
        self.model.rules(self._kept_by(self.book).wants, box.broker.log.next_seq)
        self.due = True

    def start(self) -> None:
        """A new child: what the old one had in memory is forgotten."""
        self._workers = []
        self.due = True
        try:
            pools = take_rules(self._directory, ["redis"], self.progress, self.said)
        except StoreError:
            return  # the child tries again
        self.due = False
        if self.starts and self.starts[-1][0] != self.book:
            # Not promised: what new rules want of entries that the old ones passed over may follow a tail of the old ones that
            # arrives after the new child has asked for the marks.
            for far in self.far.values():
                far.forget_late()
        self.starts.append((self.book, len(self.model.rows)))
        tag = len(self.starts) - 1
        for rule_file, pool in pools:
            rules = [rule for rule in rule_file.rules if rule.pool == pool.name]
            self._workers.append(
                self.worker_type(
                    pool.full_name, Plan(rules, TaggedBackend(tag), "node"), self.far[pool.name].connect, self.reader,
                    self.progress, self.clock, self.said, self._chance,
                )
            )  # fmt: skip

    def step(self) -> bool:
        """The child starts, or each of its workers does one thing; whether any of them has more to do."""
        if self.due:
            self.start()
            return True
        waits = [worker.step().seconds for worker in self._workers]
        self.clock.now += min((seconds for seconds in waits if seconds is not None), default=0.0) or 0.01
        return any(seconds is not None for seconds in waits)

    def calm(self) -> None:
        for far in self.far.values():
            far.calm = True

    def _write(self) -> None:
        (self._directory / FILE).write_bytes(self.book.text())

    def _kept_by(self, book: RuleBook) -> RuleBook:
        """What the gateway must keep events for: a file that nobody can read wants what the last good one did."""
        if book.mistake != "bytes":
            return book
        good = [read for read, _ in self.starts if not read.mistake]
        return good[-1] if good else RuleBook((), ())

    def story(self) -> str:
        return repr([far.state.applied for far in self.far.values()])

    # -- what must be true -----------------------------------------------------------------------------------------

    def check(self, rows: Sequence[Row]) -> None:
        """At the end, when the last file names every pool and nothing waits."""
        assert self.starts[-1][0] == self.book, "the uplink goes by older rules"
        for pool in POOLS:
            self.check_pool(pool, rows)

    def take_stock(self) -> None:
        """At any time: of what is before the last that was applied nothing is missing; the rest waits."""
        for pool in POOLS:
            self.check_pool(pool, self.model.rows, at_end=False)

    def check_pool(self, pool: str, rows: Sequence[Row], at_end: bool = True) -> None:
        """Wanted = delivered + parked + waiting, for each row; nothing else is there, and at the end nothing waits."""
        applied: dict[int, list[Tagged]] = {}
        last = 0
        for seq, _, data in self.far[pool].state.applied:
            assert seq >= last, f"{pool}: {seq} after {last}"
            last = seq
            applied.setdefault(seq, []).append(untagged(data))
        kept = self.quarantined(pool)
        low = 0
        passed: list[tuple[int, int, Row]] = []
        for index, row in enumerate(rows):
            low = max(low, self._start_at(index))
            got = applied.pop(row[0], [])
            if not got:
                passed.append((low, index, row))
                continue
            (start,) = {tag for tag, _ in got}
            assert start >= low, f"{pool}: {row[0]} by the rules of start {start}, {low} was in force"
            self._check_passed(pool, passed, start, kept)
            low, passed = start, []
            self._check_row(pool, row, [start], got, kept)
        if at_end:
            self._check_passed(pool, passed, len(self.starts) - 1, kept)
        assert not applied, f"{pool}: got what is not in the log: {sorted(applied.items())[:3]}"

    def _check_passed(self, pool: str, passed: Sequence[tuple[int, int, Row]], last: int, kept: Kept) -> None:
        """Rows of which nothing was applied: some start in force meanwhile wanted nothing of them, or all is parked."""
        for first, index, row in passed:
            if not self._was_left_out(pool, index):
                self._check_row(pool, row, range(first, last + 1), [], kept)

    def _check_row(self, pool: str, row: Row, starts: Sequence[int], got: Sequence[Tagged], kept: Kept) -> None:
        data = [operation for _, operation in got]
        parked = [operation for _, operation in kept.get(row[0], ())]
        if parked:
            self._check_once(pool, row[0], got, kept[row[0]])
        for start in starts:
            book = self.starts[start][0]
            if book.mistake or pool not in book.pools:
                continue  # nobody carried anything
            missing = Counter(book.due(pool, row))
            missing.subtract(data)
            if min(missing.values(), default=0) >= 0 and all(one in parked for one in missing.elements()):
                return
        wanted = ", ".join(f"start {start}: {self.starts[start][0].due(pool, row)}" for start in starts)
        raise AssertionError(f"{pool}: of row {row[0]} it got {data}, parked {parked}, wanted {wanted}")

    def _was_left_out(self, pool: str, index: int) -> bool:
        """Whether the row may have been trimmed because the file did not name the pool, then or later."""
        if not self.trims:
            return False
        for readings in (self.tells, self.starts):
            first = max(0, bisect_right([rows for _, rows in readings], index) - 1)
            if any(pool not in book.pools and not book.mistake for book, _ in readings[first:]):
                return True
        return False

    def _check_once(self, pool: str, seq: int, got: Sequence[Tagged], parked: Sequence[Tagged]) -> None:
        """What is parked was not applied too; but an entry may be parked, its mark lost, and then carried by other rules."""
        for start, original in parked:
            assert (seq, b"%d|%b" % (start, original)) in self.far[pool].ever_refused, (
                f"{pool}: {original!r} of {seq} is parked, not refused"
            )
            for tag, data in got:
                changed = self.starts[start][0] != self.starts[tag][0]
                assert original != data or changed or self.far[pool].restores, f"{pool}: {seq} is applied and parked: {data!r}"

    def quarantined(self, pool: str) -> Kept:
        kept: Kept = {}
        with closing(sqlite3.connect(self._directory / "uplink.db")) as db:
            for seq, original in db.execute("SELECT seq, original FROM quarantine WHERE pool = ?", (f"redis.{pool}",)):
                assert original, f"{pool}: {seq} is parked without what was refused"
                kept.setdefault(seq, []).append(untagged(original))
        for refusal in self.far[pool].state.refused.values():  # noted there, not heard of here
            kept.setdefault(refusal.seq, []).append(untagged(refusal.original))
        return kept

    def _start_at(self, index: int) -> int:
        """The start of the child that was in force when this row became durable."""
        return max(0, bisect_right([rows for _, rows in self.starts], index) - 1)
