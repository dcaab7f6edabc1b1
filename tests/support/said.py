"""A log that remembers: what our own code says, as text lines without time and level."""

from __future__ import annotations

from tidegate.store.report import INFO, Level


class Said(list[str]):
    """Called like a `store.report.Say`; holds nothing back."""

    def __call__(self, event: str, text: str, level: Level = INFO, about: str | None = None, /, **fields: object) -> None:
        self.append(" ".join([f"{event}: {text}", *(f"{name}={value}" for name, value in fields.items())]))
