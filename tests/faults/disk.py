"""A small ext4 file system in a file, and two ways to cut its power.

`shut_down` stops it with the shutdown ioctl: unwritten data and journal are gone at once. `snapshot` copies
the image while it is mounted and its writer is stopped: what was not handed to the block device is not in
the copy. The copy is compared with the image afterwards and taken again if the kernel was still writing, so
that it is one state of the disk.

The image lies in memory where there is /dev/shm: a copy takes 15 ms, and no other load on the disk disturbs.
Both need root and loop devices; `reason` says why they cannot be had.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
SIZE = 64 << 20


def reason() -> str:
    """Why power cuts are impossible here; empty when they are possible."""
    if os.geteuid() != 0:
        return "power cuts need root (to mount a file system)"
    if not Path("/dev/loop-control").exists():
        return "power cuts need loop devices (/dev/loop-control)"
    return ""


@contextmanager
def directory() -> Iterator[Path]:
    """Where images are kept during a test."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def make(image: Path, *options: str) -> None:
    """A fresh ext4 file system."""
    with image.open("wb") as file:
        file.truncate(SIZE)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", *options, str(image))


@contextmanager
def mounted(image: Path, at: Path, *options: str) -> Iterator[Path]:
    """Mount the image; whatever was left undone by a power cut is replayed from its journal."""
    at.mkdir(exist_ok=True)
    _run("mount", "-o", ",".join(["loop", *options]), str(image), str(at))
    try:
        yield at
    finally:
        _run("umount", str(at))


def shut_down(at: Path) -> None:
    """Cut the power of a mounted file system."""
    number = os.open(at, os.O_RDONLY)
    try:
        fcntl.ioctl(number, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(number)


def break_down(at: Path) -> None:
    """An error of a mounted file system, as the kernel finds one: with `errors=remount-ro` it is read-only from now on."""
    (device,) = [line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == str(at)]
    Path("/sys/fs/ext4", os.path.basename(device), "trigger_fs_error").write_text("a test")


def repair(image: Path) -> None:
    """What a person does to a file system with an error, while it is not mounted."""
    done = subprocess.run(["e2fsck", "-f", "-y", str(image)], check=False, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout


@contextmanager
def small_memory(at: Path, size: str) -> Iterator[Path]:
    """A tmpfs of that size."""
    at.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at))
    try:
        yield at
    finally:
        _run("umount", str(at))


def snapshot(image: Path, copy: Path) -> None:
    """Copy what is on the disk now, while the image is mounted and nobody writes into it."""
    _copy(image, copy)
    while subprocess.run(["cmp", "-s", str(image), str(copy)], check=False).returncode:
        _copy(image, copy)


def flush(at: Path) -> None:
    """Write everything that the kernel holds for this file system."""
    _run("sync", "-f", str(at))


def _copy(image: Path, copy: Path) -> None:
    _run("cp", "--sparse=always", str(image), str(copy))


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
