"""One named thread that does jobs in order and posts each answer back to the event loop.

The committer and the catch-up reader are such threads: SQLite blocks, the loop must not. A job returns a value or raises
sqlite3.Error or StoreError, which are handed back as values; anything else is a bug and is handed back too, so that the
loop fails loudly instead of waiting for ever.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

Post = Callable[..., object]
"""Thread-safe `post(function, *arguments)`: call it soon in the loop (asyncio's `call_soon_threadsafe`)."""


class Worker:
    """`submit(job, done)`: run `job()` here, then `done(value_or_exception)` in the loop."""

    def __init__(self, name: str, post: Post, idle: Callable[[], None] | None = None, pause: float = 1.0) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None] = queue.SimpleQueue()
        self._post = post
        self._idle = idle
        self._pause = pause
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self._jobs.put((job, done))

    def stop(self) -> None:
        """Finish what was submitted, then end; returns when the thread has ended."""
        self._jobs.put(None)
        self._thread.join()

    def serve(self, pause: float = 0.0) -> bool:
        """From within a long job: do what was submitted meanwhile, waiting `pause` seconds for it at most.

        False when this thread is to end, so that the long job had better.
        """
        for _ in range(max(1, self._jobs.qsize())):
            try:
                item = self._jobs.get(pause > 0, pause or None)
            except queue.Empty:
                break
            if item is None:
                self._jobs.put(None)
                return False
            job, done = item
            self._post(done, self._try(job))
            pause = 0.0
        return True

    def _run(self) -> None:
        rested = True
        while True:
            try:
                item = self._jobs.get(timeout=None if rested or self._idle is None else self._pause)
            except queue.Empty:
                rested = True
                self._try(self._idle)
                continue
            if item is None:
                return
            rested = False
            job, done = item
            self._post(done, self._try(job))

    @staticmethod
    def _try(job: Callable[[], Any] | None) -> Any:
        try:
            return job() if job is not None else None
        except Exception as error:  # noqa: BLE001 - protects the loop from waiting for an answer that never comes
            return error
