"""What a change of `gateway.toml` would do: it is read again with the rules, and what differs from the start needs a restart.

Nothing of it is taken over while the gateway runs: listeners, limits and far ends are built once. So whoever changed a key and
sent SIGHUP is told by name which wait for a restart, and that a file with a mistake would not let the gateway start.

Invariant: nothing here changes what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tidegate.store.report import EACH, WARNING, Say

from .config import Config, ConfigError
from .config_keys import KEYS

_FIELDS = {field.name for field in dataclasses.fields(Config)}
KEY_OF = {"listeners": "listener", "policies": "store.policy"} | {
    field: f"{section}.{name}"
    for section, keys in KEYS.items()
    for name in keys
    for field in (name, f"{section}_{name}", section)
    if field in _FIELDS
}
"""A field of `Config` -> the key that it is read from."""


class ConfigChanged:
    """`look` at each reload; `changed` and `fault` are what it found last."""

    def __init__(self, runs: Config, read: Callable[[], Config], say: Say) -> None:
        self._runs = runs
        self._read = read
        self._say = say
        self.changed: list[str] = []
        self.fault = ""

    def look(self) -> None:
        try:
            now = self._read()
        except ConfigError as error:
            self.fault = str(error)
            for mistake in error.mistakes:
                text = f"{mistake}; what runs stays as it is, and would not start like this"
                self._say("config_unusable", text, WARNING, EACH)
            return
        self.fault = ""
        self.changed = sorted(key for field, key in KEY_OF.items() if getattr(now, field) != getattr(self._runs, field))
        if self.changed:
            text = "gateway.toml was changed and needs a restart (systemctl restart tidegate)"
            self._say("config_changed", text, WARNING, EACH, keys=",".join(self.changed))
