"""The brokers that are measured: started, watched through /proc and stopped by the benchmark itself.

Rules: each start gets its own directory and port, and nothing of the user's configuration; a broker is ready
when it answers a CONNECT; it is stopped by its own process id. mosquitto keeps nothing on disk, its best
case; the gateway runs as shipped: durability `full`, the SQLite rule storing every QoS 1 message.

Invariant: leaving the `with` block leaves no process and no file behind.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import wire

from tests.support.sql_servers import SqlServer

START_DEADLINE = 20.0
MOSQUITTO_CONF = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence false
log_dest none
max_inflight_messages 1000
max_queued_messages 0
"""
RULES = """\
backend.{kind}.pool1.server = 127.0.0.1:{port}
{login}backend.{kind}.hook.client.connected.1 = {{"action": {{"function": "on_client_connected"}}, "pool": "pool1"}}
backend.{kind}.hook.message.publish.1 = {{"action": {{"function": "on_message_publish"}}, "pool": "pool1"}}
"""


class FarEnd(NamedTuple):
    """Where the gateway's uplink goes; `login` are lines of the rule file."""

    kind: str
    port: int
    login: str = ""
    server: SqlServer | None = None


class BrokerError(Exception):
    """A broker could not be started or died under load."""


class Target(Protocol):
    """How to start one kind of broker."""

    name: str
    stores: bool
    far_end: FarEnd | None

    def command(self, directory: Path, port: int) -> list[str]:
        """Write what it needs into `directory` and return the command line."""
        ...

    def environment(self) -> dict[str, str]:
        """What to add to the environment."""
        ...


class Mosquitto:
    """The peer: the distribution's mosquitto."""

    name = "mosquitto"
    stores = False
    far_end: FarEnd | None = None

    def command(self, directory: Path, port: int) -> list[str]:
        program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        if program is None:
            raise BrokerError("mosquitto is not installed: apt-get install mosquitto")
        config = directory / "mosquitto.conf"
        config.write_text(MOSQUITTO_CONF.format(port=port))
        if os.geteuid() == 0:
            config.write_text(config.read_text() + "user root\n")
        return [program, "-c", str(config)]

    def environment(self) -> dict[str, str]:
        return {}


class Tidegate:
    """The gateway as shipped, on uvloop or asyncio's own loop; with a pool if a far end is given."""

    stores = True

    def __init__(self, uvloop: bool, far_end: FarEnd | None = None, disk_budget: str = "") -> None:
        self._disk_budget = disk_budget
        self.name = "tidegate" if uvloop else "tidegate, asyncio"
        self._uvloop = uvloop
        self.far_end = far_end

    def command(self, directory: Path, port: int) -> list[str]:
        config = directory / "gateway.toml"
        text = '[gateway]\nname = "bench"\n'
        if self.far_end is not None:
            text += f'\n[uplink]\nbackends = ["sqlite", "{self.far_end.kind}"]\n'
            (directory / f"emqx_backend_{self.far_end.kind}.conf").write_text(RULES.format(**self.far_end._asdict()))
        config.write_text(text)
        return [
            *(sys.executable, "-m", "tidegate.gateway.cli", "run"),
            *("--data", str(directory / "data"), "--config", str(config), "--listen", f"127.0.0.1:{port}"),
        ]

    def environment(self) -> dict[str, str]:
        loop = {} if self._uvloop else {"TIDEGATE_NO_UVLOOP": "1"}
        return loop | ({"TIDEGATE_STORE__DISK_BUDGET": self._disk_budget} if self._disk_budget else {})


class Broker:
    """A running broker. Use as a context manager."""

    def __init__(self, target: Target, base: Path | None = None) -> None:
        self.name = target.name
        self.stores = target.stores
        self.far_end = target.far_end
        self.directory = Path(tempfile.mkdtemp(prefix="tidegate-bench-", dir=base))
        self.port = free_port()
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clean_up()

    def start(self) -> float:
        """Start it and return the seconds until it answered a CONNECT."""
        command = self._target.command(self.directory, self.port)
        began = time.perf_counter()
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | self._target.environment(),
                cwd=self.directory,
            )
        while not self._answers():
            if self._process.poll() is not None:
                raise BrokerError(f"{self.name} ended at once:\n{self.log()}")
            if time.perf_counter() - began > START_DEADLINE:
                raise BrokerError(f"{self.name} does not answer after {START_DEADLINE:.0f} s:\n{self.log()}")
            time.sleep(0.005)
        return time.perf_counter() - began

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop it with this signal; a broker that ignores SIGTERM for 30 s is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log(self) -> str:
        """The last lines that the broker printed."""
        return (self.directory / "log").read_text(errors="replace")[-2000:]

    def processes(self) -> list[int]:
        """Process ids of the broker and all its descendants."""
        assert self._process is not None
        found = [self._process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def pss(self) -> int:
        """Proportional set size of all its processes, in bytes."""
        return sum(_field(pid, "smaps_rollup", "Pss:") * 1024 for pid in self.processes())

    def bytes_written(self) -> int:
        """Bytes that its processes caused to be written to block devices (`write_bytes`)."""
        return sum(_field(pid, "io", "write_bytes:") for pid in self.processes())

    def cpu_seconds(self) -> float:
        """CPU seconds that its processes have used so far."""
        nanoseconds = 0
        for pid in self.processes():
            for task in Path(f"/proc/{pid}/task").iterdir():
                nanoseconds += int((task / "schedstat").read_text().split()[0])
        return nanoseconds / 1e9

    def _clean_up(self) -> None:
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            wire.connect(self.port, b"ready?").close()
        except OSError:
            return False
        return True


@contextmanager
def redis(port: int | None = None) -> Iterator[int]:
    """A redis-server of our own; yields its port."""
    program = shutil.which("redis-server")
    if program is None:
        raise BrokerError("redis-server is not installed: apt-get install redis-server")
    port = port or free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--daemonize", "no"]
    process = subprocess.Popen([program, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None and not _connects(port):
            time.sleep(0.005)
        yield port
    finally:
        process.terminate()
        process.wait()


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionError:
        return False
    return True


def free_port() -> int:
    """A port below the ephemeral range that nobody listens on."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def allow_many_sockets() -> None:
    """Raise the limit of open files to what the system allows, for us and the brokers we start."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _field(pid: int, file: str, name: str) -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise BrokerError(f"/proc/{pid}/{file} has no {name}")
