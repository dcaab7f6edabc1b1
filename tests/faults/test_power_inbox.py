"""Power cuts while a business system's rows come down to a device: nothing twice, nothing lost.

As in `test_power`: copies of the disk, taken while every thread of the gateway stands still, and cuts with the shutdown ioctl
after which everybody goes on with the same disk and the same far end. Under eatmydata the same must lose something.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.gateway import Gateway
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from . import disk
from .office import RULES, TOML, Device, Office, broken
from .traffic import run, run_for

COPIES = 40
SHUTDOWNS = 8
CONTROLS = 5

pytestmark = pytest.mark.skipif(bool(disk.reason()), reason=disk.reason() or "possible")


def test_copies_of_the_disk_hold_what_the_device_and_the_far_end_were_told(tmp_path: Path) -> None:
    moments = _moments()
    with _working(tmp_path) as (gateway, image, office, device):
        for number in range(COPIES):
            assert _look_at_a_cut(gateway, image, office, device, moments) == [], f"cut {number}"
        run([device], lambda: bool(office.told(device.name)))


def test_what_comes_down_arrives_once_over_power_cuts(tmp_path: Path) -> None:
    moments = _moments()
    with RedisServer(tmp_path) as server, disk.directory() as directory:
        image, mount = directory / "image", directory / "mount"
        disk.make(image)
        gateway = _gateway(tmp_path, server, mount)
        office = Office(server.port)
        device = Device("device", office)
        for number in range(SHUTDOWNS):
            with disk.mounted(image, mount), _running(gateway):
                device.connect(gateway.port)
                _work(office, device, moments)
                told = _cut(gateway, office, device, mount)
            with disk.mounted(image, mount) as seen:
                assert _look_at(seen, directory, device, told) == [], f"cut {number}"
        with disk.mounted(image, mount), _running(gateway):
            device.connect(gateway.port)
            while device.kept < office.kept:
                device.ask()
            run([device], lambda: not device.missing() and _has_all(mount / "data", office))
            assert gateway.stop() == 0
    twice = [payload for payload, count in Counter(device.messages).items() if count > 1 and not payload.startswith(b"kept")]
    assert twice == []
    assert len(device.released) > 100, "the load was no load"


def test_copies_of_the_disk_lack_something_when_fsync_does_nothing(tmp_path: Path) -> None:
    moments = _moments()
    assert shutil.which("eatmydata"), "the negative control needs eatmydata: apt-get install eatmydata"
    with _working(tmp_path, ("eatmydata",)) as (gateway, image, office, device):
        disk.flush(gateway.data)  # so that the log is there, with the session, and what comes now is not
        for _ in range(CONTROLS):
            found = _look_at_a_cut(gateway, image, office, device, moments)
            assert any("is not in the log" in one for one in found), found


def _has_all(data: Path, office: Office) -> bool:
    """Whether every retained value of the office is one here by now."""
    with closing(sqlite3.connect(f"file:{data / 'log.db'}?mode=ro", uri=True)) as log:
        return bool(log.execute("SELECT count(*) FROM retained").fetchone() == (office.kept,))


def _moments() -> random.Random:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def _gateway(directory: Path, server: RedisServer, mount: Path, prefix: Sequence[str] = ()) -> Gateway:
    files = {"emqx_backend_redis.conf": RULES.format(port=server.port)}
    return Gateway(directory, data=mount / "data", toml=TOML, files=files, prefix=prefix)


@contextmanager
def _working(tmp_path: Path, prefix: Sequence[str] = ()) -> Iterator[tuple[Gateway, Path, Office, Device]]:
    """A gateway on a disk image, a far end that no power cut reaches, and a device that has got something already."""
    with RedisServer(tmp_path) as server, disk.directory() as directory:
        image, mount = directory / "image", directory / "mount"
        disk.make(image)
        office = Office(server.port)
        device = Device("device", office)
        with disk.mounted(image, mount), _running(_gateway(tmp_path, server, mount, prefix)) as gateway:
            device.connect(gateway.port)
            office.write(1)
            device.ask()
            run([device], lambda: not device.missing() and _has_all(mount / "data", office))
            yield gateway, image, office, device


@contextmanager
def _running(gateway: Gateway) -> Iterator[Gateway]:
    gateway.start()
    try:
        yield gateway
    finally:
        if gateway.is_running:
            _kill(gateway)


def _work(office: Office, device: Device, moments: random.Random) -> None:
    for _ in range(moments.randrange(1, 8)):
        office.write(moments.randrange(1, 10))
        if moments.random() < 0.7:
            device.ask()
        run_for([device], moments.uniform(0.005, 0.06))


def _look_at_a_cut(gateway: Gateway, image: Path, office: Office, device: Device, moments: random.Random) -> list[str]:
    copy = image.with_name("copy")
    _work(office, device, moments)
    gateway.freeze()
    told = office.told(device.name)
    disk.snapshot(image, copy)
    device.listen()
    gateway.thaw()
    with disk.mounted(copy, image.with_name("seen")) as seen:
        return _look_at(seen, image.parent, device, told)


def _look_at(mount: Path, directory: Path, device: Device, told: set[str]) -> list[str]:
    """In a copy of the files: who opens a database may change it."""
    files = directory / "files"
    files.mkdir()
    for path in (mount / "data").glob("*.db*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, files)
    try:
        return broken(files, device, told)
    finally:
        shutil.rmtree(files)


def _cut(gateway: Gateway, office: Office, device: Device, mount: Path) -> set[str]:
    """Stopped first, as in `test_power`: a flush that the shutdown overtakes may still report success."""
    gateway.freeze()
    told = office.told(device.name)
    disk.shut_down(mount)
    _kill(gateway)
    device.lose()
    return told


def _kill(gateway: Gateway) -> None:
    """Both processes at once, as no power leaves none."""
    children = gateway.children()
    gateway.kill()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        wait_until(lambda child=child: _threads(child) == 0)  # type: ignore[misc]


def _threads(pid: int) -> int:
    """Those that live: the first may be gone before the others, and each of them holds the files."""
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            states.append(stat.read_text().rpartition(")")[2].split()[0])
    return len([state for state in states if state not in "ZX"])
