"""A wall clock that a test sets for the processes it starts; the boot clock and the timers go on as they are (libfaketime)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path


class WrongClock:
    """`environment` is what a process needs to see this clock; `set_to` steps it while the process runs."""

    def __init__(self, directory: Path) -> None:
        libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        assert libraries, "libfaketime is not installed: apt-get install faketime"
        self._file = directory / "wrong-clock"
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(libraries[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self.be_off(0)

    def set_to(self, seconds: float) -> None:
        """From now on it shows this time (seconds since 1970) and goes on from there."""
        self.be_off(round(seconds - time.time()))

    def be_off(self, seconds: int) -> None:
        """From now on it is so many seconds ahead of the true time."""
        made = self._file.with_suffix(".new")
        made.write_text(f"{seconds:+d}\n")
        made.rename(self._file)  # never half written for whoever reads it
