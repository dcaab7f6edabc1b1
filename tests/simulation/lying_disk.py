"""A disk that says "written" and forgets: now and then the gateway finds an older state of its log after a crash.

Nothing can bring back what was lost, so only this must hold: whatever the log has in the end is at the far end once, and no new
entry is taken for an old one because it has its number (design §2, identity).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tidegate.store.log import Row

from .device import Device
from .model import Model
from .rulebook import untagged, whole
from .simulation import Simulation
from .uplink import Uplink


class Forgetful(Model):
    """Promises nothing to devices; keeps the rows of the log as it is now."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[Row] = []

    def durable(self, rows: list[Row]) -> None:
        self.rows += rows

    def forget_after(self, seq: int) -> None:
        self.lost += [row for row in self.rows if row[0] > seq]
        self.rows = [row for row in self.rows if row[0] <= seq]

    def acknowledged(self, payload: bytes) -> None: ...
    def connected(self, name: str, persistent: bool, present: bool, may_have_expired: bool, expires: bool) -> None: ...
    def repeated(self, name: str, payload: bytes, dup: bool) -> None: ...
    def received(
        self, name: str, topic: str, payload: bytes, qos: int, dup: bool, retained: bool, left: int | None
    ) -> None: ...
    def check(self, limited: dict[str, bool], online: set[str]) -> None: ...


class ForgottenUplink(Uplink):
    """The rules stay as they are: whose rules an entry went by is another question."""

    def edit(self) -> None: ...

    def take_stock(self) -> None: ...

    def check_pool(self, pool: str, rows: Sequence[Row], at_end: bool = True) -> None:
        far, book = self.far[pool], whole()
        arrived = Counter((seq, untagged(data)[1]) for seq, _, data in far.state.applied)
        parked = {(seq, data) for seq, kept in self.quarantined(pool).items() for _, data in kept}
        assert isinstance(self.model, Forgetful)
        for row in rows:
            for data in book.due(pool, row):
                one = (row[0], data)
                assert arrived[one] or one in parked, f"{pool}: {one} never arrived"
                assert arrived[one] < 2 or self.model.lost, f"{pool}: {one} arrived twice"


class LyingDisk(Simulation):
    """See the module."""

    model_type = Forgetful
    uplink_type = ForgottenUplink

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory, seed)
        self._image = self.box.store.connection.serialize()

    def weights(self) -> tuple[list[Callable[[], None]], list[int]]:
        steps, weights = super().weights()
        return [*steps, self._remember, self._lose], [*weights, 4, 2]

    def _remember(self) -> None:
        self._image = self.box.store.connection.serialize()

    def after_stop(self) -> None:
        """A copy of the whole card is made of a gateway that was stopped as it should be."""
        if self.chance.random() < 0.5:
            self._image = self.path.read_bytes()

    def _lose(self) -> None:
        """A crash, and the log is as it was."""
        self.box.kill()
        self.uplink.reader.close()
        for tail in ("-wal", "-shm"):
            Path(f"{self.path}{tail}").unlink(missing_ok=True)
        self.path.write_bytes(self._image)
        self.uplink.open_reader()
        assert isinstance(self.model, Forgetful)
        self.model.forget_after(self.uplink.reader.bounds()[1])
        self.begin_again()

    def are_quiet(self, devices: list[Device]) -> bool:
        """They may wait for ever for what the gateway has forgotten."""
        return True

    def check_wills(self) -> None: ...

    def check_retained(self) -> None: ...
