"""What is wrong with the rule files, told to the log.

Invariant: each reading tells all of it again: whoever sent SIGHUP sees what became of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tidegate.store.report import EACH, ERROR, WARNING, Say


class Told(Protocol):
    """A mistake or warning and its place."""

    @property
    def text(self) -> str: ...
    @property
    def place(self) -> str: ...


class RuleFile(Protocol):
    """What is needed of a file."""

    @property
    def path(self) -> Path: ...
    @property
    def warnings(self) -> Iterable[Told]: ...
    @property
    def mistakes(self) -> Iterable[Told]: ...


def tell(report: Say, files: Iterable[RuleFile]) -> bool:
    """Say it; whether every file is in force."""
    usable = True
    for file in files:
        for warning in file.warnings:
            report("rule_warning", warning.text, WARNING, EACH, place=warning.place)
        for mistake in file.mistakes:
            report("rule_mistake", mistake.text, ERROR, EACH, place=mistake.place)
        if file.mistakes:
            usable = False
            text = "its pools wait until the file is mended and read again (SIGHUP); their events are kept"
            report("rules_unusable", text, ERROR, EACH, file=file.path)
    return usable
