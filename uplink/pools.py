"""Pools: the far ends a file configures, from its settings to frozen objects with every default filled in.

Values are checked by the table `vocabulary.POOL_KEYS`. Secrets are held in `Secret`, whose text never shows in a log, an
error or a status by accident.

Invariant: a `Pool` of a built backend has every key of its table, each with a value of the right type.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conf import Mistake, Raw, Setting, is_digits, nearest
from .vocabulary import BACKEND_SETTINGS, BUILT, IN_THE_RULES, KEY_ALIASES, POOL_KEYS, POOL_PREFIXES, SETTING_GROUPS, Key

_HOST_NAME = re.compile(r"[\w.-]+")
MAX_SECONDS = 86_400
"""Of a time-out: more is no time-out, and what the system cannot count."""


class Secret(str):
    """A text that does not show itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'" if self else "''"


@dataclass(frozen=True, slots=True)
class Pool:
    """One far end: its name in the file and its settings, defaults filled in."""

    backend: str
    name: str
    settings: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        """As `status` shows it: `redis.pool1`."""
        return f"{self.backend}.{self.name}"


class _Bad(Exception):
    """The value cannot be read; the text says what is expected."""


def read_pools(raw: Raw, file: str, backend: str) -> list[Pool]:
    """The file's pools in order of their first line; mistakes go to `raw.mistakes`."""
    if backend == "sqlite":
        for setting in raw.settings:
            raw.mistakes.append(Mistake(file, setting.line, "sqlite has no settings here; see [store] in gateway.toml"))
        return [Pool("sqlite", "local", {})]
    pools: dict[str, dict[str, Any]] = {}
    lines: dict[tuple[str, str], int] = {}
    for setting in [_by_its_own_name(raw, backend, setting) for setting in raw.settings]:
        if not _belongs(raw, file, backend, setting):
            continue
        values = pools.setdefault(setting.pool, {})
        if (setting.pool, setting.key) in lines:
            raw.warnings.append(
                Mistake(
                    file, setting.line, f"{setting.pool}.{setting.key} again: replaces line {lines[setting.pool, setting.key]}"
                )
            )
        lines[setting.pool, setting.key] = setting.line
        try:
            values[setting.key] = _value(setting, POOL_KEYS[backend][setting.key], Path(file).parent)
        except _Bad as bad:
            raw.mistakes.append(Mistake(file, setting.line, f"{setting.pool}.{setting.key}: {bad}"))
    defaults = {name: key.default for name, key in POOL_KEYS[backend].items()}
    found = [Pool(backend, name, defaults | values) for name, values in pools.items()]
    for pool in found:
        _check(raw, file, pool, lines)
    return found


def _by_its_own_name(raw: Raw, backend: str, setting: Setting) -> Setting:
    """The setting with the words that every backend has for it: the specification calls some by two names."""
    owner = POOL_PREFIXES.get(setting.backend, setting.backend)
    if owner != setting.backend and owner == backend:
        raw.passed_over(f"{setting.backend} is the {owner} of the rules, a pool is written backend.{owner}.", setting.line)
        setting = setting._replace(backend=owner)
    alias = KEY_ALIASES.get(backend, {}).get(setting.key)
    if alias is not None and setting.backend == backend:
        raw.passed_over(f"{setting.key} is called {alias} elsewhere", setting.line)
        setting = setting._replace(key=alias)
    return setting


def _belongs(raw: Raw, file: str, backend: str, setting: Setting) -> bool:
    """Whether the setting is one of a pool of this backend; says why when it is nothing we know."""
    owner = POOL_PREFIXES.get(setting.backend, setting.backend)
    name = f"{setting.pool}.{setting.key}" if setting.pool else setting.key
    if owner == backend and (option := IN_THE_RULES.get(backend, {}).get(name)):
        text = f'{name} has no effect here: say it by "{option}" in each rule that it is for'
        raw.warnings.append(Mistake(file, setting.line, text))
        return False
    group = SETTING_GROUPS.get(backend, {}).get(setting.pool)
    if owner == backend and not setting.pool and setting.key in BACKEND_SETTINGS.get(backend, ()):
        raw.passed_over(f"{setting.key} stands without a pool and holds for all of them", setting.line)
        return False
    if owner == backend and group is not None:
        if setting.key not in group:
            text = f'unknown key "{setting.key}" of {setting.pool}{nearest(setting.key, group)}'
            raw.mistakes.append(Mistake(file, setting.line, text))
            return False
        raw.passed_over(f"{setting.pool}.* stands without a pool and holds for all of them", setting.line)
        return False
    if owner not in POOL_KEYS:
        raw.mistakes.append(
            Mistake(file, setting.line, f'unknown backend "{setting.backend}"{nearest(setting.backend, POOL_KEYS)}')
        )
    elif owner != backend:
        raw.mistakes.append(Mistake(file, setting.line, f"a setting of {owner} does not belong in the file of {backend}"))
    elif not setting.pool and setting.key in POOL_KEYS[backend]:
        raw.mistakes.append(
            Mistake(file, setting.line, f"the pool is missing: backend.{setting.backend}.pool1.{setting.key} = ...")
        )
    elif setting.key not in POOL_KEYS[backend]:
        raw.mistakes.append(
            Mistake(file, setting.line, f'unknown key "{setting.key}"{nearest(setting.key, POOL_KEYS[backend])}')
        )
    else:
        return True
    return False


def _check(raw: Raw, file: str, pool: Pool, lines: Mapping[tuple[str, str], int]) -> None:
    """What only the settings together can show."""
    if pool.backend not in BUILT:
        return

    def mistake(key: str, text: str) -> None:
        raw.mistakes.append(Mistake(file, lines.get((pool.name, key), 0), f"{pool.name}.{key}: {text}"))

    if pool.backend == "redis":
        _check_redis(pool, mistake)
    elif pool.settings["ssl"] and not pool.settings["cacertfile"]:
        text = f"{pool.name}.ssl: the line is encrypted, but the server is not checked: name who signed it in cacertfile"
        raw.warnings.append(Mistake(file, lines[pool.name, "ssl"], text))
    if not pool.settings["ssl"]:
        for key in ("cacertfile", "certfile", "keyfile"):
            if pool.settings[key]:
                mistake(key, f"has no effect without backend.{pool.full_name}.ssl = true")
    if pool.settings["password"] and pool.settings["password_file"]:
        first, second = sorted(lines[pool.name, key] for key in ("password", "password_file"))
        text = f"{pool.name}: password and password_file are both given, in lines {first} and {second}: take one out"
        raw.mistakes.append(Mistake(file, second, text))


def _check_redis(pool: Pool, mistake: Callable[[str, str], None]) -> None:
    kind = pool.settings["type"]
    if kind == "single" and len(pool.settings["server"]) > 1:
        mistake("server", "type single has one server, host:port")
    if kind == "sentinel" and not pool.settings["sentinel"]:
        mistake("type", f"type sentinel needs the master's name: backend.redis.{pool.name}.sentinel = mymaster")
    if kind == "cluster" and pool.settings["database"]:
        mistake("database", "a cluster has only database 0")


def _value(setting: Setting, key: Key, folder: Path) -> Any:
    text = setting.value
    if key.kind == "secret":
        return Secret(text)
    if setting.backend not in BUILT:
        return text
    if key.kind == "secret_file":
        return _secret_from(folder / text) if text else ""
    if key.kind == "file":
        return _file(folder / text) if text else ""
    if key.kind == "flag":
        return _flag(text)
    if key.kind == "number":
        return _number(text)
    if key.kind == "seconds":
        return _seconds(text)
    if key.kind == "interval":
        return 0.0 if text == "0" else _seconds(text)
    if key.kind == "servers":
        return tuple(_server(part.strip()) for part in text.split(","))
    if key.kind == "choice" and text not in key.choices:
        raise _Bad(f'unknown value "{text}"{nearest(text, key.choices)}')
    return text


def _secret_from(path: Path) -> Secret:
    try:
        return Secret(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise _Bad(f"{path} cannot be read: {error}") from None


def _file(path: Path) -> str:
    """For the driver, which would say less of a file that it cannot read."""
    try:
        with path.open("rb"):
            return str(path)
    except OSError as error:
        raise _Bad(f"{path} cannot be read: {error.strerror}") from None


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise _Bad(f'"{text}" is neither true nor false')
    return text == "true"


def _number(text: str) -> int:
    if not is_digits(text):
        raise _Bad(f'"{text}" is not a number')
    return int(text)


def _seconds(text: str) -> float:
    units = {"ms": 0.001, "s": 1.0, "m": 60.0}
    for unit, factor in units.items():
        digits = text.removesuffix(unit)
        if digits != text and is_digits(digits) and 0 < int(digits) * factor <= MAX_SECONDS:
            return int(digits) * factor
    raise _Bad(f'"{text}" is not a time such as 500ms or 10s, a day at most')


def _server(text: str) -> tuple[str, int]:
    """The address taken apart. What is refused is not shown: people write passwords into addresses, as URLs have them."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not _is_host(host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65_536:
        raise _Bad("expected host:port alone, such as 127.0.0.1:6379, without redis://, user, password or database")
    return host, int(port)


def _is_host(text: str) -> bool:
    if _HOST_NAME.fullmatch(text):
        return True
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
