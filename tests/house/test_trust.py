"""Whether the clock is believed: each decision with an evidence that the test makes, and the evidence of a made-up machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.gateway.trust import STEP, YEAR, Evidence, Trust, kernel_says_synchronised
from tidegate.store.clock import BELIEVED, BUILT, CONFIRMED, UNKNOWN, Clock

NOW = 1_764_000_000_000
BOOTED = 1_763_999_000_000
"""The time of day at which CLOCK_BOOTTIME was 0."""
LAST = BOOTED - 3_600_000
"""What the log knows of the time before this boot."""
WAIT = 600_000
MONO = NOW - BOOTED


class Witness:
    """Evidence as the test wants it."""

    def __init__(self, why: str = "", is_coming: bool = False) -> None:
        self.why = why
        self.coming = is_coming

    def confirms(self, clock: Clock, wall: int, mono: int) -> str:
        return self.why

    def is_coming(self) -> bool:
        return self.coming


def fresh_boot(level: int = UNKNOWN) -> Clock:
    """A clock that knows no more than when the log ended."""
    return Clock("boot", LAST, level, LAST)


def judge(trust: Trust, clock: Clock, wall: int, mono: int = MONO) -> tuple[int, int]:
    offset, level = trust.judge(clock, wall, mono)
    clock.take(offset, level)
    return offset, level


@pytest.mark.parametrize(
    ("mode", "why", "wall", "offset", "level", "state"),
    [
        ("auto", "ntp", NOW, BOOTED, CONFIRMED, "trusted"),
        ("auto", "", NOW, BOOTED, BELIEVED, "plausible"),
        ("auto", "", 12_000, LAST, UNKNOWN, "estimated"),
        ("auto", "ntp", 12_000, LAST, UNKNOWN, "estimated"),
        ("auto", "", LAST + MONO - STEP - 1, LAST, UNKNOWN, "estimated"),
        ("auto", "", LAST + MONO + 2 * YEAR + 1, LAST, UNKNOWN, "estimated"),
        ("auto", "ntp", LAST + MONO + 20 * YEAR, LAST + 20 * YEAR, CONFIRMED, "trusted"),
        ("always", "", 12_000, 12_000 - MONO, CONFIRMED, "trusted"),
        ("never", "ntp", NOW, BOOTED, BELIEVED, "plausible"),
        ("never", "ntp", 12_000, LAST, UNKNOWN, "estimated"),
    ],
    ids=[
        "confirmed", "plausible", "1970", "1970, and somebody says that it is right", "before the last known time",
        "far ahead", "far ahead and confirmed", "always, even 1970", "never, but plausible", "never, and 1970",
    ],
)  # fmt: skip
def test_at_the_start(mode: str, why: str, wall: int, offset: int, level: int, state: str) -> None:
    trust = Trust(mode, WAIT, Witness(why))
    assert judge(trust, fresh_boot(), wall) == (offset, level)
    assert trust.state == state
    assert ("far ends wait for it, 600 s at most" in trust.why) == (level == UNKNOWN)


@pytest.mark.parametrize(("wall", "level"), [(BUILT + 10 * YEAR, BELIEVED), (BUILT + 21 * YEAR, UNKNOWN), (0, UNKNOWN)])
def test_a_gateway_without_a_past_believes_more(wall: int, level: int) -> None:
    clock = Clock("boot", BUILT, UNKNOWN, BUILT, is_new=True)
    assert judge(Trust("auto", WAIT, Witness()), clock, wall)[1] == level


def test_far_ends_wait_until_the_time_is_over_then_the_estimate_goes_out() -> None:
    trust, clock = Trust("auto", WAIT, Witness()), fresh_boot()
    assert judge(trust, clock, 12_000) == (LAST, UNKNOWN)
    assert judge(trust, clock, 12_000 + WAIT - 1, MONO + WAIT - 1) == (LAST, UNKNOWN)
    assert judge(trust, clock, 12_000 + WAIT, MONO + WAIT) == (LAST, BELIEVED)
    assert judge(trust, clock, NOW + WAIT, MONO + WAIT) == (BOOTED, BELIEVED), "and is mended when the clock comes"


def test_a_plausible_clock_waits_for_a_time_service_that_is_at_work() -> None:
    witness, clock = Witness(is_coming=True), fresh_boot()
    trust = Trust("auto", WAIT, witness)
    assert judge(trust, clock, NOW) == (BOOTED, UNKNOWN)
    witness.coming, witness.why = False, "ntp"
    assert judge(trust, clock, NOW + 7_000) == (BOOTED + 7_000, CONFIRMED)


def test_a_jump_to_now_then_ten_minutes_back() -> None:
    trust, clock = Trust("auto", WAIT, Witness()), fresh_boot()
    judge(trust, clock, 12_000)
    assert judge(trust, clock, NOW) == (BOOTED, BELIEVED)
    assert judge(trust, clock, NOW - 600_000) == (BOOTED, BELIEVED)
    assert trust.state == "estimated"


def test_a_confirmed_clock_is_followed_both_ways_only_with_evidence() -> None:
    witness, clock = Witness("ntp"), fresh_boot()
    trust = Trust("auto", WAIT, witness)
    judge(trust, clock, NOW)
    witness.why = ""
    for wall in (NOW - 600_000, NOW + 600_000, 0, NOW + 30 * YEAR):
        assert judge(trust, clock, wall) == (BOOTED, CONFIRMED)
        assert trust.state == "held"
    assert judge(trust, clock, NOW) == (BOOTED, CONFIRMED)
    assert trust.state == "trusted"
    witness.why = "ntp"
    assert judge(trust, clock, NOW - 600_000) == (BOOTED - 600_000, CONFIRMED)
    assert judge(trust, clock, NOW + 600_000) == (BOOTED + 600_000, CONFIRMED)


@pytest.mark.parametrize("wall", [NOW, 12_000])
def test_never_holds_also_for_what_was_confirmed_before(wall: int) -> None:
    clock = Clock("boot", BOOTED, CONFIRMED, LAST)
    assert judge(Trust("never", WAIT, Witness("ntp")), clock, wall) == (BOOTED, BELIEVED)


def test_since_when_is_told() -> None:
    witness, clock = Witness(), fresh_boot()
    trust = Trust("auto", WAIT, witness)
    judge(trust, clock, 12_000, MONO)
    judge(trust, clock, 13_000, MONO + 1_000)
    assert trust.since == MONO
    witness.why = "ntp"
    judge(trust, clock, NOW + 2_000, MONO + 2_000)
    judge(trust, clock, NOW + 3_000, MONO + 3_000)
    assert trust.since == MONO + 2_000


# -- the machine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Evidence:
    """One whose kernel knows of no synchronisation, with a clock chip of two and a directory of systemd-timesyncd."""
    (tmp_path / "timesync").mkdir()
    for name in ("rtc0", "rtc1"):
        (tmp_path / name).mkdir()
    return Evidence(tmp_path / "timesync" / "synchronized", tmp_path, lambda: False)


@pytest.mark.parametrize(
    ("chip", "wall", "agrees"),
    [
        (NOW, NOW, True),
        (NOW - 4_000, NOW, True),
        (NOW - 60_000, NOW, False),
        (LAST - 60_000, LAST - 60_000, False),
        (12_000, 12_000, False),
        (NOW + 3 * YEAR, NOW + 3 * YEAR, False),
    ],
    ids=["agrees", "nearly", "with another time", "before the last known time", "in 1970", "far ahead"],
)
def test_a_clock_chip_must_agree_with_the_clock_and_the_last_known_time(
    machine: Evidence, tmp_path: Path, chip: int, wall: int, agrees: bool
) -> None:
    (tmp_path / "rtc1" / "since_epoch").write_text(f"{chip // 1000}\n")
    assert ("RTC" in machine.confirms(fresh_boot(), wall, MONO)) == agrees


def test_timesyncd_confirms_once_for_each_time_that_it_synchronised(machine: Evidence, tmp_path: Path) -> None:
    assert machine.is_coming()
    assert machine.confirms(fresh_boot(), NOW, MONO) == ""
    stamp = tmp_path / "timesync" / "synchronized"
    stamp.touch()
    assert not machine.is_coming()
    assert "timesyncd" in machine.confirms(fresh_boot(), NOW, MONO)
    assert machine.confirms(fresh_boot(), NOW + 600_000, MONO) == "", "somebody else may have set it since"


def test_the_kernels_word_is_enough(tmp_path: Path) -> None:
    assert "kernel" in Evidence(tmp_path / "none" / "stamp", tmp_path, lambda: True).confirms(fresh_boot(), NOW, MONO)
    assert kernel_says_synchronised() in (True, False)
