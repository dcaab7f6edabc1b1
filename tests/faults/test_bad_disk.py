"""A disk that fails under load and works again: read-only, errors on write and on flush, the last byte taken, a database file
that takes no checkpoint.

Demanded each time is what `refusing` says, and recovery without a restart. `test_real_disk` and
`test_switched_fs` have file systems that fail.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

from . import disk
from .bad_disk import FLUSHES, WRITES, failing, fill, reason
from .refusing import RECOVERY, state, stored, survives

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())


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
    survives(Gateway(tmp_path), lambda one: failing(one.pid, calls, error), words)


def test_a_stop_while_the_disk_refuses_is_no_fault_of_the_program_and_loses_nothing(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway:
        with MqttClient(gateway.port, "sleeper", clean=False) as client:
            client.subscribe(("kept", 1))
        with MqttClient(gateway.port, "sender") as client:
            client.publish_and_wait("kept", b"acknowledged", 1)
        with failing(gateway.pid, WRITES, "ENOSPC", gateway.data / "log.db"):
            assert gateway.stop() == 0
        assert "not_closed: " in gateway.log() and not gateway.faults()
        gateway.start()
        with MqttClient(gateway.port, "sleeper", clean=False) as client:
            assert client.expect(Kind.PUBLISH).payload == b"acknowledged"
        assert gateway.stop() == 0


def test_last_byte_of_the_disk_taken_by_somebody_else(tmp_path: Path) -> None:
    with disk.small_memory(tmp_path / "small", "16m") as at:

        @contextmanager
        def filled(_: Gateway) -> Iterator[None]:
            fill(at / "filler")
            try:
                yield
            finally:
                (at / "filler").unlink()

        survives(Gateway(tmp_path / "gateway", data=at / "data"), filled, "make room")


def test_checkpoint_that_fails_does_not_undo_the_commit(tmp_path: Path) -> None:
    """The WAL still takes what comes: nothing is withheld, nothing is written twice, and a person is told."""
    with Gateway(tmp_path) as gateway, MqttClient(gateway.port, "big") as client:
        with failing(gateway.pid, "pwrite64", "EIO", only=gateway.data / "log.db"):
            for _ in range(120):
                client.publish_and_wait("big", bytes(50_000))
            assert "cannot be moved into log.db" in state(gateway)
            assert "cannot be moved into log.db" in gateway.log()
        wait_until(lambda: state(gateway) == "ok", RECOVERY)
        gateway.kill()
        gateway.start()
        assert stored(gateway, "big") == 120


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
