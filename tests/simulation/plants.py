"""Bugs planted on purpose, one at a time: each class is the simulation of a gateway with one promise broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tidegate.gateway.session import Client
from tidegate.store import store
from tidegate.store.entry import DISCONNECTED
from tidegate.store.log import Batch
from tidegate.uplink.backend import Batch as FarBatch
from tidegate.uplink.backend import Link
from tidegate.uplink.stretch import Stretch
from tidegate.uplink.worker import Worker

from .lying_disk import LyingDisk
from .model import Model
from .simulation import Box, Simulation


@contextmanager
def spoilt(where: Any, name: str, replacement: Any) -> Iterator[None]:
    """One thing of the gateway is another for a while."""
    before = getattr(where, name)
    setattr(where, name, replacement)
    try:
        yield
    finally:
        setattr(where, name, before)


class HastyBox(Box):
    def __init__(self, path: Path, model: Model, wall: int, mono: int) -> None:
        super().__init__(path, model, wall, mono, "memory")


class AcknowledgeBeforeCommit(Simulation):
    """PUBACK and PUBREC leave when the message is received."""

    box_type = HastyBox


class HastyWorker(Worker):
    def _write(self, link: Link, batch: FarBatch, stretch: Stretch) -> None:
        self._move((batch.gateway, batch.epoch), batch.through)
        super()._write(link, batch, stretch)


class CursorBeforeAnswer(Simulation):
    """The uplink's cursor moves when a batch is sent."""

    worker_type = HastyWorker


class SplitBox(Box):
    """Guards of QoS 2 are written with the next commit."""

    def __init__(self, path: Path, model: Model, wall: int, mono: int) -> None:
        super().__init__(path, model, wall, mono)
        self._late: list[tuple[str, tuple[Any, ...]]] = []

    def apply(self, batch: Batch) -> None:
        late = [change for change in batch.changes if "INTO received" in change[0]]
        batch.changes = self._late + [change for change in batch.changes if change not in late]
        self._late = late
        super().apply(batch)


class GuardInAnotherTransaction(Simulation):
    """The message of a QoS 2 exchange and the memory of its packet id are not one transaction."""

    box_type = SplitBox


class LateBox(Box):
    def __init__(self, path: Path, model: Model, wall: int, mono: int) -> None:
        super().__init__(path, model, wall, mono)
        lost = self.broker.lost

        def late(client: Client) -> None:
            lost(client)
            successor = self.broker.sessions.get(client.peer)
            if successor is not None and successor.client is not None:
                self.broker.log.append(DISCONNECTED, successor.name)

        self.broker.lost = late  # type: ignore[method-assign]


class LateDisconnectWins(Simulation):
    """The end of a connection that was taken over is logged when its socket ends."""

    box_type = LateBox


class OldEpoch(LyingDisk):
    """The epoch goes on, so the numbers of lost entries name new ones."""

    def begin_again(self) -> None:
        with spoilt(store, "next_epoch", lambda last, wall, mono, boot: last):
            super().begin_again()


PLANTS = (AcknowledgeBeforeCommit, CursorBeforeAnswer, GuardInAnotherTransaction, LateDisconnectWins, OldEpoch)
