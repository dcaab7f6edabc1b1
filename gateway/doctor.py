"""`tidegate doctor`: what a person who cannot look into the gateway needs to know, each with what to do about it.

Here stand the questions to the configuration and to the running gateway; `doctor_machine` asks the machine. A warning is
something that may be wanted or may pass; a problem loses messages, keeps devices out or stops the gateway.

Invariant: nothing is changed (one small file beside the log is written, synced and taken away), and no check can stop another.
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from tidegate.store.reader import LogReader
from tidegate.store.schema import StoreError

from .access import NO_NAME, OPENED, UNKNOWN, WRONG, PasswordFileError, lacking, read_passwords
from .config import Beside, Config
from .config_keys import WILDCARDS, is_loopback, join_address
from .control import NoAnswer, NoRight, NotRunning, ask
from .doctor_machine import (
    CLOCK_ADVICE,
    LOOK_AS,
    OK,
    PROBLEM,
    WARNING,
    Finding,
    check_clock,
    check_data,
    check_secrets,
    check_sqlite,
)
from .doctor_rights import unreadable
from .status import clock, duration, printable

__all__ = ["PROBLEM", "Finding", "examine", "examine_files", "examine_machine", "render"]

REACH = 2.0
"""Seconds that a listener has to take a connection."""
SHOWN = 5
"""Refused clients that are named."""
ADVICE = {
    f"not_authorized: {NO_NAME}": "give the device a user name and a password: tidegate passwd FILE USER makes them",
    f"not_authorized: {UNKNOWN}": "correct its user name, or make that user: tidegate passwd FILE USER; then reload",
    f"not_authorized: {WRONG}": "correct its password, or set it again: tidegate passwd FILE USER; then reload",
    "server_busy": "raise limits.max_connections, or find who opens so many connections",
    "client_identifier_not_valid": "give the device a client id, or let it connect with a clean session",
    "bad_authentication_method": "extended authentication is not supported: use user name and password",
}
FAULT_ADVICE = (
    "the client does not speak MQTT 3.1.1 or 5.0 properly, uses TLS, or the packet was larger than limits.max_packet_size"
)
_MARKS = {OK: "ok", WARNING: "WARNING", PROBLEM: "PROBLEM"}


def examine(config: Config) -> list[Finding]:
    """Everything, in the order in which a person should read it."""
    live: list[Finding] = []
    listeners = [listener.address for listener in config.listeners]
    try:
        status = ask(config.data / "control.sock", {"command": "status"})
        refused = ask(config.data / "control.sock", {"command": "refused"})
    except NoRight as error:
        running = Finding(WARNING, "gateway", str(error), LOOK_AS)
    except NoAnswer as error:
        running = Finding(PROBLEM, "gateway", str(error), "look into its log (journalctl -u tidegate), restart it")
    except NotRunning as error:
        running = Finding(WARNING, "gateway", str(error), "start it (systemctl start tidegate), then look again")
        live = _each(lambda: _free_ports(config), lambda: _log(config))
    else:
        running = _running(status)
        listeners = [_split(address) for address in status["listeners"]]
        live = _each(
            lambda: _listeners(status),
            lambda: _restart(status, config),
            lambda: _clock(status),
            lambda: _http(status),
            lambda: _pools(status),
            lambda: _refused(refused),
        )
    machine = _each(lambda: check_data(config), lambda: check_secrets(config))
    return [running, *live, *_each(lambda: _reach(config, listeners)), *machine, *examine_machine()]


def examine_files(beside: Beside) -> list[Finding]:
    """What `check` finds in the password file, and in the rights of all files."""
    return _each(lambda: _passwords(beside), lambda: _readable(beside))


def examine_machine() -> list[Finding]:
    """What can be said without a configuration."""
    return _each(check_clock, check_sqlite)


def render(findings: list[Finding]) -> str:
    """For people: a line each, and under it what to do."""
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.level]:<9}{finding.check:<14}{printable(finding.text)}")
        lines += [f"{'':<23}{printable(finding.advice)}"] if finding.advice else []
    count = Counter(finding.level for finding in findings)
    lines.append(f"problems: {count[PROBLEM]}, warnings: {count[WARNING]}")
    return "\n".join(lines)


def _each(*checks: Callable[[], Iterable[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except OSError as error:
            found.append(Finding(WARNING, "doctor", f"could not look: {error}", LOOK_AS))
    return found


# -- one that does not run -------------------------------------------------------------------------------------------


def _log(config: Config) -> Iterable[Finding]:
    """What a start would say of the log."""
    path = config.data / "log.db"
    if not path.exists():
        return
    try:
        with closing(LogReader(path)) as log:
            log.births(), log.bounds()
    except (StoreError, sqlite3.Error) as error:
        text = f"{path} cannot be read: {error}"
        yield Finding(PROBLEM, "log", text, "tidegate salvage saves what can be read; tidegate restore puts a backup back")


# -- the running gateway ---------------------------------------------------------------------------------------------


def _running(status: dict[str, Any]) -> Finding:
    text = f"tidegate {status['version']} runs since {duration(status['uptime'])} as {status['name']}"
    state = status["store"]["state"]
    if state == "ok":
        return Finding(OK, "gateway", text)
    return Finding(
        PROBLEM, "gateway", f"{text}; the store refuses to write: {state}",
        "acknowledgements are withheld until the disk works again: make room, or see below and `dmesg`",
    )  # fmt: skip


def _listeners(status: dict[str, Any]) -> Iterable[Finding]:
    for address in status["listeners"]:
        host, port = _split(address)
        try:
            socket.create_connection((WILDCARDS.get(host, host), port), REACH).close()
        except OSError as error:
            advice = "look into the gateway's log (journalctl -u tidegate), restart it; a firewall on this machine?"
            yield Finding(PROBLEM, "listener", f"{address} takes no connection: {error}", advice)
        else:
            yield Finding(OK, "listener", f"{address} takes connections")


def _restart(status: dict[str, Any], config: Config) -> Iterable[Finding]:
    """What is read at the start only: the change that does nothing."""
    advice = "systemctl restart tidegate"
    if changed := status["config"]["changed"]:
        yield Finding(WARNING, "restart", f"gateway.toml was changed after the start: {', '.join(changed)}", advice)
    runs = sorted(status["listeners"])
    wanted = sorted(map(str, config.listeners))
    if runs != wanted:
        text = f"the running gateway listens on {', '.join(runs)}, the configuration says {', '.join(wanted)}"
        yield Finding(WARNING, "restart", text, "systemctl restart tidegate, unless it was started with --listen")


def _clock(status: dict[str, Any]) -> Iterable[Finding]:
    told = status["clock"]
    level = OK if told["state"] == "trusted" else WARNING if told["state"] in ("plausible", "held") else PROBLEM
    advice = f'{CLOCK_ADVICE}; if the clock is right, clock.trust = "always"' if level != OK else ""
    yield Finding(level, "time", clock(told), advice)


def _http(status: dict[str, Any]) -> Iterable[Finding]:
    address = status["http"]
    if address == "off":
        return
    if address.startswith("cannot"):
        yield Finding(WARNING, "http", address, "choose another address under [http] in gateway.toml, and restart")
        return
    host, port = _split(address)
    connection = http.client.HTTPConnection(WILDCARDS.get(host, host), port, timeout=REACH)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        text = answer.read(4096).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        yield Finding(PROBLEM, "http", f"{address} does not answer: {error}", "is another program on this port?")
    else:
        ready = answer.status == 200
        yield Finding(OK if ready else PROBLEM, "http", f"{address}/readyz says: {text}", "" if ready else "see its words")
    finally:
        connection.close()


def _pools(status: dict[str, Any]) -> Iterable[Finding]:
    for pool in status["pools"]:
        text = f"{pool['name']} is {pool['state']}, {pool['waiting']} waiting"
        if pool["error"]:
            text += f": {pool['error']}"
        if pool["state"] == "misconfigured":
            yield Finding(PROBLEM, "far end", text, pool["hint"] or "tidegate check; then systemctl reload tidegate")
        elif pool["state"] in ("connected", "starting"):
            yield Finding(OK, "far end", text)
        else:
            yield Finding(WARNING, "far end", text, pool["hint"] or "nothing is lost: what waits is sent when it is back")
        if parked := pool.get("balance", {}).get("parked"):
            text = f"what {pool['name']} refused of {parked} entries is in quarantine"
            yield Finding(WARNING, "far end", text, "tidegate dead list shows why; send it again, change it or drop it")


def _refused(answer: dict[str, Any]) -> Iterable[Finding]:
    """Refusals that are the same but for the time and port are one line; the latest first."""
    groups: dict[tuple[str, str, str, str], int] = {}
    for refusal in reversed(answer["refusals"]):
        host = refusal["peer"].rpartition(":")[0]
        key = (host, refusal["client_id"], refusal["username"], refusal["reason"])
        groups[key] = groups.get(key, 0) + 1
    for (host, client_id, username, reason), count in list(groups.items())[:SHOWN]:
        who = " ".join([*([f"client {client_id}"] if client_id else []), *([f"user {username}"] if username else [])])
        text = f"{who or 'somebody'} from {host}, {f'{count} times' if count > 1 else 'once'}: {reason}"
        yield Finding(WARNING, "refused", text, ADVICE.get(reason, FAULT_ADVICE))
    more = len(groups) - SHOWN
    if more > 0 or answer["fell_out"]:
        text = f"{max(more, 0)} more clients, and {answer['fell_out']} refusals before the last {len(answer['refusals'])}"
        yield Finding(WARNING, "refused", text, "tidegate status --refused")
    if not groups:
        yield Finding(OK, "refused", "nobody was refused since the gateway started")


# -- the files -------------------------------------------------------------------------------------------------------


def _passwords(beside: Beside) -> Iterable[Finding]:
    if beside.password_file is None:
        return
    try:
        read_passwords(beside.password_file)
    except PasswordFileError as error:
        advice = "until then the gateway keeps the users it has, and does not start again"
        yield from (Finding(PROBLEM, "passwords", line, advice) for line in str(error).splitlines())


def _readable(beside: Beside) -> Iterable[Finding]:
    for found in unreadable(beside):
        yield Finding(PROBLEM, "rights", found.text, found.advice)


# -- the configuration -----------------------------------------------------------------------------------------------


def _free_ports(config: Config) -> Iterable[Finding]:
    """No gateway runs: could it listen?"""
    for host, port in [listener.address for listener in config.listeners] + ([config.http] if config.http else []):
        where = join_address(host, port)
        try:
            _try_listen(host, port)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            advice = f"find who has it: ss -ltnp 'sport = :{port}' (mosquitto?); stop that, or choose another port"
            why = "is used by another program" if taken else f"cannot be listened on: {os.strerror(error.errno or 0)}"
            yield Finding(PROBLEM, "listener", f"{where} {why}", advice if taken else "correct the address in gateway.toml")
        else:
            yield Finding(OK, "listener", f"{where} is free")


def _try_listen(host: str, port: int) -> None:
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(1)


def _reach(config: Config, listeners: Iterable[tuple[str, int]]) -> Iterable[Finding]:
    """Whether devices in the network can connect: to what the gateway listens on, or would."""
    for warning in config.warnings:
        yield Finding(WARNING, "access", warning, "if that is meant, nothing; else change gateway.toml and restart")
    outside = [(host, port) for host, port in listeners if not is_loopback(host)]
    if not outside:
        steps = ", then ".join([*lacking(config.password_file, config.conf_dir), OPENED])
        text = "only this machine can connect: every listener is on loopback"
        yield Finding(WARNING, "network", text, f"to let devices in: {steps}")
        return
    for host, port in outside:
        where = f"{_own_address() or 'this machine'}:{port}" if host in WILDCARDS else join_address(host, port)
        yield Finding(OK, "network", f"devices can connect to {where}, if no firewall is in between")


def _own_address() -> str:
    """The address that this machine has towards others; nothing is sent. Empty without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(sock.getsockname()[0])


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
