"""One far end's campaign: the real gateway under traffic, everything that can happen to it in a seeded order, the balance.

Each event ends when something new has reached the far end, so no two faults of the far end hide each other; kills of the
gateway's processes also come in the middle of a fault.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tidegate.uplink.progress import PoolStatus, read_pools

from tests.faults.crowd import Crowd
from tests.support.gateway import Gateway

from .balance import Balance, balance, expected, read_log, write_down
from .cuts import armed
from .far_end import CONNECTED, MISCONFIGURED, FarEnd, Fault
from .people import people

CUT, BLIND = "cut after the commit, before the reply", "other cuts (not counted)"
BROKER, CHILD = "broker killed (-9)", "uplink child killed (-9)"
DEADLINE, DRAIN, LAST_WORDS = 60.0, 180.0, 10.0
BLIND_SHARE = 0.2
BURST = 1.5
"""Seconds whose messages are sent at once before the broker is killed."""
TOML = '[gateway]\nname = "campaign"\n\n[uplink]\nbackends = ["sqlite", "{backend}"]\n'


class Plan(NamedTuple):
    """How often everything happens."""

    cuts: int
    kills: int
    """Of each of the two processes."""
    rounds: int
    """Of each fault."""


class Result(NamedTuple):
    """What was done, and what came of it."""

    counts: Counter[str]
    sheet: Balance


class Trial:
    """Everyone and everything of one campaign against one far end, which runs."""

    def __init__(self, far: FarEnd, directory: Path, chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._far = far
        self._now = "start"
        self._chance = chance
        self._directory = directory
        files = {f"emqx_backend_{far.backend}.conf": far.rules()}
        self._gateway = Gateway(directory, toml=TOML.format(backend=far.backend), files=files)
        self._publishers, self._visitors = people(chance)
        self._crowd = Crowd(self._gateway.port, [*self._publishers, *self._visitors])
        self._kills = {BROKER: self._kill_broker, CHILD: self._kill_child}

    def run(self, plan: Plan) -> Result:
        """All of it."""
        with self._gateway:
            self._until_news([])
            events = _order(plan, list(self._far.faults()), self._chance)
            while events:
                self._happen(events.pop(), events)
            while self.counts[CUT] < plan.cuts:
                self._cut()
            sheet = self._settle()
            assert self._gateway.stop() == 0
            return Result(self.counts, sheet)

    def _happen(self, event: str | Fault, later: list[str | Fault]) -> None:
        self._now = event if isinstance(event, str) else event.name
        if isinstance(event, Fault):
            inside = later.pop() if later and later[-1] in self._kills else ""
            self._suffer(event, str(inside))
        elif event in self._kills:
            self._kill(str(event))
        else:
            self._cut()

    def _cut(self) -> None:
        """One cut, and traffic until what it hid has been told another way."""
        blind = self._chance.randrange(8) if self._chance.random() < BLIND_SHARE else None
        with armed(self._far.doors(), blind) as outcome:
            self._crowd.run_until(lambda: outcome() is not None, DEADLINE, self._say)
            counted = bool(outcome())
        self.counts[CUT if counted else BLIND] += 1
        self._until_news(self._far.marks())

    def _suffer(self, fault: Fault, kill: str) -> None:
        """The fault, until the gateway has noticed and a little longer; `kill`: and one of its processes dies meanwhile."""
        with fault.during():
            if fault.state == CONNECTED:
                self._until_news(self._far.marks())
            else:
                self._crowd.run_until(lambda: self._pool_says(fault.state, fault.words), DEADLINE, self._say)
            self._crowd.run_for(self._chance.uniform(0.1, 0.5))
            if kill:
                self._kills[kill]()
                self.counts[kill] += 1
                self._crowd.run_for(self._chance.uniform(0.1, 0.5))
        self.counts[fault.name] += 1
        marks = self._far.marks()
        if fault.state == MISCONFIGURED:  # tries again each minute; its operator does not wait so long
            os.kill(self._gateway.pid, signal.SIGHUP)
        self._until_news(marks)

    def _kill(self, name: str) -> None:
        """At a random moment of the traffic."""
        self._crowd.run_for(self._chance.uniform(0.0, 0.3))
        self._kills[name]()
        self.counts[name] += 1
        self._until_news(self._far.marks())

    def _kill_broker(self) -> None:
        """In the middle of a burst, of which some is stored and not acknowledged."""
        for person in self._publishers:
            person.hurry(BURST)
        self._crowd.step()
        self._gateway.kill()
        self._crowd.lose()
        self._gateway.start()

    def _kill_child(self) -> None:
        for pid in self._gateway.children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.kill(self._gateway.pid, signal.SIGHUP)  # starts it at once, whatever its back-off

    def _settle(self) -> Balance:
        """Nothing new: everybody gets his answers, everything drains, and is compared."""
        for person in self._publishers:
            person.sending = False
        for visitor in self._visitors:
            visitor.resting = True
        self._crowd.run_until(lambda: all(person.settled() for person in self._publishers), DEADLINE, self._say)
        self._crowd.run_until(self._drained, DRAIN, self._say)
        sheet = self._look()
        end = time.monotonic() + LAST_WORDS
        while sheet.mistakes() and time.monotonic() < end:  # what was on its way when the last client went
            self._crowd.run_for(0.5)
            sheet = self._look()
        if sheet.mistakes():
            write_down(self._directory / "log.txt", expected(read_log(self._gateway.data)))
            write_down(self._directory / "far_end.txt", self._far.contents())
        return sheet

    def _look(self) -> Balance:
        sheet = balance(read_log(self._gateway.data), self._far.contents(), self._publishers, self._visitors)
        sheet.refused = sum(pool.refused for pool in read_pools(self._gateway.data))
        sheet.faults_of_the_program = len(self._complaints())
        return sheet

    def _drained(self) -> bool:
        pool = self._pool()
        return pool is not None and (pool.state, pool.waiting) == (CONNECTED, 0)

    def _until_news(self, before: object) -> None:
        """Traffic until something new has arrived there."""
        self._crowd.run_until(lambda: self._far.marks() != before and self._pool_says(CONNECTED), DEADLINE, self._say)

    def _pool_says(self, state: str, words: str = "") -> bool:
        pool = self._pool()
        return pool is not None and pool.state == state and words in pool.error.lower()

    def _pool(self) -> PoolStatus | None:
        return next(iter(read_pools(self._gateway.data)), None)

    def _complaints(self) -> list[str]:
        """Lines of the whole log that tell of a fault in the program."""
        lines = (self._directory / "gateway.log").read_text(errors="replace").splitlines()
        return [line for line in lines if "Traceback" in line or "internal_error" in line or "pool_failed" in line]

    def _say(self) -> str:
        return f"{self._far.name}, {self._now}: {dict(self.counts)}\n{self._pool()}\n{self._gateway.log()}"


def _order(plan: Plan, faults: Sequence[Fault], chance: random.Random) -> list[str | Fault]:
    """Everything in a random order, last first; every other kill comes right after a fault, so in the middle of it."""
    events: list[str | Fault] = [*[CUT] * plan.cuts, *list(faults) * plan.rounds]
    chance.shuffle(events)
    for name in (BROKER, CHILD):
        for number in range(plan.kills):
            places = [place for place, event in enumerate(events) if number % 2 and isinstance(event, Fault)]
            events.insert(chance.choice(places) if places else chance.randrange(len(events) + 1), name)
    return events
