"""The real gateway as systemd and a person with `kill` see it: ready, watched, reloaded, stopped."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate.gateway.access import password_line, set_user
from tidegate.gateway.config import Config, load
from tidegate.gateway.config_changed import KEY_OF
from tidegate.gateway.config_keys import KEYS
from tidegate.gateway.control import ask
from tidegate.gateway.doctor import examine
from tidegate.gateway.status import render

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that NOTIFY_SOCKET names."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(10)
        yield listening


def test_systemd_hears_ready_then_the_watchdog_then_stopping(tmp_path: Path, systemd: socket.socket) -> None:
    gateway = Gateway(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
    with gateway:
        assert systemd.recv(4096) == f"READY=1\nMAINPID={gateway.pid}".encode()
        MqttClient(gateway.port, "ready means that it listens")
        assert systemd.recv(4096) == b"WATCHDOG=1"
        assert systemd.recv(4096) == b"WATCHDOG=1"
        assert gateway.stop() == 0
    heard = [systemd.recv(4096)]
    while heard[-1] == b"WATCHDOG=1":
        heard.append(systemd.recv(4096))
    assert heard[-1] == b"STOPPING=1"


def test_a_gateway_that_stands_still_feeds_no_watchdog(tmp_path: Path, systemd: socket.socket) -> None:
    with Gateway(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as gateway:
        systemd.recv(4096)
        systemd.recv(4096)
        gateway.freeze()
        systemd.settimeout(2.5)
        with pytest.raises(TimeoutError):
            while True:
                assert systemd.recv(4096) == b"WATCHDOG=1", "one may be on its way"
        gateway.thaw()
        assert systemd.recv(4096) == b"WATCHDOG=1"


def test_a_start_that_fails_is_never_ready(tmp_path: Path, systemd: socket.socket) -> None:
    gateway = Gateway(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
    gateway.data.mkdir()
    (gateway.data / "log.db").write_bytes(b"x" * 5000)
    with pytest.raises(AssertionError, match="is not a database"):
        gateway.start()
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(4096)


# -- SIGHUP ----------------------------------------------------------------------------------------------------------


def _reason(gateway: Gateway, user: str, password: bytes) -> int:
    with MqttClient(gateway.port, "asks", version=5, username=user, password=password, refused=True) as client:
        return client.connack.reason


def _hup(gateway: Gateway) -> None:
    before = _heard(gateway)
    os.kill(gateway.pid, signal.SIGHUP)
    wait_until(lambda: _heard(gateway) > before, 10.0, gateway.log)


def _heard(gateway: Gateway) -> int:
    """Counted in the whole log: `log()` is its end only."""
    return gateway._log.read_text(errors="replace").count("SIGHUP: reading")


def test_a_sighup_during_the_start_does_not_kill(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    with subprocess.Popen(gateway.command(), stderr=subprocess.PIPE, text=True) as starting:
        wait_until((gateway.data / "broker.lock").exists)
        assert starting.stderr is not None
        said = ""
        while "listening" not in said:
            starting.send_signal(signal.SIGHUP)
            said = starting.stderr.readline()
            assert said, f"it ended with {starting.wait()}"
        starting.terminate()
    assert starting.returncode == 0


def test_what_became_of_each_sighup_is_told(tmp_path: Path) -> None:
    """Also of the third in a minute, when other repeated warnings are held back."""
    toml = "[access]\npassword_file = 'users'\n"
    good = password_line("anna", b"secret") + "\n"
    rule = 'backend.sqlite.hook.session.subscribed.1 = {"action": {"function": "on_message_fech"}}\n'
    with Gateway(tmp_path, toml=toml, files={"users": good, "emqx_backend_sqlite.conf": ""}) as gateway:

        def said(event: str) -> int:
            return gateway._log.read_text(errors="replace").count(f" {event}: ")

        for users, rules, event in ((good, "", "reloaded"), ("anna\n", "", "reload_failed"), (good, rule, "rules_unusable")):
            (tmp_path / "users").write_text(users)
            (tmp_path / "emqx_backend_sqlite.conf").write_text(rules)
            other = said("reloaded")
            for turn in range(1, 5):
                _hup(gateway)
                wait_until(lambda event=event, turn=turn: said(event) == turn, 10.0, gateway.log)  # type: ignore[misc]
            assert event == "reloaded" or said("reloaded") == other
        assert said("rule_mistake") == 4


def test_nobody_reads_its_log_any_more(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    with subprocess.Popen(gateway.command(), stderr=subprocess.PIPE, text=True) as starting:
        assert starting.stderr is not None
        while "only this machine" not in starting.stderr.readline():
            pass
        starting.stderr.close()
        starting.send_signal(signal.SIGHUP)
        with MqttClient(gateway.port, "goes on") as client:
            client.publish_and_wait("t", b"kept")
        starting.terminate()
    assert starting.returncode == 0


def test_a_full_pipe_that_nobody_drains_stops_nothing(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    with subprocess.Popen(gateway.command(), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"only this machine" not in process.stderr.readline():
            pass
        with MqttClient(gateway.port, "goes on") as client:
            wait_until(lambda: _hup_and_publish(process, client) and _unheard(gateway) > 100, 60.0)
        process.terminate()
        assert process.wait(10) == 0
        *lines, end = process.stderr.read().decode().split("\n")
    assert end == "", "the last line is not whole"
    assert {line for line in lines if not re.match(rf"{TIME} (info|warning) \w+: ", line)} == set()


def _hup_and_publish(process: subprocess.Popen[bytes], client: MqttClient) -> bool:
    for _ in range(20):
        process.send_signal(signal.SIGHUP)
        client.publish_and_wait("t", b"kept")
    return True


def _unheard(gateway: Gateway) -> int:
    return int(ask(gateway.data / "control.sock", {"command": "status"})["log"]["dropped"])


def test_sighup_takes_new_passwords_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    passwd = tmp_path / "passwd"
    set_user(passwd, "anna", password_line("anna", b"secret"), create=True)
    with Gateway(tmp_path, toml="[access]\npassword_file = 'passwd'\n") as gateway:
        assert _reason(gateway, "anna", b"secret") == 0
        assert _reason(gateway, "anna", b"wrong") == 0x87
        assert _reason(gateway, "bert", b"his") == 0x87
        set_user(passwd, "bert", password_line("bert", b"his"), create=False)
        _hup(gateway)
        assert _reason(gateway, "bert", b"his") == 0
        passwd.write_text("clara:plain\n")
        _hup(gateway)
        wait_until(lambda: f'the passwords stay as they were reason="{passwd}:1: ' in gateway.log(), 10.0, gateway.log)
        assert _reason(gateway, "anna", b"secret") == 0
        assert gateway.stop() == 0


def _config(gateway: Gateway) -> dict[str, object]:
    return dict(ask(gateway.data / "control.sock", {"command": "status"})["config"])


def test_sighup_names_the_keys_of_gateway_toml_that_wait_for_a_restart(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml="[limits]\nmax_inflight = 10\n") as gateway:
        wait_until(lambda: " listening: " in gateway.log(), 10.0, gateway.log)
        assert _config(gateway) == {"changed": [], "error": ""}
        toml = tmp_path / "gateway.toml"
        toml.write_text("[limits]\nmax_inflight = 20\n[uplink]\nbackends = ['redis']\n[[listener]]\nbind = '127.0.0.1:1'\n")
        _hup(gateway)
        wait_until(lambda: "config_changed: gateway.toml was changed and needs a restart" in gateway.log(), 10.0, gateway.log)
        changed = ["limits.max_inflight", "uplink.backends"]
        assert f"keys={','.join(changed)}\n" in gateway.log(), "and no listener, which --listen still overrules"
        assert _config(gateway) == {"changed": changed, "error": ""}
        for _ in range(3):
            _hup(gateway)
        wait_until(lambda: gateway.log().count("config_changed: ") == 4, 10.0, gateway.log)
        shown = render(ask(gateway.data / "control.sock", {"command": "status"}))
        assert "restart     gateway.toml was changed: limits.max_inflight, uplink.backends" in shown
        found = [finding.text for finding in examine(load(toml, gateway.data)) if finding.check == "restart"]
        assert "gateway.toml was changed after the start: limits.max_inflight, uplink.backends" in found

        toml.write_text("[limits]\nmax_inflight = 0\n")
        _hup(gateway)
        wait_until(lambda: "config_unusable: " in gateway.log(), 10.0, gateway.log)
        assert "gateway.toml:2: limits.max_inflight = 0" in str(_config(gateway)["error"])

        toml.write_text("[limits]\nmax_inflight = 10\n")
        _hup(gateway)
        wait_until(lambda: _config(gateway) == {"changed": [], "error": ""}, 10.0, gateway.log)
        assert gateway.stop() == 0


def test_every_value_of_the_configuration_has_the_name_of_its_key() -> None:
    fields = {field.name for field in dataclasses.fields(Config)}
    assert KEY_OF.keys() == fields - {"conf_dir", "file", "warnings"}
    keys = {f"{section}.{name}" for section, names in KEYS.items() for name in names}
    assert set(KEY_OF.values()) == keys | {"listener", "store.policy"}


def test_sighup_tells_the_mistakes_of_a_rule_file_and_goes_on(tmp_path: Path) -> None:
    rule = 'backend.sqlite.hook.message.publish.1 = {"action": {"function": "%s"}}\n'
    gateway = Gateway(tmp_path, files={"emqx_backend_sqlite.conf": rule % "on_message_publish"})
    with gateway:
        (tmp_path / "emqx_backend_sqlite.conf").write_text(rule % "on_message_pubish")
        _hup(gateway)
        wait_until(lambda: 'did you mean "on_message_publish"?' in gateway.log(), 10.0, gateway.log)
        with MqttClient(gateway.port, "goes on") as client:
            client.publish_and_wait("t", b"kept")
        (tmp_path / "emqx_backend_sqlite.conf").write_text(rule % "on_message_publish")
        _hup(gateway)
        with MqttClient(gateway.port, "goes on") as client:
            client.publish_and_wait("t", b"kept too")
        assert gateway.stop() == 0
