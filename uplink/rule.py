"""Rules and pools of one backend's file, checked and frozen: what `emqx_backend_<kind>.conf` means.

`load` never raises for what stands in the file: it returns every mistake at once, each with file, line and the nearest known
name, beside the rules that are right. A file with a mistake stops its pools, not the gateway; `wants` then asks the broker
to keep everything those rules could have wanted.

Invariant: a rule in `RuleFile.rules` names a known event, function and pool, and its commands are compiled.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tidegate.store.entry import ACKED, CONNECTED, DISCONNECTED, POSITION, PUBLISH, SUBSCRIBED, UNSUBSCRIBED, Want
from tidegate.store.topic import covers, matches, topic_filter_fault, without_share

from .commands import Command, TemplateFault, compile_command
from .conf import Mistake, Raw, RawRule, is_digits, nearest, read
from .local import doubts
from .pools import Pool, read_pools
from .reading import too_few_connections, wants_of
from .sql_statement import Statement, compile_statement
from .vocabulary import (
    ACTION_KEYS,
    BACKEND_FUNCTIONS,
    BUILT,
    DEFAULT_ACTION_KEYS,
    DRIVERS,
    EVENTS,
    EXPIRED_TIME,
    FIRST_FETCH,
    FUNCTION_ALIASES,
    FUNCTIONS,
    LOGGED_FOR_SQLITE,
    MAX_SECONDS,
    OFFLINE_OPTIONS,
    OPTION_BACKENDS,
    OPTION_USES,
    PAYLOAD_FORMATS,
    POOL_KEYS,
    POSITIONS,
    READING,
    RULE_OPTIONS,
    WITHOUT_TOPIC,
    placeholders,
)

__all__ = ["Mistake", "Pool", "Rule", "RuleFile", "load", "load_all", "wants"]

T = TypeVar("T")
ALIKE = 0.7
"""`difflib`'s ratio above which an unknown event may mean a known one: "disconected" may stand for either of two."""
_SQLITE_KINDS = frozenset((PUBLISH, CONNECTED, DISCONNECTED))
SHIPPED = Path(__file__).resolve().parent.parent / "conf"
_DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_FILTERS = (SUBSCRIBED, UNSUBSCRIBED)


@dataclass(frozen=True, slots=True)
class Rule:
    """One hook rule. Exactly one of `function`, `commands` and `statements` says what is done.

    A rule without a topic is for every topic, those with `$` included: then `everywhere` is true and the filter is `#`.
    """

    kind: int
    event: str
    number: int
    topic_filter: str
    everywhere: bool
    function: str
    commands: tuple[Command, ...]
    statements: tuple[Statement, ...]
    pool: str
    expired_time: int | None
    max_returned_count: int
    time_range: int
    payload_format: str
    first_fetch: str
    file: str
    line: int

    @property
    def reads(self) -> int:
        """Kind of entry that it is carried out for: acknowledgements that move a position come folded into positions."""
        return POSITION if self.function in POSITIONS else self.kind

    @property
    def name(self) -> str:
        """As the file names it: `message.publish.1`."""
        return f"{self.event}.{self.number}"

    @property
    def action(self) -> str:
        """What it does, in a few words: its function, or its first command or statement."""
        return self.function or (self.commands or self.statements)[0].text

    @property
    def target(self) -> str:
        """What writes of this rule are known by in quarantine."""
        return f"{self.name} {self.action}"

    def concerns(self, topic: str) -> bool:
        """Whether an entry of this kind with this topic is the rule's. A subscription's filter counts as if it were a topic."""
        if not topic or self.everywhere:
            return True
        return matches(self.topic_filter, without_share(topic) if self.kind in _FILTERS else topic)


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
        raw.mistakes.append(Mistake(str(path), 0, _how_to_install(driver, extra)))
    pools = read_pools(raw, str(path), backend)
    rules = _Reader(raw, str(path), backend, [pool.name for pool in pools]).rules()
    _warn_of_open_credentials(raw, path, backend)
    if backend == "sqlite":
        raw.warnings += [Mistake(str(path), line, text) for line, text in doubts(rules)]
    if backend in BUILT and backend != "sqlite" and not raw.mistakes:
        _check_use(raw, str(path), backend, pools)
        for pool in pools:
            if text := too_few_connections(pool, [rule for rule in rules if rule.pool == pool.name]):
                line = next((one.line for one in raw.settings if (one.pool, one.key) == (pool.name, "pool_size")), 0)
                raw.mistakes.append(Mistake(str(path), line, f"{pool.name}.pool_size: {text}"))
    raw.tell_defects(str(path))
    events = frozenset(kind for event in raw.events for kind in _kinds_of(event))
    mistakes, warnings = (tuple(sorted(found, key=lambda m: m.line)) for found in (raw.mistakes, raw.warnings))
    return RuleFile(backend, path, tuple(pools), tuple(rules), events, mistakes, warnings)


def _how_to_install(driver: str, extra: str) -> str:
    """With this environment's pip, from the clone: a package of our name on an index would be somebody else's."""
    return f"the driver {driver} is not installed: {sys.prefix}/bin/pip install '.[{extra}]' in the clone of Tidegate"


def load_all(folder: Path, backends: Iterable[str]) -> list[RuleFile]:
    """The files of all backends, as they stand in the folder."""
    return [load(folder / f"emqx_backend_{name}.conf", name) for name in backends]


def wants(rule_files: Iterable[RuleFile], saved: Mapping[str, Iterable[Want]] | None = None) -> list[Want]:
    """What the broker must log for all files; `saved` are each backend's last good wants, which a file with a mistake keeps."""
    found: dict[Want, None] = {}
    for rule_file in rule_files:
        before = (saved or {}).get(rule_file.backend, ())
        found |= dict.fromkeys(_wants_of(rule_file, list(before)))
    return list(found)


def _wants_of(rule_file: RuleFile, before: list[Want]) -> list[Want]:
    local = rule_file.backend == "sqlite"
    if not rule_file.mistakes:
        logged = [rule for rule in rule_file.rules if (not local or rule.function in LOGGED_FOR_SQLITE)]
        return [want for rule in logged for want in _wants_of_rule(rule, local)]
    if events := rule_file.events & (_SQLITE_KINDS if local else rule_file.events):
        return [*(Want(kind, "", 0, False) for kind in sorted(events)), *before]
    return before or [Want(PUBLISH, "", 1, False), Want(CONNECTED, "", 0, False), Want(DISCONNECTED, "", 0, False)]


def _kinds_of(event: str) -> list[int]:
    """What a rule with this event in its key could want; of an unknown one all that it looks like, else the usual."""
    if event in EVENTS:
        return [EVENTS[event]] if EVENTS[event] != ACKED else [ACKED, POSITION]
    alike = difflib.get_close_matches(event, EVENTS, len(EVENTS), ALIKE) or difflib.get_close_matches(event, EVENTS, 1)
    return [kind for name in alike for kind in _kinds_of(name)] or [PUBLISH, CONNECTED, DISCONNECTED]


def _wants_of_rule(rule: Rule, local: bool) -> list[Want]:
    return wants_of(rule) if rule.function in READING and not local else [_want(rule)]


def _want(rule: Rule) -> Want:
    stores = rule.function == "on_message_publish"
    retained = rule.function in ("on_message_retain", "on_retain_delete")
    return Want(rule.reads, "" if rule.everywhere else rule.topic_filter, 1 if stores else 0, retained)


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
        rules = sorted(found.values(), key=lambda rule: (rule.kind, rule.number))
        self._warn_of_storing_twice(rules)
        return rules

    def _rule(self, raw: RawRule) -> Rule | None:
        before = len(self._raw.mistakes)
        if not self._belongs(raw):
            return None
        event = "message.deliver" if raw.event == "message.delivered" else raw.event
        if event not in EVENTS:
            self._fail(raw, f'unknown event "{event}"{nearest(event, EVENTS)}')
            event = ""
        for option in raw.body:
            if option not in RULE_OPTIONS:
                self._fail(raw, f'unknown option "{option}"{nearest(option, RULE_OPTIONS)}')
        function, commands, statements = self._action(raw, event)
        count, time_range = self._offline_options(raw)
        topic, pool, expired_time = self._topic(raw), self._pool(raw), self._expired_time(raw, function)
        payload_format, first_fetch = self._payload_format(raw), self._first_fetch(raw)
        if len(self._raw.mistakes) > before:
            return None
        self._warn_of_no_effect(raw, event, function)
        return Rule(
            EVENTS[event], event, raw.number, topic, "topic" not in raw.body, function, commands, statements,
            pool, expired_time, count, time_range, payload_format,
            first_fetch, self._file, raw.line,
        )  # fmt: skip

    def _belongs(self, raw: RawRule) -> bool:
        """Whether the rule is one of ours, perhaps misspelt; says why not."""
        if raw.backend not in POOL_KEYS:
            self._fail(raw, f'unknown backend "{raw.backend}"{nearest(raw.backend, POOL_KEYS)}')
        elif (raw.backend, self._backend) == ("influxdb", "opentsdb"):
            self._raw.passed_over("the rule is written for influxdb and taken as one of opentsdb", raw.line)
        elif raw.backend != self._backend:
            self._fail(raw, f"a rule of {raw.backend} does not belong in the file of {self._backend}")
            return False
        return True

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
        if name != value and name:
            self._raw.passed_over(f"{value} is called {name}", raw.line)
        known = BACKEND_FUNCTIONS.get(self._backend, tuple(FUNCTIONS))
        if name not in FUNCTIONS:
            self._fail(raw, f'unknown function "{value}"{nearest(str(value), known)}')
        elif name not in known:
            self._fail(raw, f"{self._backend} has no function {name}; known: {', '.join(known)}")
        elif event and event not in FUNCTIONS[name]:
            self._fail(raw, f"{name} belongs to {' or '.join(FUNCTIONS[name])}, not to {event}")
        return name

    def _compiled(
        self, raw: RawRule, event: str, key: str, texts: list[str], compile_text: Callable[[str, Sequence[str]], T]
    ) -> tuple[T, ...]:
        known = placeholders(self._backend, event or "message.publish")
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
        elif fault := topic_filter_fault(topic):
            self._fail(raw, f'"topic" "{topic}" is no topic filter: {fault}')
        elif topic.startswith("$share/"):
            self._fail(raw, f'"topic" "{topic}": a rule sees topics without $share/GROUP/, leave that out')
        return str(topic)

    def _pool(self, raw: RawRule) -> str:
        pool = raw.body.get("pool", "local" if self._backend == "sqlite" else None)
        if pool is None:
            self._fail(raw, '"pool" is missing' + nearest("pool", self._pools))
        elif pool not in self._pools:
            known = nearest(str(pool), self._pools) or f"; no pool is set up: write backend.{self._backend}.{pool}.server = ..."
            self._fail(raw, f'unknown pool "{pool}"{known}')
        return str(pool)

    def _expired_time(self, raw: RawRule, function: str) -> int | None:
        default = EXPIRED_TIME.get(self._backend) if function in ("on_message_publish", "on_message_store") else None
        value = raw.body.get("expired_time", default)
        if value is not None and (not _is_count(value) or value == 0):
            self._fail(raw, f'"expired_time" is a number of seconds greater than 0, at most {MAX_SECONDS}')
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
        if not _is_count(count):
            self._fail(raw, '"max_returned_count" is a number, 0 or more')
        seconds = _seconds(span)
        if seconds is None:
            self._fail(raw, '"time_range" is a time such as "30s", "90m", "2h" or "7d"')
        return count, seconds or 0

    def _payload_format(self, raw: RawRule) -> str:
        value = raw.body.get("payload_format", "plain_text")
        if not isinstance(value, str) or value not in PAYLOAD_FORMATS:
            self._fail(raw, f'unknown payload_format "{value}"{nearest(str(value), PAYLOAD_FORMATS)}')
        return str(value)

    def _first_fetch(self, raw: RawRule) -> str:
        value = raw.body.get("first_fetch", "window")
        if value not in FIRST_FETCH:
            self._fail(raw, f'unknown first_fetch "{value}"{nearest(str(value), FIRST_FETCH)}')
        return str(value)

    def _warn_of_no_effect(self, raw: RawRule, event: str, function: str) -> None:
        if "topic" in raw.body and event in WITHOUT_TOPIC:
            self._warn(raw.line, f'"topic" has no effect: {event} has none')
        for option, functions in OPTION_USES.items():
            if option not in raw.body:
                continue
            backends = OPTION_BACKENDS.get(option, (self._backend,))
            if self._backend not in backends:
                self._warn(raw.line, f'"{option}" has no effect in the file of {self._backend}: it belongs to {backends[0]}')
            elif function not in functions and self._backend != "sqlite":
                self._warn(raw.line, f'"{option}" has no effect here: it goes with {", ".join(functions)}')

    def _warn_of_storing_twice(self, rules: list[Rule]) -> None:
        """A rule for QoS 0 as well in a part of the topics is no mistake: what both name is stored once."""
        stores = [rule for rule in rules if rule.function == "on_message_store"]
        for rule in (rule for rule in rules if rule.function == "on_message_publish"):
            for store in stores:
                wider = store.everywhere or (not rule.everywhere and covers(store.topic_filter, rule.topic_filter))
                if store.pool == rule.pool and wider:
                    text = f"on_message_store of line {store.line} stores these messages too, and those of QoS 0"
                    self._warn(rule.line, f"{text}: each is stored once; take this on_message_publish out")

    def _fail(self, raw: RawRule, text: str) -> None:
        self._raw.mistakes.append(Mistake(self._file, raw.line, text))

    def _warn(self, line: int, text: str) -> None:
        self._raw.warnings.append(Mistake(self._file, line, text))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SECONDS


def _seconds(value: Any) -> int | None:
    if not isinstance(value, str) or value[-1:] not in _DURATIONS or not is_digits(value[:-1]):
        return None
    seconds = int(value[:-1]) * _DURATIONS[value[-1]]
    return seconds if seconds <= MAX_SECONDS else None


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


def _warn_of_open_credentials(raw: Raw, path: Path, backend: str) -> None:
    secrets = [name for name, key in POOL_KEYS[backend].items() if key.kind == "secret"]
    lines = [setting.line for setting in raw.settings if setting.key in secrets and setting.value]
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
