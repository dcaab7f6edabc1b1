"""What the demo shows: plain lines where the output goes to a file or a pipe, a table that changes in place on a terminal.

Invariant: both say the same figures; neither computes any.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

from .status import duration


@dataclass(frozen=True, slots=True)
class Figures:
    """One moment of the demo. `waiting`: readings on this disk that are not in Redis yet. `missing`: acknowledged readings that
    neither wait in the log nor stand in Redis.
    """

    elapsed: float
    line_is_up: bool
    stored: int
    waiting: int
    oldest_age: float | None
    delivered: int
    missing: int
    own: int
    pool_says: str

    @property
    def age(self) -> str:
        """Age of the oldest waiting entry, in words; empty if none waits."""
        return f"oldest {duration(self.oldest_age)}" if self.waiting and self.oldest_age is not None else ""


class Screen(Protocol):
    """Where the demo speaks."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def show(self, figures: Figures) -> None:
        """The figures of this moment."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def make_screen() -> Screen:
    """The screen that fits where our output goes."""
    return LiveScreen() if sys.stdout.isatty() else PlainScreen()


class PlainScreen:
    """At most a line per second, and only when something has changed."""

    def __init__(self) -> None:
        self._second = -1
        self._line = ""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(self, figures: Figures) -> None:
        waiting = f"waiting {figures.waiting}" + (f" ({figures.age})" if figures.age else "")
        own = f"  from your devices {figures.own}" if figures.own else ""
        line = (
            f"line {'up ' if figures.line_is_up else 'CUT'}  stored {figures.stored:<6} {waiting:<27}"
            f" delivered {figures.delivered:<6} missing {figures.missing}  uplink {figures.pool_says}{own}"
        )
        if line != self._line and int(figures.elapsed) != self._second:
            self._line, self._second = line, int(figures.elapsed)
            self.say(f"{self._second:4d} s  {line}")

    def close(self) -> None:
        pass


class LiveScreen:
    """A table at the bottom of the terminal; what is said scrolls above it."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live: Any = Live(auto_refresh=False)
        self._live.start()

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)

    def show(self, figures: Figures) -> None:
        from rich.table import Table

        up = figures.line_is_up
        table = Table(show_header=False, title=f"tidegate demo, {int(figures.elapsed)} s", min_width=64)
        table.add_row("line to the far end", "[green]up[/]" if up else "[bold red]CUT[/]", f"uplink: {figures.pool_says}")
        table.add_row("stored, then acknowledged", str(figures.stored), "readings on this gateway's disk")
        table.add_row("waiting", f"[yellow]{figures.waiting}[/]" if figures.waiting else "0", figures.age)
        table.add_row("delivered", str(figures.delivered), "readings found in Redis")
        table.add_row("missing", f"[red]{figures.missing}[/]" if figures.missing else "[green]0[/]", "")
        if figures.own:
            table.add_row("from your devices", str(figures.own), "messages seen")
        self._live.update(table, refresh=True)

    def close(self) -> None:
        self._live.stop()
