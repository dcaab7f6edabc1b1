"""Passwords: the file is mosquitto's, in both directions, and a mistake in it is never half in force."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tidegate.gateway.access import Access, PasswordFileError, lacking, password_line, read_passwords, set_user, user_fault
from tidegate.gateway.config import Listener

from tests.support.ports import free_port
from tests.support.rights import as_user, needs_root
from tests.support.waiting import wait_until

LOOPBACK, OUTSIDE = Listener("127.0.0.1", 1883, True), Listener("0.0.0.0", 1883, False)
PASSWORDS = ["secret", "pässwörd ☃", "a:b$c", " spaces ", "x" * 200]


def mosquitto_passwd(*arguments: str | Path) -> None:
    program = shutil.which("mosquitto_passwd")
    assert program, "mosquitto_passwd is not installed: apt-get install mosquitto"
    subprocess.run([program, *map(str, arguments)], check=True, capture_output=True)


def tidegate_passwd(*arguments: str | Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tidegate.gateway.cli", "passwd", *map(str, arguments)],
        input=typed, capture_output=True, text=True, check=False,
    )  # fmt: skip


# -- with mosquitto --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_file_of_mosquitto_passwd_lets_the_same_user_in(tmp_path: Path, password: str) -> None:
    mosquitto_passwd("-c", "-b", tmp_path / "passwd", "anna", password)
    access = Access(tmp_path / "passwd")
    assert access.authenticate("anna", password.encode(), OUTSIDE)
    assert not access.authenticate("anna", password.encode() + b"x", OUTSIDE)


def test_the_older_form_of_mosquitto_passwd_is_read_too(tmp_path: Path) -> None:
    mosquitto_passwd("-c", "-H", "sha512", "-b", tmp_path / "passwd", "anna", "secret")
    assert (tmp_path / "passwd").read_text().startswith("anna:$6$")
    access = Access(tmp_path / "passwd")
    assert access.authenticate("anna", b"secret", OUTSIDE)
    assert not access.authenticate("anna", b"Secret", OUTSIDE)


def test_mosquitto_lets_in_whom_we_wrote(tmp_path: Path) -> None:
    """The real broker, with our file."""
    port = free_port()
    set_user(tmp_path / "passwd", "anna", password_line("anna", b"secret"), create=True)
    (tmp_path / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {tmp_path}/passwd\nuser root\n"
    )
    with subprocess.Popen(
        [shutil.which("mosquitto") or "/usr/sbin/mosquitto", "-c", str(tmp_path / "mosquitto.conf")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as broker:  # fmt: skip
        try:
            wait_until(lambda: _listens(port))
            assert _publish(port, "secret") == 0
            assert _publish(port, "wrong") != 0
        finally:
            broker.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _publish(port: int, password: str) -> int:
    command = ["mosquitto_pub", "-p", str(port), "-u", "anna", "-P", password, "-t", "t", "-m", "m", "-q", "1"]
    return subprocess.run(command, check=False, capture_output=True).returncode


def test_mosquitto_passwd_changes_a_file_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    set_user(path, "anna", password_line("anna", b"old"), create=True)
    set_user(path, "bert", password_line("bert", b"his"), create=False)
    mosquitto_passwd("-b", path, "anna", "new")
    mosquitto_passwd("-D", path, "bert")
    access = Access(path)
    assert access.authenticate("anna", b"new", OUTSIDE)
    assert not access.authenticate("anna", b"old", OUTSIDE)
    assert not access.authenticate("bert", b"his", OUTSIDE)


# -- who is let in ---------------------------------------------------------------------------------------------------


@pytest.fixture
def access(tmp_path: Path) -> Access:
    set_user(tmp_path / "passwd", "anna", password_line("anna", b"secret"), create=True)
    return Access(tmp_path / "passwd")


@pytest.mark.parametrize(
    ("username", "password", "listener", "allowed"),
    [
        (None, None, LOOPBACK, True),
        (None, None, OUTSIDE, False),
        ("anna", b"secret", OUTSIDE, True),
        ("anna", b"secret", LOOPBACK, True),
        ("anna", b"", OUTSIDE, False),
        ("anna", None, OUTSIDE, False),
        ("anna", b"wrong", LOOPBACK, False),
        ("nobody", b"secret", LOOPBACK, False),
        ("", b"", LOOPBACK, False),
        ("anna", b"secret ", OUTSIDE, False),
    ],
)
def test_with_a_password_file(
    access: Access, username: str | None, password: bytes | None, listener: Listener, allowed: bool
) -> None:
    assert access.authenticate(username, password, listener) is allowed


def test_why_somebody_was_not_let_in(access: Access) -> None:
    names: tuple[str | None, ...] = (None, "bert", "anna")
    assert [access.why_not(name) for name in names] == ["no user name", "unknown user", "wrong password"]


@pytest.mark.parametrize(("listener", "allowed"), [(LOOPBACK, True), (OUTSIDE, False)])
def test_without_one_the_listener_decides(listener: Listener, allowed: bool) -> None:
    assert Access(None).authenticate(None, None, listener) is allowed
    assert Access(None).authenticate("anna", b"whatever", listener) is allowed


# -- the file --------------------------------------------------------------------------------------------------------


def test_all_bad_lines_are_told_and_the_old_users_stay(tmp_path: Path, access: Access) -> None:
    path = tmp_path / "passwd"
    good = path.read_text()
    path.write_text(good + "\n# a comment\nbert\nclara:plain\ndora:$7$0$AAAA$AAAA\nemil:$7$101$!!$AAAA\n:$6$AAAA$AAAA\n")
    with pytest.raises(PasswordFileError) as caught:
        access.reload()
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (4, 5, 6, 7, 8)]
    assert all(f"tidegate passwd {path} USER" in line for line in lines)
    assert access.authenticate("anna", b"secret", OUTSIDE)


def test_a_file_that_is_not_there_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(PasswordFileError, match=r"No such file or directory; make it with: tidegate passwd -c"):
        read_passwords(tmp_path / "passwd")


@needs_root
def test_a_file_that_must_not_be_read_is_not_to_be_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    set_user(path, "anna", password_line("anna", b"secret"), create=True)
    with as_user(65534), pytest.raises(PasswordFileError, match=rf"Permission denied; .*: chgrp nogroup {path} && chmod g\+r"):
        read_passwords(path)


def test_reload_takes_what_is_new(tmp_path: Path, access: Access) -> None:
    set_user(tmp_path / "passwd", "bert", password_line("bert", b"his"), create=False)
    assert not access.authenticate("bert", b"his", OUTSIDE)
    access.reload()
    assert access.authenticate("bert", b"his", OUTSIDE)
    assert access.authenticate("anna", b"secret", OUTSIDE)


def test_setting_a_user_keeps_comments_rights_and_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "passwd"
    real.write_text("# ours\n#anna:x\n" + password_line("anna", b"old") + "\n")
    real.chmod(0o640)
    link.symlink_to(real)
    assert set_user(link, "anna", password_line("anna", b"new"), create=False)
    assert real.read_text().startswith("# ours\n#anna:x\nanna:$7$")
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_new_file_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    set_user(path, "anna", password_line("anna", b"secret"), create=True)
    assert not path.stat().st_mode & 0o007
    assert path.stat().st_gid == path.parent.stat().st_gid or os.geteuid()


@pytest.mark.parametrize("user", ["", "a:b", "a\nb", "#a", "x" * 70_000])
def test_names_that_the_file_cannot_hold(user: str) -> None:
    assert user_fault(user)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_makes_changes_and_removes(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    assert tidegate_passwd("-c", path, "anna", typed="secret\n").returncode == 0
    assert tidegate_passwd("-b", path, "bert", "his").returncode == 0
    assert set(read_passwords(path)) == {"anna", "bert"}
    assert Access(path).authenticate("anna", b"secret", OUTSIDE)
    assert tidegate_passwd("-D", path, "anna").returncode == 0
    assert set(read_passwords(path)) == {"bert"}


def test_making_a_file_that_holds_others_is_refused_and_throws_nobody_away(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    assert tidegate_passwd("-c", "-b", path, "anna", "old").returncode == 0
    assert tidegate_passwd("-c", "-b", path, "anna", "new").returncode == 0, "nobody is lost"
    assert Access(path).authenticate("anna", b"new", OUTSIDE)
    done = tidegate_passwd("-c", "-b", path, "bert", "his")
    assert done.returncode == 1
    assert f"{path}: holds other users (anna): leave -c out to keep them, or delete the file first" in done.stderr
    assert set(read_passwords(path)) == {"anna"}


def test_what_is_lacking_before_anybody_can_log_in(tmp_path: Path) -> None:
    path, other = tmp_path / "passwd", tmp_path / "other"
    unset = 'set password_file = "passwd" under [access] in gateway.toml'
    assert lacking(None, tmp_path) == [f"`tidegate passwd -c {path} USER`", unset]
    other.write_text("")
    assert lacking(other, tmp_path) == [f"`tidegate passwd {other} USER`"]
    for file in (path, other):
        set_user(file, "anna", password_line("anna", b"secret"), create=True)
    assert (lacking(None, tmp_path), lacking(other, tmp_path)) == ([unset], [])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing", "anna"], 1, "No such file or directory; make it with -c"),
        (["-c", "missing/passwd", "anna"], 1, "missing; make it first"),
        (["-D", "missing", "anna"], 1, "No such file or directory"),
        (["-D", "there", "zoe"], 1, "there is no user 'zoe'"),
        (["-c", "there", "a:b"], 2, "holds no colon"),
        (["there", "anna", "secret"], 2, "goes with -b"),
        (["-b", "there", "anna"], 2, "goes with -b"),
        (["-b", "there", "anna", ""], 2, "an empty password is none"),
        (["-D", "-c", "there", "anna"], 2, "-D goes alone"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    (tmp_path / "there").write_text("")
    placed = [str(tmp_path / text) if text.startswith(("missing", "there")) else text for text in arguments]
    done = tidegate_passwd(*placed, typed="secret\n")
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "there").read_text() == ""
