"""What `tidegate doctor` asks the machine: disk, SD card or not, how long a sync takes, clock, SQLite, file rights.

Read from the kernel's files (mountinfo, sysfs, adjtimex), so that nothing needs to be installed.

Invariant: a finding that is not `ok` says what to do.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tidegate.store.clock import BUILT

from .config import Config
from .status import size
from .trust import STAMP, clock_chips, kernel_says_synchronised, moment

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LOOK_AS = "run this as root or as the gateway's user"


class Finding(NamedTuple):
    """One thing that was looked at; `advice` says what to do, empty when nothing is to be done."""

    level: str
    check: str
    text: str
    advice: str = ""


ROOM = 64 << 20
"""Bytes below which a disk is as good as full."""
SYNCS = 7
SLOW, FAST = 0.05, 5e-6
"""Seconds of a sync: above, devices feel it; below, it cannot have reached anything."""
SAFE_SQLITE = (3, 51, 3)
_IN_MEMORY = ("tmpfs", "ramfs")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs")
_SIMPLE = ("vfat", "exfat", "ntfs", "ntfs3", "fuseblk")


# -- the disk --------------------------------------------------------------------------------------------------------


class Mount(NamedTuple):
    """Where a directory's files are: kind of file system, and the disk's name in /sys/block (empty: none)."""

    kind: str
    disk: str
    is_card: bool
    has_journal: bool = True
    """False where ext4 was made without one."""


def check_data(config: Config) -> Iterable[Finding]:
    """The data directory, or the nearest one above it that exists."""
    data = config.data
    exists = data.is_dir()
    if not exists:
        yield Finding(OK, "data", f"{data} is not there yet: the first start makes it")
    place = next(path for path in (data, *data.parents) if path.is_dir())
    mount = mount_of(place)
    yield file_system(place, mount, config.commit_delay)
    yield _room(place, config)
    if exists:
        yield from _rights(data)
        yield sync_time(place)


def mount_of(place: Path, mountinfo: Path = Path("/proc/self/mountinfo"), sysfs: Path = Path("/sys")) -> Mount:
    """Asks by device number; where that names no disk (btrfs, overlay), by the mount's source."""
    number = f"{os.major(place.stat().st_dev)}:{os.minor(place.stat().st_dev)}"
    kind = source = ""
    for line in mountinfo.read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == number:
            kind, source = right.split()[:2]
    if not kind:  # the subvolumes of btrfs have numbers of their own
        kind, source = _covering(place, mountinfo)
    block = sysfs / "dev" / "block" / number
    name = block.resolve().name if block.exists() else Path(source).name if source.startswith("/dev/") else ""
    disk = re.sub(r"(?<=\d)p\d+$", "", name) if name.startswith(("mmcblk", "nvme")) else name
    card = sysfs / "block" / disk / "device" / "type"
    is_card = disk.startswith("mmcblk") and not (card.exists() and card.read_text().strip() == "MMC")
    task = sysfs / "fs" / "ext4" / name / "journal_task"
    return Mount(kind, disk, is_card, not (kind == "ext4" and task.exists() and task.read_text().strip() == "<none>"))


def _covering(place: Path, mountinfo: Path) -> tuple[str, str]:
    """File system and source of the mount that the path lies in; empty where that cannot be seen (chroot)."""
    mounts = [(0, ["", ""])]
    for line in mountinfo.read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].replace(r"\040", " "))
        if place.resolve().is_relative_to(point):
            mounts.append((len(point.parts), right.split()))
    _, (kind, source, *_) = max(mounts, key=lambda mount: mount[0])
    return kind, source


def file_system(place: Path, mount: Mount, commit_delay: float) -> Finding:
    """Whether what is written there stays."""
    text = f"{place} is on {mount.kind or 'a file system that cannot be seen from here'}" + (
        f", disk {mount.disk}" if mount.disk else ""
    )
    if mount.kind in _IN_MEMORY:
        return Finding(PROBLEM, "disk", f"{text}: in memory, gone with the power", "set gateway.data to a directory on a disk")
    if mount.kind in _NETWORK:
        advice = "set gateway.data to a local disk: SQLite's write-ahead log does not work over a network"
        return Finding(PROBLEM, "disk", f"{text}: a network file system", advice)
    if mount.kind == "overlay":
        advice = "in a container, mount a volume there; on a Raspberry Pi with a read-only root, a partition that is written"
        return Finding(WARNING, "disk", f"{text}: what is written may be in memory, or gone with the container", advice)
    if mount.kind in _SIMPLE:
        advice = "use ext4: this one has no journal or no rights, and a power cut can break it"
        return Finding(WARNING, "disk", text, advice)
    if not mount.has_journal:
        advice = "unmount it and run tune2fs -O has_journal DEVICE"
        return Finding(WARNING, "disk", f"{text} without a journal: a power cut can break it", advice)
    if mount.is_card and not commit_delay:
        advice = 'each commit wears a card: set store.commit_delay = "20ms" or more, or use an SSD for gateway.data'
        return Finding(WARNING, "disk", f"{text}, an SD card", advice)
    return Finding(OK, "disk", f"{text}, an SD card, commits gathered" if mount.is_card else text)


def _room(place: Path, config: Config) -> Finding:
    usage = os.statvfs(place)
    free = usage.f_bavail * usage.f_frsize
    text = f"{size(free)} of {size(usage.f_blocks * usage.f_frsize)} free"
    if usage.f_flag & os.ST_RDONLY:
        return Finding(
            PROBLEM, "room", f"{place} is mounted read-only", "mount it for writing; after an error see dmesg, run fsck"
        )
    if free < ROOM or (usage.f_files and not usage.f_favail):
        return Finding(PROBLEM, "room", f"{text}, as good as full", "delete something else, or lower store.disk_budget")
    log = sum(path.stat().st_size for path in config.data.glob("log.db*"))  # none where this user must not look
    if free + log < config.disk_budget:
        text += f"; the log may grow to {size(config.disk_budget)}, that is more than there is"
        return Finding(WARNING, "room", text, f'set store.disk_budget = "{(free + log) * 3 // 4 >> 20}MiB" or less')
    if log > config.disk_budget:
        text += f"; the log has {size(log)}, more than its {size(config.disk_budget)}"
        return Finding(WARNING, "room", text, "a long read of log.db may keep it from being cut; see its log")
    return Finding(OK, "room", f"{text}; the log has {size(log)} of its {size(config.disk_budget)}" if log else text)


def sync_time(place: Path) -> Finding:
    """How long the disk takes to say that 4 KiB are safe: what every message of QoS 1 and 2 waits for."""
    try:
        times = sorted(_syncs(place))
    except PermissionError:
        return Finding(WARNING, "sync", f"not timed: this user must not write in {place}", LOOK_AS)
    except OSError as error:
        return Finding(PROBLEM, "sync", f"cannot write in {place}: {error.strerror}", "make room, or see dmesg and run fsck")
    middle, worst = times[len(times) // 2], times[-1]
    text = f"a sync takes {middle * 1000:.2f} ms, {worst * 1000:.2f} ms at worst"
    if middle < FAST:
        return Finding(
            WARNING, "sync", f"{text}: it reaches no disk", "is eatmydata, or a mount option such as nobarrier, in use?"
        )
    if middle > SLOW:
        advice = 'devices wait that long for each acknowledgement: a better card or an SSD; or store.durability = "normal"'
        return Finding(WARNING, "sync", text, advice)
    return Finding(OK, "sync", text)


def _syncs(place: Path) -> Iterable[float]:
    with tempfile.TemporaryFile(dir=place) as file:
        for _ in range(SYNCS):
            os.pwrite(file.fileno(), os.urandom(4096), 0)
            began = time.perf_counter()
            os.fsync(file.fileno())
            yield time.perf_counter() - began


# -- rights ----------------------------------------------------------------------------------------------------------


def _rights(data: Path) -> Iterable[Finding]:
    about = data.stat()
    wrong = [path.name for path in data.iterdir() if path.is_file() and path.stat().st_uid != about.st_uid]
    if wrong and about.st_uid:
        yield Finding(
            PROBLEM, "rights", f"{data} belongs to another user than {', '.join(sorted(wrong))} in it",
            f"the gateway may not be able to write them: chown -R --reference {data} {data}",
        )  # fmt: skip
    if about.st_mode & (stat.S_IROTH | stat.S_IXOTH) and not wrong:
        readable = [path.name for path in data.glob("*.db") if path.stat().st_mode & stat.S_IROTH]
        if readable:
            text = f"everybody on this machine can read the messages in {data}"
            yield Finding(WARNING, "rights", text, f"chmod o-rwx {data}")
            return
    if not wrong:
        yield Finding(OK, "rights", f"{data} is written and read by its owner")


def check_secrets(config: Config) -> Iterable[Finding]:
    """Files that hold passwords: the password file, and what the backends' files hold or name."""
    secrets = [config.password_file] if config.password_file else []
    for conf in sorted(config.conf_dir.glob("emqx_backend_*.conf")):
        for line in conf.read_text(errors="replace").splitlines():
            found = re.match(r"\s*backend\.\S+\.(\w+?)(_file)?\s*=\s*(\S+)", line)
            if found and found[1] in ("password", "aws_secret_access_key"):
                secrets.append(config.conf_dir / found[3] if found[2] else conf)
    for secret in dict.fromkeys(secrets):
        try:
            mode = secret.stat().st_mode
        except OSError as error:
            yield Finding(PROBLEM, "secrets", f"{secret}: {error.strerror}", "make it, or correct the path where it is named")
            continue
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            text = f"everybody on this machine can {'write' if mode & stat.S_IWOTH else 'read'} {secret}"
            yield Finding(
                PROBLEM, "secrets", text, f"chmod 640 {secret} (and chgrp tidegate, if the service runs as that user)"
            )
        else:
            yield Finding(OK, "secrets", f"{secret} is kept from others")


# -- clock and SQLite ------------------------------------------------------------------------------------------------


CLOCK_ADVICE = "let systemd-timesyncd or chrony reach a time server (timedatectl); without a network, a clock chip (RTC)"


def check_clock() -> Iterable[Finding]:
    now = time.time()
    when = moment(int(now * 1000))
    yield judge_clock(now, kernel_says_synchronised() or STAMP.exists(), bool(clock_chips()), when)


def judge_clock(now: float, synchronised: bool, has_rtc: bool, when: str) -> Finding:
    rtc = (
        "a clock chip keeps time without power" if has_rtc else "no clock chip: after a power cut the time is unknown at first"
    )
    advice = CLOCK_ADVICE
    if now * 1000 < BUILT:
        return Finding(PROBLEM, "clock", f"it is {when} here: the clock was never set", f"{advice}; or: date -s")
    if synchronised:
        return Finding(OK, "clock", f"synchronised, {when}; {rtc}")
    return Finding(WARNING, "clock", f"not synchronised, {when}; {rtc}", advice)


def check_sqlite() -> Iterable[Finding]:
    version = sqlite3.sqlite_version_info
    text = f"SQLite {sqlite3.sqlite_version}"
    if version >= SAFE_SQLITE:
        yield Finding(OK, "sqlite", text)
        return
    safe = ".".join(map(str, SAFE_SQLITE))
    text += f" (before {safe} a database written by two at once can break; the gateway writes from one connection only)"
    yield Finding(OK, "sqlite", text, "open log.db with other programs only for reading: sqlite3 -readonly")
