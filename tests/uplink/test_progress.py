"""Reading `uplink.db` from the broker's side, whatever state a killed child left it in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tidegate.store.entry import Want
from tidegate.uplink.progress import cursors, read_pools, read_rows, saved_wants

KILLED = """
import os, sys, pathlib
from tidegate.uplink.progress import Progress
from tidegate.uplink.rule import Want
Progress(pathlib.Path(sys.argv[1])).save_wants("redis", [Want(6, "#", 1, False)])
os.kill(os.getpid(), 9)
"""


def test_without_a_file_nothing_is_known(tmp_path: Path) -> None:
    assert (read_pools(tmp_path), cursors(tmp_path), saved_wants(tmp_path)) == ([], {}, {})


def test_a_file_that_is_just_being_moved_forward_is_read_the_next_time(tmp_path: Path) -> None:
    (tmp_path / "uplink.db").write_bytes((Path(__file__).parent / "uplink-v1.db").read_bytes())
    assert read_rows(tmp_path, "SELECT again FROM pool") == []
    assert len(read_rows(tmp_path, "SELECT cursor FROM pool")) == 1


@pytest.mark.parametrize("leave_index", [True, False], ids=["as it was left", "after a power cut, without the shared memory"])
def test_what_a_killed_child_wrote_can_be_read(tmp_path: Path, leave_index: bool) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -9
    assert (tmp_path / "uplink.db-wal").stat().st_size > 0
    if not leave_index:
        (tmp_path / "uplink.db-shm").unlink()
    assert saved_wants(tmp_path) == {"redis": [Want(6, "#", 1, False)]}
