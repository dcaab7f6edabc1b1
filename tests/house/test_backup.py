"""`tidegate backup`, `restore` and `salvage` as a person uses them, on real gateways under load."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

from tests.faults.traffic import Sender, run, run_for
from tests.house.test_cli import refused, tidegate
from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

QUICK = 2.0
"""Seconds that no acknowledgement may take while a backup is made."""


def stored(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as db:
        return {payload.decode() for (payload,) in db.execute("SELECT payload FROM entry WHERE kind = 6")}


def identity(data: Path) -> tuple[str, int, int]:
    """Gateway, epoch and the highest seq."""
    with closing(sqlite3.connect(data / "log.db")) as db:
        gateway, epoch = db.execute("SELECT gateway, epoch FROM run ORDER BY id DESC LIMIT 1").fetchone()
        (top,) = db.execute("SELECT max(seq) FROM entry").fetchone()
    return gateway, epoch, top


def fill(gateway: Gateway, megabytes: int) -> None:
    with MqttClient(gateway.port, "filler") as filler:
        for number in range(megabytes * 10):
            filler.publish_and_wait("fill", b"%d:" % number + b"x" * 100_000)


def begin_backup(gateway: Gateway, file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tidegate.gateway.cli", "backup", "--data", str(gateway.data), str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_backup_under_load_restored_elsewhere_has_all_that_was_acknowledged_before_it(tmp_path: Path) -> None:
    file = tmp_path / "backup.db"
    senders = [Sender(f"s{number}", f"load/{number}", 1 + number % 2) for number in range(4)]
    with Gateway(tmp_path / "first") as gateway:
        fill(gateway, 20)
        for sender in senders:
            sender.connect(gateway.port)
        run_for(senders, 0.3)
        acknowledged = {s.payload(number).decode() for s in senders for number in s.acknowledged}
        with begin_backup(gateway, file) as process:
            slowest = 0.0
            while process.poll() is None:
                before, began = sum(len(s.acknowledged) for s in senders), time.monotonic()
                run(senders, lambda before=before: sum(len(s.acknowledged) for s in senders) > before)  # type: ignore[misc]
                slowest = max(slowest, time.monotonic() - began)
            said, errors = process.communicate()
        assert (process.returncode, errors) == (0, ""), errors
        assert said.startswith(f"{file}: ") and said.endswith(" MB, checked\n")
        assert slowest < QUICK
        run_for(senders, 0.1)
        gateway.kill()
    backed_up = stored(file)
    assert acknowledged, "there was load"
    assert acknowledged <= backed_up
    assert [found.name for found in tmp_path.iterdir() if "backup" in found.name] == ["backup.db"]
    elsewhere = Gateway(tmp_path / "second")
    done = tidegate("restore", "--data", elsewhere.data, file)
    assert done.returncode == 0, done.stderr
    assert "begins a new epoch" in done.stdout
    gateway_id, epoch, top = identity(elsewhere.data)
    with elsewhere:
        with MqttClient(elsewhere.port, "after") as client:
            client.publish_and_wait("after", b"restored")
        elsewhere.stop()
    again = identity(elsewhere.data)
    assert again[0] == gateway_id
    assert again[1] > epoch
    assert again[2] > top
    assert stored(elsewhere.data / "log.db") == backed_up | {"restored"}


@pytest.mark.parametrize("victim", ["gateway", "command"])
def test_a_backup_that_is_killed_half_way_leaves_no_file(tmp_path: Path, victim: str) -> None:
    file = tmp_path / "backup.db"
    with Gateway(tmp_path / "gateway") as gateway:
        fill(gateway, 20)
        with begin_backup(gateway, file) as process:
            wait_until(lambda: file.with_name("backup.db.part").exists() or file.exists(), 20)
            gateway.freeze()
            caught = file.exists()
            if victim == "command":
                process.kill()
                gateway.thaw()
            else:
                gateway.kill()
            _, errors = process.communicate()
        if victim == "gateway":
            assert caught or not file.exists()
            assert caught or "tidegate: " in errors
            assert "Traceback" not in errors
            gateway.start()
        # whole or not there, and the next one is made
        wait_until(lambda: "being made" not in tidegate("backup", "--data", gateway.data, file).stderr, 30)
        assert tidegate("backup", "--data", gateway.data, file).returncode == 0
        assert gateway.stop() == 0
    assert len(stored(file)) == 200
    assert not file.with_name("backup.db.part").exists()


def test_a_gateway_stops_while_a_backup_is_made(tmp_path: Path) -> None:
    file = tmp_path / "backup.db"
    with Gateway(tmp_path / "gateway") as gateway:
        fill(gateway, 20)
        with begin_backup(gateway, file) as process:
            wait_until(lambda: file.with_name("backup.db.part").exists() or file.exists(), 20)
            assert gateway.stop() == 0
            _, errors = process.communicate()
    assert "Traceback" not in errors
    assert file.exists() or process.returncode != 0


def test_backup_of_a_stopped_gateway(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    with gateway:
        fill(gateway, 1)
        gateway.kill()
    done = tidegate("backup", "--data", gateway.data, tmp_path / "backup.db")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(stored(tmp_path / "backup.db")) == 10, "what was only in the write-ahead log too"


def test_backup_says_what_is_wrong(tmp_path: Path) -> None:
    refused(tidegate("backup", "--data", tmp_path / "none", tmp_path / "x"), 1, f"there is no log in {tmp_path}/none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "letter").write_text("dear Anna")
    with Gateway(tmp_path / "gateway") as gateway:
        for place, words in (
            (tmp_path / "letter", f"no backup was made: {tmp_path}/letter is there already and is not a backup"),
            (tmp_path / "nowhere" / "x", f"there is no directory {tmp_path}/nowhere"),
            (tmp_path / "nowhere" / "x", f"; the gateway's own user writes it, not you: name a file below {gateway.data}"),
            (Path("/proc/x"), "cannot write /proc/x.part: "),
            (gateway.data / "log.db", "belongs to the running log"),
        ):
            refused(tidegate("backup", "--data", gateway.data, place), 1, words)
        assert gateway.stop() == 0
    assert (tmp_path / "letter").read_text() == "dear Anna"


def test_restore_and_salvage_want_no_gateway_running(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway:
        assert tidegate("backup", "--data", gateway.data, tmp_path / "backup.db").returncode == 0
        refused(tidegate("restore", "--data", gateway.data, tmp_path / "backup.db"), 1, "another tidegate is running on")
        refused(tidegate("salvage", "--data", gateway.data), 1, "another tidegate is running on")
        assert gateway.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to work for another user")
def test_root_restores_for_the_user_of_the_gateway(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    with gateway:
        fill(gateway, 1)
        gateway.stop()
    assert tidegate("backup", "--data", gateway.data, tmp_path / "backup.db").returncode == 0
    os.chown(gateway.data, 12345, 12345)
    (gateway.data / "broker.lock").unlink()
    assert tidegate("restore", "--data", gateway.data, tmp_path / "backup.db").returncode == 0
    for name in ("log.db", "broker.lock"):
        found = (gateway.data / name).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (12345, 12345, 0o640)


def test_a_damaged_log_refuses_to_start_names_salvage_and_starts_after_it(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    with gateway:
        fill(gateway, 1)
        gateway.stop()
    before = identity(gateway.data)
    path = gateway.data / "log.db"
    content = path.read_bytes()
    path.write_bytes(bytes(100) + content[100 : len(content) // 2] + b"\xa5" * 8192 + content[len(content) // 2 + 8192 :])
    refused(
        subprocess.run(gateway.command(), capture_output=True, text=True, check=False, timeout=20),
        1, f"{path} is not a database", f"`tidegate salvage --data {gateway.data}`", "nothing was changed",
    )  # fmt: skip
    done = tidegate("salvage", "--data", gateway.data)
    assert (done.returncode, done.stderr) == (0, "")
    assert "are lost, with the numbers " in done.stdout
    assert f"kept as {path}.damaged-" in done.stdout
    with gateway:
        with MqttClient(gateway.port, "after") as client:
            client.publish_and_wait("after", b"salvaged")
        assert gateway.stop() == 0
    after = identity(gateway.data)
    assert after[0] == before[0]
    assert after[1] > before[1]
    assert after[2] > before[2]
    assert 8 <= len(stored(path)) - 1 < 10


@pytest.mark.parametrize("runs", [False, True])
def test_a_backup_of_a_damaged_log_names_the_log_and_salvage(tmp_path: Path, runs: bool) -> None:
    gateway = Gateway(tmp_path)
    with gateway:
        fill(gateway, 1)
        gateway.stop()
    path = gateway.data / "log.db"
    with closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'position'").fetchone()
    content = path.read_bytes()
    path.write_bytes(content[: (root - 1) * 4096] + b"\xa5" * 4096 + content[root * 4096 :])
    with gateway if runs else nullcontext():
        done = tidegate("backup", "--data", gateway.data, tmp_path / "backup.db")
    refused(done, 1, f"{path} is damaged", f"`tidegate salvage --data {gateway.data}`")
    assert "btree" not in done.stderr and ".part" not in done.stderr


def test_damage_that_shows_when_sessions_are_loaded_is_one_sentence_too(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    with gateway:
        MqttClient(gateway.port, "sleeper", clean=False).disconnect()
        gateway.stop()
    path = gateway.data / "log.db"
    with closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'session'").fetchone()
    content = path.read_bytes()
    path.write_bytes(content[: (root - 1) * 4096] + b"\xa5" * 4096 + content[root * 4096 :])
    done = subprocess.run(gateway.command(), capture_output=True, text=True, check=False, timeout=20)
    refused(done, 1, f"{path} is damaged", "`tidegate salvage --data")
    assert tidegate("salvage", "--data", gateway.data).returncode == 0
    with gateway:
        os.kill(gateway.pid, signal.SIGTERM)
