"""The real gateway as a process that a test starts, kills and starts again.

Rules: it is started as a user would (`run`), with a directory and a port of its own; ready means that it
takes connections; it is stopped and killed by its own process id. What it printed stands in `log()` and in
every failure.

Invariant: after `stop`, `kill` or the end of the `with` block the process is gone (its uplink child ends by
itself).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from .ports import free_port
from .waiting import wait_until

START_DEADLINE = 20.0
STOP_DEADLINE = 10.0


class Gateway:
    """A gateway on `data`; not started until `start` or the `with` block.

    `files` are laid beside gateway.toml (rule files); `toml` is what gateway.toml says; `prefix` goes before
    the command (eatmydata, strace).
    """

    def __init__(
        self,
        directory: Path,
        *,
        data: Path | None = None,
        toml: str = "",
        files: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.data = data or directory / "data"
        self._config = directory / "gateway.toml"
        self._log = directory / "gateway.log"
        self._prefix = prefix
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._config.write_text(toml)
        for name, content in (files or {}).items():
            (directory / name).write_text(content)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self.kill()

    @property
    def is_running(self) -> bool:
        """Whether it was started, and neither stopped nor killed since."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The broker's process id."""
        assert self._process is not None, "the gateway is not running"
        return self._process.pid

    def command(self) -> list[str]:
        """The command line that starts it."""
        return [
            *(*self._prefix, sys.executable, "-m", "tidegate.gateway.cli", "run"),
            *("--data", str(self.data), "--config", str(self._config), "--listen", f"127.0.0.1:{self.port}"),
        ]

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        assert self._process is None, "the gateway is running"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | self._environment,
            )
        wait_until(self._listens, START_DEADLINE, self.log)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        process = self._take()
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the gateway did not stop within {STOP_DEADLINE} s:\n{self.log()}") from None

    def kill(self) -> None:
        """SIGKILL."""
        process = self._take()
        process.kill()
        process.wait()

    def freeze(self) -> None:
        """SIGSTOP; returns when every thread has stopped."""
        for pid in (self.pid, *self.children()):
            os.kill(pid, signal.SIGSTOP)
        while any(state not in "Tt" for state in self._states()):
            os.sched_yield()

    def thaw(self) -> None:
        """SIGCONT. A child that was killed while it was frozen may be gone as soon as its parent runs."""
        for pid in (self.pid, *self.children()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def children(self) -> list[int]:
        """Process ids of the uplink child, if there is one."""
        found: list[int] = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def rss(self) -> int:
        """Resident memory of the broker process, in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def log(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-4000:]

    def faults(self) -> list[str]:
        """Lines of the end of its log that tell of a fault in the program."""
        return [
            line for line in self.log().splitlines() if "Traceback" in line or "internal_error" in line or "pool_failed" in line
        ]

    def _take(self) -> subprocess.Popen[bytes]:
        process, self._process = self._process, None
        assert process is not None, "the gateway is not running"
        return process

    def _listens(self) -> bool:
        assert self._process is not None
        ended = self._process.poll()
        assert ended is None, f"the gateway ended with {ended}:\n{self.log()}"
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=START_DEADLINE).close()
        except ConnectionError:
            return False
        return True

    def _states(self) -> list[str]:
        return [
            (task / "stat").read_text().rpartition(")")[2].split()[0]
            for pid in (self.pid, *self.children())
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]


def running(pid: int) -> bool:
    """Whether a process with this id exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
