"""A machine of its own with systemd as its first process: this one's files, seen through an overlay that keeps every change.

Rules: nothing is written outside the overlay, which lies in memory and is gone afterwards; the box has a network of its own,
with nothing but loopback; of this machine's services none is started in it.

Needs root, overlay file systems and systemd-nspawn; `reason` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
BOOT = 60.0
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", "build")


def reason() -> str:
    """Why there can be no box here; empty when there can."""
    if os.geteuid() != 0:
        return "a machine of its own needs root"
    if shutil.which("systemd-nspawn") is None:
        return "a machine of its own needs systemd-nspawn: apt-get install systemd-container"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "a machine of its own needs overlay file systems"
    return ""


class Box:
    """`run` is as if somebody logged in as root."""

    def __init__(self, root: Path, console: Path) -> None:
        self.root = root
        self._console = console
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._state: subprocess.CompletedProcess[str] | None = None

    def prepare(self, *command: str) -> None:
        """Run something in its files before it is on, with this machine's network."""
        options = ["-q", "-D", str(self.root), "--register=no", "--keep-unit", "--pipe", "--resolv-conf=replace-host"]
        _done(["systemd-nspawn", *options, *command])

    def start(self) -> None:
        """Switch it on, and wait until everything has started that starts by itself."""
        options = ["--register=no", "--keep-unit", "--private-network", "--console=pipe", "--timezone=off", "--resolv-conf=off"]
        with self._console.open("ab") as console:
            self._nspawn = subprocess.Popen(
                ["systemd-nspawn", "-q", "-D", str(self.root), "-b", *options],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        wait_until(self._has_started, BOOT, self._said)

    def stop(self) -> None:
        """Switch it off as a power button does."""
        nspawn, self._nspawn = self._nspawn, None
        if nspawn is not None:
            nspawn.terminate()
            nspawn.wait(BOOT)

    def run(self, *command: str, code: int = 0) -> str:
        """What the command prints; AssertionError when it ends with another code."""
        return _done(["nsenter", "-t", str(self._init), "-a", *command], code)

    def python(self, program: str) -> str:
        """Run a program of the tests on this machine, in the box's network."""
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        return _done(["nsenter", "-t", str(self._init), "-n", sys.executable, "-c", program], environment=environment)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", unit, "--property", name, "--value").strip()

    def _has_started(self) -> bool:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, self._said()
        for child in Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split():
            self._init = int(child)  # at first another one, which makes the name spaces
        asked = ["nsenter", "-t", str(self._init), "-a", "systemctl", "is-system-running"]
        self._state = subprocess.run(asked, check=False, capture_output=True, text=True)
        return self._state.stdout.strip() in ("running", "degraded")

    def _said(self) -> str:
        return f"{self._state}\n{self._console.read_text(errors='replace')[-3000:]}"


@contextmanager
def box() -> Iterator[Box]:
    """A box that is switched off; the project lies in /root/tidegate."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="box", dir=memory if memory.is_dir() else None) as name:
        place = Path(name)
        upper, work, root = (place / part for part in ("upper", "work", "root"))
        for part in (upper, work, root):
            part.mkdir()
        upper.chmod(0o755)
        _done(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={work}", str(root)])
        one = Box(root, place / "console")
        try:
            for wanted in (root / "etc" / "systemd" / "system").glob("*.wants/*"):
                wanted.unlink()
            shutil.copytree(ROOT, root / "root" / "tidegate", ignore=LEFT_OUT)
            yield one
        finally:
            one.stop()
            _done(["umount", str(root)])


def _done(command: Sequence[str], code: int = 0, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | (environment or {}))
    assert done.returncode == code, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
