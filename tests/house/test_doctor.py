"""`tidegate doctor`: each finding is provoked for real where a test can, else judged from the kernel's files as they look."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from tidegate.gateway.access import password_line
from tidegate.gateway.doctor_machine import Mount, file_system, judge_clock, mount_of
from tidegate.store.clock import BUILT

from tests.faults import disk
from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.ports import free_port
from tests.support.waiting import wait_until

LISTENER = '[[listener]]\nbind = "127.0.0.1:{port}"\n'


class Findings(NamedTuple):
    """What it said, and how it ended."""

    code: int
    found: list[dict[str, str]]

    def about(self, check: str) -> list[tuple[str, str]]:
        """(level, text with advice) of each finding of this kind."""
        return [(one["level"], f"{one['text']} | {one['advice']}") for one in self.found if one["check"] == check]

    def one(self, check: str) -> tuple[str, str]:
        (only,) = self.about(check)
        return only


def doctor(directory: Path, data: Path | None = None, prefix: Sequence[str] = ()) -> Findings:
    command = [*prefix, sys.executable, "-m", "tidegate.gateway.cli", "doctor", "--json"]
    command += ["--config", str(directory / "gateway.toml"), "--data", str(data or directory / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.stderr == ""
    answer = Findings(done.returncode, json.loads(done.stdout)["findings"])
    for one in answer.found:
        assert one["level"] == "ok" or one["advice"], f"what to do about it? {one}"
    assert (answer.code == 1) == any(one["level"] == "problem" for one in answer.found)
    return answer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A configuration with a free port, and an empty data directory."""
    (tmp_path / "gateway.toml").write_text(LISTENER.format(port=free_port()))
    (tmp_path / "data").mkdir(mode=0o750)
    return tmp_path


# -- a gateway that runs ---------------------------------------------------------------------------------------------


def test_a_healthy_gateway(tmp_path: Path) -> None:
    port = free_port()
    with Gateway(tmp_path, toml=f'[http]\nbind = "127.0.0.1:{port}"\n') as gateway:
        wait_until(lambda: "http=http://" in gateway.log())
        found = doctor(tmp_path)
        assert found.one("gateway")[0] == "ok"
        assert found.one("listener") == ("ok", f"127.0.0.1:{gateway.port} takes connections | ")
        assert found.one("http") == ("ok", f"127.0.0.1:{port}/readyz says: ok | ")
        assert found.one("refused")[0] == "ok"
        assert re.search(r"UTC, (not )?trusted \(\w+ since", found.one("time")[1])
        level, text = found.one("network")
        assert level == "warning"
        assert "only this machine can connect" in text
        assert f"tidegate passwd -c {tmp_path / 'passwd'} USER" in text
        assert gateway.stop() == 0


def test_a_person_reads_it_as_lines(directory: Path) -> None:
    command = [sys.executable, "-m", "tidegate.gateway.cli", "doctor"]
    command += ["--config", str(directory / "gateway.toml"), "--data", str(directory / "data")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].split()[:5] == ["WARNING", "gateway", "no", "gateway", "is"]
    assert lines[1].startswith(" ")
    assert lines[-1].startswith("problems: 0, warnings: ")


def test_who_was_refused_and_what_to_do(tmp_path: Path) -> None:
    toml = '[access]\npassword_file = "passwd"\n'
    with Gateway(tmp_path, toml=toml, files={"passwd": password_line("barn", b"secret") + "\n"}) as gateway:
        for _ in range(2):
            MqttClient(gateway.port, "meter-3", username="barn", password=b"wrong", refused=True)
        with socket.create_connection(("127.0.0.1", gateway.port)) as sock:
            sock.sendall(b"\x16\x03\x01 a TLS client")
            assert sock.recv(100) == b""
        first, second = doctor(tmp_path).about("refused")
        assert first[1].startswith("somebody from 127.0.0.1, once: protocol error")
        assert "uses TLS" in first[1]
        assert second[1].startswith("client meter-3 user barn from 127.0.0.1, 2 times: ")
        assert "wrong password | correct its password, or set it again: tidegate passwd FILE USER" in second[1]


def test_a_gateway_that_does_not_know_its_new_configuration(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway:
        (tmp_path / "gateway.toml").write_text(LISTENER.format(port=gateway.port))
        assert doctor(tmp_path).about("restart") == []
        port = free_port()
        (tmp_path / "gateway.toml").write_text(LISTENER.format(port=port))
        assert doctor(tmp_path).one("restart") == (
            "warning",
            f"the running gateway listens on 127.0.0.1:{gateway.port}, the configuration says 127.0.0.1:{port}"
            " | systemctl restart tidegate, unless it was started with --listen",
        )


def test_to_what_devices_can_connect_is_said_of_the_gateway_that_runs(tmp_path: Path) -> None:
    toml = '[[listener]]\nbind = "0.0.0.0:1"\nallow_anonymous = true\n'
    with Gateway(tmp_path, toml=toml) as gateway:  # with --listen 127.0.0.1
        level, text = doctor(tmp_path).one("network")
        assert (level, text.partition(":")[0]) == ("warning", "only this machine can connect")
        assert gateway.stop() == 0
    assert doctor(tmp_path).one("network")[0] == "ok"


def test_a_gateway_that_hangs_is_a_problem(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway:
        wait_until(lambda: doctor(tmp_path).one("gateway")[0] == "ok")
        gateway.freeze()
        level, text = doctor(tmp_path).one("gateway")
        assert level == "problem"
        assert "does not answer" in text
        gateway.thaw()


@pytest.mark.parametrize(
    ("rule", "level", "word"),
    [
        ('{"topic": "#", "action": {"function": "on_message_publish"}, "pool": "pool1"}', "warning", "unreachable"),
        ('{"topic": "#", "action": {"function": "on_nothing"}, "pool": "pool1"}', "problem", "misconfigured"),
    ],
)
def test_far_ends(tmp_path: Path, rule: str, level: str, word: str) -> None:
    conf = f"backend.redis.pool1.server = 127.0.0.1:{free_port()}\nbackend.redis.hook.message.publish.1 = {rule}\n"
    toml = '[uplink]\nbackends = ["sqlite", "redis"]\n'
    with Gateway(tmp_path, toml=toml, files={"emqx_backend_redis.conf": conf}):
        wait_until(lambda: any(word in text for _, text in doctor(tmp_path).about("far end")))
        assert level in [found for found, text in doctor(tmp_path).about("far end") if word in text]


# -- configuration and ports -----------------------------------------------------------------------------------------


def test_a_port_that_another_program_has(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (directory / "gateway.toml").write_text(LISTENER.format(port=port))
        level, text = doctor(directory).one("listener")
        assert level == "problem"
        assert text.startswith(f"127.0.0.1:{port} is used by another program | find who has it: ss -ltnp")
    assert doctor(directory).one("listener")[0] == "ok"


def test_what_would_keep_a_gateway_from_its_work_though_none_runs(directory: Path) -> None:
    with Gateway(directory) as gateway:
        assert gateway.stop() == 0
    assert doctor(directory, gateway.data).about("log") == []
    gateway.data.joinpath("log.db").write_bytes(b"SQLite format 3\0" + bytes(5000))
    with (directory / "gateway.toml").open("a") as toml:
        toml.write('[uplink]\nbackends = ["redis"]\n')
    (directory / "emqx_backend_redis.conf").write_text("backend.redis.pool1.sever = 127.0.0.1:6379\n")
    found = doctor(directory, gateway.data)
    assert found.one("log")[0] == "problem" and "tidegate salvage" in found.one("log")[1]
    assert found.one("rules")[0] == "problem" and 'emqx_backend_redis.conf:1: unknown key "sever"' in found.one("rules")[1]


def test_mistakes_of_the_configuration_are_problems(directory: Path) -> None:
    (directory / "gateway.toml").write_text("[store]\ndurability = 'ful'\n[htp]\n")
    found = doctor(directory)
    assert [level for level, _ in found.about("configuration")] == ["problem", "problem"]
    assert found.about("sqlite"), "the rest that can be looked at is"


def test_devices_in_the_network_can_connect(directory: Path) -> None:
    port = free_port()
    (directory / "passwd").write_text("")
    (directory / "passwd").chmod(0o640)
    bind = LISTENER.format(port=port).replace("127.0.0.1", "0.0.0.0")
    (directory / "gateway.toml").write_text(f'{bind}[access]\npassword_file = "passwd"\n')
    level, text = doctor(directory).one("network")
    assert level == "ok"
    assert f":{port}, if no firewall" in text
    (directory / "gateway.toml").write_text(bind)
    found = doctor(directory)
    assert found.one("network")[0] == "warning"
    assert "there is no password file" in found.one("access")[1]


# -- secrets and rights ----------------------------------------------------------------------------------------------


def test_secrets_that_others_can_read(directory: Path) -> None:
    with (directory / "gateway.toml").open("a") as file:
        file.write('[access]\npassword_file = "passwd"\n')
    (directory / "emqx_backend_redis.conf").write_text("backend.redis.pool1.password_file = redis.password\n")
    (directory / "passwd").write_text("")
    (directory / "passwd").chmod(0o644)
    passwd, redis = doctor(directory).about("secrets")
    assert passwd == (
        "problem",
        f"everybody on this machine can read {directory / 'passwd'} | chmod 640 {directory / 'passwd'}"
        " (and chgrp tidegate, if the service runs as that user)",
    )
    assert redis[1].startswith(f"{directory / 'redis.password'}: No such file or directory")
    (directory / "passwd").chmod(0o640)
    (directory / "redis.password").touch(0o600)
    assert [level for level, _ in doctor(directory).about("secrets")] == ["ok", "ok"]


def test_a_password_in_a_backend_file_that_others_can_read(directory: Path) -> None:
    conf = directory / "emqx_backend_redis.conf"
    conf.write_text("backend.redis.pool1.password = secret\n")
    conf.chmod(0o644)
    level, text = doctor(directory).one("secrets")
    assert level == "problem"
    assert "secret" not in text.replace("secrets", "")


def test_messages_that_others_can_read(directory: Path) -> None:
    (directory / "data" / "log.db").touch(0o644)
    assert doctor(directory).one("rights")[0] == "ok", "nobody gets into the directory"
    (directory / "data").chmod(0o755)
    assert doctor(directory).one("rights") == (
        "warning",
        f"everybody on this machine can read the messages in {directory / 'data'} | chmod o-rwx {directory / 'data'}",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_files_of_another_user(directory: Path) -> None:
    """As after `sudo tidegate run` by hand, and then the service."""
    data = directory / "data"
    os.chown(data, 54_321, 54_321)
    (data / "log.db").touch()
    level, text = doctor(directory).one("rights")
    assert level == "problem"
    assert "belongs to another user than log.db in it" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_a_user_without_rights_is_told_so_and_nothing_is_called_a_problem(tmp_path: Path) -> None:
    """Root without the right to pass over rights is a user like others."""
    with Gateway(tmp_path, toml=LISTENER.format(port=free_port())) as gateway:
        wait_until((gateway.data / "control.sock").exists)
        for path in (gateway.data, *gateway.data.iterdir()):
            os.chown(path, 54_321, 54_321)
        gateway.data.chmod(0o700)
        without_rights = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
        found = doctor(tmp_path, prefix=without_rights)
        assert found.code == 0
        level, text = found.one("gateway")
        assert level == "warning"
        assert "no right to use" in text
        assert "could not look" in found.one("doctor")[1]
        assert found.about("listener") == [], "whose port it is cannot be told"
        gateway.data.chmod(0o755)
        assert "not timed" in doctor(tmp_path, prefix=without_rights).one("sync")[1]


# -- disk ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory that is gone with the power."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def test_data_in_memory_is_a_problem(directory: Path, in_memory: Path) -> None:
    level, text = doctor(directory, in_memory).one("disk")
    assert level == "problem"
    assert "gone with the power" in text


def test_a_sync_that_reaches_no_disk_is_told(directory: Path) -> None:
    assert shutil.which("eatmydata"), "this needs eatmydata: apt-get install eatmydata"
    level, text = doctor(directory, prefix=["eatmydata"]).one("sync")
    assert level == "warning"
    assert "it reaches no disk" in text
    assert "it reaches no disk" not in doctor(directory).one("sync")[1]
    assert list((directory / "data").iterdir()) == [], "what was written is gone"


def test_more_budget_than_room(directory: Path) -> None:
    with (directory / "gateway.toml").open("a") as file:
        file.write('[store]\ndisk_budget = "1000TiB"\n')
    level, text = doctor(directory).one("room")
    assert level == "warning"
    assert "set store.disk_budget =" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root (to mount it)")
@pytest.mark.parametrize(("options", "word"), [("size=4m", "as good as full"), ("ro", "read-only")])
def test_a_disk_without_room(directory: Path, options: str, word: str) -> None:
    data = directory / "data"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(data)], check=True)
    try:
        found = doctor(directory)
    finally:
        subprocess.run(["umount", str(data)], check=True)
    assert found.one("room")[0] == "problem"
    assert word in found.one("room")[1]


def sysfs_with(tmp_path: Path, place: Path, name: str, partition: str, card: str = "") -> tuple[Path, Path]:
    """(mountinfo, /sys) of a machine where `place` is on this partition."""
    number = f"{os.major(place.stat().st_dev)}:{os.minor(place.stat().st_dev)}"
    mountinfo, sysfs = tmp_path / "mountinfo", tmp_path / "sys"
    mountinfo.write_text(f"22 1 {number} / / rw,noatime shared:1 - ext4 /dev/root rw\n")
    (sysfs / "block" / name / partition).mkdir(parents=True)
    (sysfs / "block" / name / "device").mkdir()
    if card:
        (sysfs / "block" / name / "device" / "type").write_text(f"{card}\n")
    (sysfs / "dev" / "block").mkdir(parents=True)
    (sysfs / "dev" / "block" / number).symlink_to(sysfs / "block" / name / partition)
    return mountinfo, sysfs


@pytest.mark.parametrize(
    ("name", "partition", "card", "mount"),
    [
        ("mmcblk0", "mmcblk0p2", "SD", Mount("ext4", "mmcblk0", True)),
        ("mmcblk0", "mmcblk0p2", "MMC", Mount("ext4", "mmcblk0", False)),
        ("nvme0n1", "nvme0n1p1", "", Mount("ext4", "nvme0n1", False)),
    ],
    ids=["SD card", "eMMC", "NVMe"],
)
def test_what_the_disk_is(tmp_path: Path, name: str, partition: str, card: str, mount: Mount) -> None:
    assert mount_of(tmp_path, *sysfs_with(tmp_path, tmp_path, name, partition, card)) == mount


def test_a_file_system_with_device_numbers_of_its_own(tmp_path: Path) -> None:
    """As btrfs has them: the mount that the path lies in tells, the innermost of them."""
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(
        f"1 0 250:1 / / rw - ext4 /dev/sda1 rw\n2 1 250:2 / {tmp_path} rw - btrfs /dev/mmcblk1p3 rw\n"
        "3 1 250:3 / /proc rw - proc proc rw\n"
    )
    assert mount_of(tmp_path, mountinfo, tmp_path / "sys") == Mount("btrfs", "mmcblk1", True)


@pytest.mark.skipif(bool(disk.reason()), reason=disk.reason())
@pytest.mark.parametrize(("options", "has_journal"), [((), True), (("-O", "^has_journal"), False)])
def test_an_ext4_without_journal(options: tuple[str, ...], has_journal: bool) -> None:
    with disk.directory() as directory:
        disk.make(directory / "image", *options)
        with disk.mounted(directory / "image", directory / "mount") as at:
            mount = mount_of(at)
    assert (mount.kind, mount.has_journal) == ("ext4", has_journal)


def test_a_root_whose_mount_cannot_be_seen(tmp_path: Path) -> None:
    """As in a chroot."""
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("3 1 250:3 / /proc rw - proc proc rw\n")
    mount = mount_of(tmp_path, mountinfo, tmp_path / "sys")
    assert mount == Mount("", "", False)
    assert "cannot be seen from here" in file_system(tmp_path, mount, 0.0).text


@pytest.mark.parametrize(
    ("mount", "delay", "level"),
    [
        (Mount("ext4", "sda1", False), 0.0, "ok"),
        (Mount("ext4", "mmcblk0", True), 0.0, "warning"),
        (Mount("ext4", "mmcblk0", True), 0.02, "ok"),
        (Mount("ext4", "mmcblk0", True, False), 0.02, "warning"),
        (Mount("overlay", "", False), 0.0, "warning"),
        (Mount("vfat", "sda1", False), 0.0, "warning"),
        (Mount("nfs4", "", False), 0.0, "problem"),
        (Mount("tmpfs", "", False), 0.0, "problem"),
    ],
    ids=lambda value: value.kind if isinstance(value, Mount) else None,
)
def test_what_is_said_of_a_file_system(mount: Mount, delay: float, level: str) -> None:
    finding = file_system(Path("/var/lib/tidegate"), mount, delay)
    assert finding.level == level
    assert bool(finding.advice) == (level != "ok")


# -- clock and SQLite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "synchronised", "rtc", "level", "word"),
    [
        (BUILT / 1000 + 1, True, True, "ok", "synchronised"),
        (BUILT / 1000 + 1, True, False, "ok", "no clock chip"),
        (BUILT / 1000 + 1, False, True, "warning", "not synchronised"),
        (12.0, False, False, "problem", "never set"),
    ],
)
def test_the_clock(now: float, synchronised: bool, rtc: bool, level: str, word: str) -> None:
    finding = judge_clock(now, synchronised, rtc, "2026-01-31 12:00:00 UTC")
    assert finding.level == level
    assert word in finding.text


def test_clock_and_sqlite_are_looked_at(directory: Path) -> None:
    found = doctor(directory)
    assert "UTC" in found.one("clock")[1]
    assert found.one("sqlite")[1].startswith("SQLite 3.")
