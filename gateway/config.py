"""`gateway.toml`: read, checked as a whole, and turned into one frozen `Config`.

Every key is in `KEYS` with its kind and default; the shipped file shows the same (a test compares them). The flags of the
command win over the environment (`TIDEGATE_SECTION__KEY`), which wins over the file. All mistakes are reported together,
each with file, line, what was found, what is allowed, and the nearest known name.

Invariant: a `Config` that exists can be run.
"""

from __future__ import annotations

import difflib
import errno
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.store.policy import Policies

from .config_keys import (
    DEFAULT_BIND,
    KEYS,
    LATER_KEYS,
    LISTENER_KEYS,
    PREFIX,
    WILDCARDS,
    Key,
    is_blocks,
    is_loopback,
    join_address,
    near,
    near_section,
    split_address,
)
from .config_places import USER, default_conf, default_data
from .config_policies import read_policies


class Mistake(NamedTuple):
    """One thing that is wrong in a file; `line` 0 when it is about the whole file or no file."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass(frozen=True, slots=True)
class Beside:
    """What is known of a gateway.toml also when it has a mistake: the files that belong to it and are checked together with it,
    and how its mistakes are to be told."""

    file: Path | None
    data: Path
    conf_dir: Path
    password_file: Path | None = None
    backends: tuple[str, ...] = ()
    log_format: str = "text"


class ConfigError(Exception):
    """The configuration cannot be used; `mistakes` are all of them, `beside` what could be read of it."""

    def __init__(self, mistakes: Sequence[Mistake], beside: Beside) -> None:
        super().__init__("\n".join(str(mistake) for mistake in mistakes))
        self.mistakes = tuple(mistakes)
        self.beside = beside


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP address to listen on."""

    host: str
    port: int
    allow_anonymous: bool

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    def conflict(self, other: Listener) -> str:
        """Why both cannot be listened on, if they cannot. Port 0 is another port each time."""
        if self.port != other.port or not self.port:
            return ""
        if self.host == other.host:
            return f"{self} again: an address is listened on once"
        for wide, narrow in ((self, other), (other, self)):
            if wide.host in WILDCARDS and (narrow.host == "localhost" or _version(narrow.host) == _version(wide.host)):
                return f"{self} overlaps {other}: {wide} is every address of this machine already; take one out"
        return ""

    def __str__(self) -> str:
        return join_address(self.host, self.port)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the gateway is told. Sizes in bytes, times in seconds."""

    name: str
    """Empty: the host's name and four characters of the gateway's id, which only its database knows."""
    data: Path
    file: Path | None
    """None: the defaults."""
    conf_dir: Path
    listeners: tuple[Listener, ...]
    password_file: Path | None
    durability: str
    commit_delay: float
    disk_budget: int
    free_floor: int
    policies: Policies
    max_packet_size: int
    max_inflight: int
    max_queued_bytes: int
    max_queued_together: int
    max_unfinished_together: int
    max_wills_together: int
    max_connections: int
    max_connections_per_address: int
    max_keep_alive: int
    session_expiry: int
    max_waiting_messages: int
    max_waiting_bytes: int
    max_waiting_age: int
    max_subscriptions: int
    max_subscriptions_together: int
    max_retained_bytes: int
    max_session_bytes: int
    max_exchange_bytes: int
    sys_interval: int
    clock_trust: str
    clock_wait: float
    log_format: str
    log_level: str
    http: tuple[str, int] | None
    """Where health and metrics are asked for; None: nowhere."""
    backends: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def beside(self) -> Beside:
        return Beside(self.file, self.data, self.conf_dir, self.password_file, self.backends, self.log_format)


def load(
    path: Path | None, data: Path | None = None, listen: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Config:
    """Read the file (None: the defaults), the environment and the flags. Raises ConfigError with every mistake."""
    return _Loader(path, environ).load(data, listen)


class _Loader:
    def __init__(self, path: Path | None, environ: Mapping[str, str]) -> None:
        self._file = str(path) if path is not None else "defaults"
        self._path = path.absolute() if path is not None else None
        self._environ = environ
        self._mistakes: list[Mistake] = []
        self._text = ""
        self._tables: dict[str, Any] = {}
        self._base = self._path.parent if self._path is not None else default_conf(environ).absolute()

    def load(self, data: Path | None, listen: Sequence[str]) -> Config:
        self._read_file()
        self._check_names()
        self._check_environment()
        values = {
            f"{section}.{name}": self._value(section, name, key) for section, keys in KEYS.items() for name, key in keys.items()
        }
        base = self._base
        password_file = base / values["access.password_file"] if values["access.password_file"] else None
        listeners, warnings = self._narrow(self._listeners(listen), password_file, base)
        if values["http.bind"]:
            self._check_http(values["http.bind"], listeners)
        policies = self._policies()
        data = data or (Path(values["gateway.data"]) if values["gateway.data"] else default_data(self._environ, self._path))
        place = data.expanduser().absolute()
        if self._mistakes:
            mistakes = sorted(self._mistakes, key=lambda mistake: mistake.line)
            backends, log_format = values["uplink.backends"] or (), values["log.format"] or "text"
            raise ConfigError(mistakes, Beside(self._path, place, base, password_file, backends, log_format))
        return Config(
            name=values["gateway.name"],
            data=place,
            file=self._path,
            conf_dir=base,
            listeners=listeners,
            password_file=password_file,
            durability=values["store.durability"],
            commit_delay=values["store.commit_delay"],
            disk_budget=values["store.disk_budget"],
            free_floor=values["store.free_floor"],
            policies=policies,
            max_packet_size=values["limits.max_packet_size"],
            max_inflight=values["limits.max_inflight"],
            max_queued_bytes=values["limits.max_queued_bytes"],
            max_queued_together=values["limits.max_queued_together"],
            max_unfinished_together=values["limits.max_unfinished_together"],
            max_wills_together=values["limits.max_wills_together"],
            max_connections=values["limits.max_connections"],
            max_connections_per_address=values["limits.max_connections_per_address"],
            max_keep_alive=values["limits.max_keep_alive"],
            session_expiry=values["limits.session_expiry"],
            max_waiting_messages=values["limits.max_waiting_messages"],
            max_waiting_bytes=values["limits.max_waiting_bytes"],
            max_waiting_age=values["limits.max_waiting_age"],
            max_subscriptions=values["limits.max_subscriptions"],
            max_subscriptions_together=values["limits.max_subscriptions_together"],
            max_retained_bytes=values["limits.max_retained_bytes"],
            max_session_bytes=values["limits.max_session_bytes"],
            max_exchange_bytes=values["limits.max_exchange_bytes"],
            sys_interval=values["log.sys_interval"],
            clock_trust=values["clock.trust"],
            clock_wait=values["clock.wait"],
            log_format=values["log.format"],
            log_level=values["log.level"],
            http=values["http.bind"] or None,
            backends=values["uplink.backends"],
            warnings=warnings + _open_http(values["http.bind"]) + _overdrawn(values),
        )

    def _read_file(self) -> None:
        if self._path is None:
            return
        try:
            self._text = self._path.read_text("utf-8-sig")
            self._tables = tomllib.loads(self._text)
        except OSError as error:
            rights = (
                f"use sudo, join the group that may read it (the service's is {USER}), or "
                if error.errno == errno.EACCES
                else ""
            )
            text = f"cannot be read: {error.strerror}; {rights}name another with --config FILE"
            raise self._unreadable(0, text) from None
        except UnicodeDecodeError:
            raise self._unreadable(0, "is not UTF-8 text; save it as UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            found = re.search(r" \(at line (\d+), column \d+\)$", str(error))
            line = int(found[1]) if found else len(self._text.splitlines())
            text = f'is not TOML: {str(error).removesuffix(found[0] if found else "")}; a line is name = "text", number or true'
            raise self._unreadable(line, text) from None
        except (ValueError, RecursionError):
            raise self._unreadable(0, "has a number with too many digits, or too many brackets inside one another") from None

    def _unreadable(self, line: int, text: str) -> ConfigError:
        log_format = self._environ.get(_variable("log", "format"), "text")
        data = default_data(self._environ, self._path)
        return ConfigError([Mistake(self._file, line, text)], Beside(self._path, data, self._base, log_format=log_format))

    def _check_names(self) -> None:
        known = [*KEYS, "listener"]
        for section, table in self._tables.items():
            if section == "listener":
                if table and not is_blocks(table):
                    self._fail(self._line(section, None), "listeners are written [[listener]], with two brackets")
            elif section in KEYS and is_blocks(table):
                self._fail(self._line(section, None), f"the section is written [{section}], with one bracket")
            elif not isinstance(table, dict) and not is_blocks(table):
                self._fail(self._line(section, None), f"the key {section!r} belongs into a section, such as [gateway]")
            elif section not in KEYS and not any(key.startswith(f"{section}.") for key in LATER_KEYS):
                self._fail(self._line(section, None), f"unknown section [{section}]{near_section(section, known)}")
            else:
                for name in table:
                    self._check_name(section, name)

    def _check_name(self, section: str, name: str) -> None:
        known = KEYS.get(section, {})
        if f"{section}.{name}" in LATER_KEYS:
            self._fail(self._line(section, name), f"{section}.{name} comes with a later release: take it out until then")
        elif name not in known and (section, name) != ("store", "policy"):
            self._fail(self._line(section, name), f"unknown key {name!r} in [{section}]{near(name, known)}")

    def _check_environment(self) -> None:
        """A variable that looks like one of ours and is not would be passed over in silence: a misspelt name."""
        known = [_variable(section, name).removeprefix(PREFIX) for section, keys in KEYS.items() for name in keys]
        for variable in self._environ:
            if variable.startswith(PREFIX) and "__" in variable and variable.removeprefix(PREFIX) not in known:
                text = "listeners are not taken from the environment: use --listen or the file"
                if not variable.startswith(f"{PREFIX}LISTENER"):
                    found = difflib.get_close_matches(variable.removeprefix(PREFIX), known, 1)
                    shape = f"; {PREFIX}SECTION__KEY names a section and a key as gateway.toml has them"
                    text = f"unknown key{f': did you mean {PREFIX}{found[0]}?' if found else shape}"
                self._mistakes.append(Mistake(f"environment variable {variable}", 0, text))

    def _value(self, section: str, name: str, key: Key) -> Any:
        variable = _variable(section, name)
        table = self._tables.get(section)
        if variable in self._environ:
            given, place = self._environ[variable], Mistake(f"environment variable {variable}", 0, "")
        elif isinstance(table, dict) and name in table:
            given, place = table[name], Mistake(self._file, self._line(section, name), "")
        else:
            return key.default if key.default == "" else key.read(key.default)
        try:
            return key.read(given)
        except ValueError as error:
            self._mistakes.append(Mistake(place.file, place.line, f"{section}.{name} = {given!r}: allowed is {error}"))
            return None

    def _listeners(self, listen: Sequence[str]) -> list[tuple[Listener, Mistake]]:
        """Each listener and the place where it stands."""
        if listen:
            made = [self._listener({"bind": text}, Mistake(f"--listen {text}", 0, ""), {}) for text in listen]
        else:
            tables = self._tables.get("listener", [{"bind": DEFAULT_BIND}])
            blocks = self._block_lines("listener")
            made = []
            for number, table in enumerate(tables if isinstance(tables, list) else []):
                line, keys = blocks[number] if number < len(blocks) else (0, {})
                if isinstance(table, dict):
                    made.append(self._listener(table, Mistake(self._file, line, ""), keys))
        found: list[tuple[Listener, Mistake]] = []
        for listener, place in filter(None, made):
            if fault := next(filter(None, (listener.conflict(other) for other, _ in found)), ""):
                self._mistakes.append(Mistake(place.file, place.line, fault))
            else:
                found.append((listener, place))
        return found

    def _listener(self, table: Mapping[str, Any], place: Mistake, keys: Mapping[str, int]) -> tuple[Listener, Mistake] | None:
        file, block, _ = place
        for name in table:
            if name not in LISTENER_KEYS:
                text = f"unknown key {name!r} in [[listener]]{near(name, LISTENER_KEYS)}"
                self._mistakes.append(Mistake(file, keys.get(name, block), text))
        values: dict[str, Any] = {}
        for name, read in LISTENER_KEYS.items():
            try:
                values[name] = read(table[name]) if name in table else None
            except ValueError as error:
                text = f"listener.{name} = {table[name]!r}: allowed is {error}"
                self._mistakes.append(Mistake(file, keys.get(name, block), text))
                return None
        host, port = values["bind"] or split_address(DEFAULT_BIND)
        anonymous = values["allow_anonymous"]
        return Listener(host, port, is_loopback(host) if anonymous is None else anonymous), place

    def _narrow(
        self, found: Sequence[tuple[Listener, Mistake]], password_file: Path | None, base: Path
    ) -> tuple[tuple[Listener, ...], tuple[str, ...]]:
        """Without a password file only this machine may connect, unless a listener says that it lets anybody in.

        A listener on every address is narrowed to loopback, one on another address is left out, each with the command that
        opens it; only when none is left there is nothing to run.
        """
        from .access import lacking

        kept: list[Listener] = []
        warnings: list[str] = []
        for listener, place in found:
            if listener.loopback or password_file is not None:
                kept.append(listener)
                if not listener.loopback and listener.allow_anonymous:
                    warnings.append(f"{listener} lets anybody in without a user name: allow_anonymous = true")
                continue
            if listener.allow_anonymous:
                kept.append(listener)
                warnings.append(f"{listener} lets anybody in: allow_anonymous = true and no password file")
                continue
            hint = f"there is no password file in force: {', then '.join(lacking(None, base))}"
            if loopback := WILDCARDS.get(listener.host):
                narrow = Listener(loopback, listener.port, True)
                kept += [narrow] if narrow not in kept else []
                warnings.append(f"not listening on {listener}, only on {narrow}: {hint}")
            elif len(found) > 1:
                warnings.append(f"not listening on {listener}: {hint}")
            else:
                self._mistakes.append(Mistake(place.file, place.line, f"not listening on {listener}: {hint}"))
        if not kept and not self._mistakes:
            self._fail(0, "no listener is left: add one on 127.0.0.1, or a password file")
        return tuple(kept), tuple(warnings)

    def _check_http(self, bind: tuple[str, int], listeners: Sequence[Listener]) -> None:
        http = Listener(*bind, allow_anonymous=True)
        if fault := next(filter(None, (http.conflict(listener) for listener in listeners)), ""):
            self._fail(self._line("http", "bind"), f"http.bind = {fault}")

    def _policies(self) -> Policies:
        store = self._tables.get("store")
        tables = store.get("policy", []) if isinstance(store, dict) else []
        line = self._line("store.policy", None) or self._line("store", "policy")
        return read_policies(tables, self._block_lines("store.policy"), line, self._fail)

    def _block_lines(self, name: str) -> list[tuple[int, dict[str, int]]]:
        """Of each [[name]]: the line of the block, and of each key in it."""
        blocks: list[tuple[int, dict[str, int]]] = []
        inside = False
        for number, text in enumerate(self._text.split("\n"), 1):
            if text.strip().startswith("["):
                inside = re.match(rf"\[\[\s*{re.escape(name)}\s*\]\]", text.strip()) is not None
                blocks += [(number, {})] if inside else []
            elif inside and (key := re.match(r"\s*\"?([\w-]+)\"?\s*=", text)):
                blocks[-1][1][key[1]] = number
        return blocks

    def _fail(self, line: int, text: str) -> None:
        self._mistakes.append(Mistake(self._file, line, text))

    def _line(self, section: str, name: str | None) -> int:
        """The line where a section begins or a key of it stands; 0 when it cannot be told."""
        wanted = rf'"?{re.escape(name or section)}"?\s*[=.]'
        current = ""
        for number, text in enumerate(self._text.split("\n"), 1):
            stripped = text.strip()
            if head := re.match(r"\[+\s*\"?([^\]\"]+?)\"?\s*\]+", stripped):
                current = head[1]
                if name is None and current == section:
                    return number
            elif (name is None or current == section) and re.match(wanted, stripped):
                return number
        return 0


def _open_http(bind: tuple[str, int] | None) -> tuple[str, ...]:
    if not bind or is_loopback(bind[0]):
        return ()
    return (f"http.bind = {join_address(*bind)}: whoever reaches it can read health and metrics, without a password",)


def _overdrawn(values: Mapping[str, Any]) -> tuple[str, ...]:
    from .held import overdrawn, shares  # it knows the store, which is more than a command may need

    limits = (values[f"limits.max_{what}_bytes"] for what in ("retained", "session", "exchange"))
    budget = values["store.disk_budget"]
    return tuple(filter(None, [overdrawn(budget, shares(budget, *limits))]))


def _version(host: str) -> int:
    """4 or 6, 0 for a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0


def _variable(section: str, name: str) -> str:
    return f"{PREFIX}{section}__{name}".upper()
