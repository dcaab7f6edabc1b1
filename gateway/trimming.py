"""Driving the trim: when it looks, and how its steps get into the log's batches.

It looks every ten seconds, and as soon as the commits since the last look could have filled the disk budget. One step is
under way at a time: asked for in the committer's thread, carried out by the broker, and when that is durable the next.

Invariant: at most one step is under way, however often it is started.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tidegate.store.names import Unused
from tidegate.store.report import WARNING, Say
from tidegate.store.trim import Plan, Trim

from .broker import BATCH_LIMIT, Broker

Submit = Callable[[Callable[[], Any], Callable[[Any], None]], None]
PAUSE = 10.0


class Reach(NamedTuple):
    """`floor`: all at or below it is done with by everyone; `pools`: where the far ends are."""

    floor: int
    pools: tuple[int, ...]


class Trimming:
    """`reach()` tells where the cursors are; `trim` may be replaced when the rules change."""

    def __init__(
        self, trim: Trim, db: sqlite3.Connection, submit: Submit, broker: Broker, reach: Callable[[], Reach], report: Say
    ) -> None:
        self.trim = trim
        self._db = db
        self._submit = submit
        self._broker = broker
        self._reach = reach
        self._report = report
        self._under_way = False
        self._asked = False
        self._since = 0
        self._next = 0.0

    def tick(self) -> None:
        """Called each second."""
        if self._broker.now >= self._next:
            self._next = self._broker.now + PAUSE
            if self._broker.gaps.due(self._reach().pools, self._broker.now):
                self._broker.gaps.close()
                self._broker.turn_over()
            self.start()

    def committed(self, size: int) -> None:
        """So many bytes more may be on disk now."""
        self._pace()
        self._since += size
        if self._since >= self.trim.look_every and not self._under_way and not self._asked:
            self._since = 0
            self._asked = True
            self._submit(lambda: self.trim.above(self._db), self._looked)

    def start(self) -> None:
        """Take steps until nothing is left to do."""
        if not self._under_way:
            self._under_way = True
            self._step()

    def _pace(self) -> None:
        """While the log is near its budget and something can go, nothing may come faster than that: publishers wait."""
        self._broker.hold(0 if self.trim.tight and self._under_way else min(BATCH_LIMIT, self.trim.look_every))

    def _looked(self, above: bool | Exception) -> None:
        self._asked = False
        if above is True:
            self.start()

    def _step(self) -> None:
        log = self._broker.log
        trim, now, floor = self.trim, log.clock.at(log.mono), self._reach().floor
        self._submit(lambda: trim.plan(self._db, now, floor), self._carry_out)

    def _carry_out(self, plan: Plan | Unused | Exception | None) -> None:
        broker = self._broker
        broker.pressure.set_level(self.trim.level)
        if self.trim.is_stuck and broker.router.level is None:
            text = "the log is above its budget and nothing is left that may go: retained messages, sessions and names stay"
            self._report("budget_exceeded", text, WARNING)
        if isinstance(plan, Exception):
            self._report("trim_failed", "the log cannot be trimmed", WARNING, reason=plan)
        if plan is None or isinstance(plan, Exception):
            self._under_way = False
            self._pace()
        elif not (plan.changes if isinstance(plan, Plan) else plan.topics or plan.clients or plan.first):
            self._step()
        else:
            broker.when_durable(self._step)
            if isinstance(plan, Plan):
                broker.trim(plan)
            else:
                broker.collect(plan)


def reach(broker: Broker, pools: Iterable[int]) -> Reach:
    """Of everyone: sessions, as stored, and pools, by their cursors."""
    pools = tuple(pools)
    live = broker.delivery.live
    sessions = [session.floor(live) for session in broker.sessions if session.persistent or session.behind]
    return Reach(min([live, *sessions, *pools]), pools)
