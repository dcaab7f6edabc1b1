"""Where configuration and data lie when nobody says: the service's places, root's, and those of a user who runs one himself.

Invariant: who uses the service's configuration means the service's data, whoever he is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

USER = "tidegate"
"""As whom the service runs."""
SYSTEM_CONF = Path("/etc/tidegate")
SYSTEM_DATA = Path("/var/lib/tidegate")


def default_data(environ: Mapping[str, str], config_file: Path | None = None) -> Path:
    """systemd's directory, /var/lib for root and for whoever asks about the service, else the user's state directory."""
    if state := environ.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0])
    if os.geteuid() == 0 or (config_file is not None and config_file.absolute() == SYSTEM_CONF / "gateway.toml"):
        return SYSTEM_DATA
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tidegate"


def default_conf(environ: Mapping[str, str]) -> Path:
    """/etc for root, else the user's own."""
    if os.geteuid() == 0:
        return SYSTEM_CONF
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tidegate"


def find_config(environ: Mapping[str, str], system: Path = SYSTEM_CONF) -> Path | None:
    """The gateway.toml that is used when none is named, None for the built-in defaults. One that must not be looked at is
    named, so that whoever reads it tells why it cannot be read."""
    for place in dict.fromkeys((default_conf(environ), system)):
        file = place / "gateway.toml"
        try:
            if file.is_file():
                return file
        except OSError:
            return file
    return None
