"""The lane in the real uplink process: killed at any moment, every question is answered."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from tidegate.store.inbox import Answer, read

from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from .lane_rig import LOOKUP, Devices, subscriptions


def answers(data: Path) -> list[Answer]:
    if not (data / "uplink.db").exists():
        return []
    with closing(sqlite3.connect(f"file:{data}/uplink.db?mode=ro", uri=True)) as db:
        try:
            return read(db, 0, 100_000)
        except sqlite3.OperationalError:
            return []


def test_every_client_is_answered_although_the_process_is_killed_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with RedisServer(tmp_path) as server, closing(Devices(tmp_path / "data")) as log:
        text = f"backend.redis.pool1.server = 127.0.0.1:{server.port}\n{LOOKUP}"
        (tmp_path / "emqx_backend_redis.conf").write_text(text)
        command = [sys.executable, "-m", "tidegate.uplink.child", "--data", str(tmp_path / "data"), "--conf", str(tmp_path)]
        with server.client() as far:
            for number in range(6):
                far.hset(f"mqtt:sub:c{number}", f"t/{number}", 1)
        for number in range(6):
            before = len(answers(tmp_path / "data"))
            with subprocess.Popen(
                [*command, "--backend", "redis"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as child:
                log.arrive(f"c{number}")
                assert child.stdin
                child.stdin.write(b"\n")
                child.stdin.flush()
                wait_until(lambda before=before: len(answers(tmp_path / "data")) > before)  # type: ignore[misc]
                assert child.stdout
                assert child.stdout.read(1) == b"\n"
                child.kill()
        found = [subscriptions(answer) for answer in answers(tmp_path / "data")]
        assert {client: rows for client, rows in found} == {f"c{number}": {f"t/{number}": 1} for number in range(6)}
