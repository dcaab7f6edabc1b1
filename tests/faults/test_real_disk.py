"""Real file systems that fail: one the kernel makes read-only under load, and one whose device loses what it was given.

A file system that is read-only after an error never becomes writable again while it is mounted (ext4 keeps `emergency_ro`
through every remount), and one without an error is not made read-only while a file is open for writing (EBUSY). So its cure is
the one that a person has: stop, check, mount, start. `test_switched_fs` has a file system that does become writable again.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.gateway import Gateway

from . import disk
from .refusing import Load

pytestmark = pytest.mark.skipif(bool(disk.reason()), reason=disk.reason())

BARE = ("-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard")
"""No journal, whose loss would make it read-only; and its own tables have their place from the start."""
FORGIVING = ("errors=continue",)
"""By default, with `dioread_nolock`, ext4 forgets after an error that blocks were written ("potential data loss", it says),
unless it is asked anew for their place."""


def test_a_file_system_that_became_read_only_withholds_everything_and_is_whole_after_its_repair(tmp_path: Path) -> None:
    with disk.directory() as directory:
        image, at = directory / "image", directory / "mount"
        disk.make(image)
        gateway = Gateway(tmp_path, data=at / "data")
        with disk.mounted(image, at, "errors=remount-ro"), gateway:
            load = Load(gateway)
            load.go_on()
            disk.break_down(at)
            load.is_withheld("read-only")
            assert gateway.stop() == 0
            load.lose()
        disk.repair(image)
        with disk.mounted(image, at, "errors=remount-ro"):
            load.is_stored()
            with gateway:
                load.connect()
                load.go_on()
                load.end()
            load.is_stored()


def test_what_a_partial_checkpoint_moved_is_moved_again_when_its_flush_fails(tmp_path: Path) -> None:
    """SQLite flushes the database only when a checkpoint is complete, and begins the next one where the last one ended."""
    with disk.directory() as directory, disk.small_memory(directory / "beneath", "48m") as beneath:
        image, at = beneath / "image", directory / "mount"
        disk.make(image, *BARE)
        with disk.mounted(image, at, *FORGIVING):
            command = [sys.executable, "-c", _PARTIAL, str(at / "log.db"), str(beneath / "filler")]
            subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
        with disk.mounted(image, at), closing(sqlite3.connect(at / "log.db")) as log:
            assert log.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert log.execute("SELECT count(*), sum(length(payload)) FROM entry").fetchone() == (40, 400_000)


def test_what_is_confirmed_after_the_device_was_full_is_there_after_the_next_mount() -> None:
    with disk.directory() as directory, disk.small_memory(directory / "beneath", "48m") as beneath:
        image, at = beneath / "image", directory / "mount"
        disk.make(image, *BARE)
        with disk.mounted(image, at, *FORGIVING):
            command = [sys.executable, "-c", _COMMITS, str(at / "log.db"), str(beneath / "filler")]
            done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
            assert done.returncode == 0, done.stderr
        entries, refused = map(int, done.stdout.split())
        assert refused > 0
        with disk.mounted(image, at), closing(sqlite3.connect(at / "log.db")) as log:
            assert log.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert log.execute("SELECT count(*), sum(length(payload)) FROM entry").fetchone() == (entries, entries * 10_000)


_COMMITS = """
import os, sqlite3, sys
from pathlib import Path
from tests.faults.bad_disk import fill
from tidegate.store.entry import PUBLISH
from tidegate.store.log import Log
from tidegate.store.store import Store
path, filler = map(Path, sys.argv[1:])
store = Store.open(path, "n", "full", 1, 1)
log = Log(store.identity.next_seq, 0, store.identity.run, store.identity.clock)
refused = entries = 0
def write(tries):
    global refused, entries
    for _ in range(10):
        log.append(PUBLISH, None, None, 1, b"x" * 10_000)
    batch = log.take()
    for _ in range(tries):
        try:
            store.apply(batch)
        except sqlite3.Error:
            refused += 1
        else:
            entries += 10
            return None
    return batch
for _ in range(3):
    write(1)
fill(filler)
while (batch := write(3)) is None:
    pass
filler.unlink()
store.apply(batch)
entries += 10
for _ in range(3):
    write(1)
print(entries, refused)
sys.stdout.flush()
os._exit(0)
"""
_PARTIAL = """
import os, sqlite3, sys
from pathlib import Path
from tests.faults.bad_disk import fill
from tidegate.store.entry import PUBLISH
from tidegate.store.log import Log
from tidegate.store.store import Store
path, filler = map(Path, sys.argv[1:])
store = Store.open(path, "n", "full", 1, 1)
log = Log(store.identity.next_seq, 0, store.identity.run, store.identity.clock)
def write():
    for _ in range(10):
        log.append(PUBLISH, None, None, 1, b"x" * 10_000)
        store.apply(log.take())
write()
reader = sqlite3.connect(path, isolation_level=None)
reader.execute("BEGIN")
reader.execute("SELECT count(*) FROM entry").fetchone()
write()
_, frames, moved = store._checkpoint("PASSIVE")
assert 0 < moved < frames, "not a partial one"
fill(filler)
reader.execute("COMMIT")
assert store._checkpoint("PASSIVE") is None, "the flush did not fail"
filler.unlink()
for _ in range(2):
    _, frames, moved = store._checkpoint("PASSIVE")
    assert moved == frames, "not complete"
    write()
os._exit(0)
"""
