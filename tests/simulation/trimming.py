"""A small box: what every consumer is done with goes after seconds, and names that nothing uses with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tidegate.gateway.trimming import Reach, Trimming, reach
from tidegate.store.report import INFO, Level
from tidegate.store.trim import Trim
from tidegate.uplink.progress import held

from tests.uplink.far_end import FarEnd

from .simulation import Box, Simulation
from .uplink import Uplink

AGE = 3_000


class Forgiving(FarEnd):
    """Loses answers, but never its memory: what it had confirmed is gone from the log."""

    def restore(self) -> None: ...


class TrimmedUplink(Uplink):
    far_type = Forgiving
    trims = True


class TrimmedSimulation(Simulation):
    """See the module."""

    uplink_type = TrimmedUplink

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        super().__init__(directory, seed)

    def weights(self) -> tuple[list[Callable[[], None]], list[int]]:
        steps, weights = super().weights()
        return [*steps, self._trim], [*weights, 20]

    def _start_box(self) -> Box:
        box = super()._start_box()
        self._trimming = Trimming(
            Trim(1 << 30, AGE), box.store.connection, lambda job, done: done(job()), box.broker, self._reach, self._say
        )
        return box

    def _say(self, event: str, text: str, level: Level = INFO, about: str | None = None, /, **fields: object) -> None:
        raise AssertionError(f"{event}: {fields}")

    def _trim(self) -> None:
        self._trimming.start()

    def _reach(self) -> Reach:
        """As the gateway has it: by the pools that the broker knows of."""
        return reach(self.box.broker, held(self._directory, self.uplink.named))
