"""Whether the gateway lives: the loop turns (whoever asks finds that out), and the disk's thread has answered lately.

Invariant: a pure function of the times it is told; a disk that hangs is told before systemd's watchdog acts on it.
"""

from __future__ import annotations

SILENCE = 30.0
"""Seconds without an answer of the committer's thread; half of what the watchdog of the unit waits."""


class Health:
    """`now` is monotonic seconds."""

    def __init__(self, now: float) -> None:
        self._answered = now

    def answered(self, now: float) -> None:
        """The committer's thread has done what was asked of it."""
        self._answered = now

    def faults(self, now: float) -> list[str]:
        """What is wrong, a line each."""
        silent = now - self._answered
        return [f"the disk has not answered for {silent:.0f} s"] if silent > SILENCE else []
