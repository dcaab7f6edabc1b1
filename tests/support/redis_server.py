"""A real redis-server for one test: its own directory and port, killed, frozen and started again at will.

Started without append-only file and snapshots unless asked: `dump` writes one, and after `kill` the next `start` loads the
last. With `sentinel`, the lines of a sentinel's file, it is a sentinel; with `certificates`, the directory where
`make_certificates` put them, it speaks TLS alone. Stopped by its own process id only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from .ports import free_port
from .waiting import wait_until


class RedisServer:
    """Use as a context manager; `client()` talks to it."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        password: str = "",
        port: int = 0,
        sentinel: str = "",
        certificates: Path | None = None,
    ) -> None:
        self.port = port or free_port()
        self._sentinel = sentinel
        self._certificates = certificates
        self._password = password
        self._directory = directory / f"redis-{self.port}"
        self._copy = directory / f"redis-{self.port}-kept"
        self._directory.mkdir(parents=True)
        self._options = [*options, *(("--requirepass", password) if password else ())]
        if "--cluster-enabled" in options and "--cluster-announce-bus-port" not in options:
            self._options += ["--cluster-port", str(free_port())]  # 10,000 above the other it may be taken by then
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            if self._process is not None:
                self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self.kill()

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._process is None, "the server is running"
        program = shutil.which("redis-server")
        assert program, "redis-server is not installed: apt-get install redis-server"
        arguments = [
            "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory),
            "--save", "", "--enable-debug-command", "yes", *self._options,
        ]  # fmt: skip
        if self._certificates is not None:
            folder = self._certificates
            arguments += [
                "--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no",
                "--tls-ca-cert-file", str(folder / "ca.pem"), "--tls-cert-file", str(folder / "server.pem"),
                "--tls-key-file", str(folder / "server.key"),
            ]  # fmt: skip
        if self._sentinel:
            conf = self._directory / "sentinel.conf"  # which the sentinel rewrites
            conf.write_text(self._sentinel)
            arguments = [str(conf), "--sentinel", *arguments]
        self._process = subprocess.Popen(
            [program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        wait_until(self._answers)

    def kill(self) -> None:
        """SIGKILL; what was not dumped is gone."""
        process, self._process = self._process, None
        assert process is not None, "the server is not running"
        process.kill()
        process.wait()

    def freeze(self) -> None:
        """SIGSTOP: connections open, no answer comes."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def dump(self) -> None:
        """Write the snapshot that the next start loads."""
        with self.client() as client:
            client.save()

    def keep(self) -> None:
        """Keep a cold copy of what it holds now (its append-only file too) for `bring_back`; it is started again."""
        self.kill()
        shutil.copytree(self._directory, self._copy)
        self.start()

    def bring_back(self) -> None:
        """It holds again what it held at `keep`."""
        self.kill()
        shutil.rmtree(self._directory)
        self._copy.rename(self._directory)
        self.start()

    def client(self, **options: Any) -> redis.Redis:
        """A client that decodes answers to text, unless asked otherwise."""
        options.setdefault("password", self._password or None)
        options.setdefault("decode_responses", True)
        if self._certificates is not None:
            options |= {"ssl": True, "ssl_ca_certs": str(self._certificates / "ca.pem")}
        return redis.Redis("127.0.0.1", self.port, **options)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"redis-server ended with {self._process.returncode}"
        try:
            with self.client() as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False
