"""A disk that takes 200 ms for every flush: acknowledgements wait for it, nothing else does (design: the
event loop never waits for the disk). The delay is injected by strace into fsync and fdatasync of the real
gateway.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway

FLUSH = 0.2
PROBES = 200
STRACE = ("strace", "-D", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=fsync,fdatasync")
DELAY = ("-e", f"inject=fsync,fdatasync:delay_enter={int(FLUSH * 1e6)}")


def test_pings_and_qos_0_do_not_wait_for_a_slow_disk(tmp_path: Path) -> None:
    assert shutil.which("strace"), "this test needs strace: apt-get install strace"
    with Gateway(tmp_path, prefix=(*STRACE, *DELAY)) as gateway:
        durable, fast = MqttClient(gateway.port, "durable"), MqttClient(gateway.port, "fast")
        fast.subscribe(("fast", 0))
        acknowledged, took = 0, []
        began = time.perf_counter()
        durable.publish("slow", b"0", 1)
        for number in range(PROBES):
            took.append(_round_trip(fast, b"%d" % number))
            for _ in durable.available():
                acknowledged += 1
                durable.publish("slow", b"%d" % acknowledged, 1)
        while not acknowledged:
            durable.expect(Kind.PUBACK)
            acknowledged += 1
        elapsed = time.perf_counter() - began
    assert acknowledged <= elapsed / FLUSH, "acknowledged before the flush: nothing was delayed"
    assert sorted(took)[PROBES * 99 // 100] < FLUSH / 4


def _round_trip(client: MqttClient, payload: bytes) -> float:
    """Seconds for a QoS 0 message to oneself and a ping."""
    began = time.perf_counter()
    client.publish("fast", payload)
    assert [packet.payload for packet in client.ping()] in ([payload], [])
    return time.perf_counter() - began
