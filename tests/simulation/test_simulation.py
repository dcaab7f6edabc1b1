"""The seeds that found bugs, new ones for a while, and bugs planted on purpose: what finds nothing proves nothing."""

from __future__ import annotations

import os
import random

import pytest

from .campaign import campaign, run_seed
from .lying_disk import LyingDisk
from .plants import PLANTS
from .simulation import Simulation
from .trimming import CrowdedSimulation, TrimmedSimulation

SECONDS = float(os.environ.get("TIDEGATE_SIMULATION_SECONDS", "20"))
FOUND = {
    7: "a live message taken for one that was sent as retained",
    15: "the retain flag lost when a message was sent again",
    35: "DUP forgotten over a clean stop",
    98: "a retained delivery in flight held the cursor back",
    133: "after a crash a message was matched with a later subscription",
    154: "a packet id used twice after a clean stop",
    195: "QoS 0 messages before the CONNACK of a resumed session",
    280: "a repeated PUBREC answered before the first was durable",
}


@pytest.mark.parametrize("seed", FOUND, ids=lambda seed: f"{seed}: {FOUND[seed]}")
def test_a_bug_that_a_seed_found_stays_mended(seed: int) -> None:
    run_seed(seed, 2000)


def test_new_seeds() -> None:
    """Each run of the tests tries others; a failing one is named, `python -m tests.simulation --seed N` repeats it."""
    said: list[str] = []
    sheet = campaign(SECONDS, 2000, random.randrange(1_000_000, 1_000_000_000), said.append)
    assert not sheet.failed, "\n".join(said)


@pytest.mark.parametrize("seed", range(30))
def test_a_log_that_lost_its_end_is_no_danger_to_the_far_end(seed: int) -> None:
    run_seed(seed, 2000, LyingDisk)


@pytest.mark.parametrize("seed", range(30))
def test_what_is_trimmed_was_done_with_by_everyone(seed: int) -> None:
    run_seed(seed, 2000, TrimmedSimulation)


def test_what_the_budget_takes_is_named_and_the_balance_holds() -> None:
    dropped = 0
    for seed in (*range(8), 105):  # 105: time went back when the last entry was gone
        dropped += run_seed(seed, 6000, CrowdedSimulation).box.broker.gaps.totals.total()
    assert dropped > 1_000


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_does_not_survive(plant: type[Simulation]) -> None:
    for seed in range(50):
        try:
            run_seed(seed, 2000, plant)
        except AssertionError:
            return
    pytest.fail("survived 100,000 steps")
