"""`tidegate status --refused` and `--watch` against the real gateway."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tidegate.gateway.access import password_line
from tidegate.gateway.refusals import KEPT, TEXT_LIMIT, Refusals
from tidegate.gateway.status import render_refused

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

TOML = '[[listener]]\nbind = "127.0.0.1:1883"\n[access]\npassword_file = "passwd"\n'


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that knows the user `barn`; without a user name anybody on this machine may connect."""
    with Gateway(tmp_path, toml=TOML, files={"passwd": password_line("barn", b"secret") + "\n"}) as gateway:
        yield gateway


def command(gateway: Gateway, *options: str) -> list[str]:
    return [sys.executable, "-m", "tidegate.gateway.cli", "status", "--data", str(gateway.data), *options]


def told(gateway: Gateway, *options: str) -> str:
    return subprocess.run(command(gateway, *options), capture_output=True, text=True, check=True).stdout


# -- $SYS ------------------------------------------------------------------------------------------------------------


def test_every_sys_topic_is_one_that_the_documentation_names_and_counts_what_mosquitto_counts(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "mosquitto.md").read_text()
    (row,) = re.findall(r"^\| `\$SYS/broker/` \|.*$", page, re.MULTILINE)
    named = re.findall(r"`([^`]+)`", row.split("Not there:")[0])[1:]
    with Gateway(tmp_path, toml="[log]\nsys_interval = 1\n") as gateway, MqttClient(gateway.port, "looks on") as client:
        client.publish_and_wait("t", b"1")
        client.ping()
        client.subscribe(("$SYS/broker/#", 0))
        found: dict[str, bytes] = {}
        while found.get("$SYS/broker/publish/messages/received") != b"1" or len(found) < len(named):
            packet = client.expect(Kind.PUBLISH)
            found[packet.topic] = packet.payload
        assert set(found) == {f"$SYS/broker/{name}" for name in named}
        assert found["$SYS/broker/clients/connected"] == b"1"


# -- refused ---------------------------------------------------------------------------------------------------------


def test_who_was_refused_and_why(gateway: Gateway) -> None:
    assert told(gateway, "--refused") == "nobody was refused since the gateway started\n"
    refused = [
        MqttClient(gateway.port, "meter-3", version=5, username=name, password=password, refused=True)
        for name, password in (("barn", b"wrong"), ("shed", b"secret"))
    ]
    with MqttClient(gateway.port, "talker", username="barn", password=b"secret") as talker:
        talker.send(b"\xf0\x00")
        talker.expect_closed()
    answer = json.loads(told(gateway, "--refused", "--json"))
    wrong, unknown, fault = answer["refusals"]
    assert (wrong["client_id"], wrong["username"]) == ("meter-3", "barn")
    assert [one["reason"].partition("not_authorized: ")[2] for one in (wrong, unknown)] == [
        "wrong password", "unknown user",
    ]  # fmt: skip
    assert [one.connack.reason for one in refused] == [0x87, 0x87], "the network does not learn which"
    assert wrong["peer"].startswith("127.0.0.1:")
    assert (fault["client_id"], fault["username"]) == ("talker", "barn")
    assert fault["reason"].startswith("protocol error: ")
    assert answer["fell_out"] == 0
    lines = told(gateway, "--refused").splitlines()
    assert lines[0].split() == ["when", "from", "client", "id", "user", "name", "why"]
    assert [line.split()[3] for line in lines[1:]] == ["meter-3", "meter-3", "talker"]


def test_what_is_kept_is_bounded_whatever_is_sent() -> None:
    refusals = Refusals()
    for number in range(KEPT + 30):
        refusals.note(number, "10.0.0.1:1", f"{number}-" + "x" * 60_000, "y" * 60_000, "server_busy")
    answer = refusals.as_dict()
    assert [refusal["at"] for refusal in answer["refusals"]] == list(range(30, KEPT + 30))
    assert answer["fell_out"] == 30
    assert {len(refusal[key]) for refusal in answer["refusals"] for key in ("client_id", "username")} == {TEXT_LIMIT}
    assert "(30 earlier ones are not kept)" in render_refused(answer).splitlines()


def test_a_client_id_cannot_steer_the_terminal() -> None:
    refusals = Refusals()
    refusals.note(0, "10.0.0.1:1", "\x1b[2Jgone\x07\n", None, "server_busy")
    (_, line) = render_refused(refusals.as_dict()).splitlines()
    assert "�[2Jgone�� " in line
    assert line.isprintable()


# -- watch -----------------------------------------------------------------------------------------------------------


def test_the_status_comes_again_and_again_until_ctrl_c(gateway: Gateway) -> None:
    watch = [*command(gateway, "--watch", "--interval", "0.1")]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        blocks = [[process.stdout.readline().partition("  ")[0] for _ in range(10)] for _ in range(2)]
        assert blocks[0] == blocks[1]
        assert blocks[0][-1] == "\n", "an empty line between two"
        with MqttClient(gateway.port, "seen"):
            while "1 connected" not in process.stdout.readline():
                pass
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=10)
        assert (process.returncode, said) == (0, "")
        assert "Traceback" not in rest


def test_a_gateway_that_goes_and_comes_back_is_watched_on(gateway: Gateway) -> None:
    watch = [*command(gateway, "--watch", "--json", "--interval", "0.1")]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        answers = map(json.loads, process.stdout)
        first = next(answers)
        gateway.stop()
        wait_until(lambda: "no gateway is running" in next(answers).get("error", ""))
        gateway.start()
        wait_until(lambda: next(answers).get("gateway") == first["gateway"])
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_nobody_reads_any_more(gateway: Gateway) -> None:
    with subprocess.Popen(
        command(gateway, "--watch", "--interval", "0.1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(10) == 1
        assert "Traceback" not in process.stderr.read()


def test_on_a_terminal_it_is_shown_in_place(gateway: Gateway) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    watch = command(gateway, "--watch", "--interval", "0.1")
    with subprocess.Popen(watch, stdout=theirs, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        shown = b""
        while shown.count(b"clients ") < 3:
            shown += os.read(ours, 65_536)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # the terminal's other end is closed
            while data := os.read(ours, 65_536):
                shown += data
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(ours)
    assert b"\x1b[1A" in shown, "the cursor goes up again"
    assert shown.rstrip().endswith(b"\x1b[?25h"), "and is shown at the end"


def test_without_a_gateway_there_is_nothing_to_watch(tmp_path: Path) -> None:
    watch = [sys.executable, "-m", "tidegate.gateway.cli", "status", "--watch", "--data", str(tmp_path)]
    done = subprocess.run(watch, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no gateway is running" in done.stderr
