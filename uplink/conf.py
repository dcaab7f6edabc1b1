"""The `.conf` syntax of the specification, line by line: `backend.<kind>.<pool>.<key> = value` and hook rules with JSON.

`read` splits a file into settings and raw rules and knows nothing of their meaning. It takes the specification's own
blocks verbatim, repairing its known defects with one warning for each kind of them. Whatever it cannot read becomes a
`Mistake` and reading goes on, so that a person sees all mistakes at once.

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

_HOOK = re.compile(r"backend\.(?P<backend>\w+)\.hook\.(?P<event>[\w.]+?)\.(?P<number>\d{1,9})", re.ASCII)
_HOOK_SHAPE = re.compile(r"backend\.(?P<backend>\w+)\.hook\b", re.ASCII)
_SETTING = re.compile(r"backend\.(?P<backend>\w+)\.(?P<pool>[\w-]+)\.(?P<key>\w+)", re.ASCII)
_BARE_SETTING = re.compile(r"backend\.(?P<backend>\w+)\.(?P<key>\w+)", re.ASCII)
_KEY = re.compile(r"[\w-]+(?:\.[\w-]+)+", re.ASCII)
_REPAIRS = (
    (re.compile(r'([{,]\s*)(\w+)"(\s*:)'), r'\1"\2"\3', "a quote is missing before a name in the rule"),
    (re.compile(r",(\s*[}\]])"), r"\1", "a comma too many in the rule"),
)
_SHOWN = 400
"""Characters of a mistake that are shown: a name in it may be anything, of any length."""


class Mistake(NamedTuple):
    """Something a person must mend (or, as a warning, should know)."""

    file: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def __str__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN]}…"
        return printable(f"{self.place}: {text}")


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
    defects: dict[str, list[int]] = field(default_factory=dict)

    def passed_over(self, defect: str, line: int) -> None:
        """A known defect was read all the same."""
        self.defects.setdefault(defect, []).append(line)

    def tell_defects(self, file: str) -> None:
        """One warning for each kind of defect, at its first line."""
        for defect, (first, *more) in self.defects.items():
            lines = f"; so in line{'s' * (len(more) > 1)} {', '.join(map(str, more))}" if more else ""
            self.warnings.append(Mistake(file, first, f"{defect}: read all the same{lines}"))


def read(path: Path) -> Raw:
    """Read the file. Never raises for what is in it; OSError and UnicodeDecodeError become mistakes as well."""
    raw = Raw()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.object.count(b"\n", 0, error.start) + 1
        raw.mistakes.append(Mistake(str(path), bad, "is not UTF-8 text; save the file as UTF-8"))
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
    close = difflib.get_close_matches(name[:80], names, 1, 0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(names)}" if names else ""


def is_digits(text: str) -> bool:
    """Whether it is a number that every far end can hold; `isdigit` alone would let "\u00b2" through."""
    return text.isascii() and text.isdecimal() and len(text) <= 9


def printable(text: str) -> str:
    """What would steer a terminal is written out."""
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text])


def _read_line(raw: Raw, file: str, number: int, line: str) -> None:
    key, separator, value = (part.strip() for part in line.partition("="))
    if not separator:
        _note_event(raw, line)
        raw.mistakes.append(Mistake(file, number, f"neither a comment nor `key = value`{_key_of(line, ': ')}"))
        return
    if hook := _HOOK.fullmatch(key):
        raw.events.append(hook["event"])
        if line.startswith(f"{key}="):
            raw.passed_over("no space before the =", number)
        body = _read_json(raw, file, number, value)
        if body is not None:
            raw.rules.append(RawRule(number, hook["backend"], hook["event"], int(hook["number"]), body))
    elif _HOOK_SHAPE.match(key):
        _note_event(raw, key)
        raw.mistakes.append(
            Mistake(file, number, f"{_key_of(key)}: a rule is written backend.<backend>.hook.<event>.<number> = {{...}}")
        )
    elif match := _SETTING.fullmatch(key):
        raw.settings.append(Setting(number, match["backend"], match["pool"], match["key"], value))
    elif match := _BARE_SETTING.fullmatch(key):
        raw.settings.append(Setting(number, match["backend"], "", match["key"], value))
    else:
        _note_event(raw, key)
        raw.mistakes.append(
            Mistake(
                file,
                number,
                f"unknown key{_key_of(key, ' ')}: keys begin with backend.<backend>.<pool>. or backend.<backend>.hook.",
            )
        )


def _note_event(raw: Raw, line: str) -> None:
    """What stands where a rule has its event, though the line is none: something is wanted there."""
    words = line.partition(".hook.")[2].split()
    if words:
        raw.events.append(words[0])


def _key_of(line: str, before: str = "") -> str:
    """The dotted name that the line begins with, after `before`; nothing if it has none. Whatever follows, or stands alone,
    may be a password whose `=` was forgotten."""
    match = _KEY.match(line)
    return before + match[0][:80] if match else ""


def _read_json(raw: Raw, file: str, number: int, text: str) -> dict[str, Any] | None:
    """The rule's object; the quote and comma defects of the specification are repaired."""
    try:
        body = _parse(text)
    except ValueError as error:
        repaired, repairs = text, []
        for pattern, replacement, name in _REPAIRS:
            repaired, count = pattern.subn(replacement, repaired)
            repairs += [name] if count else []
        try:
            body = _parse(repaired)
        except ValueError:
            raw.mistakes.append(Mistake(file, number, f"the rule is not valid JSON{_why(error)}"))
            return None
        for name in repairs:
            raw.passed_over(name, number)
    if not isinstance(body, dict):
        raw.mistakes.append(Mistake(file, number, 'a rule is an object: {"topic": ..., "action": {...}, "pool": ...}'))
        return None
    return body


def _parse(text: str) -> Any:
    """JSON as everybody else understands it: no name twice, no NaN, no half characters. Raises ValueError."""
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("too many brackets inside one another") from None
    except UnicodeEncodeError:
        raise ValueError("a \\u escape stands for half a character") from None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" stands there twice')
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value")


def _integer(digits: str) -> int:
    if len(digits) > 18:
        raise ValueError("a number has too many digits")
    return int(digits)


def _why(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f" at character {error.pos + 1} after the =: {error.msg}"
    return f": {error}"
