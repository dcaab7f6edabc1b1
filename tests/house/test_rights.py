"""What root can read and the gateway's user cannot is told before the gateway finds it out, by `check` and by `doctor`."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rights import needs_root, seen_by_others

pytestmark = needs_root

USER = pwd.getpwnam("nobody")
TOML = """\
[access]
password_file = "passwd"
[uplink]
backends = ["sqlite", "redis"]
"""
RULES = """\
backend.redis.pool1.server = 127.0.0.1:6379
backend.redis.pool1.password_file = redis.password
backend.redis.hook.message.publish.1 = {"topic": "#", "action": {"function": "on_message_publish"}, "pool": "pool1"}
"""
FILES = {
    "gateway.toml": TOML,
    "passwd": "",
    "emqx_backend_sqlite.conf": "",
    "emqx_backend_redis.conf": RULES,
    "redis.password": "x",
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A configuration as the service has it, and the data of the gateway's user, who is not root."""
    with seen_by_others() as place:
        (place / "data").mkdir(mode=0o750)
        os.chown(place / "data", USER.pw_uid, USER.pw_gid)
        for name, text in FILES.items():
            (place / name).write_text(text)
            (place / name).chmod(0o640)
            os.chown(place / name, 0, USER.pw_gid)
        yield place


def tidegate(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tidegate.gateway.cli", *arguments, "--data", str(place / "data")]
    command += ["--config", str(place / "gateway.toml")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def doctor(place: Path, check: str) -> list[tuple[str, str, str]]:
    found = json.loads(tidegate(place, "doctor", "--json").stdout)["findings"]
    return [(one["level"], one["text"], one["advice"]) for one in found if one["check"] == check]


def test_what_the_gateway_s_user_can_read_is_well(place: Path) -> None:
    assert tidegate(place, "check").returncode == 0
    assert [level for level, *_ in doctor(place, "rights")] == ["ok"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_only_root_can_read(place: Path, name: str) -> None:
    os.chown(place / name, 0, 0)
    text = f"{place / name}: nobody, as whom the gateway runs, cannot read it: it is root:root, mode 640"
    change = f"chgrp nogroup {place / name} && chmod g+r {place / name}"
    done = tidegate(place, "check")
    assert (done.returncode, done.stderr.splitlines()[-2:]) == (2, [f"mistake: {text}; {change}", "1 mistake"])
    assert ("problem", text, change) in doctor(place, "rights")


def test_a_directory_that_only_root_can_enter(place: Path) -> None:
    place.chmod(0o700)
    assert f"nobody may not look into {place}; chgrp nogroup {place} && chmod g+rx {place}" in tidegate(place, "check").stderr


def test_files_of_one_who_runs_a_gateway_as_root_are_root_s(place: Path) -> None:
    os.chown(place / "data", 0, 0)
    os.chown(place / "passwd", 0, 0)
    assert tidegate(place, "check").returncode == 0


def test_doctor_finds_in_the_password_file_what_check_finds(place: Path) -> None:
    (place / "passwd").write_text("anna:secret\n")
    ((level, text, _),) = doctor(place, "passwords")
    assert level == "problem" and f"{place}/passwd:1: is not USER:$7$" in text
    assert text in tidegate(place, "check").stderr
    (place / "gateway.toml").write_text(TOML + "nonsense = 1\n")
    assert doctor(place, "configuration") and doctor(place, "passwords")
