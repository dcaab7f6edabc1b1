"""The keys of `gateway.toml`: of each its default and how its value is read. `conf/gateway.toml` shows the same (a test).

A reader takes what TOML or the environment gives and returns what the gateway works with, or raises ValueError saying what is
allowed; the loader adds file, line and what was found.

Invariant: a key that is not here does not exist.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

NEVER = 0xFFFFFFFF
BACKENDS = ("sqlite", "redis", "mysql", "pgsql")
LATER_BACKENDS = ("mongo", "cassa", "dynamo", "influxdb", "opentsdb")


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


def choice(*allowed: str) -> Callable[[Any], str]:
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


def number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, str) and value.isdecimal():
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
        "durability": Key(choice("full", "normal", "memory"), "full"),
        "commit_delay": Key(_time(0, 0.1, 'a time from "0ms" to "100ms"'), "0ms"),
        "disk_budget": Key(_size(16 << 20, 1 << 50), "1GiB"),
        "free_floor": Key(_size(0, 1 << 50), "0"),
    },
    "limits": {
        "max_packet_size": Key(_size(1 << 10, 268_435_460), "1MiB"),
        "max_inflight": Key(number(1, 65_535), 1000),
        "max_queued_bytes": Key(_size(1 << 10, 1 << 40), "1MiB"),
        "max_queued_together": Key(_size(1 << 20, 1 << 40), "64MiB"),
        "max_unfinished_together": Key(_size(1 << 20, 1 << 40), "64MiB"),
        "max_wills_together": Key(_size(1 << 20, 1 << 40), "16MiB"),
        "max_connections": Key(number(1, 1_000_000), 10_000),
        "max_connections_per_address": Key(number(0, 1_000_000), 0),
        "max_keep_alive": Key(number(1, 65_535), 65_535),
        "session_expiry": Key(_expiry, "never"),
        "max_waiting_messages": Key(number(0, 1 << 50), 0),
        "max_waiting_bytes": Key(_size(0, 1 << 50), "0"),
        "max_waiting_age": Key(_expiry, "never"),
        "max_subscriptions": Key(number(0, 1 << 50), 10_000),
        "max_subscriptions_together": Key(_size(1 << 20, 1 << 40), "64MiB"),
        "max_retained_bytes": Key(_size(0, 1 << 50), "0"),
        "max_session_bytes": Key(_size(0, 1 << 50), "0"),
        "max_exchange_bytes": Key(_size(0, 1 << 50), "0"),
    },
    "clock": {
        "trust": Key(choice("auto", "always", "never"), "auto"),
        "wait": Key(_time(0, 86_400, 'a time from "0s" to "24h"'), "10m"),
    },
    "log": {
        "sys_interval": Key(number(0, 86_400), 10),
        "format": Key(choice("text", "json"), "text"),
        "level": Key(choice("info", "warning", "error"), "info"),
    },
    "http": {"bind": Key(lambda value: split_address(_text(value), "127.0.0.1:9883"), "")},
    "uplink": {"backends": Key(_backends, ["sqlite"])},
}
LISTENER_KEYS: dict[str, Callable[[Any], Any]] = {"bind": lambda value: split_address(_text(value)), "allow_anonymous": _flag}
LATER_KEYS = {"access.acl_file"}
"""Names that are settled and come with a later release: refused with these words, never passed over in silence."""
DEFAULT_BIND = "127.0.0.1:1883"
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""All addresses of this machine -> the one that only itself can reach."""
PREFIX = "TIDEGATE_"


def near(name: str, known: Iterable[str]) -> str:
    """The nearest known name, for whoever has misspelt one, or all of them."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {found[0]}?" if found else f"; known: {', '.join(known) or 'none'}"


def near_section(name: str, known: Iterable[str]) -> str:
    """The same, the listeners as they are written."""
    return re.sub(r"\blistener\b", "[[listener]]", near(name, known))


def is_blocks(value: Any) -> bool:
    """[[name]], once or more."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def split_address(text: str, example: str = "127.0.0.1:1883, 0.0.0.0:1883 or [::]:1883") -> tuple[str, int]:
    """`host:port` or `[v6]:port` taken apart. Raises ValueError with what is allowed."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65_535:
        raise ValueError(f"HOST:PORT with a port from 0 to 65535, such as {example}")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """As people and URLs write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
