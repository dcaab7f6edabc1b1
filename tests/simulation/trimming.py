"""A small box: what every consumer is done with goes after seconds, and names that nothing uses with it.

Or a crowded one, whose budget takes what is still waited for: then nothing is missing that no gap record names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tidegate.gateway.trimming import Reach, Trimming, reach
from tidegate.store.entry import GAP, KIND_NAMES
from tidegate.store.log import Row
from tidegate.store.policy import Policies, Policy
from tidegate.store.report import INFO, Level
from tidegate.store.topic import matches
from tidegate.store.trim import Trim
from tidegate.uplink.progress import held

from tests.uplink.far_end import FarEnd

from .model import Model, Reader
from .simulation import Box, Simulation
from .uplink import Kept, Uplink

AGE = 3_000
CROWDED = 248_000
"""Bytes: half of it for the database, of which a fresh one takes 111,000."""
POLICIES = Policies((Policy("b/#", 2),))


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

    def make_trim(self) -> Trim:
        return Trim(1 << 30, AGE)

    def _start_box(self) -> Box:
        box = super()._start_box()
        self._trimming = Trimming(
            self.make_trim(), box.store.connection, lambda job, done: done(job()), box.broker, self._reach, self._say
        )
        return box

    def _say(self, event: str, text: str, level: Level = INFO, about: str | None = None, /, **fields: object) -> None:
        raise AssertionError(f"{event}: {fields}")

    def _trim(self) -> None:
        self._trimming.start()

    def _reach(self) -> Reach:
        """As the gateway has it: by the pools that the broker knows of."""
        return reach(self.box.broker, held(self._directory, self.uplink.named))


class Excusing(Model):
    """Nobody needs to have got what `gone` names."""

    gone: Callable[[Row], bool] = staticmethod(lambda row: False)

    def _check_reader(self, name: str, reader: Reader, limited: bool) -> None:
        rows = self.rows
        self.rows = [row for row in rows if not self.gone(row)]
        super()._check_reader(name, reader, limited)
        self.rows = rows


class CrowdedUplink(TrimmedUplink):
    """What is gone may have been carried before."""

    gone: Callable[[Row], bool] = staticmethod(lambda row: False)

    def _check_passed(self, pool: str, passed: Sequence[tuple[int, int, Row]], last: int, kept: Kept) -> None:
        left = [one for one in passed if one[2][4] != GAP and not self.gone(one[2])]
        super()._check_passed(pool, left, last, kept)


class CrowdedSimulation(TrimmedSimulation):
    """See the module."""

    model_type = Excusing
    uplink_type = CrowdedUplink

    def make_trim(self) -> Trim:
        return Trim(CROWDED, 1 << 40, POLICIES)

    def _time_passes(self) -> None:
        super()._time_passes()
        self._trimming.tick()

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory, seed)
        assert isinstance(self.model, Excusing) and isinstance(self.uplink, CrowdedUplink)
        self.model.gone = self.uplink.gone = self._is_named

    def _records(self) -> list[tuple[str, str, int, int]]:
        """(event, topic, first seq, last seq) of every gap record, those included that are no entries yet."""
        texts = [json.loads(row[8]) for row in self.model.rows if row[4] == GAP]
        found = [(gap["event"], gap["topic"], gap["first_seq"], gap["last_seq"]) for gap in texts]
        kept = self.box.store.connection.execute("SELECT value FROM meta WHERE key = 'gaps'").fetchone()
        for event, topic, _, _, first, last, *_ in json.loads(kept[0]) if kept else ():
            found.append((event, topic, first, last))
        return found

    def _is_named(self, row: Row) -> bool:
        topic, event = row[6].text if row[6] else "", KIND_NAMES[row[4]]
        return any(
            first <= row[0] <= last and event == kind and (topic == name or matches(name, topic))
            for kind, name, first, last in self._records()
        )
