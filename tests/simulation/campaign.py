"""Many seeds one after the other, in memory where the machine offers that."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .simulation import Simulation

MEMORY = Path("/dev/shm")


@dataclass
class Sheet:
    """What a campaign did."""

    seeds: int = 0
    steps: int = 0
    failed: int = 0
    seconds: float = 0.0


def run_seed(seed: int, steps: int, simulation_type: type[Simulation] = Simulation) -> Simulation:
    """One simulation to its end. Raises AssertionError where something is not as it must be."""
    with tempfile.TemporaryDirectory(prefix="tidegate-simulation-", dir=MEMORY if MEMORY.is_dir() else None) as directory:
        simulation = simulation_type(Path(directory), seed)
        try:
            simulation.run(steps)
            simulation.finish()
            return simulation
        finally:
            simulation.close()


def campaign(seconds: float, steps: int, first: int, say: Callable[[str], None]) -> Sheet:
    """Seeds from `first` on for that long; each failure is said at once."""
    sheet = Sheet()
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds or not sheet.seeds:
        seed = first + sheet.seeds
        try:
            run_seed(seed, steps)
        except Exception as error:  # noqa: BLE001 - whatever it is, the seed must be told
            sheet.failed += 1
            say(f"seed {seed} with {steps} steps, after {now:.0f} s: {type(error).__name__}: {error}")
        sheet.seeds += 1
        sheet.steps += steps
    sheet.seconds = time.monotonic() - began
    return sheet
