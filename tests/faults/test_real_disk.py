"""Real file systems that fail under load: one the kernel makes read-only, and one whose device loses what it was given.

A file system that is read-only after an error never becomes writable again while files are open on it, whatever is mounted
over what (and one without an error is not made read-only while a file is open for writing: EBUSY). So its cure is the one that
a person has: stop, check, mount, start. A device that only refuses for a while works again under the running gateway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gateway import Gateway

from . import disk
from .bad_disk import fill
from .refusing import Load, survives

pytestmark = pytest.mark.skipif(bool(disk.reason()), reason=disk.reason())


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


def test_a_device_that_loses_writes_for_a_while_is_written_again(tmp_path: Path) -> None:
    """Beneath the file system there is no room for what the log grows by: its flush fails, and the kernel drops the pages."""
    with disk.directory() as directory, disk.small_memory(directory / "beneath", "48m") as beneath:
        image, at = beneath / "image", directory / "mount"
        disk.make(image, "-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard")

        @contextmanager
        def full(_: Gateway) -> Iterator[None]:
            fill(beneath / "filler")
            try:
                yield
            finally:
                (beneath / "filler").unlink()

        gateway = Gateway(tmp_path, data=at / "data")
        with disk.mounted(image, at, "errors=continue"):
            load = survives(gateway, full, "did not confirm")
        with disk.mounted(image, at):
            load.is_stored()
