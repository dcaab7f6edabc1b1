"""The gateway for a given time under random faults of all kinds, with many clients, and a balance sheet at the end.

    .venv/bin/python bench/soak.py [--minutes M] [--seed N] [--directory DIR]

Two lanes of faults run side by side, each one fault at a time: at the gateway (kill -9, SIGSTOP, and as root a full disk and
errors of the disk) and towards the far end (kill -9 of the uplink child, Redis killed or stopped, the link cut, reset or held).
Senders send what is unanswered again with DUP, as the standard asks; some receivers stay, others come and go.

The exit code is 1 if anything acknowledged is missing anywhere, or if there is a copy that no resend explains.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balance import Sheet, balance

from tests.faults import bad_disk
from tests.faults.crowd import Crowd
from tests.faults.traffic import Peer, Receiver, SteadySender, describe
from tests.support.gateway import Gateway
from tests.support.proxy import Proxy
from tests.support.redis_server import RedisServer

SENDERS, STAYING, VISITING = 40, 4, 4
DISK = "384m"
SETTLE = 60.0
TOML = '[gateway]\nname = "soak"\n\n[uplink]\nbackends = ["sqlite", "redis"]\n'
RULES = """\
backend.redis.pool1.server = 127.0.0.1:{port}
backend.redis.pool1.timeout = 1s
backend.redis.hook.message.publish.1 = {{"action": {{"function": "on_message_publish"}}, "pool": "pool1"}}
backend.redis.hook.message.publish.2 = {{"action": {{"commands": ["RPUSH ids ${{msgid}}"]}}, "pool": "pool1"}}
"""
Fault = Callable[[], AbstractContextManager[None]]


class Lane:
    """One fault at a time: random fault, random length, random pause."""

    def __init__(self, faults: dict[str, Fault], chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._faults = faults
        self._chance = chance
        self._open = ExitStack()
        self._ends: float | None = None
        self._next = time.monotonic() + 2.0

    @property
    def faulty(self) -> bool:
        """Whether a fault is going on."""
        return self._ends is not None

    def step(self) -> None:
        """Begin or end a fault if it is time."""
        now = time.monotonic()
        if self._ends is not None and now >= self._ends:
            self.end()
        elif self._ends is None and now >= self._next:
            name = self._chance.choice(list(self._faults))
            self.counts[name] += 1
            self._open.enter_context(self._faults[name]())
            self._ends = time.monotonic() + self._chance.uniform(0.2, 5.0)

    def end(self) -> None:
        """End the fault that is going on."""
        self._open.close()
        self._ends = None
        self._next = time.monotonic() + self._chance.uniform(0.5, 4.0)


class Soak:
    """Everyone and everything of one run."""

    def __init__(self, gateway: Gateway, server: RedisServer, proxy: Proxy, disk: Path | None, chance: random.Random) -> None:
        self.gateway = gateway
        self.server = server
        self.senders = [SteadySender(f"s{n}", f"soak/{n}", 1 + n % 2, 4 + n // 2 % 2) for n in range(SENDERS)]
        self.receivers = [Receiver(f"r{n}", "soak/#", 1 + n % 2, 4 + n // 2 % 2) for n in range(STAYING + VISITING)]
        self.peers: list[Peer] = [*self.receivers, *self.senders]
        self.crowd = Crowd(gateway.port, self.peers)
        self.visitors = self.receivers[STAYING:]
        self.near = Lane(self._near_faults(disk), chance)
        self.far = Lane(self._far_faults(proxy), chance)
        self._chance = chance

    def run_for(self, seconds: float) -> None:
        """Faults and traffic."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.near.step()
            self.far.step()
            self._visit()
            self._traffic()
        self.near.end()
        self.far.end()

    def settle(self) -> bool:
        """Nothing new, no faults: whether everything came to rest in time."""
        self.crowd.call_back()
        for sender in self.senders:
            sender.sending = False
        end = time.monotonic() + SETTLE
        while not self._at_rest():
            if time.monotonic() > end:
                return False
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                self._traffic()
        return True

    def _at_rest(self) -> bool:
        if not all(peer.client is not None for peer in self.peers) or not all(one.settled() for one in self.senders):
            return False
        return all(receiver.has_all(self.senders) for receiver in self.receivers)

    def _traffic(self) -> None:
        self.crowd.step(connecting=not self.near.faulty)

    def _visit(self) -> None:
        """Now and then a visitor goes away for a while."""
        if not self.near.faulty and self._chance.random() < 0.005:
            peer = self._chance.choice(self.visitors)
            if peer.client is not None:
                self.crowd.send_away(peer, self._chance.uniform(0.5, 20.0))

    def _near_faults(self, disk: Path | None) -> dict[str, Fault]:
        faults: dict[str, Fault] = {"broker killed": self._killed, "broker stopped": self._frozen}
        if disk is None:
            return faults
        for name, calls, error in (
            ("disk: write EIO", bad_disk.WRITES, "EIO"),
            ("disk: fsync EIO", bad_disk.FLUSHES, "EIO"),
            ("disk: read-only", bad_disk.WRITES, "EROFS"),
        ):
            faults[name] = lambda calls=calls, error=error: bad_disk.failing(self.gateway.pid, calls, error)  # type: ignore[misc]
        faults["disk: full"] = lambda: _full(disk)
        faults["disk: fsync EIO, then broker killed"] = self._killed_with_a_bad_disk
        return faults

    def _far_faults(self, proxy: Proxy) -> dict[str, Fault]:
        faults: dict[str, Fault] = {
            "uplink child killed": self._child_killed,
            "redis killed": lambda: _between(self.server.kill, self.server.start),
            "redis stopped": lambda: _between(self.server.freeze, self.server.thaw),
        }
        for mode in ("refuse", "reset", "hold_down", "cut_down"):
            faults[f"link: {mode}"] = lambda mode=mode: _between(lambda: proxy.set(mode), lambda: proxy.set("pass"))  # type: ignore[misc]
        return faults

    @contextmanager
    def _killed(self) -> Iterator[None]:
        self.gateway.kill()
        self.crowd.lose()
        self.gateway.start()
        yield

    @contextmanager
    def _killed_with_a_bad_disk(self) -> Iterator[None]:
        """What was written but never confirmed is in the kernel's cache when the next run begins."""
        with bad_disk.failing(self.gateway.pid, bad_disk.FLUSHES, "EIO"):
            yield
            self.gateway.kill()
        self.crowd.lose()
        self.gateway.start()

    def _frozen(self) -> AbstractContextManager[None]:
        return _between(self.gateway.freeze, self.gateway.thaw)

    def _child_killed(self) -> AbstractContextManager[None]:
        for pid in self.gateway.children():
            os.kill(pid, signal.SIGKILL)
        return nullcontext()


@contextmanager
def _between(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    begin()
    try:
        yield
    finally:
        end()


@contextmanager
def _full(disk: Path) -> Iterator[None]:
    bad_disk.fill(disk / "filler")
    try:
        yield
    finally:
        (disk / "filler").unlink()


@contextmanager
def _small_disk(directory: Path) -> Iterator[Path | None]:
    """A file system of our own, None if this user may not have one."""
    if why := bad_disk.reason():
        print(f"without faults of the disk: {why}", file=sys.stderr)
        yield None
        return
    at = directory / "disk"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def soak(directory: Path, seconds: float, chance: random.Random) -> tuple[Sheet, Sequence[Lane]]:
    """One run."""
    with ExitStack() as stack:
        disk = stack.enter_context(_small_disk(directory))
        server = stack.enter_context(RedisServer(directory, "--appendonly", "yes", "--appendfsync", "always"))
        proxy = stack.enter_context(Proxy(server.port))
        files = {"emqx_backend_redis.conf": RULES.format(port=proxy.port)}
        data = (disk or directory) / "data"
        gateway = stack.enter_context(Gateway(directory / "gateway", data=data, toml=TOML, files=files))
        one = Soak(gateway, server, proxy, disk, chance)
        one.run_for(seconds)
        if not one.settle():
            print(f"not at rest after {SETTLE:.0f} s: {describe(one.peers)}\n{gateway.log()}", file=sys.stderr)
        return balance(gateway.data / "log.db", server.port, one.senders, one.receivers), (one.near, one.far)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the faults, not of what meets them")
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        sheet, lanes = soak(Path(name), options.minutes * 60, random.Random(options.seed))
    for lane in lanes:
        print(", ".join(f"{count} x {fault}" for fault, count in sorted(lane.counts.items())))
    print(sheet.text())
    return 0 if sheet.good else 1


if __name__ == "__main__":
    sys.exit(main())
