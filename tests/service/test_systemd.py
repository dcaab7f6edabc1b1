"""`tidegate service install` under a real systemd: started, watched, told, stopped, and there again after a reboot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

from .box import Box, box, reason

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())

README = Path(__file__).parents[2] / "README.md"
QUICK = r"[Service]\nWatchdogSec=3\nTimeoutAbortSec=2\nTimeoutStopSec=5\n"
"""A minute is too long for a test; a stop that takes longer than five seconds counts as failed."""
PUBLISH = """
from tests.support.client import MqttClient
with MqttClient(1883, "device") as client:
    client.publish_and_wait("box", b"%s")
"""
PATIENCE = 30.0


@pytest.fixture(scope="module")
def machine() -> Iterator[Box]:
    """The README's steps for a service, up to its start."""
    section = README.read_text().partition("### As a service")[2]
    steps = re.findall(r"^sudo (.+)$", section.partition("```sh\n")[2].partition("```")[0], re.MULTILINE)
    assert [step.split()[0] for step in steps] == [
        "python3", "/opt/tidegate/bin/pip", "/opt/tidegate/bin/tidegate", "systemctl",
    ]  # fmt: skip
    with box() as machine:
        for step in steps[:2]:
            machine.prepare("/bin/sh", "-c", f"cd /root/tidegate && PATH=/usr/sbin:/usr/bin:/sbin:/bin {step}")
        machine.start()
        for step in steps[2:]:
            machine.run("/bin/sh", "-c", step)
        yield machine


def _pid(machine: Box) -> int:
    return int(machine.show("tidegate", "MainPID"))


def _journal(machine: Box) -> list[dict[str, str]]:
    machine.run("journalctl", "--sync")
    lines = machine.run("journalctl", "-u", "tidegate", "-o", "json", "--no-pager").splitlines()
    return [json.loads(line) for line in lines]


def _status(machine: Box) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(machine.run("/opt/tidegate/bin/tidegate", "status", "--json"))
    return found


def test_enabling_returns_when_devices_may_connect(machine: Box) -> None:
    assert (machine.show("tidegate", "ActiveState"), machine.show("tidegate", "SubState")) == ("active", "running")
    machine.python(PUBLISH % "first")
    assert _status(machine)["messages"]["received"] >= 1


def test_it_runs_as_a_user_of_its_own_who_can_read_and_write_only_what_is_its(machine: Box) -> None:
    pid = str(_pid(machine))
    assert machine.run("ps", "-o", "user=", "-p", pid).strip() == "tidegate"
    assert machine.run("stat", "-c", "%U:%G %a", "/var/lib/tidegate", "/etc/tidegate").splitlines() == [
        "tidegate:tidegate 750", "root:tidegate 750",
    ]  # fmt: skip
    assert machine.run("stat", "-c", "%U %a", "/var/lib/tidegate/log.db").strip() == "tidegate 640"
    assert machine.run("grep", "-E", "^Cap(Prm|Eff)|^NoNewPrivs", f"/proc/{pid}/status").split() == [
        "CapPrm:", "0000000000000000", "CapEff:", "0000000000000000", "NoNewPrivs:", "1",
    ]  # fmt: skip


def test_its_user_asks_without_saying_where_and_another_is_told_in_one_sentence(machine: Box) -> None:
    tidegate = "/opt/tidegate/bin/tidegate"
    status = machine.run("setpriv", "--reuid=tidegate", "--regid=tidegate", "--init-groups", "env", "-u", "XDG_CONFIG_HOME",
                         "HOME=/nonexistent", tidegate, "status", "--json")  # fmt: skip
    assert json.loads(status)["version"]
    told = machine.run("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "env", "HOME=/nonexistent",
                       "/bin/sh", "-c", f"{tidegate} status 2>&1", code=2)  # fmt: skip
    assert told.startswith("tidegate: /etc/tidegate/gateway.toml: cannot be read: Permission denied; use sudo")
    assert len(told.splitlines()) == 1


def test_the_journal_has_its_lines_with_their_priority_and_without_a_second_time(machine: Box) -> None:
    (line,) = [entry for entry in _journal(machine) if entry["MESSAGE"].startswith("listening: ")]
    assert (line["PRIORITY"], line["SYSLOG_IDENTIFIER"]) == ("6", "tidegate")
    assert line["MESSAGE"] == (
        "listening: devices may connect address=127.0.0.1:1883 durability=full data=/var/lib/tidegate"
        " config=/etc/tidegate/gateway.toml"
    )


def test_a_reload_is_heard(machine: Box) -> None:
    before = _pid(machine)
    machine.run("systemctl", "reload", "tidegate")
    wait_until(lambda: any(entry["MESSAGE"].startswith("reload: ") for entry in _journal(machine)), PATIENCE)
    assert _pid(machine) == before


def test_systemd_finds_nothing_wrong_with_the_unit(machine: Box) -> None:
    assert machine.run("systemd-analyze", "verify", "/etc/systemd/system/tidegate.service") == ""
    exposure = machine.run("systemd-analyze", "security", "--no-pager", "tidegate").splitlines()[-1]
    assert re.search(r"exposure level for tidegate\.service: ([01]\.\d|2\.[01]) OK", exposure), exposure


def test_a_gateway_that_stands_still_is_started_anew_and_has_lost_nothing(machine: Box) -> None:
    quick = "/etc/systemd/system/tidegate.service.d/quick.conf"
    machine.run("/bin/sh", "-c", f"mkdir -p {Path(quick).parent} && printf '{QUICK}' > {quick}")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "tidegate")
    machine.python(PUBLISH % "before it stands still")
    before, seq = _pid(machine), _status(machine)["store"]["last_seq"]
    machine.run("kill", "-STOP", str(before))
    wait_until(lambda: _pid(machine) not in (0, before) and machine.show("tidegate", "ActiveState") == "active", PATIENCE)
    assert machine.show("tidegate", "NRestarts") == "1"
    assert any("Watchdog timeout" in entry["MESSAGE"] for entry in _journal(machine))
    assert _status(machine)["store"]["last_seq"] >= seq
    machine.python(PUBLISH % "afterwards")


def test_a_stop_is_clean_and_in_time(machine: Box) -> None:
    machine.run("systemctl", "stop", "tidegate")
    assert (machine.show("tidegate", "Result"), machine.show("tidegate", "ExecMainStatus")) == ("success", "0")
    machine.run("systemctl", "start", "tidegate")


def test_a_mistake_in_the_configuration_is_told_and_not_tried_again_and_again(machine: Box) -> None:
    machine.run("/bin/sh", "-c", "cp -p /etc/tidegate/gateway.toml /root/ && echo 'nonsense = 1' >> /etc/tidegate/gateway.toml")
    machine.run("systemctl", "restart", "tidegate", code=1)
    assert machine.show("tidegate", "ActiveState") == "failed"
    assert machine.show("tidegate", "NRestarts") == "0"
    assert any("gateway.toml:" in entry["MESSAGE"] and "nonsense" in entry["MESSAGE"] for entry in _journal(machine))
    machine.run("cp", "-p", "/root/gateway.toml", "/etc/tidegate/gateway.toml")
    machine.run("systemctl", "start", "tidegate")


def test_after_a_reboot_it_is_there_again_with_what_it_had(machine: Box) -> None:
    machine.python(PUBLISH % "before the reboot")
    seq = _status(machine)["store"]["last_seq"]
    machine.stop()
    machine.start()
    wait_until(lambda: machine.show("tidegate", "ActiveState") == "active", PATIENCE)
    status = _status(machine)
    assert status["store"]["last_seq"] >= seq
    exported = machine.run("/opt/tidegate/bin/tidegate", "export", "mqtt_msg")
    assert "before the reboot" in exported
    assert "before it stands still" in exported
    machine.python(PUBLISH % "after the reboot")
