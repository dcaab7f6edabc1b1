"""What the processes say of themselves on standard error: one line for an event, with a stable name, a sentence and fields.

    2026-01-31T12:00:00.123Z warning store_refuses: the store refuses to write; ... reason="database or disk is full"
    {"time": "2026-01-31T12:00:00.123Z", "level": "warning", "event": "store_refuses", "text": "the store ...", "reason": ...}

The sentence does not change from one time to the next: what differs is in the fields. Names and fields are a promise to whoever
searches for them (docs/operating.md lists them). Under systemd the journal keeps the time, and the level is its priority.

Invariant: one event of one subject is said at most twice a minute if it is a warning or worse, and what was held back is
counted in the next line that is said of it, at the latest when the minute is over.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from .lines import Lines

MINUTE = 60.0
PER_MINUTE = 2
MAX_SUBJECTS = 200
LONGEST = 1_000
"""Characters of a field; client ids and topics of strangers may have 65,535."""
LAST_WORDS = 0.5
"""Seconds that the end waits for whoever reads the log."""
FRAMES = 8


class Level(IntEnum):
    """How bad; the number is syslog's."""

    error = 3
    warning = 4
    info = 6


INFO, WARNING, ERROR = Level.info, Level.warning, Level.error
EACH = "each time"
"""About nothing that is held back here: who says it takes care that it does not repeat itself."""


class Say(Protocol):
    """One line. `about` is the subject whose repetitions are held back together; an info without one is always said."""

    def __call__(self, event: str, text: str, level: Level = INFO, about: str | None = None, /, **fields: object) -> None: ...


class Event(NamedTuple):
    """What is said once."""

    level: Level
    name: str
    text: str
    fields: dict[str, object]


class Report:
    """See the module; any thread may call it. `tick` once a second while it asks for it, `close` at the end."""

    def __init__(self, style: str = "text", level: str = "info") -> None:
        self._journal = _is_journal()
        self._json = style == "json"
        self._level = Level[level]
        self._often = Often()
        self._lock = threading.Lock()
        self.lines = Lines(lambda count: self._line(_missing(count)))

    def __call__(self, event: str, text: str, level: Level = INFO, about: str | None = None, /, **fields: object) -> None:
        if level > self._level:
            return
        said = Event(level, event, text, {name: _cut(value) for name, value in fields.items()})
        if about is None and level < INFO:
            about = ""
        if about is not None and about is not EACH:
            with self._lock:
                due = list(self._often.admit((event, about), said, time.monotonic()))
        else:
            due = [said]
        self._say(due)

    def tick(self) -> bool:
        """Say what was held back and is due, and what its reader did not take; whether there is more of it."""
        with self._lock:
            due = list(self._often.over(time.monotonic()))
        self._say(due)
        return self.lines.push() or self._often.holds

    def close(self) -> None:
        with self._lock:
            due = list(self._often.over(float("inf")))
        self._say(due)
        self.lines.close(LAST_WORDS)

    def _say(self, events: list[Event]) -> None:
        for event in events:
            self.lines.put(self._line(event))

    def _line(self, event: Event) -> str:
        now = "" if self._journal else _utc()
        priority = f"<{event.level.value}>" if self._journal else ""
        if self._json:
            known = {"time": now} if now else {}
            known |= {"level": event.level.name, "event": event.name, "text": event.text}
            return priority + json.dumps(known | event.fields, ensure_ascii=False, default=str)
        head = f"{now} {event.level.name} {event.name}" if now else f"{priority}{event.name}"
        return " ".join(
            [f"{head}: {printable(event.text)}", *(f"{key}={_value(value)}" for key, value in event.fields.items())]
        )


class Often:
    """What repeats itself; pure, `now` is monotonic seconds. `holds`: something is held back."""

    def __init__(self) -> None:
        self._subjects: dict[tuple[str, str], tuple[float, int, Event]] = {}
        """Subject -> when its minute began, how often it came since, the last of it."""

    @property
    def holds(self) -> bool:
        return any(count > PER_MINUTE for _, count, _ in self._subjects.values())

    def admit(self, subject: tuple[str, str], event: Event, now: float) -> Iterator[Event]:
        """It comes now; what is to be said."""
        began, count, last = self._subjects.pop(subject, (now, 0, event))
        if now - began >= MINUTE:
            yield from _held(count, last)
            began, count = now, 0
        if len(self._subjects) >= MAX_SUBJECTS:
            _, longest, other = self._subjects.pop(next(iter(self._subjects)))
            yield from _held(longest, other)
        self._subjects[subject] = (began, count + 1, event)
        if count < PER_MINUTE:
            yield event

    def over(self, now: float) -> Iterator[Event]:
        """The minutes that are over: what they held back."""
        for subject, (began, count, last) in list(self._subjects.items()):
            if now - began >= MINUTE:
                del self._subjects[subject]
                yield from _held(count, last)


def _cut(value: object) -> object:
    return value if not isinstance(value, str) or len(value) <= LONGEST else f"{value[:LONGEST]}…"


def _held(count: int, last: Event) -> Iterator[Event]:
    if count > PER_MINUTE:
        yield last._replace(fields=last.fields | {"repeated": count - PER_MINUTE})


def _missing(count: int) -> Event:
    return Event(WARNING, "lines_missing", "lines are missing here: nobody read them", {"count": count})


def _is_journal() -> bool:
    """Whether standard error leads to systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        error = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{error.st_dev}:{error.st_ino}"


def _utc() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds // 1_000_000:03}Z"


def printable(text: str) -> str:
    """In one line, without what would steer a terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _value(value: Any) -> str:
    """As a person reads it: quoted where it has to be, with the quotes that are not in it."""
    text = printable(str(value))
    if text and not any(character in " \"'=" for character in text):
        return text
    return f'"{text}"' if '"' not in text else f"'{text}'" if "'" not in text else json.dumps(text, ensure_ascii=False)


def brief(error: BaseException) -> str:
    """An exception and where it came from, innermost first, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    places = [f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    return " < ".join([f"{type(error).__name__}: {error}", *places])
