"""The supervisor and its pipe, with small real children in place of the uplink."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tidegate.gateway.supervisor import Supervisor

from tests.support.said import Said

DEADLINE = 10.0
COUNT = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with open(sys.argv[1], "ab", 0) as out:
    out.write(b"S")
    while data := os.read(0, 65536):
        out.write(b"." * len(data))
    out.write(b"E")
"""
DIES = "import sys; open(sys.argv[1], 'ab').write(b'S'); sys.exit(7)"
STUBBORN = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "ab").write(b"S")
while True:
    signal.pause()
"""


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until the condition holds."""

    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(look(), DEADLINE)


class Stage:
    """A supervisor over a small program that writes to a file what it sees."""

    def __init__(self, directory: Path, program: str) -> None:
        self._out = directory / "out"
        self.reports = Said()
        self.supervisor = Supervisor([sys.executable, "-c", program, str(self._out)], self.reports)

    def seen(self) -> str:
        return self._out.read_text() if self._out.exists() else ""


def test_a_wake_up_arrives_and_stop_ends_the_child(tmp_path: Path) -> None:
    async def story() -> None:
        stage = Stage(tmp_path, COUNT)
        await stage.supervisor.start()
        await until(lambda: stage.seen() == "S")
        stage.supervisor.wake()
        stage.supervisor.wake()
        await until(lambda: stage.seen() == "S..")
        assert stage.supervisor.state == "running"
        await stage.supervisor.stop(5)
        assert (stage.supervisor.state, stage.supervisor.pid, stage.reports) == ("stopped", None, [])
        stage.supervisor.wake()

    asyncio.run(story())


def test_wake_ups_never_block_although_nobody_reads(tmp_path: Path) -> None:
    async def story() -> None:
        stage = Stage(tmp_path, STUBBORN)
        await stage.supervisor.start()
        await until(lambda: stage.seen() == "S")
        for _ in range(200_000):
            stage.supervisor.wake()
        await stage.supervisor.stop(0.1)
        assert stage.supervisor.pid is None, "killed, since it did not listen"

    asyncio.run(story())


def test_a_child_that_dies_is_started_again_later_each_time(tmp_path: Path) -> None:
    async def story() -> None:
        stage = Stage(tmp_path, DIES)
        await stage.supervisor.start()
        await until(lambda: stage.seen() == "SSS")
        await until(lambda: len(stage.reports) == 3)
        await stage.supervisor.stop(5)
        assert stage.reports == [
            f"uplink_ended: the uplink ended and is started again; nothing is lost exit_code=7 pause={pause}"
            for pause in (0.2, 0.4, 0.8)
        ]
        assert stage.supervisor.restarts == 3

    asyncio.run(story())


def test_a_restart_is_a_stop_and_a_start(tmp_path: Path) -> None:
    async def story() -> None:
        stage = Stage(tmp_path, COUNT)
        await stage.supervisor.start()
        await until(lambda: stage.seen() == "S")
        before = stage.supervisor.pid
        await stage.supervisor.restart()
        await until(lambda: stage.seen() == "SS")
        assert stage.supervisor.pid not in (before, None)
        assert stage.reports == []
        await stage.supervisor.stop(5)

    asyncio.run(story())


class Counting(Supervisor):
    starts = 0

    async def start(self) -> None:
        self.starts += 1
        await super().start()


def test_many_restarts_that_are_asked_for_at_once_are_two(tmp_path: Path) -> None:
    """One that has begun may have read the files before they changed; all that come later are one."""

    async def story() -> None:
        supervisor = Counting([sys.executable, "-c", COUNT, str(tmp_path / "out")], Said())
        await supervisor.start()
        await asyncio.gather(*(supervisor.restart() for _ in range(50)))
        await supervisor.stop(DEADLINE)
        assert 2 <= supervisor.starts <= 3

    asyncio.run(story())


def test_a_program_that_cannot_be_started_is_reported(tmp_path: Path) -> None:
    async def story() -> None:
        reports = Said()
        supervisor = Supervisor([str(tmp_path / "nothing")], reports)
        await supervisor.start()
        await until(lambda: reports)
        assert "not_started=" in reports[0]
        await supervisor.stop(1)

    asyncio.run(story())


def test_only_the_supervisor_holds_the_pipe_s_other_end(tmp_path: Path) -> None:
    async def story() -> None:
        stage = Stage(tmp_path, COUNT)
        await stage.supervisor.start()
        await until(lambda: stage.seen() == "S")
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", "import os; os.read(0, 1)", stdin=-1)
        os.close(stage.supervisor._pipe)
        stage.supervisor._pipe = os.open(os.devnull, os.O_WRONLY)
        await until(lambda: stage.seen() == "SE")
        await stage.supervisor.stop(5)
        other.kill()
        await other.wait()

    asyncio.run(story())
