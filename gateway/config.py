"""`gateway.toml`: read, checked as a whole, and turned into one frozen `Config`.

Every key is in `KEYS` with its kind and default; the shipped file shows the same (a test compares them). The flags of the
command win over the environment (`TIDEGATE_SECTION__KEY`), which wins over the file. All mistakes are reported together,
each with file, line, what was found, what is allowed, and the nearest known name.

Invariant: a `Config` that exists can be run.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEVER = 0xFFFFFFFF
BACKENDS = ("sqlite", "redis")
LATER_BACKENDS = ("mysql", "pgsql", "mongo", "cassa", "dynamo", "influxdb", "opentsdb")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong in a file; `line` 0 when it is about the whole file or no file."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


class ConfigError(Exception):
    """The configuration cannot be used; `mistakes` are all of them."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("\n".join(str(mistake) for mistake in mistakes))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP address to listen on."""

    host: str
    port: int
    allow_anonymous: bool

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the gateway is told. Sizes in bytes, times in seconds."""

    name: str
    data: Path
    conf_dir: Path
    listeners: tuple[Listener, ...]
    password_file: Path | None
    durability: str
    commit_delay: float
    disk_budget: int
    max_packet_size: int
    max_inflight: int
    max_queued_bytes: int
    max_connections: int
    max_keep_alive: int
    session_expiry: int
    sys_interval: int
    backends: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the file: how its value is read (raises ValueError with what is allowed), and its default."""

    read: Callable[[Any], Any]
    default: Any


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or any(ord(character) < 32 for character in value):
        raise ValueError("a text in quotes, not empty, without control characters")
    return value


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _choice(*allowed: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, 1)
            raise ValueError(" | ".join(allowed) + (f" (nearest: {near[0]})" if near else ""))
        return str(value)

    return read


_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "kB": 1000, "MB": 10**6, "GB": 10**9}
_TIMES = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _size(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", str(value).strip())
        bounds = f'a size from {low} to {high} bytes, such as "64MiB" or "1GiB"'
        if isinstance(value, bool) or not found or found[2] not in _SIZES:
            raise ValueError(bounds)
        size = int(found[1]) * _SIZES[found[2]]
        if not low <= size <= high:
            raise ValueError(bounds)
        return size

    return read


def _time(low: float, high: float, text: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", str(value).strip())
        if value in (0, "0"):
            seconds = 0.0
        elif found:
            seconds = float(found[1]) * _TIMES[found[2]]
        else:
            raise ValueError(text)
        if not low <= seconds <= high:
            raise ValueError(text)
        return seconds

    return read


def _number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return read


def _expiry(value: Any) -> int:
    if value == "never":
        return NEVER
    return int(_time(1, NEVER - 1, '"never" or a time such as "12h" or "30d"')(value))


def _backends(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of " + ", ".join(BACKENDS))
    for item in value:
        if item in LATER_BACKENDS:
            raise ValueError(f"{', '.join(BACKENDS)}; {item} comes with a later release")
        if item not in BACKENDS:
            near = difflib.get_close_matches(item, BACKENDS, 1)
            raise ValueError(", ".join(BACKENDS) + (f" (nearest to {item!r}: {near[0]})" if near else ""))
    return tuple(dict.fromkeys(value))


KEYS: dict[str, dict[str, Key]] = {
    "gateway": {"name": Key(_text, ""), "data": Key(_text, "")},
    "access": {"password_file": Key(_text, "")},
    "store": {
        "durability": Key(_choice("full", "normal", "memory"), "full"),
        "commit_delay": Key(_time(0, 0.1, 'a time from "0ms" to "100ms"'), "0ms"),
        "disk_budget": Key(_size(16 << 20, 1 << 50), "1GiB"),
    },
    "limits": {
        "max_packet_size": Key(_size(1 << 10, 268_435_460), "1MiB"),
        "max_inflight": Key(_number(1, 65_535), 1000),
        "max_queued_bytes": Key(_size(1 << 10, 1 << 40), "1MiB"),
        "max_connections": Key(_number(1, 1_000_000), 10_000),
        "max_keep_alive": Key(_number(1, 65_535), 65_535),
        "session_expiry": Key(_expiry, "never"),
    },
    "log": {"sys_interval": Key(_number(0, 86_400), 10)},
    "uplink": {"backends": Key(_backends, ["sqlite"])},
}
LISTENER_KEYS: dict[str, Callable[[Any], Any]] = {"bind": _text, "allow_anonymous": _flag}
DEFAULT_BIND = "127.0.0.1:1883"


def load(
    path: Path | None, data: Path | None = None, listen: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Config:
    """Read the file (None: the defaults), the environment and the flags. Raises ConfigError with every mistake."""
    return _Loader(path, environ).load(data, listen)


class _Loader:
    def __init__(self, path: Path | None, environ: Mapping[str, str]) -> None:
        self._file = str(path) if path is not None else "defaults"
        self._path = path
        self._environ = environ
        self._mistakes: list[Mistake] = []
        self._text = ""
        self._tables: dict[str, Any] = {}

    def load(self, data: Path | None, listen: Sequence[str]) -> Config:
        self._read_file()
        self._check_names()
        values = {
            f"{section}.{name}": self._value(section, name, key) for section, keys in KEYS.items() for name, key in keys.items()
        }
        base = self._path.parent if self._path is not None else Path.cwd()
        password_file = base / values["access.password_file"] if values["access.password_file"] else None
        listeners = self._listeners(listen)
        warnings = self._check_open(listeners, password_file, base)
        if self._mistakes:
            raise ConfigError(self._mistakes)
        place = data or (Path(values["gateway.data"]) if values["gateway.data"] else default_data(self._environ))
        return Config(
            name=values["gateway.name"] or socket.gethostname(),
            data=place.expanduser().absolute(),
            conf_dir=base.absolute(),
            listeners=listeners,
            password_file=password_file,
            durability=values["store.durability"],
            commit_delay=values["store.commit_delay"],
            disk_budget=values["store.disk_budget"],
            max_packet_size=values["limits.max_packet_size"],
            max_inflight=values["limits.max_inflight"],
            max_queued_bytes=values["limits.max_queued_bytes"],
            max_connections=values["limits.max_connections"],
            max_keep_alive=values["limits.max_keep_alive"],
            session_expiry=values["limits.session_expiry"],
            sys_interval=values["log.sys_interval"],
            backends=values["uplink.backends"],
            warnings=warnings,
        )

    def _read_file(self) -> None:
        if self._path is None:
            return
        try:
            self._text = self._path.read_text("utf-8")
            self._tables = tomllib.loads(self._text)
        except OSError as error:
            raise ConfigError([Mistake(self._file, 0, f"cannot be read: {error.strerror}")]) from None
        except UnicodeDecodeError:
            raise ConfigError([Mistake(self._file, 0, "is not UTF-8 text")]) from None
        except tomllib.TOMLDecodeError as error:
            found = re.search(r"line (\d+)", str(error))
            raise ConfigError([Mistake(self._file, int(found[1]) if found else 0, f"is not TOML: {error}")]) from None

    def _check_names(self) -> None:
        known = [*KEYS, "listener"]
        for section, table in self._tables.items():
            if section not in known:
                self._fail(self._line(section, None), f"unknown section [{section}]{_near(section, known)}")
            elif section == "listener":
                if not isinstance(table, list):
                    self._fail(self._line(section, None), "listeners are written [[listener]], with two brackets")
            elif not isinstance(table, dict):
                self._fail(self._line(section, None), f"{section} is a section: [{section}]")
            else:
                for name in table:
                    if name not in KEYS[section]:
                        text = f"unknown key {name!r} in [{section}]{_near(name, KEYS[section])}"
                        self._fail(self._line(section, name), text)

    def _value(self, section: str, name: str, key: Key) -> Any:
        variable = f"TIDEGATE_{section}__{name}".upper()
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

    def _listeners(self, listen: Sequence[str]) -> tuple[Listener, ...]:
        if listen:
            made = [self._listener({"bind": text}, 0, f"--listen {text}") for text in listen]
        else:
            tables = self._tables.get("listener", [{"bind": DEFAULT_BIND}])
            lines = [n for n, text in enumerate(self._text.splitlines(), 1) if text.strip().startswith("[[listener]]")]
            made = [
                self._listener(table, lines[n] if n < len(lines) else 0, self._file)
                for n, table in enumerate(tables if isinstance(tables, list) else [])
            ]
        return tuple(listener for listener in made if listener is not None)

    def _listener(self, table: Mapping[str, Any], line: int, file: str) -> Listener | None:
        for name in table:
            if name not in LISTENER_KEYS:
                self._mistakes.append(Mistake(file, line, f"unknown key {name!r} in [[listener]]{_near(name, LISTENER_KEYS)}"))
        try:
            host, port = split_address(_text(table.get("bind", DEFAULT_BIND)))
            anonymous = _flag(table.get("allow_anonymous", is_loopback(host)))
        except ValueError as error:
            self._mistakes.append(Mistake(file, line, f"listener {dict(table)}: allowed is {error}"))
            return None
        return Listener(host, port, anonymous)

    def _check_open(self, listeners: Sequence[Listener], password_file: Path | None, base: Path) -> tuple[str, ...]:
        """A listener that others can reach needs a password file, or must say that it wants none."""
        warnings = []
        for listener in listeners:
            if listener.loopback or password_file is not None:
                continue
            if not listener.allow_anonymous:
                self._fail(
                    0,
                    f"{listener.host}:{listener.port} can be reached from outside, but there is no password file: make one with"
                    f' `tidegate passwd -c {base / "passwd"} USER`, then set access.password_file = "passwd" in gateway.toml',
                )
            else:
                warnings.append(f"{listener.host}:{listener.port} lets anybody in: allow_anonymous = true and no password file")
        return tuple(warnings)

    def _fail(self, line: int, text: str) -> None:
        self._mistakes.append(Mistake(self._file, line, text))

    def _line(self, section: str, name: str | None) -> int:
        """The line where a section begins or a key of it stands; 0 when it cannot be told."""
        wanted = rf'"?{re.escape(name or section)}"?\s*[=.]'
        current = ""
        for number, text in enumerate(self._text.splitlines(), 1):
            stripped = text.strip()
            if head := re.match(r"\[+\s*\"?([^\]\"]+?)\"?\s*\]+", stripped):
                current = head[1]
                if name is None and current == section:
                    return number
            elif (name is None or current == section) and re.match(wanted, stripped):
                return number
        return 0


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` taken apart. Raises ValueError with what is allowed."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdigit() or not 0 <= int(port) <= 65_535:
        raise ValueError("HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:1883, 0.0.0.0:1883 or [::]:1883")
    return host, int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_data(environ: Mapping[str, str]) -> Path:
    """Where data lives when nobody says: systemd's directory, /var/lib for root, else the user's state directory."""
    if state := environ.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/tidegate")
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tidegate"


def find_config(environ: Mapping[str, str]) -> Path | None:
    """The gateway.toml that is used when none is named, None for the built-in defaults."""
    places = [Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tidegate", Path("/etc/tidegate")]
    for place in places:
        if (place / "gateway.toml").is_file():
            return place / "gateway.toml"
    return None


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
