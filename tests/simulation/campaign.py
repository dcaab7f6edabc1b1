"""Many seeds one after the other, in memory where the machine offers that."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from .asking import Asking
from .clocks import WrongClocks
from .lying_disk import LyingDisk
from .simulation import Simulation
from .trimming import TrimmedSimulation

MEMORY = Path("/dev/shm")


class Simulated(Protocol):
    """What a campaign needs of a simulation. The same directory and seed tell the same story."""

    counts: Counter[str]

    def __init__(self, directory: Path, seed: int) -> None: ...
    def run(self, steps: int) -> None: ...
    def finish(self) -> None: ...
    def story(self) -> str: ...
    def close(self) -> None: ...


Kinds = Sequence[type[Simulated]]
Found = TypeVar("Found", bound=Simulated)
KINDS_OF_SIMULATION: dict[str, Kinds] = {
    "all": (Simulation, TrimmedSimulation, LyingDisk, WrongClocks, Asking),
    "plain": (Simulation,),
    "trimmed": (TrimmedSimulation,),
    "lying": (LyingDisk,),
    "clocks": (WrongClocks,),
    "asking": (Asking,),
}


@dataclass
class Sheet:
    """What a campaign did."""

    seeds: int = 0
    steps: int = 0
    failed: int = 0
    seconds: float = 0.0


def run_seed(seed: int, steps: int, kind: type[Simulated] = Simulation) -> str:
    """One simulation to its end, and its story in short. Raises AssertionError where something is not as it must be."""
    with simulation_of(seed, kind) as simulation:
        simulation.run(steps)
        simulation.finish()
        return simulation.story()


def campaign(seconds: float, steps: int, first: int, kinds: Kinds, say: Callable[[str], None]) -> Sheet:
    """Seeds from `first` on for that long, the kinds in turn; each failure is said at once."""
    sheet = Sheet()
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds or not sheet.seeds:
        seed, kind = first + sheet.seeds, kinds[sheet.seeds % len(kinds)]
        try:
            run_seed(seed, steps, kind)
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed must be told
            sheet.failed += 1
            say(f"{kind.__name__} seed {seed} with {steps} steps, after {now:.0f} s: {type(error).__name__}: {error}")
        sheet.seeds += 1
        sheet.steps += steps
    sheet.seconds = time.monotonic() - began
    return sheet


def survival(kind: type[Simulated], seed: int, steps: int, at_most: int) -> int | None:
    """How many steps a planted bug survives from this seed on; None if it was not found in `at_most`."""
    survived = 0
    while survived < at_most:
        with simulation_of(seed, kind) as simulation:
            try:
                simulation.run(steps)
                simulation.finish()
            except AssertionError:
                return survived + simulation.counts.total()
        survived += steps
        seed += 1000
    return None


@contextmanager
def simulation_of(seed: int, kind: type[Found]) -> Iterator[Found]:
    with tempfile.TemporaryDirectory(prefix="tidegate-simulation-", dir=MEMORY if MEMORY.is_dir() else None) as directory:
        simulation = kind(Path(directory), seed)
        try:
            yield simulation
        finally:
            simulation.close()
