"""The campaign's short form: three counted cuts, a kill of each process, every fault once, on each far end that is here.

The whole of it is a command: python -m tests.campaign
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.uplink.sql_rig import NEEDS_MYSQL

from .far_end import FAULTS
from .far_ends import FAR_ENDS
from .trial import BROKER, CHILD, CUT, Plan, Trial

SHORT = Plan(cuts=3, kills=1, rounds=1)


@pytest.mark.parametrize("name", ["redis", "sentinel", "cluster", "pgsql", "mariadb", pytest.param("mysql", marks=NEEDS_MYSQL)])
def test_everything_that_can_happen_to_a_far_end_leaves_it_as_the_log_is(tmp_path: Path, name: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    with FAR_ENDS[name](tmp_path) as far:
        counts, sheet = Trial(far, tmp_path / "gateway", random.Random(seed)).run(SHORT)
    assert sheet.mistakes() == {}, sheet
    done = {CUT, BROKER, CHILD, *FAULTS}.difference(far.impossible)
    assert {event: counts[event] > 0 for event in done} == dict.fromkeys(done, True)
    assert (counts[CUT], counts[BROKER], counts[CHILD]) == (3, 1, 1)
