"""The `.conf` syntax of the specification, line by line: `backend.<kind>.<pool>.<key> = value` and hook rules with JSON.

`read` splits a file into settings and raw rules and knows nothing of their meaning. It takes the specification's own
blocks verbatim, repairing its known defects with a warning each. Whatever it cannot read becomes a `Mistake` and reading
goes on, so that a person sees all mistakes at once.

Invariant: every line is blank, a comment, a setting, a rule, or named in a mistake; a mistake shows of a line its key alone.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_HOOK = re.compile(r"backend\.(?P<backend>\w+)\.hook\.(?P<event>[\w.]+?)\.(?P<number>\d+)")
_HOOK_SHAPE = re.compile(r"backend\.(?P<backend>\w+)\.hook\b")
_SETTING = re.compile(r"backend\.(?P<backend>\w+)\.(?P<pool>[\w-]+)\.(?P<key>\w+)")
_BARE_SETTING = re.compile(r"backend\.(?P<backend>\w+)\.(?P<key>\w+)")
_KEY = re.compile(r"[\w-]+(?:\.[\w-]+)+")
_UNOPENED_KEY = re.compile(r'([{,]\s*)(\w+)"(\s*:)')
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")


class Mistake(NamedTuple):
    """Something a person must mend (or, as a warning, should know)."""

    file: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class Setting(NamedTuple):
    """`backend.<backend>.<pool>.<key> = <value>`; `pool` is empty for a setting of the whole backend."""

    line: int
    backend: str
    pool: str
    key: str
    value: str


class RawRule(NamedTuple):
    """A hook rule whose JSON is an object, nothing in it checked yet."""

    line: int
    backend: str
    event: str
    number: int
    body: dict[str, Any]


@dataclass
class Raw:
    """What `read` found, in order of the file. `events` names those of unreadable rules too."""

    settings: list[Setting] = field(default_factory=list)
    rules: list[RawRule] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    warnings: list[Mistake] = field(default_factory=list)


def read(path: Path) -> Raw:
    """Read the file. Never raises for what is in it; OSError and UnicodeDecodeError become mistakes as well."""
    raw = Raw()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raw.mistakes.append(Mistake(str(path), 0, f"is not UTF-8 text (byte {error.start}); save it as UTF-8"))
        return raw
    except OSError as error:
        raw.mistakes.append(Mistake(str(path), 0, f"cannot be read: {error.strerror}; create it or correct its rights"))
        return raw
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            _read_line(raw, str(path), number, stripped)
    return raw


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` or, when nothing is near, what is known."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, 1, 0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(names)}" if names else ""


def is_digits(text: str) -> bool:
    """Whether it is a number as `int` reads it; `isdigit` alone would let "\u00b2" through."""
    return text.isascii() and text.isdecimal()


def _read_line(raw: Raw, file: str, number: int, line: str) -> None:
    key, separator, value = (part.strip() for part in line.partition("="))
    if not separator:
        raw.mistakes.append(Mistake(file, number, f"neither a comment nor `key = value`{_key_of(line, ': ')}"))
        return
    if hook := _HOOK.fullmatch(key):
        raw.events.append(hook["event"])
        body = _read_json(raw, file, number, value)
        if body is not None:
            raw.rules.append(RawRule(number, hook["backend"], hook["event"], int(hook["number"]), body))
    elif _HOOK_SHAPE.match(key):
        raw.mistakes.append(
            Mistake(file, number, f"{_key_of(key)}: a rule is written backend.<backend>.hook.<event>.<number> = {{...}}")
        )
    elif match := _SETTING.fullmatch(key):
        raw.settings.append(Setting(number, match["backend"], match["pool"], match["key"], value))
    elif match := _BARE_SETTING.fullmatch(key):
        raw.settings.append(Setting(number, match["backend"], "", match["key"], value))
    else:
        raw.mistakes.append(
            Mistake(
                file,
                number,
                f"unknown key{_key_of(key, ' ')}: keys begin with backend.<backend>.<pool>. or backend.<backend>.hook.",
            )
        )


def _key_of(line: str, before: str = "") -> str:
    """The dotted name that the line begins with, after `before`; nothing if it has none. Whatever follows, or stands alone,
    may be a password whose `=` was forgotten."""
    match = _KEY.match(line)
    return before + match[0][:80] if match else ""


def _read_json(raw: Raw, file: str, number: int, text: str) -> dict[str, Any] | None:
    """The rule's object; the quote and comma defects of the specification are repaired with a warning."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        repaired = _TRAILING_COMMA.sub(r"\1", _UNOPENED_KEY.sub(r'\1"\2"\3', text))
        try:
            body = json.loads(repaired)
        except json.JSONDecodeError:
            raw.mistakes.append(
                Mistake(file, number, f"the rule is not valid JSON at character {error.pos + 1} after the =: {error.msg}")
            )
            return None
        raw.warnings.append(Mistake(file, number, "a missing quote or a comma too many in the rule was passed over"))
    if not isinstance(body, dict):
        raw.mistakes.append(Mistake(file, number, 'a rule is an object: {"topic": ..., "action": {...}, "pool": ...}'))
        return None
    return body
