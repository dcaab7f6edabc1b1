"""The uplink child and its pipe: started, woken, started again with back-off when it ends, stopped.

The child is executed, not forked: a restart is a start. Its standard input is a pipe whose other end only this process holds,
so the child sees our death as the end of its input, whatever killed us. A wake-up is one byte that never blocks: a full pipe
says already that there is something new. What the child prints goes to our own standard error; a byte on its standard output
says that it has put answers into the inbox (`store.inbox`).

Invariant: there is at most one child, and none is started after `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence

from tidegate.store.report import WARNING, Say

FIRST_PAUSE, MAX_PAUSE = 0.2, 30.0
STEADY = 30.0
"""Seconds after which a child that ran counts as healthy again."""
RESTART_TIMEOUT = 3.0


class Supervisor:
    """Keeps one child of `command` running; `report` is told when it ends unasked, `answers` that there are some."""

    def __init__(self, command: Sequence[str], report: Say, answers: Callable[[], None] = lambda: None) -> None:
        self.state = "stopped"
        self.restarts = 0
        self._command = command
        self._report = report
        self._answers = answers
        self._pipe = -1
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._asked = False
        self._closed = False
        self._changing = asyncio.Lock()
        self._restart_waits = False

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the child and watch over it."""
        self._watch = asyncio.get_running_loop().create_task(self._keep_running(), name="uplink supervisor")

    def wake(self) -> None:
        """There is something new in the log."""
        if self._pipe >= 0:
            # Full: the child has not read the last wake-ups yet. Broken: it ended, and reads the log when it starts.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._pipe, b"\n")

    async def restart(self) -> None:
        """Stop the child and start it anew, with files read again; what is asked while one waits for its turn is that one."""
        if self._restart_waits:
            return
        self._restart_waits = True
        async with self._changing:
            self._restart_waits = False
            if self._watch is not None and not self._closed:
                await self._end(RESTART_TIMEOUT)
                await self.start()

    async def stop(self, timeout: float) -> None:
        """Let the child finish its batch; after `timeout` seconds it is killed. There is no other one after it."""
        self._closed = True
        async with self._changing:
            await self._end(timeout)

    async def _end(self, timeout: float) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        self._asked = True
        process = self._process
        if process is None:
            watch.cancel()
        else:
            _signal(process, signal.SIGTERM)
            done, _ = await asyncio.wait([watch], timeout=timeout)
            if not done:
                _signal(process, signal.SIGKILL)
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        self._asked = False
        self.state = "stopped"

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        while True:
            started = loop.time()
            try:
                code = await self._run()
                why: dict[str, object] = {"signal": -code} if code < 0 else {"exit_code": code}
            except OSError as error:
                why = {"not_started": error}
            if self._asked:
                return
            pause = FIRST_PAUSE if loop.time() - started > STEADY else pause
            self.state = "waiting"
            self.restarts += 1
            text = "the uplink ended and is started again; nothing is lost"
            self._report("uplink_ended", text, WARNING, **why, pause=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE)

    async def _run(self) -> int:
        """One child from start to end; its exit code."""
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        try:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=read, stdout=asyncio.subprocess.PIPE, stderr=None, start_new_session=True
                )
            finally:
                os.close(read)
            if self._asked:
                _signal(self._process, signal.SIGTERM)
            self.state = "running"
            assert self._process.stdout is not None
            while await self._process.stdout.read(65_536):
                self._answers()
            return await self._process.wait()
        finally:
            self._process = None
            pipe, self._pipe = self._pipe, -1
            os.close(pipe)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
