"""A small box: what every consumer is done with goes after seconds, and names that nothing uses with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tidegate.gateway.trimming import Trimming, lowest_cursor
from tidegate.store.report import INFO, Level
from tidegate.store.trim import Trim
from tidegate.uplink.progress import cursors

from tests.uplink.far_end import FarEnd

from .simulation import Box, Simulation

AGE = 3_000


class Forgiving(FarEnd):
    """Loses answers, but never its memory: what it had confirmed is gone from the log."""

    def restore(self) -> None: ...


class TrimmedSimulation(Simulation):
    """See the module."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        super().__init__(directory, seed)
        self.far = Forgiving(self.chance)
        self.worker = self._start_worker()

    def weights(self) -> tuple[list[Callable[[], None]], list[int]]:
        steps, weights = super().weights()
        return [*steps, self._trim], [*weights, 20]

    def _start_box(self) -> Box:
        box = super()._start_box()
        self._trimming = Trimming(
            Trim(1 << 30, AGE), box.store.connection, lambda job, done: done(job()), box.broker, self._floor, self._say
        )
        return box

    def _say(self, event: str, text: str, level: Level = INFO, about: str | None = None, /, **fields: object) -> None:
        raise AssertionError(f"{event}: {fields}")

    def _trim(self) -> None:
        self._trimming.start()

    def _floor(self) -> int:
        return lowest_cursor(self.box.broker, cursors(self._directory).values() or [0])
