"""Faults of the disk under a running process: strace is attached to it and answers chosen system calls with an error.

Rules: only what the process asks of the kernel is answered, so a mended disk is one from which strace was taken away; `only`
limits the fault to one file. A file system that really became read-only cannot be mended without unmounting it, which a
process with open files prevents: here EROFS comes and goes.

Needs strace, and root to attach; `reason` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import wait_until

WRITES = "pwrite64,ftruncate,fallocate"
FLUSHES = "fsync,fdatasync"


def reason() -> str:
    """Why this cannot be done here; empty when it can."""
    if os.geteuid() != 0:
        return "disk faults need root (to attach strace)"
    if shutil.which("strace") is None:
        return "disk faults need strace: apt-get install strace"
    return ""


@contextmanager
def failing(pid: int, calls: str, error: str, only: Path | None = None) -> Iterator[None]:
    """While this lasts, these calls of the process end with this error."""
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}"]
    command += ["-P", str(only)] if only else []
    strace = subprocess.Popen([*command, "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _traced(pid), say=lambda: f"strace: {strace.poll()}")
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait()


def _traced(pid: int) -> bool:
    """Whether every thread has its tracer."""
    states = [task.joinpath("status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all("TracerPid:\t0\n" not in state for state in states)


def fill(file: Path) -> None:
    """Take the file system's last byte."""
    with file.open("wb", buffering=0) as out:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    out.write(bytes(size))
            except OSError:
                continue
