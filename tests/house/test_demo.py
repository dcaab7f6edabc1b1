"""`tidegate demo` as a user starts it: the story is told with real figures, and every process it started is gone afterwards."""

from __future__ import annotations

import fcntl
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import paho.mqtt.publish
import pytest
from rich.console import Console
from tidegate.gateway.demo_remains import PREFIX, own_directory
from tidegate.gateway.demo_screen import Figures, LiveScreen

from tests.support.ports import free_port
from tests.support.waiting import wait_until

DEADLINE = 90.0


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "tidegate.gateway.cli", "demo", *options]


def without_redis(directory: Path) -> dict[str, str]:
    """An environment in which no redis-server is found."""
    (directory / "bin").mkdir()
    return os.environ | {"PATH": str(directory / "bin")}


def processes(mark: str) -> list[str]:
    """Command lines of the processes that name this text."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:
            continue
        if mark in line:
            found.append(line)
    return found


@pytest.mark.parametrize("far_end", ["redis-server", "fakeredis"])
def test_the_line_is_cut_and_nothing_is_missing(far_end: str, tmp_path: Path) -> None:
    environment = dict(os.environ) if far_end == "redis-server" else without_redis(tmp_path)
    if far_end == "redis-server":
        assert shutil.which("redis-server"), "apt-get install redis-server"
    port = str(free_port())
    done = subprocess.run(
        command("--seconds", "6", "--port", port), capture_output=True, text=True, env=environment, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search(rf"^far end +{far_end}", done.stdout, re.M), done.stdout
    assert f"listens on 127.0.0.1:{port}" in done.stdout
    while_cut = re.findall(
        r"line CUT +stored (\d+) +waiting (\d+) \(oldest [\d.]+ s\) +delivered (\d+) +missing 0 ", done.stdout
    )
    assert while_cut, done.stdout
    shown = re.findall(r"stored (\d+) .* delivered (\d+) ", done.stdout)
    assert [line for line in shown if int(line[1]) > int(line[0])] == [], "nothing arrives that was not stored"
    assert all(int(waiting) > 0 for _, waiting, _ in while_cut)
    verdict = re.search(
        r"verdict +(\d+) readings acknowledged, (\d+) read back from Redis, 0 missing, 0 twice, in order", done.stdout
    )
    assert verdict, done.stdout
    assert int(verdict[1]) == int(verdict[2]) >= int(while_cut[-1][0])
    directory = re.search(r"keeps its log in (\S+)/data", done.stdout)
    assert directory and not Path(directory[1]).exists()
    assert processes(directory[1]) == []


def test_the_gateway_stays_up_for_the_users_devices_until_control_c(tmp_path: Path) -> None:
    data = tmp_path / "d"
    screen = tmp_path / "screen"
    with screen.open("wb") as output:
        demo = subprocess.Popen(command("--seconds", "20", "--port", "0", "--data", str(data)), stdout=output, stderr=output)
    try:
        wait_until(lambda: "verdict" in screen.read_text() or demo.poll() is not None, DEADLINE, screen.read_text)
        listens = re.search(r"listens on 127\.0\.0\.1:(\d+)", screen.read_text())
        assert listens, screen.read_text()
        paho.mqtt.publish.single("kitchen/temperature", "21.5", qos=1, port=int(listens[1]))
        wait_until(lambda: "from your devices 1" in screen.read_text(), DEADLINE, screen.read_text)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(DEADLINE) == 0, screen.read_text()
    finally:
        demo.kill()
        demo.wait()
    assert (data / "log.db").exists()
    assert processes(str(data)) == []


def test_a_taken_port_is_named_and_another_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(command("--seconds", "3", "--port", str(port)), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"port {port} is taken by another program" in done.stdout
    assert f"listens on 127.0.0.1:{port}" not in done.stdout


@pytest.mark.parametrize(
    ("name", "holds"), [("log.db", "already holds a log (log.db)"), ("photo.jpg", "is not empty (photo.jpg)")]
)
def test_a_directory_that_holds_something_is_refused_in_one_sentence(name: str, holds: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    done = subprocess.run(command("--data", str(tmp_path)), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"tidegate: {tmp_path} {holds} and the demo begins with a new log: give --data a new directory\n"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("seconds", ["0", "-4"])
def test_a_demo_in_which_no_reading_was_acknowledged_claims_nothing(seconds: str) -> None:
    done = subprocess.run(command("--seconds", seconds, "--port", "0"), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "verdict   no reading was acknowledged, so nothing was shown" in done.stdout
    assert "nothing is missing" not in done.stdout


@pytest.mark.parametrize("far_end", ["redis-server", "fakeredis"])
def test_nothing_outlives_a_demo_that_is_killed(far_end: str, tmp_path: Path) -> None:
    environment = dict(os.environ) if far_end == "redis-server" else without_redis(tmp_path)
    (tmp_path / "tmp").mkdir()
    environment["TMPDIR"] = str(tmp_path / "tmp")
    screen = tmp_path / "screen"
    with screen.open("wb") as output:
        demo = subprocess.Popen(command("--port", "0"), stdout=output, stderr=output, env=environment)
    try:
        wait_until(lambda: "act 1" in screen.read_text(), DEADLINE, screen.read_text)
    finally:
        demo.kill()
        demo.wait()
    ports = [int(port) for port in re.findall(r"on 127\.0\.0\.1:(\d+),", screen.read_text())]
    assert len(ports) == 2, screen.read_text()
    wait_until(lambda: not any(map(listens, ports)))
    wait_until(lambda: processes(str(tmp_path / "tmp")) == [])
    (left,) = (tmp_path / "tmp").iterdir()
    os.utime(left, (0, 0))
    subprocess.run(command("--seconds", "-4", "--port", "0"), capture_output=True, env=environment, timeout=DEADLINE)
    assert list((tmp_path / "tmp").iterdir()) == []


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_only_the_directories_of_demos_that_are_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    for name in ("gone", "young", "held"):
        (tmp_path / f"{PREFIX}{name}" / "data").mkdir(parents=True)
    (tmp_path / f"{PREFIX}link").symlink_to("elsewhere")
    (tmp_path / f"{PREFIX}file").touch()
    for path in tmp_path.iterdir():
        if not path.name.endswith("young"):
            os.utime(path, (0, 0))
    holder = os.open(tmp_path / f"{PREFIX}held", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    before = {path.name for path in tmp_path.iterdir()}
    with own_directory() as own:
        os.utime(own, (0, 0))
        with own_directory():
            assert own.exists(), "a demo that runs is left alone by the next"
    os.close(holder)
    assert before - {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}gone"}


def test_a_demo_that_nobody_reads_ends_without_a_word() -> None:
    with subprocess.Popen(command("--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None and demo.stderr is not None
        directory = re.search(r"keeps its log in (\S+)/data", demo.stdout.readline())
        demo.stdout.close()
        assert demo.stderr.read() == ""
        assert demo.wait(DEADLINE) == 1
    assert directory and not Path(directory[1]).exists()
    assert processes(directory[1]) == []


def test_a_demo_whose_output_cannot_be_kept_says_so() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command("--port", "0"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (1, "tidegate: cannot write the output: No space left on device\n")


def test_on_a_terminal_nothing_said_or_shown_is_read_or_printed_as_markup() -> None:
    output = io.StringIO()
    screen = LiveScreen(Console(file=output, force_terminal=True, force_interactive=True, width=100, color_system=None))
    for up in (True, False):
        screen.show(Figures(1.0, up, 12, 3, 0.5, 9, 0 if up else 1, 2, "state [red]refused[/]"))
        screen.say("far end   [bold]as it is[/]")
    screen.close()
    shown = output.getvalue()
    assert "[green]" not in shown and "[yellow]" not in shown and "[bold red]" not in shown
    assert re.search(r"line to the far end +│ up +│ uplink: state \[red\]refused\[/\]", shown), shown
    assert re.search(r"missing +│ 1 ", shown), shown
    assert "far end   [bold]as it is[/]" in shown
