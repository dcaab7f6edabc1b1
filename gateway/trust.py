"""Whether the clock is to be trusted: the judge of `store.clock`, and the machine's own evidence.

While nothing confirms the clock it is followed as long as it is plausible: not before the last time that is known, not far
ahead of it. Else the last known time goes on with CLOCK_BOOTTIME, and far ends wait until the clock is known, a bounded time.
A clock once confirmed needs no more evidence until somebody sets it.

Invariant: a step that nothing confirms never takes the time back, nor far ahead, nor makes the clock trusted.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tidegate.store.clock import BELIEVED, BUILT, CONFIRMED, UNKNOWN, Clock

STEP = 500
"""ms: what the clock may drift before the time of this boot's entries is corrected."""
YEAR = 365 * 86_400_000
FAR, FAR_FROM_NOTHING = 2 * YEAR, 20 * YEAR
"""ms ahead of the last known time (of the making of this program, where none is known) that a clock is believed to be."""
RTC_APART = 5_000
"""ms between clock chip and clock, which the kernel sets from it in whole seconds."""
STAMP = Path("/run/systemd/timesync/synchronized")
"""Touched by systemd-timesyncd at each synchronisation; its directory is there while it runs."""
RTCS = Path("/sys/class/rtc")


class Witness(Protocol):
    """Who may confirm the clock."""

    def confirms(self, clock: Clock, wall: int, mono: int) -> str:
        """Why the clock is to be trusted, empty if there is no reason to."""
        ...

    def is_coming(self) -> bool:
        """Whether somebody is still at it."""
        ...


class Evidence:
    """What the machine says about its clock."""

    def __init__(self, stamp: Path, rtcs: Path, kernel: Callable[[], bool]) -> None:
        self._stamp = stamp
        self._rtcs = rtcs
        self._kernel_says_so = kernel
        self._used = 0

    def confirms(self, clock: Clock, wall: int, mono: int) -> str:
        """Why the clock is to be trusted, empty if there is no reason to."""
        if self._kernel_says_so():
            return "the kernel says that it is synchronised"
        touched = self._touched()
        if touched and touched != self._used:  # once for each: it says nothing about who set the clock afterwards
            self._used = touched
            return "systemd-timesyncd has synchronised it"
        known = mono + clock.offset
        for chip in clock_chips(self._rtcs):
            if abs(chip - wall) <= RTC_APART and known - RTC_APART <= chip <= known + far(clock):
                return "the clock chip (RTC) agrees with it"
        return ""

    def is_coming(self) -> bool:
        """Whether systemd-timesyncd is still at it."""
        return self._stamp.parent.is_dir() and not self._touched()

    def _touched(self) -> int:
        try:
            return self._stamp.stat().st_mtime_ns
        except OSError:
            return 0


class Trust:
    """`mode`: auto, always or never; `wait` (ms from the start) is how long far ends wait for a clock that is not plausible."""

    def __init__(self, mode: str, wait: int, evidence: Witness | None = None) -> None:
        self.state = ""
        """trusted; held: trusted, and set since by somebody whom nothing confirms; plausible; estimated."""
        self.why = ""
        self.since = 0
        """CLOCK_BOOTTIME (ms) at which the state began."""
        self._mode = mode
        self._wait = wait
        self._evidence = evidence or Evidence(STAMP, RTCS, kernel_says_synchronised)
        self._deadline: int | None = None

    def judge(self, clock: Clock, wall: int, mono: int) -> tuple[int, int]:
        """The offset to go by and its level; asked at the start and each second."""
        if self._deadline is None:
            self._deadline = mono + self._wait
        offset = wall - mono
        is_set = abs(offset - clock.offset) > STEP
        is_confirmed = clock.level == CONFIRMED and self._mode != "never"
        if is_confirmed and not is_set:
            if self.state != "trusted":
                self._now("trusted", mono, "it was confirmed before, and nobody has set it since")
            return clock.offset, CONFIRMED
        if why := self._confirmation(clock, wall, mono):
            self._now("trusted", mono, why)
            return offset, CONFIRMED
        if is_confirmed:
            self._now("held", mono, f"it was confirmed; since then it was set to {moment(wall)}, which nothing confirms")
            return clock.offset, CONFIRMED
        return self._unconfirmed(clock, wall, mono, offset if is_set else clock.offset)

    def _now(self, state: str, mono: int, why: str) -> None:
        if state != self.state:
            self.since = mono
        self.state, self.why = state, why

    def _confirmation(self, clock: Clock, wall: int, mono: int) -> str:
        if self._mode == "always":
            return 'clock.trust = "always"'
        if self._mode == "never" or wall < BUILT:
            return ""
        return self._evidence.confirms(clock, wall, mono)

    def _unconfirmed(self, clock: Clock, wall: int, mono: int, offset: int) -> tuple[int, int]:
        assert self._deadline is not None
        is_over, before = mono >= self._deadline, min(clock.level, BELIEVED)
        waits = "" if is_over or before else f"; far ends wait for it, {(self._deadline - mono) // 1000} s at most"
        known = mono + clock.offset
        if wall >= BUILT and known - STEP <= wall <= known + far(clock):
            is_coming = self._mode == "auto" and self._evidence.is_coming()
            level = before if is_coming and not is_over else BELIEVED
            more = f": systemd-timesyncd is not done yet{waits}" if level == UNKNOWN else ""
            self._now("plausible", mono, f"nothing confirms it{more}")
            return offset, level
        if clock.is_new:
            side = "before this program was made" if wall < known else "too far ahead"
        else:
            side = f"{'before' if wall < known else 'too far ahead of'} the last known time"
        self._now("estimated", mono, f"the clock shows {moment(wall)}, {side}{waits}")
        return clock.offset, BELIEVED if is_over else before


def far(clock: Clock) -> int:
    return FAR_FROM_NOTHING if clock.is_new else FAR


def moment(ms: int) -> str:
    """For people; whatever a broken clock shows."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ms / 1000))
    except (OverflowError, OSError, ValueError):
        return f"{ms / 1000:.0f} s after 1970"


def clock_chips(rtcs: Path = RTCS) -> list[int]:
    """What each clock chip shows, in ms."""
    found = []
    for path in sorted(rtcs.glob("rtc*/since_epoch")):
        try:
            found.append(int(path.read_text()) * 1000)
        except (OSError, ValueError):
            continue  # without its battery a chip may answer with an error
    return found


class _Timex(ctypes.Structure):
    """The beginning of the kernel's `struct timex`, with room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        *((name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


_UNSYNCHRONISED = 0x40
"""STA_UNSYNC"""


def kernel_says_synchronised() -> bool:
    """As `timedatectl` does: adjtimex without changing anything."""
    timex = _Timex()
    return ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) >= 0 and not timex.status & _UNSYNCHRONISED
