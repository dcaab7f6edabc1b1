"""`tidegate service install`: the gateway under systemd, as its own user, watched by a watchdog that is tied to real work.

The watchdog is fed from the committer's thread through the loop: if either stands still, systemd restarts the gateway.

Invariant: nothing that exists is lost (a unit that said something else is kept beside), and every step done is told.
"""

from __future__ import annotations

import grp
import itertools
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .config_places import SYSTEM_CONF as CONF
from .config_places import USER

UNIT = Path("/etc/systemd/system/tidegate.service")


HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What the unit's ProtectHome and PrivateTmp keep from the service."""
ADVICE = (
    "install it where everybody may read: sudo python3 -m venv /opt/tidegate && sudo /opt/tidegate/bin/pip install"
    " '.[fast]', then sudo /opt/tidegate/bin/tidegate service install"
)


class ServiceError(Exception):
    """The service cannot be installed; the text is for the user."""


def unit_file(command: Path) -> str:
    """The systemd unit that runs this `tidegate`."""
    return f"""\
[Unit]
Description=Tidegate MQTT edge gateway
Documentation=file://{CONF}/gateway.toml
After=network.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={_quoted(command)} run --config {CONF}/gateway.toml
ExecReload=/bin/kill -HUP $MAINPID
User={USER}
Group={USER}
StateDirectory={USER}
StateDirectoryMode=0750
UMask=0027
WatchdogSec=60
TimeoutStartSec=300
TimeoutStopSec=15
Restart=always
RestartSec=2
# A mistake in the configuration is not mended by starting again.
RestartPreventExitStatus=2
KillMode=mixed
LimitNOFILE=65536

NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectProc=invisible
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
# Besides the usual: to ask whether the clock is synchronised. Setting it needs a right that is not there.
SystemCallFilter=@system-service adjtimex clock_adjtime clock_adjtime64

[Install]
WantedBy=multi-user.target
"""


def this_command() -> Path:
    """The `tidegate` that is running, as it stands beside its interpreter."""
    called = Path(sys.argv[0]).absolute()
    return called if called.name == "tidegate" else Path(sys.executable).with_name("tidegate")


def check_reach(*files: Path) -> None:
    """The service's own user must come to each of them, through every link on the way. Raises ServiceError."""
    for file in files:
        if not file.is_file():
            raise ServiceError(f"there is no {file}; {ADVICE}")
        for place in _passed(file):
            if not place.stat().st_mode & stat.S_IXOTH:
                raise ServiceError(f"the service's user {USER} could not look into {place} on the way to {file}; {ADVICE}")


def check_shown(*files: Path) -> None:
    """Nothing that the service needs may lie where its unit lets it see nothing. Raises ServiceError."""
    for file in files:
        for place in _passed(file):
            if str(place) in HIDDEN:
                raise ServiceError(f"{file} lies below {place}, which the service must not see; {ADVICE}")


def _passed(file: Path) -> Iterator[Path]:
    """Every directory that is entered on the way to the file: its own, and those of what each link names."""
    while True:
        yield from reversed(file.parents)
        folder = file.parent.resolve()
        yield from (*reversed(folder.parents), folder)
        if not file.is_symlink():
            return
        file = folder / file.readlink()


def _quoted(command: Path) -> str:
    """As systemd reads a word: quoted where it must be, with its specifiers and variables taken as they are."""
    text = str(command).replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if any(letter in text for letter in " \t;'") else text


def install_service() -> Iterator[str]:
    """Do it, step by step; yields what was done. Raises ServiceError."""
    if os.geteuid() != 0:
        raise ServiceError("installing a service needs root: sudo tidegate service install (or see it with --print)")
    if shutil.which("systemctl") is None:
        raise ServiceError("there is no systemd here; the unit file is shown by: tidegate service install --print")
    command = this_command()
    # In a virtual environment the interpreter is a link, and may lead into the home of whoever made it.
    needed = (command, Path(sys.executable), Path(__file__).absolute())
    check_shown(*needed)
    check_reach(*needed)
    yield from _make_user()
    yield from make_conf(CONF, grp.getgrnam(USER).gr_gid)
    yield from write_unit(UNIT, unit_file(command))
    _run("systemctl", "daemon-reload")
    yield "start it now and at every boot with: systemctl enable --now tidegate"


def write_unit(unit: Path, text: str) -> Iterator[str]:
    """Put it there; one that says something else is kept beside it."""
    before = unit.read_text() if unit.exists() else text
    if before != text:
        names = (unit.with_name(f"{unit.name}.old{number or ''}") for number in itertools.count())
        kept = next(place for place in names if not place.exists())
        kept.write_text(before)
        yield f"{unit} was another: kept as {kept}; changes of your own belong into `systemctl edit {unit.stem}`"
    unit.write_text(text)
    yield f"wrote {unit}"


def _make_user() -> Iterator[str]:
    try:
        pwd.getpwnam(USER)
    except KeyError:
        _run("useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", USER)
        yield f"made the user {USER}"


def make_conf(folder: Path, group: int) -> Iterator[str]:
    """Put the shipped files there, readable for the group only; what exists stays as it is."""
    shipped = Path(__file__).resolve().parent.parent / "conf"
    if not folder.exists():
        folder.mkdir(mode=0o750)
        os.chown(folder, -1, group)
    for source in sorted(shipped.iterdir()):
        target = folder / source.name
        if source.suffix in (".toml", ".conf") and not target.exists():
            shutil.copyfile(source, target)
            os.chmod(target, 0o640)
            os.chown(target, -1, group)
            yield f"wrote {target}"


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ServiceError(f"the command {command[0]} is missing") from None
    except subprocess.CalledProcessError as error:
        raise ServiceError(f"{' '.join(command)}: {error.stderr.strip()}") from None
