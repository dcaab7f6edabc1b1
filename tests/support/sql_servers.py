"""Real PostgreSQL and MariaDB servers for one test: own directory and port, killed, frozen and started again at will.

Both refuse to run as root, so as root they run as their package's user (`postgres`, `mysql`), in a directory of that user's
in /tmp. The data directory is made once per test run and copied, which is ten times faster than making it anew. A cold copy
of it is a dump: `dump` and `restore` bring an older state back. Stopped by their own process id only.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import pymysql

from .gateway import running
from .ports import free_port
from .waiting import wait_until

START_DEADLINE = 30.0
DATABASE, USER, PASSWORD = "mqtt", "gate", "secret"


class SqlServer(ABC):
    """Use as a context manager. `run` and `rows` talk to it in DATABASE as its owner USER, elsewhere as superuser."""

    backend: str
    runs_as: str
    first_database: str
    """One that exists from the beginning."""
    recreation: Sequence[str]

    def __init__(self, *options: str, data: Path | None = None) -> None:
        self.port = free_port()
        self.directory = own_directory(self.runs_as)
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None
        copy(data or self.template(), self.directory / "data")

    @classmethod
    @abstractmethod
    def template(cls) -> Path:
        """A data directory with the database and the account, made once."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """How the server is started."""

    @abstractmethod
    def connect(self, database: str = DATABASE) -> Any:
        """A connection, every statement its own transaction."""

    @abstractmethod
    def connect_as_user(self) -> Any:
        """A connection as the gateway makes one: USER, with PASSWORD, over TCP."""

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
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._process is None, "the server is running"
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                cwd=self.directory, **_as_user(self.runs_as),
            )  # fmt: skip
        wait_until(self._answers, START_DEADLINE, lambda: (self.directory / "log").read_text(errors="replace")[-2000:])

    def stop(self) -> None:
        """As its package stops it: all is written, clients are sent away."""
        process, self._process = self._process, None
        assert process is not None, "the server is not running"
        process.send_signal(signal.SIGINT if self.backend == "pgsql" else signal.SIGTERM)
        process.wait(START_DEADLINE)

    def kill(self) -> None:
        """SIGKILL for it and its children: what was committed is on disk."""
        process, self._process = self._process, None
        assert process is not None, "the server is not running"
        family = _family(process.pid)
        _signal(family, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not any(running(pid) for pid in family))

    def freeze(self) -> None:
        """SIGSTOP: connections open, no answer comes."""
        assert self._process is not None
        _signal(_family(self._process.pid), signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        _signal(_family(self._process.pid), signal.SIGCONT)

    @abstractmethod
    def read_only(self, on: bool) -> None:
        """Whether everybody but a superuser may only read."""

    def dump(self) -> None:
        """Keep what it holds now for `restore`."""
        self.stop()
        shutil.rmtree(self.directory / "dump", ignore_errors=True)
        copy(self.directory / "data", self.directory / "dump")
        self.start()

    def restore(self) -> None:
        """Bring back what it held at `dump`."""
        self.kill()
        shutil.rmtree(self.directory / "data")
        copy(self.directory / "dump", self.directory / "data")
        self.start()

    def recreate(self) -> None:
        """An empty DATABASE that USER owns; whoever is connected to it is sent away."""
        self.run(*self.recreation, database=self.first_database)

    def run(self, *statements: str, database: str = DATABASE) -> None:
        """Run statements."""
        with closing(self.connect(database)) as connection, closing(connection.cursor()) as cursor:
            for statement in statements:
                cursor.execute(statement)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """What a SELECT answers."""
        with closing(self.connect()) as connection, closing(connection.cursor()) as cursor:
            cursor.execute(sql)
            return [tuple(row) for row in cursor.fetchall()]

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the server ended with {self._process.returncode}"
        try:
            self.connect(self.first_database).close()
        except (OSError, psycopg.OperationalError, pymysql.err.OperationalError):
            return False
        return True


class Postgres(SqlServer):
    """PostgreSQL as Debian ships it."""

    backend, runs_as, first_database = "pgsql", "postgres", "postgres"
    recreation = (f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)", f"CREATE DATABASE {DATABASE} OWNER {USER}")

    @classmethod
    @functools.cache
    def template(cls) -> Path:
        directory = own_directory(cls.runs_as)
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        (directory / "secret").write_text("root")
        quietly(
            cls.runs_as, directory,
            *(_postgres("initdb"), "-D", directory / "data", "-U", "root", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C"),
            *("-N", f"--pwfile={directory / 'secret'}"),
        )  # fmt: skip
        with cls(data=directory / "data") as server:
            server.run(f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'", database=cls.first_database)
            server.recreate()
            server.stop()
            shutil.rmtree(directory / "data")
            copy(server.directory / "data", directory / "data")
        return directory / "data"

    def command(self) -> Sequence[str]:
        (self.directory / "data" / "postmaster.pid").unlink(missing_ok=True)
        settings = ("listen_addresses=127.0.0.1", "shared_buffers=16MB", "max_connections=40", *self.options)
        return [
            *(_postgres("postgres"), "-D", str(self.directory / "data"), "-k", str(self.directory), "-p", str(self.port)),
            *(part for setting in settings for part in ("-c", setting)),
        ]

    def read_only(self, on: bool) -> None:
        word = "on" if on else "off"
        self.run(f"ALTER SYSTEM SET default_transaction_read_only = {word}", database=self.first_database)
        self.run("SELECT pg_reload_conf()", database=self.first_database)
        wait_until(lambda: self.rows("SHOW default_transaction_read_only") == [(word,)])

    def connect(self, database: str = DATABASE) -> psycopg.Connection[Any]:
        role = f"-c role={USER}" if database == DATABASE else ""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="root", password="root", dbname=database, autocommit=True,
            connect_timeout=5, options=role,
        )  # fmt: skip

    def connect_as_user(self) -> psycopg.Connection[Any]:
        return psycopg.connect(host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname=DATABASE)


class MariaDb(SqlServer):
    """MariaDB as Debian ships it."""

    backend, runs_as, first_database = "mysql", "mysql", ""
    recreation = (
        f"DROP DATABASE IF EXISTS {DATABASE}",
        f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
    )

    @classmethod
    @functools.cache
    def template(cls) -> Path:
        directory = own_directory(cls.runs_as)
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        install = shutil.which("mariadb-install-db")
        assert install, "mariadb-server is not installed: apt-get install mariadb-server"
        quietly(
            cls.runs_as, directory,
            *(install, "--no-defaults", f"--datadir={directory / 'data'}", "--skip-test-db", "--basedir=/usr"),
            *("--auth-root-authentication-method=normal", f"--tmpdir={directory}"),
        )  # fmt: skip
        with cls(data=directory / "data") as server:
            server.recreate()
            server.run(
                f"CREATE USER {USER}@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'", f"GRANT ALL ON {DATABASE}.* TO {USER}@'127.0.0.1'"
            )
            server.stop()
            shutil.rmtree(directory / "data")
            copy(server.directory / "data", directory / "data")
        return directory / "data"

    def command(self) -> Sequence[str]:
        directory = self.directory
        program = shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        assert program, "mariadb-server is not installed: apt-get install mariadb-server"
        return [
            *(program, "--no-defaults", f"--datadir={directory / 'data'}", f"--socket={directory / 's.sock'}"),
            *(f"--pid-file={directory / 'pid'}", "--bind-address=127.0.0.1", f"--port={self.port}", "--skip-name-resolve"),
            *("--innodb-buffer-pool-size=32M", "--innodb-log-file-size=4M", "--performance-schema=OFF", "--skip-log-bin"),
            *(f"--tmpdir={directory}", *self.options),
        ]

    def read_only(self, on: bool) -> None:
        self.run(f"SET GLOBAL read_only = {int(on)}")

    def connect(self, database: str = DATABASE) -> pymysql.Connection[Any]:
        path = str(self.directory / "s.sock")
        with socket.socket(socket.AF_UNIX) as probe:
            # The driver leaves a socket open that finds nobody there.
            probe.connect(path)
        return pymysql.connect(
            unix_socket=path, user="root", database=database or None, autocommit=True, charset="utf8mb4"
        )  # fmt: skip

    def connect_as_user(self) -> pymysql.Connection[Any]:
        return pymysql.connect(host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, database=DATABASE)


def own_directory(user: str) -> Path:
    """A short one that the server's user may write to, whatever TMPDIR is."""
    directory = Path(tempfile.mkdtemp(prefix="tidegate-", dir="/tmp"))
    if os.geteuid() == 0:
        shutil.chown(directory, user, user)
    return directory


def _as_user(user: str) -> dict[str, Any]:
    return {"user": user, "group": user, "extra_groups": []} if os.geteuid() == 0 else {}


def quietly(user: str, directory: Path, *command: object) -> None:
    done = subprocess.run(
        [str(part) for part in command], cwd=directory, capture_output=True, text=True, check=False, **_as_user(user)
    )
    assert done.returncode == 0, done.stdout + done.stderr


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


def _postgres(program: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    assert found, "postgresql is not installed: apt-get install postgresql"
    return str(found[-1])


def _family(pid: int) -> list[int]:
    """The process and its children; PostgreSQL gives each of them a group of its own."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _signal(processes: Sequence[int], number: signal.Signals) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
