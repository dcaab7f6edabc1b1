"""`tidegate export`: what the views and a SELECT answer, as JSON lines and CSV, beside a gateway that goes on working."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.cli import VIEWS as OFFERED
from tidegate.store import export
from tidegate.store.entry import GAP
from tidegate.store.export import VIEWS, export_select, export_view
from tidegate.store.schema import StoreError

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.uplink.logfile import START, LogFile

DAY = 86_400_000


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LogFile]:
    log = LogFile(tmp_path)
    yield log
    log.close()


def exported(log: LogFile, view: str, since: str = "") -> list[dict[str, Any]]:
    out = io.StringIO()
    export_view(log.path, view, since, False, out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def tidegate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tidegate.gateway.cli", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)


# -- what is read ----------------------------------------------------------------------------------------------------


def test_the_command_offers_every_view() -> None:
    assert tuple(VIEWS) == OFFERED


def test_a_view_is_what_sqlite_says_in_order_of_id(log: LogFile) -> None:
    log.publish_many(3000)
    log.append(GAP, None, None, 0, b"{}")
    log.publish("last", b"\xff\x00")
    found = exported(log, "mqtt_msg")
    with closing(sqlite3.connect(log.path)) as db:
        assert [row["id"] for row in found] == [row for (row,) in db.execute("SELECT id FROM mqtt_msg ORDER BY id")]
    assert [row["payload"] for row in found[:-1]] == [entry.payload.decode() for entry in log.entries()[:3000]]
    assert found[-1] == {
        "id": 3002, "msgid": log.entries()[-1].msgid, "topic": "last", "sender": "c1", "node": "barn", "qos": 1, "retain": 0,
        "payload": {"$base64": True, "encoded": "/wA="}, "arrived": "2023-11-14 22:13:23",
    }  # fmt: skip


def test_since_is_a_time_of_the_view(log: LogFile) -> None:
    for day in range(3):
        log.publish("t", b"%d" % day, at=START + day * DAY)
    assert [row["payload"] for row in exported(log, "mqtt_msg", "2023-11-15 22:13:20")] == ["1", "2"]


def test_an_empty_log_is_no_rows(log: LogFile) -> None:
    assert [exported(log, view) for view in VIEWS] == [[]] * len(VIEWS)


def test_a_select_is_gathered_before_it_is_printed(log: LogFile) -> None:
    """Whoever reads slowly holds no transaction: all that was printed was read before."""
    log.publish_many(20_000)

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            with closing(sqlite3.connect(log.path, timeout=0)) as other:
                busy, *_ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            assert not busy
            return super().write(text)

    out = Slow()
    export_select(log.path, "SELECT id FROM mqtt_msg", False, out)
    assert len(out.getvalue().splitlines()) == 20_000


def test_a_view_is_read_in_pieces_that_shrink_when_slow_and_none_is_open_while_it_is_printed(
    log: LogFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.publish_many(2000)
    clock = PieceClock(quick=6, slow=3)
    monkeypatch.setattr(export, "time", clock)
    out = Pieces(log.path, clock)
    export_view(log.path, "mqtt_msg", "", False, out)
    assert out.sizes[:10] == [8, 16, 32, 64, 128, 256, 512, 256, 128, 64]
    assert set(out.sizes[10:-1]) == {64}
    assert sum(out.sizes) == 2000


class PieceClock:
    """Stands for `time`: it is looked at before and after each piece, of which the first are quick, then some slow."""

    def __init__(self, quick: int, slow: int) -> None:
        self.pieces = 0
        self._now = 0.0
        self._took = [export.QUICK / 2] * quick + [export.SLOW * 2] * slow
        self._begun = False

    def monotonic(self) -> float:
        self._begun = not self._begun
        if not self._begun:
            usual = (export.QUICK + export.SLOW) / 2
            self._now += self._took[self.pieces] if self.pieces < len(self._took) else usual
            self.pieces += 1
        return self._now


class Pieces(io.StringIO):
    """Takes rows and sees at the first of each piece that nothing is held; `sizes` in rows."""

    def __init__(self, path: Path, clock: PieceClock) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._path = path
        self._clock = clock

    def write(self, text: str) -> int:
        if self._clock.pieces > len(self.sizes):
            self.sizes.append(0)
            with closing(sqlite3.connect(self._path, timeout=0)) as other:
                busy, *_ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            assert not busy
        self.sizes[-1] += 1
        return len(text)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("DELETE FROM entry", "attempt to write a readonly database"),
        ("DELETE FROM entry RETURNING seq", "attempt to write a readonly database"),
        ("COMMIT", "can only be used with SQL that returns rows"),
        ("SELECT paylod FROM mqtt_msg", "no such column: paylod"),
        ("SELECT 1; SELECT 2", "one statement at a time"),
    ],
)
def test_what_is_no_select_is_refused_and_changes_nothing(log: LogFile, sql: str, words: str) -> None:
    log.publish("t")
    with pytest.raises(StoreError, match=words):
        export_select(log.path, sql, False, io.StringIO())
    assert len(log.entries()) == 1


# -- the command -----------------------------------------------------------------------------------------------------


def test_beside_a_running_gateway_and_after_it_was_killed(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway:
        with MqttClient(gateway.port, "c1") as client:
            client.publish_and_wait("a/b", "Wärme, 21".encode())
            client.publish_and_wait("a/c", b"\xff", retain=True)
        for is_killed in (False, True):
            if is_killed:
                gateway.kill()
            done = tidegate("--data", gateway.data, "--csv", "mqtt_msg")
            rows = list(csv.DictReader(io.StringIO(done.stdout)))
            assert [(row["topic"], row["payload"]) for row in rows] == [("a/b", "Wärme, 21"), ("a/c", "base64:/w==")]
            done = tidegate("--data", gateway.data, "--sql", "SELECT topic, retain FROM mqtt_msg")
            assert done.stdout == '{"topic": "a/b", "retain": 0}\n{"topic": "a/c", "retain": 1}\n'
            (client_row,) = map(json.loads, tidegate("--data", gateway.data, "mqtt_client").stdout.splitlines())
            assert client_row["clientid"] == "c1"
            assert tidegate("--data", gateway.data, "--since", "2100-01-01", "mqtt_retain").stdout == ""
        gateway.start()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name a view (mqtt_client, "),
        (["mqtt_msg", "--sql", "SELECT 1"], 2, "name a view (mqtt_client, "),
        (["mqtt_mgs"], 2, "'mqtt_mgs' is not one of 'mqtt_client'"),
        (["--since", "2026-01-01", "--sql", "SELECT 1"], 2, "--since goes with a view"),
        (["--since", "yesterday", "mqtt_msg"], 2, "does not match the formats"),
        (["mqtt_msg"], 1, "there is no log in"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    done = tidegate("--data", tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"something else entirely\n" * 100)
    done = tidegate("--data", tmp_path, "mqtt_msg")
    assert (done.returncode, done.stdout) == (1, "")
    assert "log.db is not a database" in done.stderr
