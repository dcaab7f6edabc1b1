"""A disk that fails under load and works again: read-only, errors on write and on flush, the last byte taken, a database file
that takes no checkpoint.

Demanded each time: no acknowledgement of QoS 1 or 2 while nothing can be made durable, QoS 0 and pings as ever, `status` and
log say it in words, recovery without a restart, and nothing acknowledged missing, for the subscriber and after kill -9 on disk.
"""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest
from tidegate.gateway.control import ask

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

from .bad_disk import FLUSHES, WRITES, failing, fill, reason
from .traffic import Receiver, Sender, check, run, settle

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())

PROBES = 100
LOAD = 300
"""Messages acknowledged before the fault, and again after it."""
RECOVERY = 20.0
Fault = Callable[[Gateway], AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("calls", "error", "words"),
    [
        pytest.param(WRITES, "EROFS", "read-only", id="read-only"),
        pytest.param(WRITES, "EIO", "writing failed", id="write"),
        pytest.param(FLUSHES, "EIO", "did not confirm", id="fsync"),
        pytest.param(WRITES, "ENOSPC", "make room", id="no space"),
    ],
)
def test_disk_that_fails_withholds_acknowledgements_until_it_works_again(
    tmp_path: Path, calls: str, error: str, words: str
) -> None:
    with Gateway(tmp_path) as gateway:
        _survives(gateway, lambda one: failing(one.pid, calls, error), words)


def test_last_byte_of_the_disk_taken_by_somebody_else(tmp_path: Path) -> None:
    at = tmp_path / "small"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(at)], check=True)

    @contextmanager
    def filled(_: Gateway) -> Iterator[None]:
        fill(at / "filler")
        try:
            yield
        finally:
            (at / "filler").unlink()

    try:
        with Gateway(tmp_path / "gateway", data=at / "data") as gateway:
            _survives(gateway, filled, "make room")
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_checkpoint_that_fails_does_not_undo_the_commit(tmp_path: Path) -> None:
    """The WAL still takes what comes: nothing is withheld, nothing is written twice, and a person is told."""
    with Gateway(tmp_path) as gateway, MqttClient(gateway.port, "big") as client:
        with failing(gateway.pid, "pwrite64", "EIO", only=gateway.data / "log.db"):
            for _ in range(120):
                client.publish_and_wait("big", bytes(50_000))
            assert "cannot be moved into log.db" in _state(gateway)
            assert "cannot be moved into log.db" in gateway.log()
        wait_until(lambda: _state(gateway) == "ok", RECOVERY)
        gateway.kill()
        gateway.start()
        assert _stored(gateway, "big") == 120


def test_batch_whose_flush_failed_is_written_again(tmp_path: Path) -> None:
    """After a failed fsync the kernel holds the pages for clean: to sync once more would confirm what is not on the disk."""
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-y", "-o", str(trace), "-e", "trace=pwrite64,fdatasync"]
    subprocess.run(
        [*strace, "-e", "inject=fdatasync:error=EIO:when=20", sys.executable, "-c", _APPLY, str(tmp_path / "log.db")],
        check=True,
        env=os.environ,
    )
    lines = trace.read_text().splitlines()
    failed = next(number for number, line in enumerate(lines) if "(INJECTED)" in line)
    assert "log.db-wal" in lines[failed], "the failed flush was not one of a commit"
    again = next(number for number in range(failed + 1, len(lines)) if "fdatasync" in lines[number])
    before = max(number for number in range(failed) if "fdatasync" in lines[number])
    assert _offsets(lines[before + 1 : failed]) == _offsets(lines[failed + 1 : again]) != []


_APPLY = """
import sqlite3, sys
from pathlib import Path
from tidegate.store.entry import PUBLISH
from tidegate.store.log import Log
from tidegate.store.store import Store
store = Store.open(Path(sys.argv[1]), "n", "full", 1, 1)
log = Log(store.identity.next_seq, 0, store.identity.run, store.identity.clock)
failed = 0
for _ in range(30):
    log.append(PUBLISH, None, None, 1, b"x" * 10_000)
    batch = log.take()
    try:
        store.apply(batch)
    except sqlite3.Error:
        failed += 1
        store.apply(batch)
assert failed == 1, failed
"""


def _offsets(lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := re.search(r"log\.db-wal.*, (\d+, \d+)\)", line))]


def _survives(gateway: Gateway, fault: Fault, words: str) -> None:
    senders = [Sender("one", "t/one", 1), Sender("two", "t/two", 2, version=5)]
    receivers = [Receiver("all", "t/#", 2)]
    peers = [*receivers, *senders]
    for peer in peers:
        peer.connect(gateway.port)
    with MqttClient(gateway.port, "fast") as fast:
        fast.subscribe(("fast", 0))
        run(peers, lambda: _acknowledged(senders) > LOAD)
        with fault(gateway):
            run(peers, lambda: _state(gateway) != "ok")
            assert words in _state(gateway)
            _probe(fast)
            for sender in senders:
                sender.listen()
            withheld = _acknowledged(senders)
            _probe(fast)
            for sender in senders:
                sender.listen()
            assert _acknowledged(senders) == withheld, "acknowledged without a disk"
            assert "the store refuses to write" in gateway.log()
        run(peers, lambda: _acknowledged(senders) > withheld + LOAD, RECOVERY)
    settle(senders, receivers)
    check(senders, receivers)
    assert _state(gateway) == "ok"
    assert "the store works again" in gateway.log()
    gateway.kill()
    for sender in senders:
        assert _stored(gateway, sender.topic) >= len(sender.acknowledged)


def _probe(fast: MqttClient) -> None:
    """QoS 0 to oneself and a ping, time and again."""
    for number in range(PROBES):
        fast.publish("fast", b"%d" % number)
        assert [packet.payload for packet in fast.ping()] == [b"%d" % number]


def _acknowledged(senders: list[Sender]) -> int:
    return sum(len(sender.acknowledged) for sender in senders)


def _state(gateway: Gateway) -> str:
    return str(ask(gateway.data / "control.sock", {"command": "status"})["store"]["state"])


def _stored(gateway: Gateway, topic: str) -> int:
    with closing(sqlite3.connect(gateway.data / "log.db")) as log:
        (count,) = log.execute("SELECT count(DISTINCT payload || id) FROM mqtt_msg WHERE topic = ?", (topic,)).fetchone()
    return int(count)
