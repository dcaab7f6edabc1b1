"""The uplink process: `python -m tidegate.uplink.child --data DIR --conf DIR --backend redis`.

A fresh process beside the broker, so a driver that blocks, leaks or crashes is not felt by a device. Its standard input is a
pipe from the broker: any byte means "there is something new", its end means that the broker is gone: stop now. A byte on its
standard output means that there are answers in the inbox. One thread for each pool and one for what a pool asks, plain
blocking calls. A lock file beside `uplink.db` makes sure there is only one such process.

Invariant: this process is the only writer of `uplink.db` while it holds the lock.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import importlib
import os
import random
import select
import selectors
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TextIO, cast

from tidegate.store.reader import LogReader
from tidegate.store.report import EACH, ERROR, INFO, WARNING, Level, Report, Say, brief
from tidegate.store.schema import StoreError, explain

from .asking import AskingBackend
from .asking_lane import AskingLane, Lane
from .backend import Backend
from .lane_book import LaneBook
from .lane_log import LaneLog
from .plan import Plan
from .pools import Pool
from .progress import Progress, Standing
from .reading import Reading, reading
from .requests import take_up
from .rule import Rule, RuleFile, load_all, wants
from .worker import Wait, Worker

LOCK_WAIT = 5.0
STOP_WAIT = 2.0
FIRST_PAUSE, MAX_PAUSE = 0.2, 30.0
"""Seconds between looks at an `uplink.db` that cannot be used."""
GC_THRESHOLD = 50_000
"""A batch is thousands of short-lived tuples without cycles; looking through them early finds nothing."""
EXIT_FAILED, EXIT_LOCKED = 1, 3


class GatewayClock:
    """Lengths of time are the machine's; the time of day is the gateway's, which knows it better than the wall clock."""

    def __init__(self, log: LogReader) -> None:
        self._log = log

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 + (self._log.run().clock_offset or 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until the pipe ends or SIGTERM comes. Exit codes: 0 stopped, 1 failed, 3 another one runs."""
    options = _options(arguments)
    gc.set_threshold(GC_THRESHOLD)
    report = Report(options.log_format, options.log_level)
    try:
        try:
            lock = _lock(options.data / "uplink.lock")
        except OSError as error:
            text = "the uplink may not take its lock; check owner and rights"
            report("uplink_locked", text, ERROR, lock=options.data / "uplink.lock", reason=error.strerror)
            return EXIT_FAILED
        if lock is None:
            report("uplink_locked", "another uplink runs; this one ends", ERROR, lock=options.data / "uplink.lock")
            return EXIT_LOCKED
        with lock:
            return _run(options.data, options.conf, options.backend, report)
    finally:
        report.close()


def _run(data: Path, conf: Path, backends: Sequence[str], report: Report) -> int:
    stop = _Stop(report.tick)
    pause, said = FIRST_PAUSE, False
    while True:
        try:
            progress, threads = _begin(data, conf, backends, report)
            break
        except StoreError as error:
            reason = str(error)
        if not said:
            said = True
            text = "the uplink waits until its file can be used, the log keeps everything"
            report("uplink_waits", text, ERROR, reason=reason)
        if stop.wait(0, (), pause) is not None:
            return 0
        pause = min(pause * 2, MAX_PAUSE)
    for thread in threads:
        thread.start()
    ended_by_broker = stop.wait(0, threads, news=lambda: _take_up(data, progress, report))
    for thread in threads:
        thread.halt()
    deadline = time.monotonic() + (0.5 if ended_by_broker else STOP_WAIT)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        # A driver hangs in a call: nothing is lost by leaving it, the mark at the far end says what arrived.
        report.close()
        os._exit(0)
    progress.close()
    return 0


def _take_up(data: Path, progress: Progress, report: Report) -> None:
    try:
        take_up(data, progress)
    except StoreError as error:
        text = "what was asked of the quarantine is kept and done later"
        report("dead_not_taken_up", text, WARNING, reason=error)


def _begin(data: Path, conf: Path, backends: Sequence[str], report: Report) -> tuple[Progress, list[PoolThread]]:
    """Open `uplink.db` and make a thread for each pool that can work. Raises StoreError when the file cannot be used."""
    progress = Progress(data)
    try:
        take_up(data, progress)
        return progress, _make_threads(data, conf, backends, progress, report)
    except (StoreError, sqlite3.Error) as error:
        progress.close()
        raise StoreError(explain(data / "uplink.db", error) if isinstance(error, sqlite3.Error) else str(error)) from error


def _make_threads(data: Path, conf: Path, backends: Sequence[str], progress: Progress, report: Report) -> list[PoolThread]:
    working = take_rules(conf, backends, progress, report)
    ruled = [(pool, [rule for rule in rule_file.rules if rule.pool == pool.name]) for rule_file, pool in working]
    threads = [PoolThread(data, pool, _worker(data, rules, pool, progress), report) for pool, rules in ruled]
    asking = [(pool, found) for pool, rules in ruled if (found := reading(rules)) is not None]
    book = LaneBook(progress)
    # Of a pool that cannot work nobody knows what it asks: its questions stay.
    book.keep_lanes({pool.full_name for pool, _ in asking} | (set(progress.names()) - {pool.full_name for _, pool in working}))
    return threads + [PoolThread(data, pool, _lane(data, found, pool, book), report) for pool, found in asking]


def _worker(data: Path, rules: Sequence[Rule], pool: Pool, progress: Progress) -> Make:
    def make(say: Say) -> tuple[Driven, LogReader]:
        # The driver is imported here, only when a pool needs it.
        backend = cast(Backend, importlib.import_module(f"tidegate.uplink.to_{pool.backend}"))
        log = LogReader(data / "log.db", waits=True)
        plan = Plan(rules, backend, log.run().node)
        clock = GatewayClock(log)
        return Worker(pool.full_name, plan, lambda: backend.connect(pool), log, progress, clock, say, random.Random()), log

    return make


def _lane(data: Path, found: Reading, pool: Pool, book: LaneBook) -> Make:
    def make(say: Say) -> tuple[Driven, LogReader]:
        backend = cast(AskingBackend, importlib.import_module(f"tidegate.uplink.to_{pool.backend}"))
        log = LaneLog(data / "log.db")
        lane = Lane(pool.full_name, log.run().code, found, pool.settings["lookup_interval"])
        clock = GatewayClock(log)
        return AskingLane(lane, lambda: backend.connect_asker(pool), log, book, clock, say, random.Random(), _tell), log

    return make


def _tell() -> None:
    """The broker reads our standard output: a byte says that there are answers in the inbox."""
    # Gone: the end of our standard input tells us. Full: it has not read the last ones yet.
    with contextlib.suppress(OSError):
        if select.select([], [1], [], 0)[1]:
            os.write(1, b"\n")


def take_rules(conf: Path, backends: Sequence[str], progress: Progress, report: Say) -> list[tuple[RuleFile, Pool]]:
    """Read the files and write down what becomes of their pools; those that can work. Raises StoreError."""
    files = load_all(conf, [name for name in backends if name != "sqlite"])
    pools = [pool for rule_file in files for pool in _pools(rule_file, progress)]
    progress.keep_only([pool.full_name for _, pool in pools])
    working: list[tuple[RuleFile, Pool]] = []
    for rule_file, pool in pools:
        if rule_file.mistakes:
            _mark_misconfigured(progress, rule_file, pool, report)
        else:
            # What a worker will read of it is read here, where a damaged file can be waited for.
            progress.standing(pool.full_name), progress.marks(pool.full_name)
            working.append((rule_file, pool))
    for rule_file in files:
        if not rule_file.mistakes:
            progress.save_wants(rule_file.backend, wants([rule_file]))
    return working


class Driven(Protocol):
    """What a thread steps: a worker, or a lane that asks."""

    @property
    def fileno(self) -> int: ...
    def step(self) -> Wait: ...
    def stop(self) -> None: ...


Make = Callable[[Say], tuple[Driven, LogReader]]


class PoolThread(threading.Thread):
    """A pool's worker, or its lane that asks, in its own thread and on its own connection; `make` is called there."""

    def __init__(self, data: Path, pool: Pool, make: Make, report: Report) -> None:
        super().__init__(name=pool.full_name, daemon=True)
        self._data = data
        self._make = make
        self._report = report
        self._halted = threading.Event()
        self._news, self._tell = os.pipe()
        os.set_blocking(self._news, False)
        os.set_blocking(self._tell, False)

    def wake(self) -> None:
        """There may be new entries."""
        # A full pipe says so already.
        with contextlib.suppress(BlockingIOError):
            os.write(self._tell, b"\n")

    def halt(self) -> None:
        """Finish the batch at hand, then end."""
        self._halted.set()
        self.wake()

    def run(self) -> None:
        try:
            self._run()
        except (StoreError, sqlite3.Error) as error:
            self._end_process("the log cannot be read; the uplink ends", path=self._data / "log.db", reason=error)
        except Exception as error:  # noqa: BLE001 - protects the user: a pool that died alone would look alive in `status`
            self._end_process("a fault in the program; the uplink ends", fault=brief(error))

    def _run(self) -> None:
        driven, log = self._make(self._say)
        while not self._halted.is_set():
            self._rest(driven.step(), driven.fileno)
        driven.stop()
        log.close()

    def _say(self, event: str, text: str, level: Level = INFO, _: str | None = None, /, **fields: object) -> None:
        # Whoever is stepped here holds repetitions back by itself (`rarely`).
        self._report(event, text, level, EACH, pool=self.name, **fields)

    def _end_process(self, text: str, **fields: object) -> None:
        self._say("pool_failed", text, ERROR, None, **fields)
        self._report.close()
        os._exit(EXIT_FAILED)

    def _rest(self, wait: Wait, far_end: int) -> None:
        """Until the time is over, or news come, or the far end goes away while nobody asks it anything."""
        if not wait.for_news:
            self._halted.wait(wait.seconds)
        elif wait.seconds != 0:
            watched = [self._news] if far_end < 0 else [self._news, far_end]
            select.select(watched, [], [], wait.seconds)
            with contextlib.suppress(BlockingIOError):
                os.read(self._news, 65_536)


class _Stop:
    """Waits for the broker's bytes, the end of its pipe, or SIGTERM; meanwhile `tick` each second as long as it asks for it."""

    def __init__(self, tick: Callable[[], bool]) -> None:
        self._tick = tick
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        # A reload concerns the broker, which starts a new child; a stray signal must not end this one.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def wait(
        self,
        pipe: int,
        threads: Sequence[PoolThread],
        seconds: float | None = None,
        news: Callable[[], None] = lambda: None,
    ) -> bool | None:
        """Do `news` and wake the threads, each time; True: the broker is gone, False: told to stop, None: the time is over."""
        end = None if seconds is None else time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            selector.register(self._read, selectors.EVENT_READ)
            while True:
                pauses = ([max(0.0, end - time.monotonic())] if end is not None else []) + ([1.0] if self._tick() else [])
                ready = {key.fd for key, _ in selector.select(min(pauses, default=None))}
                if self._read in ready:
                    return False
                if pipe in ready and not os.read(pipe, 65_536):
                    return True
                if end is not None and time.monotonic() >= end:
                    return None
                if ready:
                    news()
                    for thread in threads:
                        thread.wake()


def _pools(rule_file: RuleFile, progress: Progress) -> list[tuple[RuleFile, Pool]]:
    """The file's pools; with a mistake in it those it had before too, which may be what the mistake hides, and if there are
    none the first that the specification names."""
    found = {pool.name: pool for pool in rule_file.pools}
    if rule_file.mistakes:
        backend = rule_file.backend
        before = [name.partition(".")[2] for name in progress.names() if name.startswith(f"{backend}.")]
        found = {name: Pool(backend, name, {}) for name in before} | found
        found = found or {"pool1": Pool(backend, "pool1", {})}
    return [(rule_file, pool) for pool in found.values()]


def _mark_misconfigured(progress: Progress, rule_file: RuleFile, pool: Pool, report: Say) -> None:
    """The pool waits where it is; its events are kept until the file is mended."""
    name = pool.full_name
    first = rule_file.mistakes[0]
    more = len(rule_file.mistakes) - 1
    error = f"{first}" + (f" (and {more} more)" if more else "")
    standing: Standing = progress.standing(name)
    hint = f"mend {rule_file.path} and reload; `tidegate check` lists every mistake"
    progress.save(
        name,
        standing._replace(state="misconfigured", error=error, hint=hint, rate=0.0),
        {},
        time.time_ns() // 1_000_000,
    )
    report("pool_misconfigured", "its events are kept", WARNING, name, pool=name, reason=error, hint=hint)


def _lock(path: Path) -> TextIO | None:
    """Take the lock; an orphan of a killed broker needs a moment to notice that its pipe ended."""
    file = path.open("w", encoding="ascii")
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(0.05)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tidegate-uplink", description="The uplink process; the gateway starts it.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--conf", type=Path, required=True)
    parser.add_argument("--backend", action="append", required=True)
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--log-level", default="info")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
