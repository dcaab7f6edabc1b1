"""The uplink as a process: woken by its pipe, ended by its end, one at a time, misconfigured files, a stand-in for Redis."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from tidegate.store.entry import Want
from tidegate.store.schema import StoreError
from tidegate.uplink.progress import PoolStatus, Progress, cursors, read_pools, saved_wants

from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .logfile import LogFile
from .rig import LEDGER, LIST, MESSAGES

STOP_DEADLINE = 5.0


class Child:
    """The process with its pipe."""

    def __init__(self, data: Path, conf: Path) -> None:
        self._printed = conf / "child.log"
        command = [sys.executable, "-m", "tidegate.uplink.child", "--data", str(data), "--conf", str(conf)]
        with self._printed.open("ab") as printed:
            self.process = subprocess.Popen([*command, "--backend", "redis"], stdin=subprocess.PIPE, stderr=printed)

    def wake(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def hang_up(self) -> int:
        """What the child sees when its broker dies."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(STOP_DEADLINE)

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(STOP_DEADLINE)

    def has_said(self, text: str, times: int) -> bool:
        return self.printed().count(text) == times

    def printed(self) -> str:
        return self._printed.read_text()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LogFile]:
    (tmp_path / "data").mkdir()
    log = LogFile(tmp_path / "data")
    yield log
    log.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def start(tmp_path: Path, log: LogFile) -> Iterator[Callable[[], Child]]:
    children: list[Child] = []

    def start() -> Child:
        children.append(Child(tmp_path / "data", tmp_path))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.wait()
        if child.process.stdin:
            child.process.stdin.close()


def write_rules(directory: Path, port: int, rules: str = MESSAGES + LIST) -> None:
    (directory / "emqx_backend_redis.conf").write_text(f"backend.redis.pool1.server = 127.0.0.1:{port}\n{rules}")


OUTAGES = """
import pathlib
from tidegate.store.report import INFO, WARNING, Report
from tidegate.uplink.child import PoolThread
from tidegate.uplink.pools import Pool
report = Report()
thread = PoolThread(pathlib.Path("."), Pool("redis", "pool1", {}), None, report)
for _ in range(4):
    thread._say("pool_unreachable", "away", WARNING)
    thread._say("pool_connected", "back", INFO)
report.close()
"""


def test_what_a_pool_says_is_not_held_back_a_second_time() -> None:
    done = subprocess.run([sys.executable, "-c", OUTAGES], stderr=subprocess.PIPE, text=True, check=True)
    events = [line.split()[2] for line in done.stderr.splitlines()]
    assert events == ["pool_unreachable:", "pool_connected:"] * 4


def pool(directory: Path) -> PoolStatus | None:
    return next(iter(read_pools(directory / "data")), None)


def state(directory: Path) -> str:
    found = pool(directory)
    return found.state if found else ""


def test_a_byte_in_the_pipe_is_enough_and_nothing_is_asked_while_idle(
    tmp_path: Path, log: LogFile, server: RedisServer, start: Callable[[], Child]
) -> None:
    write_rules(tmp_path, server.port)
    child = start()
    wait_until(lambda: state(tmp_path) == "connected")
    with server.client() as far:
        before = far.info("stats")["total_commands_processed"]
        log.publish("a", b"1")
        child.wake()
        wait_until(lambda: far.llen("list") == 1)
        mine = far.info("stats")["total_commands_processed"] - before
        assert mine < 2000, "our own looking"
    assert child.terminate() == 0
    assert cursors(tmp_path / "data") == {"redis.pool1": 1}
    assert state(tmp_path) == "stopped"


@pytest.mark.parametrize("reachable", [True, False])
def test_it_ends_with_its_pipe_and_on_sigterm(
    tmp_path: Path, server: RedisServer, start: Callable[[], Child], reachable: bool
) -> None:
    with socket.socket() as nobody:
        # Bound and never listening: nobody else can begin to answer there.
        nobody.bind(("127.0.0.1", 0))
        write_rules(tmp_path, server.port if reachable else nobody.getsockname()[1])
        for end in (Child.hang_up, Child.terminate):
            child = start()
            wait_until(lambda: state(tmp_path) == ("connected" if reachable else "unreachable"), say=child.printed)
            assert end(child) == 0


def test_it_ends_soon_although_the_far_end_is_frozen(
    tmp_path: Path, log: LogFile, server: RedisServer, start: Callable[[], Child]
) -> None:
    write_rules(tmp_path, server.port)
    child = start()
    wait_until(lambda: state(tmp_path) == "connected")
    server.freeze()
    log.publish("a")
    child.wake()
    assert child.hang_up() == 0
    server.thaw()


def test_a_second_one_does_not_start_beside_the_first(tmp_path: Path, server: RedisServer, start: Callable[[], Child]) -> None:
    write_rules(tmp_path, server.port)
    first = start()
    wait_until(lambda: state(tmp_path) == "connected")
    second = start()
    assert second.process.wait(10) == 3
    assert "uplink_locked: another uplink runs" in second.printed()
    third = start()
    assert first.terminate() == 0
    wait_until(lambda: state(tmp_path) == "connected", say=third.printed)


def test_a_lock_that_it_may_not_take_is_a_sentence(tmp_path: Path, start: Callable[[], Child]) -> None:
    write_rules(tmp_path, free_port())
    (tmp_path / "data" / "uplink.lock").mkdir()
    child = start()
    assert child.process.wait(10) == 1
    assert "uplink_locked: the uplink may not take its lock" in child.printed()
    assert "Traceback" not in child.printed()


def test_a_far_end_that_went_away_while_idle_is_filled_again_without_news(
    tmp_path: Path, log: LogFile, server: RedisServer, start: Callable[[], Child]
) -> None:
    write_rules(tmp_path, server.port)
    log.publish_many(100)
    start()
    with server.client() as far:
        wait_until(lambda: far.llen("list") == 100)
    wait_until(lambda: cursors(tmp_path / "data") == {"redis.pool1": 100})
    server.kill()
    wait_until(lambda: state(tmp_path) == "unreachable")
    server.start()
    with server.client() as far:
        wait_until(lambda: far.llen("list") == 100, 15)


def test_a_mistake_in_the_file_keeps_the_pool_s_place_until_it_is_mended(
    tmp_path: Path, log: LogFile, server: RedisServer, start: Callable[[], Child]
) -> None:
    write_rules(tmp_path, server.port)
    log.publish_many(10)
    child = start()
    with server.client() as far:
        wait_until(lambda: far.llen("list") == 10)
        assert child.terminate() == 0
        write_rules(tmp_path, server.port, LIST.replace("RPUSH", "RPUSH ").replace("publish.9", "publsh.9"))
        log.publish_many(10)
        child = start()
        wait_until(lambda: state(tmp_path) == "misconfigured")
        found = pool(tmp_path)
        assert found
        assert "emqx_backend_redis.conf:2: unknown event" in found.error
        assert "tidegate check" in found.hint
        assert (found.cursor, found.waiting) == (10, 10)
        assert child.terminate() == 0
        write_rules(tmp_path, server.port)
        start()
        wait_until(lambda: far.llen("list") == 20)


def test_the_good_file_s_wants_are_remembered_for_one_nobody_can_read(
    tmp_path: Path, server: RedisServer, start: Callable[[], Child]
) -> None:
    write_rules(tmp_path, server.port, LIST)
    child = start()
    wait_until(lambda: state(tmp_path) == "connected")
    assert child.terminate() == 0
    assert saved_wants(tmp_path / "data") == {"redis": [Want(6, "", 0, False)]}
    (tmp_path / "emqx_backend_redis.conf").write_bytes(b"\xff\xfe\xff")
    start()
    wait_until(lambda: state(tmp_path) == "misconfigured")
    assert list(cursors(tmp_path / "data")) == ["redis.pool1"]
    assert saved_wants(tmp_path / "data") == {"redis": [Want(6, "", 0, False)]}


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no database, " * 100)


def _of_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE bookmarks (url)")


def _newer(path: Path) -> None:
    Progress(path.parent).close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")


def _damaged(path: Path) -> None:
    Progress(path.parent).close()
    content = path.read_bytes()
    path.write_bytes(content[:200] + b"\xa5" * (len(content) - 200))


UNUSABLE = [
    (_garbage, "is not a database: move it aside"),
    (_of_another_program, "belongs to another program"),
    (_newer, "was written by a newer tidegate"),
    (_damaged, "is damaged"),
]


@pytest.mark.parametrize(("spoil", "words"), UNUSABLE)
def test_an_uplink_db_that_cannot_be_used_is_left_alone_told_once_and_waited_for(
    tmp_path: Path, server: RedisServer, start: Callable[[], Child], spoil: Callable[[Path], None], words: str
) -> None:
    write_rules(tmp_path, server.port)
    path = tmp_path / "data" / "uplink.db"
    spoil(path)
    before = path.read_bytes()
    child = start()
    wait_until(lambda: words in child.printed())
    with pytest.raises(StoreError, match=words):
        read_pools(tmp_path / "data")
    assert path.read_bytes() == before
    assert child.process.poll() is None
    path.rename(tmp_path / "aside")
    wait_until(lambda: state(tmp_path) == "connected", say=child.printed)
    assert child.printed().count("the uplink waits") == child.printed().count("\n") == 1
    assert "pool_failed" not in child.printed()
    assert child.terminate() == 0


def test_an_uplink_db_that_cannot_be_opened_is_told_while_the_child_waits_for_it(
    tmp_path: Path, log: LogFile, start: Callable[[], Child]
) -> None:
    write_rules(tmp_path, free_port())
    (tmp_path / "data" / "uplink.db").mkdir()
    child = start()
    wait_until(lambda: "uplink.db is a directory where a file belongs" in child.printed())
    with pytest.raises(StoreError, match=r"uplink\.db"):
        read_pools(tmp_path / "data")


def test_one_that_waits_for_its_uplink_db_stops_when_it_is_told_to(
    tmp_path: Path, server: RedisServer, start: Callable[[], Child]
) -> None:
    write_rules(tmp_path, server.port)
    _garbage(tmp_path / "data" / "uplink.db")
    for count, end in enumerate((Child.hang_up, Child.terminate), 1):
        child = start()
        wait_until(partial(child.has_said, "not a database", count))
        assert end(child) == 0


def test_a_log_that_nobody_reads_does_not_keep_it_from_working_or_stopping(tmp_path: Path, log: LogFile) -> None:
    (tmp_path / "emqx_backend_redis.conf").write_text("nonsense\n")
    read, write = os.pipe()
    os.set_blocking(write, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    command = [sys.executable, "-m", "tidegate.uplink.child", "--data", str(tmp_path / "data"), "--conf", str(tmp_path)]
    with subprocess.Popen([*command, "--backend", "redis"], stdin=subprocess.PIPE, stderr=write) as child:
        wait_until(lambda: state(tmp_path) == "misconfigured")
        child.terminate()
        assert child.wait(STOP_DEADLINE) == 0
    os.close(read)
    os.close(write)


def at_least(far: Any, count: int) -> bool:
    return bool(far.llen("list") >= count)


def test_kill_9_in_the_middle_repeats_nothing(
    tmp_path: Path, log: LogFile, server: RedisServer, start: Callable[[], Child]
) -> None:
    write_rules(tmp_path, server.port)
    log.publish_many(20_000)
    with server.client() as far:
        for part in range(1, 5):
            child = start()
            wait_until(partial(at_least, far, part * 3000))
            os.kill(child.process.pid, signal.SIGKILL)
            child.process.wait()
        start()
        wait_until(lambda: far.hget(LEDGER, "1") == "20000", 20)
        assert far.lrange("list", 0, -1) == [entry.msgid for entry in log.entries()]


def test_the_stand_in_of_the_demo_takes_everything_too(tmp_path: Path, log: LogFile, start: Callable[[], Child]) -> None:
    port = free_port()
    program = f"from fakeredis import TcpFakeServer; TcpFakeServer(('127.0.0.1', {port}), server_type='redis').serve_forever()"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as stand_in:
        write_rules(tmp_path, port)
        log.publish_many(250)
        log.publish("r", b"keep", retain=True)
        start()
        with redis.Redis(port=port, decode_responses=True) as far:
            wait_until(lambda: answers(far) and far.llen("list") == 251, 20)
            assert far.lrange("list", 0, -1) == [entry.msgid for entry in log.entries()]
            assert far.hget("mqtt:retain:r", "payload") == "keep"
        stand_in.kill()


def answers(far: redis.Redis) -> bool:
    try:
        return bool(far.ping())
    except redis.ConnectionError:
        return False
