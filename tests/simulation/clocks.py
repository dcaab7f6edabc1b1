"""A box without a clock chip: it boots in 1970 or at any other time, hands and time servers set its clock, and power fails.

The judge is the real one; what it may know is only whether a time server has set the clock. In the end the clock is known, and
every entry of a boot in which it ever was must have the time at which it truly happened.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tidegate.gateway.trust import STEP, Trust
from tidegate.store.clock import CONFIRMED, Clock
from tidegate.store.reader import LogReader

from .model import Model
from .simulation import Box, Simulation

YEAR = 365 * 86_400_000


class Unsure(Model):
    times_change = True


class WrongClocks(Simulation):
    """The clock shows `_wall`; the true time is `_offset` more than the boot clock."""

    model_type = Unsure

    def __init__(self, directory: Path, seed: int) -> None:
        self._boot = 0
        self._synchronised = False
        self._offset = 0
        self._offsets: dict[str, int] = {}
        """Boot -> its true offset."""
        super().__init__(directory, seed)

    def _open_reader(self) -> None:
        self._reader = LogReader(self.path, waits=True)

    # -- the witness -----------------------------------------------------------------------------------------------

    def confirms(self, clock: Clock, wall: int, mono: int) -> str:
        return "a time server" if self._synchronised else ""

    def is_coming(self) -> bool:
        return False

    def judge(self, clock: Clock, wall: int, mono: int) -> tuple[int, int]:
        offset, level = self._trust.judge(clock, wall, mono)
        if level == CONFIRMED:
            assert abs(offset - self._offset) <= STEP, "a clock that nobody confirmed was trusted"
        return offset, level

    @property
    def _true(self) -> int:
        return self._mono + self._offset

    # -- what happens to the clock ---------------------------------------------------------------------------------

    def weights(self) -> tuple[list[Callable[[], None]], list[int]]:
        steps, weights = super().weights()
        return [*steps, self._power_fails, self._time_server], [*weights, 2, 3]

    def _start_box(self) -> Box:
        if not self._boot:
            self._power_comes_back(self._wall)
        self._trust = Trust("auto", 600_000, self)
        self._offsets[f"boot-{self._boot}"] = self._offset
        return self.box_type(self.path, self.model, self._wall, self._mono, judge=self.judge, boot=f"boot-{self._boot}")

    def _clock_steps(self) -> None:
        """By hand."""
        self._doubt()
        self._synchronised = False
        self._wall = self._true + self.chance.choice((-YEAR, -600_000, -5_000, 0, 7_000, 86_400_000, 10 * YEAR))
        self._tell_time()

    def _doubt(self) -> None:
        """What is left of a session's life may be reckoned anew."""
        for device in self.devices:
            device.in_doubt = True

    def _time_server(self) -> None:
        self._doubt()
        self._synchronised = True
        self._wall = self._true
        self._tell_time()

    def _power_fails(self) -> None:
        self._doubt()
        self._power_comes_back(self._true)
        self._crash()

    def _power_comes_back(self, gone: int) -> None:
        self._boot += 1
        self._synchronised = False
        self._mono = self.chance.choice((1, 15_000))
        self._offset = gone + self.chance.choice((1_000, 60_000, 30 * 86_400_000))
        self._wall = self.chance.choice((self._mono, self._true - 60_000, self._true, self._true + 10 * YEAR))

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        self._time_server()
        super().finish()
        self._check_times()

    def _check_times(self) -> None:
        """What became known of a clock and was lost with the power before it was durable cannot be known."""
        known = "SELECT id, boot FROM run WHERE clock = ?"
        offsets = {run: self._offsets[boot] for run, boot in self.box.store.connection.execute(known, (CONFIRMED,))}
        with closing(LogReader(self.path)) as reader:
            entries = reader.read(0, 1_000_000)[0]
        when = {entry.seq: entry.when for entry in entries}
        rows = [row for row in self.model.rows if row[3] in offsets and row[2]]
        assert rows, "no time was checked"
        for row in rows:
            true = row[2] + offsets[row[3]]
            assert abs(when[row[0]] - true) <= STEP, f"seq {row[0]} has {when[row[0]]}, was {true}"
        ids = [entry.msgid for entry in entries]
        assert ids == sorted(ids), "ids are not in the order of the log"
