"""What the systemd unit forbids must be nothing that the gateway does: a forbidden system call kills it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tidegate.gateway.service import unit_file

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until


def allowed() -> set[str]:
    """Every system call that the unit allows, its groups resolved as systemd does."""
    words = re.search(r"^SystemCallFilter=(.*)$", unit_file(Path("/bin/true")), re.MULTILINE)
    assert words is not None
    found: set[str] = set()
    waiting = words[1].split()
    while waiting:
        word = waiting.pop()
        if not word.startswith("@"):
            found.add(word)
            continue
        listed = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True)
        lines = [line.strip() for line in listed.stdout.splitlines()[1:]]
        waiting += [line for line in lines if line and not line.startswith("#")]
    return found


def test_the_unit_allows_every_system_call_that_the_gateway_makes(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    toml = '[uplink]\nbackends = ["redis"]\n'
    rules = 'backend.redis.pool1.server = 127.0.0.1:1\nbackend.redis.hook.message.publish.1 = {"action": {"function": '
    rules += '"on_message_publish"}, "pool": "pool1"}\n'
    prefix = ["strace", "-D", "-f", "-qq", "-e", "signal=none", "-o", str(trace)]
    with Gateway(tmp_path, toml=toml, files={"emqx_backend_redis.conf": rules}, prefix=prefix) as gateway:
        with MqttClient(gateway.port, "d") as client:
            client.publish_and_wait("t", b"x")
        pid = gateway.pid
        assert gateway.stop() == 0
    wait_until(lambda: re.search(rf"^{pid} .*exit_group\(", trace.read_text(), re.MULTILINE) is not None)
    made = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    assert {"clock_adjtime", "adjtimex"} & made, "it asks the kernel whether the clock is synchronised"
    assert made - allowed() == set()
