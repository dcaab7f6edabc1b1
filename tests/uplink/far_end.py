"""A far end in memory that fails as real ones do, for the worker's simulation: lost answers, late tails, restored backups.

It keeps what the worker's contract asks of every backend: a mark per (gateway, epoch) that moves by compare-and-set together
with the batch. All its chances come from one seeded generator, so a seed repeats a failure exactly.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Container
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field

from tidegate.uplink.backend import Batch, Mark, Meanwhile, Packed, Refusal, nothing
from tidegate.uplink.errors import Misconfigured, NotConnected, Rejected


@dataclass
class State:
    """What a restart from an older backup brings back."""

    marks: dict[tuple[str, int], Mark] = field(default_factory=dict)
    applied: list[tuple[int, int, bytes]] = field(default_factory=list)
    refused: dict[tuple[str, int, int, int], Refusal] = field(default_factory=dict)


class FarEnd:
    """`bad` operations are refused one by one; `poison` makes a whole batch refused without saying which; `named` too, but
    the far end says which."""

    def __init__(
        self,
        chance: random.Random,
        bad: Container[bytes] = (),
        poison: Container[bytes] = (),
        named: Container[bytes] = (),
    ) -> None:
        self.state = State()
        self.calm = False
        self.is_cut = False
        self._chance = chance
        self.ever_refused: set[tuple[int, bytes]] = set()
        """(seq, operation) of everything that was refused, alone or with the rest of its entry."""
        self.restores = 0
        self._bad = bad
        self._poison = poison
        self._named = named
        self._late: list[Batch] = []
        self._backup = deepcopy(self.state)

    def connect(self) -> FarLink:
        self.trouble(0.3)
        return FarLink(self)

    def trouble(self, probability: float) -> None:
        """Something happens to the far end, or to the link; what was under way may still arrive."""
        if self.calm:
            return
        if self._late and self._chance.random() < 0.5:
            # Refused or not: nobody is there any more to hear it.
            with suppress(Rejected):
                self.apply(self._late.pop(self._chance.randrange(len(self._late))))
        dice = self._chance.random()
        if dice < 0.02:
            self._backup = deepcopy(self.state)
        elif dice < 0.03:
            self.restore()
            # A restored server is a new process: what was on its way in old connections is gone.
            self._late.clear()
            raise NotConnected("restored from an older backup")
        elif dice < probability:
            raise NotConnected("no answer")
        elif dice < probability + 0.01:
            raise Misconfigured("wrong password", "set the right one")

    def forget_late(self) -> None:
        """What was still on its way is lost."""
        self._late.clear()

    def restore(self) -> None:
        """Go back to the last backup."""
        self.state = deepcopy(self._backup)
        self.restores += 1

    def write(self, batch: Batch) -> list[Refusal] | None:
        """Apply a batch, or seem to: the request is lost, comes late, or its answer is lost."""
        self.trouble(0.0)
        if not self.calm:
            dice = self._chance.random()
            if dice < 0.05:
                raise NotConnected("the request was lost")
            if dice < 0.10:
                self._late.append(batch)
                raise NotConnected("no answer yet")
            if dice < 0.15:
                with suppress(Rejected):
                    self.apply(batch)
                raise NotConnected("the answer was lost")
        return self.apply(batch)

    def apply(self, batch: Batch) -> list[Refusal] | None:
        key = (batch.gateway, batch.epoch)
        if self.state.marks.get(key, Mark()) != batch.expected:
            return None
        if any(operation.packed.data in self._poison for operation in batch.operations):
            if len({operation.seq for operation in batch.operations}) == 1:
                self.ever_refused |= {(operation.seq, operation.packed.data) for operation in batch.operations}
            raise Rejected("something in here is poison")
        rows = {place: "named" for place, operation in enumerate(batch.operations) if operation.packed.data in self._named}
        if rows:
            self.ever_refused |= {(batch.operations[place].seq, batch.operations[place].packed.data) for place in rows}
            raise Rejected("these are refused", rows)
        self.state.marks[key] = Mark(batch.through)
        refusals: list[Refusal] = []
        for operation in batch.operations:
            if operation.packed.data in self._bad:
                refusal = Refusal(batch.epoch, operation.seq, operation.number, "bad", operation.packed.data)
                self.state.refused[batch.gateway, batch.epoch, operation.seq, operation.number] = refusal
                refusals.append(refusal)
                self.ever_refused.add((operation.seq, operation.packed.data))
            else:
                self.state.applied.append((operation.seq, operation.number, operation.packed.data))
        return refusals


class FarLink:
    """See `backend.Link`."""

    warning = ""
    largest = 1000
    whole = True

    def __init__(self, far: FarEnd) -> None:
        self._far = far

    def marks(self, gateway: str) -> dict[int, Mark]:
        self._far.trouble(0.1)
        return {epoch: mark for (name, epoch), mark in self._far.state.marks.items() if name == gateway}

    def refusals(self, gateway: str) -> list[Refusal]:
        self._far.trouble(0.1)
        return sorted(refusal for (name, *_), refusal in self._far.state.refused.items() if name == gateway)

    def settle(self, gateway: str, refusals: Collection[Refusal]) -> None:
        self._far.trouble(0.1)
        for refusal in refusals:
            self._far.state.refused.pop((gateway, refusal.epoch, refusal.seq, refusal.number), None)

    def write(self, batch: Batch, meanwhile: Meanwhile = nothing) -> list[Refusal] | None:
        meanwhile()
        return self._far.write(batch)

    def repack(self, data: bytes) -> Packed:
        return Packed(data, 1)

    def fileno(self) -> int:
        return -1

    def gone(self) -> bool:
        return self._far.is_cut

    def close(self) -> None:
        pass
