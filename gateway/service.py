"""`tidegate service install`: the gateway under systemd, as its own user, watched by a watchdog that is tied to real work.

The watchdog is fed from the committer's thread through the loop: if either stands still, systemd restarts the gateway.

Invariant: nothing that exists is overwritten but the unit file itself, and every step done is told.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

UNIT = Path("/etc/systemd/system/tidegate.service")
CONF = Path("/etc/tidegate")
USER = "tidegate"


class ServiceError(Exception):
    """The service cannot be installed; the text is for the user."""


def unit_file() -> str:
    """The systemd unit for this installation."""
    command = (
        Path(sys.argv[0]).absolute() if Path(sys.argv[0]).name == "tidegate" else Path(sys.executable).with_name("tidegate")
    )
    return f"""\
[Unit]
Description=Tidegate MQTT edge gateway
Documentation=file://{CONF}/gateway.toml
After=network.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={command} run --config {CONF}/gateway.toml
ExecReload=/bin/kill -HUP $MAINPID
User={USER}
Group={USER}
StateDirectory=tidegate
StateDirectoryMode=0750
ConfigurationDirectory=tidegate
WatchdogSec=60
TimeoutStopSec=15
Restart=always
RestartSec=2
KillMode=mixed
LimitNOFILE=65536
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome={"read-only" if str(command).startswith(("/home", "/root")) else "yes"}
PrivateTmp=yes
PrivateDevices=no
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes

[Install]
WantedBy=multi-user.target
"""


def install_service() -> Iterator[str]:
    """Do it, step by step; yields what was done. Raises ServiceError."""
    if os.geteuid() != 0:
        raise ServiceError("installing a service needs root: sudo tidegate service install (or see --print)")
    if shutil.which("systemctl") is None:
        raise ServiceError("there is no systemd here; the unit file is shown by: tidegate service install --print")
    yield from _make_user()
    yield from _make_conf()
    UNIT.write_text(unit_file())
    yield f"wrote {UNIT}"
    _run("systemctl", "daemon-reload")
    yield "start it now and at every boot with: systemctl enable --now tidegate"


def _make_user() -> Iterator[str]:
    try:
        pwd.getpwnam(USER)
    except KeyError:
        _run("useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", USER)
        yield f"made the user {USER}"


def _make_conf() -> Iterator[str]:
    shipped = Path(__file__).resolve().parent.parent / "conf"
    CONF.mkdir(mode=0o750, exist_ok=True)
    for source in sorted(shipped.iterdir()):
        target = CONF / source.name
        if source.suffix in (".toml", ".conf") and not target.exists():
            shutil.copyfile(source, target)
            yield f"wrote {target}"
    _run("chown", "-R", f"root:{USER}", str(CONF))
    _run("chmod", "-R", "u=rwX,g=rX,o=", str(CONF))


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ServiceError(f"the command {command[0]} is missing") from None
    except subprocess.CalledProcessError as error:
        raise ServiceError(f"{' '.join(command)}: {error.stderr.strip()}") from None
