"""`tidegate backup` of a running gateway: the copy is made in the committer's thread, in between commits.

Asked through the control socket: `{"command": "backup", "file": FILE}` begins, without `file` it tells how far it came. The
copy reaches the disk piece by piece in a thread of its own, which the copying waits for while commits go on: so neither a
commit waits for more than one step, nor does a slow disk gather a flood. Whoever began it has to keep asking; a backup that
nobody waits for is given up.

Invariant: one backup at a time, and it never keeps the gateway from stopping.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from tidegate.store.backup import backup_to, finish
from tidegate.store.exchange import part_of, sync
from tidegate.store.schema import StoreError
from tidegate.store.store import Store
from tidegate.store.worker import Post, Worker

ASKED_WITHIN = 15.0
"""Seconds without a question after which nobody is thought to wait."""
PIECE = 2048
"""Pages that are copied before they have to be on the disk."""


class OnlineBackup:
    """See the module; `answer` is called in the loop, the rest in the threads."""

    def __init__(self, store: Store, committer: Worker, post: Post) -> None:
        self._store = store
        self._committer = committer
        self._post = post
        self._helper: Worker | None = None
        self._asked = 0.0
        self._state: dict[str, Any] = {"state": "none"}
        self._synced = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin, or tell how far it is."""
        self._asked = time.monotonic()
        if "file" in request:
            if self._state["state"] in ("copying", "checking"):
                return {"error": "a backup is being made already"}
            self._begin(Path(str(request["file"])))
        return self._state

    def _begin(self, file: Path) -> None:
        if not file.is_absolute():
            raise StoreError("the file's name must be absolute")
        self._synced = 0
        self._state = {"state": "copying", "copied": 0, "total": 0}
        helper = self._helper = self._helper or Worker("backup", self._post)

        def copied(result: Any) -> None:
            if isinstance(result, Exception):
                self._end(result)
            else:
                self._state = self._state | {"state": "checking"}
                helper.submit(lambda: finish(file, self._store.path), self._end)

        self._committer.submit(
            lambda: backup_to(self._store.connection, file, lambda done, total: self._between(file, done, total)), copied
        )

    def _end(self, result: Any) -> None:
        if isinstance(result, StoreError):
            self._state = {"state": "failed", "reason": str(result)}
        elif isinstance(result, Exception):
            self._state = {"state": "failed", "reason": f"{type(result).__name__}: {result}"}
        else:
            self._state = {"state": "done", "bytes": result}

    def _between(self, file: Path, done: int, total: int) -> None:
        """In the committer's thread, after each step: what was submitted meanwhile comes first."""
        self._state = {"state": "copying", "copied": done, "total": total}
        self._serve()
        if done - self._synced >= PIECE:
            self._synced = done
            self._sync(file)

    def _sync(self, file: Path) -> None:
        assert self._helper is not None
        over = threading.Event()
        faults: list[OSError] = []

        def job() -> None:
            try:
                sync(part_of(file))
            except OSError as error:
                faults.append(error)
            finally:
                over.set()

        self._helper.submit(job, lambda _: None)
        while not over.is_set():
            self._serve(0.02)
        if faults:
            raise faults[0]

    def _serve(self, pause: float = 0.0) -> None:
        if not self._committer.serve(pause):
            raise StoreError("the gateway was stopped")
        if time.monotonic() - self._asked > ASKED_WITHIN:
            raise StoreError("nobody waits for it any more")
