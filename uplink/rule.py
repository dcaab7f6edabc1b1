"""Rules and pools of one backend's file, checked and frozen: what `emqx_backend_<kind>.conf` means.

`load` never raises for what stands in the file: it returns every mistake at once, each with file, line and the nearest known
name, beside the rules that are right. A file with a mistake stops its pools, not the gateway; `wants` then asks the broker
to keep everything those rules could have wanted.

Invariant: a rule in `RuleFile.rules` names a known event, function and pool, and its commands are compiled.
"""

from __future__ import annotations

import importlib.util
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tidegate.store.entry import CONNECTED, DISCONNECTED, PUBLISH, Want
from tidegate.store.topic import overlap, topic_filter_fault

from .commands import Command, TemplateFault, compile_command
from .conf import Mistake, Raw, RawRule, is_digits, nearest, read
from .pools import Pool, read_pools
from .sql_statement import Statement, compile_statement
from .vocabulary import (
    ACTION_KEYS,
    BUILT,
    DEFAULT_ACTION_KEYS,
    DRIVERS,
    EVENTS,
    EXPIRED_TIME,
    FUNCTION_ALIASES,
    FUNCTIONS,
    LATER,
    LATER_OF,
    OFFLINE_OPTIONS,
    PAYLOAD_FORMATS,
    POOL_KEYS,
    RULE_OPTIONS,
    placeholders,
)

__all__ = ["Mistake", "Pool", "Rule", "RuleFile", "load", "load_all", "wants"]

T = TypeVar("T")
SHIPPED = Path(__file__).resolve().parent.parent / "conf"
_DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class Rule:
    """One hook rule. Exactly one of `function`, `commands` and `statements` says what is done."""

    kind: int
    event: str
    number: int
    topic_filter: str
    function: str
    commands: tuple[Command, ...]
    statements: tuple[Statement, ...]
    works: bool
    """False for functions that a later version brings."""
    pool: str
    expired_time: int | None
    max_returned_count: int
    time_range: int
    payload_format: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class RuleFile:
    """Everything one file says. `events` are the kinds its rules are keyed by, readable or not."""

    backend: str
    path: Path
    pools: tuple[Pool, ...]
    rules: tuple[Rule, ...]
    events: frozenset[int]
    mistakes: tuple[Mistake, ...]
    warnings: tuple[Mistake, ...]


def load(path: Path, backend: str) -> RuleFile:
    """Read and check the file of `backend`. A missing file of sqlite means the shipped one, of others a mistake."""
    if backend == "sqlite" and not path.exists():
        path = SHIPPED / path.name
    raw = read(path)
    if backend not in POOL_KEYS:
        raw.mistakes.append(Mistake(str(path), 0, f'unknown backend "{backend}"{nearest(backend, POOL_KEYS)}'))
        return RuleFile(backend, path, (), (), frozenset(), tuple(raw.mistakes), tuple(raw.warnings))
    if backend not in BUILT:
        raw.mistakes.append(
            Mistake(str(path), 0, f"the backend {backend} comes with a later version; take it out of [uplink] backends")
        )
    driver, extra = DRIVERS.get(backend, ("", ""))
    if driver and importlib.util.find_spec(driver) is None:
        raw.mistakes.append(Mistake(str(path), 0, f"the driver {driver} is not installed: pip install 'tidegate[{extra}]'"))
    pools = read_pools(raw, str(path), backend)
    rules = _Reader(raw, str(path), backend, [pool.name for pool in pools]).rules()
    _warn_of_open_credentials(raw, path, pools)
    if backend in BUILT and backend != "sqlite" and not raw.mistakes:
        _check_use(raw, str(path), backend, pools)
    events = frozenset(EVENTS[event] for event in raw.events if event in EVENTS)
    order = sorted(raw.mistakes, key=lambda mistake: mistake.line)
    return RuleFile(backend, path, tuple(pools), tuple(rules), events, tuple(order), tuple(raw.warnings))


def load_all(folder: Path, backends: Iterable[str]) -> list[RuleFile]:
    """The files of all backends, as they stand in the folder."""
    return [load(folder / f"emqx_backend_{name}.conf", name) for name in backends]


def wants(rule_files: Iterable[RuleFile], saved: Mapping[str, Iterable[Want]] | None = None) -> list[Want]:
    """What the broker must log for all files; `saved` are each backend's last good wants, for a file nobody can read."""
    found: dict[Want, None] = {}
    for rule_file in rule_files:
        before = (saved or {}).get(rule_file.backend, ())
        found |= dict.fromkeys(_wants_of(rule_file, list(before)))
    return list(found)


def _wants_of(rule_file: RuleFile, before: list[Want]) -> list[Want]:
    if not rule_file.mistakes:
        return [want for rule in rule_file.rules if rule.works for want in [_want(rule)]]
    if rule_file.events:
        return [Want(kind, "#", 0, False) for kind in sorted(rule_file.events)]
    return before or [Want(PUBLISH, "#", 1, False), Want(CONNECTED, "#", 0, False), Want(DISCONNECTED, "#", 0, False)]


def _want(rule: Rule) -> Want:
    stores = rule.function == "on_message_publish"
    retained = rule.function in ("on_message_retain", "on_retain_delete")
    return Want(rule.kind, rule.topic_filter, 1 if stores else 0, retained)


class _Reader:
    """Turns raw rules into rules; mistakes go where the raw file keeps them."""

    def __init__(self, raw: Raw, file: str, backend: str, pools: list[str]) -> None:
        self._raw = raw
        self._file = file
        self._backend = backend
        self._pools = pools

    def rules(self) -> list[Rule]:
        found: dict[tuple[int, int], Rule] = {}
        for raw_rule in self._raw.rules:
            rule = self._rule(raw_rule)
            if rule is None:
                continue
            key = (rule.kind, rule.number)
            if key in found:
                self._warn(rule.line, f"{rule.event}.{rule.number} again: this one replaces line {found[key].line}")
            found[key] = rule
        self._warn_of_later([rule for rule in found.values() if not rule.works])
        self._warn_of_storing_twice(list(found.values()))
        return sorted(found.values(), key=lambda rule: (rule.kind, rule.number))

    def _rule(self, raw: RawRule) -> Rule | None:
        if not self._belongs(raw):
            return None
        before = len(self._raw.mistakes)
        for option in raw.body:
            if option not in RULE_OPTIONS:
                self._fail(raw, f'unknown option "{option}"{nearest(option, RULE_OPTIONS)}')
        event = "message.deliver" if raw.event == "message.delivered" else raw.event
        function, commands, statements = self._action(raw, event)
        count, time_range = self._offline_options(raw)
        rule = Rule(
            EVENTS[event], event, raw.number, self._topic(raw), function, commands, statements,
            function not in LATER_OF.get(self._backend, LATER), self._pool(raw), self._expired_time(raw, function),
            count, time_range, self._payload_format(raw), self._file, raw.line,
        )  # fmt: skip
        return rule if len(self._raw.mistakes) == before else None

    def _belongs(self, raw: RawRule) -> bool:
        """Whether the key names our backend and a known event; says why not."""
        before = len(self._raw.mistakes)
        if raw.backend not in POOL_KEYS:
            self._fail(raw, f'unknown backend "{raw.backend}"{nearest(raw.backend, POOL_KEYS)}')
        elif (raw.backend, self._backend) == ("influxdb", "opentsdb"):
            self._warn(raw.line, "the rule is written for influxdb; taken as one of opentsdb")
        elif raw.backend != self._backend:
            self._fail(raw, f"a rule of {raw.backend} does not belong in the file of {self._backend}")
        if raw.event not in EVENTS:
            self._fail(raw, f'unknown event "{raw.event}"{nearest(raw.event, EVENTS)}')
        return len(self._raw.mistakes) == before

    def _action(self, raw: RawRule, event: str) -> tuple[str, tuple[Command, ...], tuple[Statement, ...]]:
        nothing: tuple[str, tuple[Command, ...], tuple[Statement, ...]] = ("", (), ())
        allowed = ACTION_KEYS.get(self._backend, DEFAULT_ACTION_KEYS)
        action = raw.body.get("action")
        if not isinstance(action, dict) or len(action) != 1:
            self._fail(raw, f'"action" holds exactly one of {", ".join(allowed)}, as {{"function": "..."}}')
            return nothing
        ((key, value),) = action.items()
        if key not in allowed:
            self._fail(raw, f'unknown action "{key}"{nearest(key, allowed)}')
            return nothing
        if key == "function":
            return self._function(raw, event, value), (), ()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            self._fail(raw, f'"{key}" is a list of texts')
            return nothing
        if key == "commands":
            return "", self._compiled(raw, event, key, texts, compile_command), ()
        return "", (), self._compiled(raw, event, key, texts, compile_statement)

    def _function(self, raw: RawRule, event: str, value: Any) -> str:
        name = FUNCTION_ALIASES.get(value, value) if isinstance(value, str) else ""
        if name not in FUNCTIONS:
            self._fail(raw, f'unknown function "{value}"{nearest(str(value), FUNCTIONS)}')
        elif event not in FUNCTIONS[name]:
            self._fail(raw, f"{name} belongs to {' or '.join(FUNCTIONS[name])}, not to {event}")
        return name

    def _compiled(
        self, raw: RawRule, event: str, key: str, texts: list[str], compile_text: Callable[[str, Sequence[str]], T]
    ) -> tuple[T, ...]:
        known = placeholders(self._backend, event)
        found: list[T] = []
        for text in texts:
            try:
                found.append(compile_text(text, known))
            except TemplateFault as fault:
                hint = nearest(fault.unknown, known) if fault.unknown else ""
                # The arguments stay unsaid: one of them may be a password.
                self._fail(raw, f'{key.removesuffix("s")} "{" ".join(text.split()[:1])}": {fault}{hint}')
        return tuple(found)

    def _topic(self, raw: RawRule) -> str:
        topic = raw.body.get("topic", "#")
        if not isinstance(topic, str):
            self._fail(raw, '"topic" is a text, a topic filter such as "sensor/#"')
            return "#"
        if fault := topic_filter_fault(topic):
            self._fail(raw, f'"topic" "{topic}" is no topic filter: {fault}')
        return topic

    def _pool(self, raw: RawRule) -> str:
        pool = raw.body.get("pool", "local" if self._backend == "sqlite" else None)
        if pool is None:
            self._fail(raw, '"pool" is missing' + nearest("pool", self._pools))
        elif pool not in self._pools:
            known = nearest(str(pool), self._pools) or f"; no pool is set up: write backend.{self._backend}.{pool}.server = ..."
            self._fail(raw, f'unknown pool "{pool}"{known}')
        return str(pool)

    def _expired_time(self, raw: RawRule, function: str) -> int | None:
        default = EXPIRED_TIME.get(self._backend) if function == "on_message_publish" else None
        value = raw.body.get("expired_time", default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
            self._fail(raw, '"expired_time" is a number of seconds greater than 0')
            return None
        return value

    def _offline_options(self, raw: RawRule) -> tuple[int, int]:
        options = raw.body.get("offline_opts", {})
        if not isinstance(options, dict):
            self._fail(raw, '"offline_opts" is an object: {"max_returned_count": 500, "time_range": "2h"}')
            return 500, 7200
        for name in options:
            if name not in OFFLINE_OPTIONS:
                self._fail(raw, f'unknown option "{name}" in offline_opts{nearest(name, OFFLINE_OPTIONS)}')
        count, span = options.get("max_returned_count", 500), options.get("time_range", "2h")
        if not isinstance(count, int) or count < 0:
            self._fail(raw, '"max_returned_count" is a number, 0 or more')
        seconds = _seconds(span)
        if seconds is None:
            self._fail(raw, '"time_range" is a time such as "30s", "90m", "2h" or "7d"')
        return count, seconds or 0

    def _payload_format(self, raw: RawRule) -> str:
        value = raw.body.get("payload_format", "plain_text")
        if value not in PAYLOAD_FORMATS:
            self._fail(raw, f'unknown payload_format "{value}"{nearest(str(value), PAYLOAD_FORMATS)}')
        return str(value)

    def _warn_of_later(self, rules: list[Rule]) -> None:
        if rules:
            names = ", ".join(f"{rule.function} (line {rule.line})" for rule in sorted(rules, key=lambda r: r.line))
            self._warn(min(rule.line for rule in rules), f"known, but without effect until a later version: {names}")

    def _warn_of_storing_twice(self, rules: list[Rule]) -> None:
        stored = [rule for rule in rules if rule.function == "on_message_publish"]
        for rule in (rule for rule in rules if rule.function == "on_message_store" and rule.works):
            if any(other.pool == rule.pool and overlap(other.topic_filter, rule.topic_filter) for other in stored):
                self._warn(rule.line, "on_message_publish stores some of these messages too; each is stored once")

    def _fail(self, raw: RawRule, text: str) -> None:
        self._raw.mistakes.append(Mistake(self._file, raw.line, text))

    def _warn(self, line: int, text: str) -> None:
        self._raw.warnings.append(Mistake(self._file, line, text))


def _seconds(value: Any) -> int | None:
    if not isinstance(value, str) or value[-1:] not in _DURATIONS or not is_digits(value[:-1]):
        return None
    return int(value[:-1]) * _DURATIONS[value[-1]]


def _check_use(raw: Raw, file: str, backend: str, pools: list[Pool]) -> None:
    """Who loads a backend expects that something goes there: a file that can carry nothing must not look well."""
    leave = f"or take {backend} out of [uplink] backends in gateway.toml"
    if not pools:
        text = f"no pool is set up, so nothing can go to {backend}: write backend.{backend}.pool1.server = host:port, {leave}"
        raw.mistakes.append(Mistake(file, 0, text))
    elif not raw.rules:
        text = f"there is no rule, so nothing would go to {backend}: write backend.{backend}.hook.message.publish.1 = {{...}}"
        raw.mistakes.append(Mistake(file, 0, f"{text}, {leave}"))
    else:
        used = {rule.body.get("pool") for rule in raw.rules}
        for name in (pool.name for pool in pools if pool.name not in used):
            line = next(setting.line for setting in raw.settings if setting.pool == name)
            raw.warnings.append(Mistake(file, line, f"no rule names {name}, so nothing goes there"))


def _warn_of_open_credentials(raw: Raw, path: Path, pools: list[Pool]) -> None:
    lines = [setting.line for setting in raw.settings if setting.key == "password" and setting.value]
    if not lines:
        return
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if mode & stat.S_IROTH:
        raw.warnings.append(
            Mistake(
                str(path), lines[0], f"everybody on this machine can read the password: chmod 640 {path} or use password_file"
            )
        )
