"""Power cuts under load, on the whole gateway: what was acknowledged is still there.

A hundred cuts are copies of the mounted disk, taken while every thread of the gateway is stopped at a random
moment; each copy is mounted and its log read. Some more are cuts with the shutdown ioctl, after which the
gateway goes on with the same disk. The negative control runs the same under eatmydata, which swallows every
fsync, and must lose messages: a harness that does not see that sees nothing.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway

from . import disk
from .traffic import Receiver, Sender, check, run_for, settle

COPIES = 100
SHUTDOWNS = 10
CONTROLS = 5
RESTARTED = 25
"""Every so many copies, a gateway is started on the copy as well."""
PUBLISH = 6

pytestmark = pytest.mark.skipif(bool(disk.reason()), reason=disk.reason() or "possible")


def test_a_hundred_copies_of_the_disk_hold_everything_acknowledged(tmp_path: Path) -> None:
    moments = _moments()
    with _loaded_gateway(tmp_path) as (gateway, image, senders):
        for number in range(1, COPIES + 1):
            copy = _cut(gateway, image, senders, moments)
            with disk.mounted(copy, image.with_name("seen")) as seen:
                assert _missing(seen / "data", senders) == [], f"cut {number}"
                if number % RESTARTED == 0:
                    _check_restart(tmp_path / f"restart-{number}", seen / "data", senders)


def test_ten_shutdowns_of_the_file_system_lose_nothing_acknowledged(tmp_path: Path) -> None:
    moments = _moments()
    senders = _senders()
    receivers = [Receiver("first", "power/#", 1, version=4), Receiver("second", "power/#", 2, version=5)]
    with disk.directory() as directory:
        image, mount = directory / "image", directory / "mount"
        disk.make(image)
        gateway = Gateway(tmp_path, data=mount / "data")
        for number in range(1, SHUTDOWNS + 1):
            with disk.mounted(image, mount), gateway:
                _load([*receivers, *senders], gateway, moments)
                # Stopped first: a flush that the shutdown overtakes may still report success to its caller, who could then
                # acknowledge. After a real power cut nobody is left to do so.
                gateway.freeze()
                disk.shut_down(mount)
                gateway.kill()
                for peer in [*receivers, *senders]:
                    peer.lose()
            with disk.mounted(image, mount):
                assert _missing(mount / "data", senders) == [], f"cut {number}"
        with disk.mounted(image, mount), gateway:
            for peer in [*receivers, *senders]:
                peer.connect(gateway.port)
            settle(senders, receivers)
            assert gateway.stop() == 0
    check(senders, receivers)


def test_shutdowns_that_hit_a_running_flush_lose_nothing_acknowledged_before(tmp_path: Path) -> None:
    """A flush that the shutdown overtakes may report success, so what is acknowledged after it began does not count."""
    moments = _moments()
    senders = _senders()
    too_late: set[bytes] = set()
    with disk.directory() as directory:
        image, mount = directory / "image", directory / "mount"
        disk.make(image)
        gateway = Gateway(tmp_path, data=mount / "data")
        for number in range(1, SHUTDOWNS + 1):
            with disk.mounted(image, mount), gateway:
                _load(senders, gateway, moments)
                before = _acknowledged(senders) - too_late
                disk.shut_down(mount)
                gateway.kill()
                for sender in senders:
                    sender.lose()
                too_late |= _acknowledged(senders) - before
            with disk.mounted(image, mount):
                assert before & set(_missing(mount / "data", senders)) == set(), f"cut {number}"


def test_copies_of_the_disk_lose_messages_when_fsync_does_nothing(tmp_path: Path) -> None:
    moments = _moments()
    with _loaded_gateway(tmp_path, prefix=_eatmydata()) as (gateway, image, senders):
        for _ in range(CONTROLS):
            copy = _cut(gateway, image, senders, moments)
            with disk.mounted(copy, image.with_name("seen")) as seen:
                assert _missing(seen / "data", senders) != []


def test_a_shutdown_of_the_file_system_loses_messages_when_fsync_does_nothing(tmp_path: Path) -> None:
    senders = _senders()
    with disk.directory() as directory:
        image, mount = directory / "image", directory / "mount"
        disk.make(image)
        with (
            disk.mounted(image, mount),
            Gateway(tmp_path, data=mount / "data", prefix=_eatmydata()) as gateway,
        ):
            _load(senders, gateway, _moments())
            disk.shut_down(mount)
            gateway.kill()
            for sender in senders:
                sender.lose()
        with disk.mounted(image, mount):
            assert _missing(mount / "data", senders) != []


def _moments() -> random.Random:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def _senders() -> list[Sender]:
    return [Sender("one", "power/one", 1, version=5), Sender("two", "power/two", 2, version=4)]


def _eatmydata() -> Sequence[str]:
    assert shutil.which("eatmydata"), "the negative control needs eatmydata: apt-get install eatmydata"
    return ("eatmydata",)


@contextmanager
def _loaded_gateway(tmp_path: Path, prefix: Sequence[str] = ()) -> Iterator[tuple[Gateway, Path, list[Sender]]]:
    """A gateway on a disk image, with a sleeping session that wants everything, and connected senders."""
    senders = _senders()
    with disk.directory() as directory:
        image, mount = directory / "image", directory / "mount"
        disk.make(image)
        with disk.mounted(image, mount), Gateway(tmp_path, data=mount / "data", prefix=prefix) as gateway:
            sleeper = MqttClient(gateway.port, "sleeper", clean=False)
            assert sleeper.subscribe(("power/#", 1)) == (1,)
            sleeper.disconnect()
            for sender in senders:
                sender.connect(gateway.port)
            yield gateway, image, senders


def _load(peers: Sequence[Sender | Receiver], gateway: Gateway, moments: random.Random) -> None:
    for peer in peers:
        peer.connect(gateway.port)
    run_for(peers, moments.uniform(0.02, 0.15))


def _cut(gateway: Gateway, image: Path, senders: Sequence[Sender], moments: random.Random) -> Path:
    """Load, stop at a random moment, copy the disk, note all that was acknowledged until then, go on."""
    copy = image.with_name("copy")
    run_for(senders, moments.uniform(0.005, 0.05))
    gateway.freeze()
    disk.snapshot(image, copy)
    for sender in senders:
        sender.listen()
    gateway.thaw()
    assert all(sender.acknowledged for sender in senders)
    return copy


def _missing(data: Path, senders: Sequence[Sender]) -> list[bytes]:
    """Acknowledged messages that are not in the log of this disk; the log itself must be sound."""
    path = data / "log.db"
    stored: set[bytes] = set()
    if path.exists():
        with closing(sqlite3.connect(path)) as log:
            assert log.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if log.execute("SELECT 1 FROM sqlite_schema WHERE name = 'entry'").fetchone():
                rows = log.execute("SELECT payload FROM entry WHERE kind = ?", (PUBLISH,))
                stored = {payload for (payload,) in rows}
    return sorted(_acknowledged(senders) - stored)


def _acknowledged(senders: Sequence[Sender]) -> set[bytes]:
    return {sender.payload(number) for sender in senders for number in sender.acknowledged}


def _check_restart(directory: Path, data: Path, senders: Sequence[Sender]) -> None:
    """A gateway starts on this disk, knows the sleeping session and delivers everything to it."""
    with Gateway(directory, data=data) as gateway:
        sleeper = MqttClient(gateway.port, "sleeper", clean=False)
        assert sleeper.connack.session_present
        wanted = {sender.payload(number) for sender in senders for number in sender.acknowledged}
        while wanted:
            packet = sleeper.expect(Kind.PUBLISH)
            wanted.discard(packet.payload)
            sleeper.answer(Kind.PUBACK, packet.packet_id)
