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


class OutputError(OSError):
    """Nobody reads what the demo shows (`| head`), or it cannot be kept (a full disk)."""


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
        try:
            print(text, flush=True)
        except OSError as error:
            raise OutputError(*error.args) from error

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
    """A table at the bottom of the terminal; what is said scrolls above it.

    Everything is handed over as `Text`: markup in strings would be read in what the gateway says, and switching it off for one
    line said switches it off for the table below as well.
    """

    def __init__(self, console: Any = None) -> None:
        from rich.live import Live

        self._live: Any = Live(console=console, auto_refresh=False)
        self._live.start()

    def say(self, text: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(text))

    def show(self, figures: Figures) -> None:
        from rich.table import Table
        from rich.text import Text

        line = ("up", "green") if figures.line_is_up else ("CUT", "bold red")
        rows = [
            ("line to the far end", *line, f"uplink: {figures.pool_says}"),
            ("stored, then acknowledged", str(figures.stored), "", "readings on this gateway's disk"),
            ("waiting", str(figures.waiting), "yellow" if figures.waiting else "", figures.age),
            ("delivered", str(figures.delivered), "", "readings found in Redis"),
            ("missing", str(figures.missing), "red" if figures.missing else "green", ""),
        ]
        if figures.own:
            rows.append(("from your devices", str(figures.own), "", "messages seen"))
        table = Table(show_header=False, title=f"tidegate demo, {int(figures.elapsed)} s", min_width=64)
        for name, value, style, remark in rows:
            table.add_row(Text(name), Text(value, style), Text(remark))
        self._live.update(table, refresh=True)

    def close(self) -> None:
        self._live.stop()
