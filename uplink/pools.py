"""Pools: the far ends a file configures, from its settings to frozen objects with every default filled in.

Values are checked by the table `vocabulary.POOL_KEYS`. Secrets are held in `Secret`, whose text never shows in a log, an
error or a status by accident.

Invariant: a `Pool` of a built backend has every key of its table, each with a value of the right type.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conf import Mistake, Raw, Setting, is_digits, nearest
from .vocabulary import BACKEND_SETTINGS, BUILT, POOL_KEYS, POOL_PREFIXES, SETTING_GROUPS, Key

_HOST_NAME = re.compile(r"[\w.-]+")


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
    for setting in raw.settings:
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


def _belongs(raw: Raw, file: str, backend: str, setting: Setting) -> bool:
    """Whether the setting is one of a pool of this backend; says why when it is nothing we know."""
    owner = POOL_PREFIXES.get(setting.backend, setting.backend)
    if not setting.pool and setting.key in BACKEND_SETTINGS.get(backend, ()):
        return False
    if setting.pool in SETTING_GROUPS.get(backend, ()):
        return False
    if owner not in POOL_KEYS:
        raw.mistakes.append(
            Mistake(file, setting.line, f'unknown backend "{setting.backend}"{nearest(setting.backend, POOL_KEYS)}')
        )
    elif owner != backend:
        raw.mistakes.append(Mistake(file, setting.line, f"a setting of {owner} does not belong in the file of {backend}"))
    elif not setting.pool:
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
    if pool.backend == "redis":
        _check_redis(raw, file, pool, lines)
    elif not pool.settings["ssl"]:
        for name in ("cacertfile", "certfile", "keyfile"):
            if pool.settings[name]:
                line = lines[pool.name, name]
                raw.warnings.append(Mistake(file, line, f"{pool.name}.{name} has no effect without {pool.name}.ssl = true"))
    elif not pool.settings["cacertfile"]:
        text = f"{pool.name}.ssl: the line is encrypted, but the server is not checked: name who signed it in cacertfile"
        raw.warnings.append(Mistake(file, lines[pool.name, "ssl"], text))
    if pool.settings["password"] and pool.settings["password_file"]:
        first, second = sorted(lines[pool.name, key] for key in ("password", "password_file"))
        text = f"{pool.name}: password and password_file are both given, in lines {first} and {second}: take one out"
        raw.mistakes.append(Mistake(file, second, text))


def _check_redis(raw: Raw, file: str, pool: Pool, lines: Mapping[tuple[str, str], int]) -> None:
    kind = pool.settings["type"]
    line = lines.get((pool.name, "type"), 0)
    if kind in ("sentinel", "cluster"):
        raw.mistakes.append(Mistake(file, line, f"{pool.name}.type: {kind} comes with a later version; single works now"))
    elif len(pool.settings["server"]) > 1:
        line = lines.get((pool.name, "server"), 0)
        raw.mistakes.append(Mistake(file, line, f"{pool.name}.server: type single has one server, host:port"))


def _value(setting: Setting, key: Key, folder: Path) -> Any:
    text = setting.value
    if setting.backend not in BUILT:
        return text
    if setting.key == "password":
        return Secret(text)
    if setting.key == "password_file":
        return _secret_from(folder / text) if text else ""
    if key.kind == "number":
        return _number(text)
    if key.kind == "seconds":
        return _seconds(text)
    if key.kind == "servers":
        return tuple(_server(part.strip()) for part in text.split(","))
    if key.kind == "flag":
        return _flag(text)
    if key.kind == "file":
        return _file(folder / text) if text else ""
    if key.kind == "choice" and text not in key.choices:
        raise _Bad(f'unknown value "{text}"{nearest(text, key.choices)}')
    return text


def _secret_from(path: Path) -> Secret:
    try:
        return Secret(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise _Bad(f"{path} cannot be read: {error}") from None


def _file(path: Path) -> str:
    try:
        path.read_bytes()
    except OSError as error:
        raise _Bad(f"{path} cannot be read: {error.strerror}") from None
    return str(path)


def _flag(text: str) -> bool:
    if text not in ("true", "false", "on", "off"):
        raise _Bad(f'"{text}" is neither true nor false')
    return text in ("true", "on")


def _number(text: str) -> int:
    if not is_digits(text):
        raise _Bad(f'"{text}" is not a number')
    return int(text)


def _seconds(text: str) -> float:
    units = {"ms": 0.001, "s": 1.0, "m": 60.0}
    for unit, factor in units.items():
        digits = text.removesuffix(unit)
        if digits != text and is_digits(digits) and int(digits) > 0:
            return int(digits) * factor
    raise _Bad(f'"{text}" is not a time such as 500ms or 10s')


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
