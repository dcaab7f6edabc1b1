"""The small parts of the house: control socket, systemd's notifications, the unit, and the status as people read it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway import notify
from tidegate.gateway.control import NotRunning, ask, serve
from tidegate.gateway.service import ServiceError, check_reach, check_shown, make_conf, unit_file, write_unit
from tidegate.gateway.status import duration, render, size

SHIPPED = Path(__file__).resolve().parents[2] / "conf"

# -- the control socket ----------------------------------------------------------------------------------------------


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if request.get("command") == "fail":
        raise RuntimeError("no luck")
    return {"asked": request}


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Path]:
    """A control socket that is served by a loop in a thread."""
    path = tmp_path / "control.sock"
    path.write_text("left by a gateway that was killed")
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        server = await serve(path, _answer)
        ready.set()
        try:
            await asyncio.Event().wait()
        finally:
            server.close()

    task = loop.create_task(main())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])), name="control")
    thread.start()
    assert ready.wait(10)
    yield path
    loop.call_soon_threadsafe(task.cancel)
    thread.join()
    loop.close()


def test_half_a_request_holds_no_descriptor_for_ever(tmp_path: Path) -> None:
    async def main() -> bytes:
        path = tmp_path / "control.sock"
        async with await serve(path, _answer, patience=0.05):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b'{"command"')
            said = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return said

    assert asyncio.run(main()) == b""


def test_one_line_in_one_line_out(control: Path) -> None:
    assert ask(control, {"command": "status"}) == {"asked": {"command": "status"}}
    assert control.stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize("line", [b"{\n", b"[1]\n", b"\xff\n", b"7\n", b"[" * 50_000 + b"\n"])
def test_what_is_no_request_is_answered_with_an_error(control: Path, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(control))
        sock.sendall(line)
        assert b'"error"' in sock.recv(4096)
    assert ask(control, {}) == {"asked": {}}, "the gateway goes on"


def test_a_line_without_end_is_bounded(control: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(control))
        try:
            for _ in range(64):
                sock.sendall(b"x" * 65_536)
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert answer == b""
    assert ask(control, {}) == {"asked": {}}


def test_a_fault_of_the_handler_is_told_to_who_asked(control: Path) -> None:
    with pytest.raises(NotRunning, match="answers: RuntimeError: no luck"):
        ask(control, {"command": "fail"})
    assert ask(control, {}) == {"asked": {}}


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="no gateway is running on"):
        ask(tmp_path / "control.sock", {})
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    with pytest.raises(NotRunning, match="no gateway is running on"):
        ask(tmp_path / "control.sock", {})


def test_somebody_who_does_not_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(tmp_path / "control.sock"))
        frozen.listen()
        with pytest.raises(NotRunning, match="does not answer: timed out"):
            ask(tmp_path / "control.sock", {}, timeout=0.05)


# -- systemd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@tidegate-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify.ready()
        assert systemd.recv(4096) == f"READY=1\nMAINPID={os.getpid()}".encode()
        notify.watchdog()
        assert systemd.recv(4096) == b"WATCHDOG=1"
        notify.stopping()
        assert systemd.recv(4096) == b"STOPPING=1"


def test_without_systemd_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify.ready()
    assert list(tmp_path.iterdir()) == []


def test_the_unit_says_what_the_gateway_keeps() -> None:
    unit = unit_file(Path("/opt/tidegate/bin/tidegate"))
    lines = unit.splitlines()
    for line in (
        "Type=notify",
        "User=tidegate",
        "StateDirectory=tidegate",
        "WatchdogSec=60",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ExecStart=/opt/tidegate/bin/tidegate run --config /etc/tidegate/gateway.toml",
    ):
        assert line in lines
    assert 'ExecStart="/opt/my %%d/tidegate" run' in unit_file(Path("/opt/my %d/tidegate"))


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """It knows every line. The user does not exist yet, so root stands in."""
    unit = unit_file(Path("/bin/true")).replace("User=tidegate", "User=root").replace("Group=tidegate", "Group=root")
    (tmp_path / "tidegate.service").write_text(unit)
    command = ["systemd-analyze", "verify", str(tmp_path / "tidegate.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "tidegate.service" in line] == []


def test_a_program_that_the_service_cannot_reach_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    program = home / "bin" / "tidegate"
    with pytest.raises(ServiceError, match="there is no"):
        check_reach(program)
    program.touch()
    home.chmod(0o700)
    with pytest.raises(ServiceError, match=r"could not look into .*; install it where everybody may read: .*/opt/tidegate"):
        check_reach(program)


def test_an_interpreter_behind_a_link_that_the_service_cannot_follow_is_refused() -> None:
    """As with pyenv or uv of root: the environment is open, its interpreter is a link into a home that is not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        closed, through, program = place / "closed", place / "through", place / "open" / "python"
        for folder in (closed, through, program.parent):
            folder.mkdir()
        (place / "real").touch()
        (closed / "link").symlink_to("../real")
        (through / "link").symlink_to(closed / "link")
        program.symlink_to("../through/link")
        check_reach(program)
        closed.chmod(0o700)
        with pytest.raises(ServiceError, match=f"could not look into {closed} on the way to {program}; install it where"):
            check_reach(program)


@pytest.mark.parametrize("place", ["/home/anna/tidegate/.venv", "/root/.venv", "/tmp/clone/.venv"])
def test_a_program_where_the_unit_lets_the_service_see_nothing_is_refused(place: str) -> None:
    top = "/" + place.split("/")[1]
    with pytest.raises(ServiceError, match=rf"{place}/bin/tidegate lies below {top}, .*; install it where .*/opt/tidegate"):
        check_shown(Path("/opt/tidegate/bin/python"), Path(place, "bin", "tidegate"))


def test_a_unit_that_says_something_else_is_kept(tmp_path: Path) -> None:
    unit = tmp_path / "tidegate.service"
    assert list(write_unit(unit, "new\n")) == list(write_unit(unit, "new\n")) == [f"wrote {unit}"]
    for name, mine in (("tidegate.service.old", "mine\n"), ("tidegate.service.old1", "mine again\n")):
        unit.write_text(mine)
        assert str(tmp_path / name) in next(kept := write_unit(unit, "new\n"))
        assert list(kept) == [f"wrote {unit}"]
        assert ((tmp_path / name).read_text(), unit.read_text()) == (mine, "new\n")


def test_the_configuration_is_laid_out_once(tmp_path: Path) -> None:
    folder = tmp_path / "etc"
    told = list(make_conf(folder, os.getgid()))
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in SHIPPED.iterdir() if path.suffix in (".toml", ".conf")
    }
    assert len(told) == len(list(folder.iterdir()))
    assert folder.stat().st_mode & 0o777 == 0o750
    (folder / "gateway.toml").write_text("# mine\n")
    assert list(make_conf(folder, os.getgid())) == []
    assert (folder / "gateway.toml").read_text() == "# mine\n"


# -- status ----------------------------------------------------------------------------------------------------------

STATUS: dict[str, Any] = {
    "version": "1.2.3", "name": "barn-7", "gateway": "5c0f", "epoch": 2, "uptime": 7300.0, "listeners": ["127.0.0.1:1883"],
    "http": "off",
    "clients": {"connected": 3, "sessions": 4, "subscriptions": 5, "refused": {"not_authorized": 6},
                "protocol_errors": 2},
    "messages": {"received": 100, "sent": 50, "stored": 90, "refused": 0},
    "store": {"state": "ok", "durability": "full", "bytes": 1 << 20, "bytes_written": 3 << 19, "commits": 7,
              "disk_budget": 1 << 30},
    "clock": {"trusted": False, "state": "plausible", "why": "nothing confirms it", "since": 1764000000.1, "time": 1764000060},
    "backends": ["sqlite", "redis"],
    "pools": [{"name": "redis.pool1", "state": "unreachable", "error": "Connection refused", "hint": "start it",
               "warning": "", "waiting": 42, "oldest_age": 90.0, "rate": 10.0, "drain": 4.2, "delivered": 48, "refused": 1}],
    "dropped": {"disk_budget": 9},
    "log": {"dropped": 7},
}  # fmt: skip


def test_the_status_shows_everything_with_its_unit() -> None:
    assert render(STATUS).splitlines() == [
        "barn-7  tidegate 1.2.3  up 2 h  gateway 5c0f epoch 2",
        "listening   127.0.0.1:1883; http off",
        "clients     3 connected, 4 sessions, 5 subscriptions",
        "messages    100 received, 90 entries stored, 50 sent",
        "store       ok, durability full, 1 MiB of 1 GiB, 1.5 MiB written in 7 commits",
        "clock       2025-11-24 16:01:00 UTC, not trusted (plausible since 2025-11-24 16:00:00): nothing confirms it",
        "pool        redis.pool1: unreachable, 42 waiting (oldest 90 s), drained in 4.2 s, 48 delivered, 1 refused",
        "            Connection refused",
        "            start it",
        "dropped     9 disk_budget",
        "refused     6 not_authorized, 2 protocol_errors",
        "log         7 lines dropped: nobody reads standard error, or too slowly",
    ]


def test_who_lost_something_is_named_with_the_whole_sheet() -> None:
    sheet = {"wanted": 20, "delivered": 9, "waiting": 4, "parked": 2, "cancelled": 0, "expired": 0, "mismatch": 1,
             "dropped": {"disk_budget": 3, "damaged": 1}}  # fmt: skip
    pool = STATUS["pools"][0] | {"balance": sheet}
    session = {"client": "a\x1b", "wanted": 5, "delivered": 4, "in_flight": 0, "waiting": 0, "expired": 0, "mismatch": 0,
               "unread_entries": 3, "dropped": {"max_waiting_age": 1}}  # fmt: skip
    store = STATUS["store"] | {"refusing_below": 2}
    lines = render(STATUS | {"pools": [pool], "sessions": {"most": [session]}, "store": store}).splitlines()
    explained = "20 wanted: 9 delivered, 4 waiting, 2 parked, 1 dropped (damaged), 3 dropped (disk_budget); 1 UNEXPLAINED"
    assert f"            {explained}" in lines
    lost = "5 wanted: 4 delivered, 1 dropped (max_waiting_age); 3 entries of the log not looked at for it"
    assert f"session     a\ufffd: {lost}" in lines
    assert "refusing    publishes below priority 2 with reject_new: 0 so far" in lines


@pytest.mark.parametrize(
    ("backends", "line"),
    [(["sqlite"], "pools       none: no remote backend is configured"), (["sqlite", "redis"], "pools       starting: redis")],
)
def test_the_status_without_pools(backends: list[str], line: str) -> None:
    assert line in render(STATUS | {"pools": [], "backends": backends}).splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (12, "12 s"), (119, "119 s"), (180, "3 min"), (19_000, "5.3 h"), (1e6, "11.6 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5 TiB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
