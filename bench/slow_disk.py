"""What a slow disk costs whom: QoS 1 waits for each flush, QoS 0 and pings do not.

    .venv/bin/python bench/slow_disk.py [--probes N]        half a minute; needs strace

The real gateway, `durability = "full"`. strace makes each of its fsyncs and fdatasyncs take longer; twenty publishers keep a
QoS 1 message on its way each, all the time. Between their answers a probe sends a QoS 0 message to itself, and a PINGREQ.
"""

from __future__ import annotations

import argparse
import select
import shutil
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import brokers
import wire

FLUSHES = (0, 50, 200)
PUBLISHERS = 20
PAUSE = 0.004
LIMIT = 20.0
"""ms: what pings and QoS 0 may take at the 99th percentile (design)."""
HEAD = wire.publish_head(wire.topic_of(999), 0)
MESSAGE = HEAD + wire.NAME.pack(999, 0) + wire.FILLER


class SlowDisk(brokers.Tidegate):
    """A gateway whose every flush takes so many ms longer."""

    def __init__(self, flush: int) -> None:
        super().__init__(True)
        self._flush = flush

    def command(self, directory: Path, port: int) -> list[str]:
        command = super().command(directory, port)
        if not self._flush:
            return command
        delay = f"inject=fsync,fdatasync:delay_enter={self._flush * 1000}"
        strace = ["strace", "-D", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", delay]
        return strace + command


class Publishers:
    """Each has one QoS 1 message on its way; `took` are the seconds until the PUBACKs."""

    def __init__(self, port: int) -> None:
        self.took: list[float] = []
        self._socks = [wire.connect(port, b"publisher %d" % number) for number in range(PUBLISHERS)]
        self._sent = dict.fromkeys(self._socks, 0.0)
        self._packet = wire.stream(0, 1, 1).packets
        for sock in self._socks:
            self._publish(sock)

    def answer(self, pause: float) -> None:
        """Take the PUBACKs that come in this time and publish again."""
        end = time.perf_counter() + pause
        while (left := end - time.perf_counter()) > 0:
            ready: list[socket.socket] = select.select(self._socks, [], [], left)[0]
            for sock in ready:
                assert wire.receive(sock, 4)[:2] == b"\x40\x02"
                self.took.append(time.perf_counter() - self._sent[sock])
                self._publish(sock)

    def close(self) -> None:
        for sock in self._socks:
            sock.close()

    def _publish(self, sock: socket.socket) -> None:
        self._sent[sock] = time.perf_counter()
        sock.sendall(self._packet)


def main() -> int:
    """The command; 1 if a slow disk was felt by those it must not concern."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--probes", type=int, default=2000)
    options = parser.parse_args()
    if shutil.which("strace") is None:
        print("strace is not installed: apt-get install strace", file=sys.stderr)
        return 2
    felt = False
    print("| a flush takes, ms more | QoS 0, p50, ms | p99 | PINGREQ, p50, ms | p99 | PUBACK, p50, ms | p99 |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for flush in FLUSHES:
        messages, pings, acks = measure(flush, options.probes)
        shown = [_at(times, share) for times in (messages, pings, acks) for share in (0.5, 0.99)]
        print(f"| {flush} | " + " | ".join(f"{value:,.2f}" for value in shown) + " |", flush=True)
        felt |= max(shown[1], shown[3]) >= LIMIT
    return 1 if felt else 0


def measure(flush: int, probes: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds that QoS 0 messages, pings and acknowledgements took."""
    with brokers.Broker(SlowDisk(flush)) as broker:
        probe = wire.connect(broker.port, b"probe")
        wire.subscribe(probe, wire.topic_of(999), 0)
        publishers = Publishers(broker.port)
        messages, pings = [], []
        for _ in range(probes):
            publishers.answer(PAUSE)
            messages.append(_round_trip(probe, MESSAGE, MESSAGE))
            pings.append(_round_trip(probe, wire.PINGREQ, wire.PINGRESP))
        publishers.answer(2 * flush / 1000)
        publishers.close()
        probe.close()
        assert not flush or min(publishers.took) > flush / 1000, "acknowledged before the flush: nothing was delayed"
        return messages, pings, publishers.took


def _round_trip(sock: socket.socket, data: bytes, expected: bytes) -> float:
    began = time.perf_counter()
    sock.sendall(data)
    assert wire.receive(sock, len(expected)) == expected
    return time.perf_counter() - began


def _at(times: list[float], share: float) -> float:
    """The percentile in ms."""
    return sorted(times)[int(len(times) * share)] * 1000


if __name__ == "__main__":
    sys.exit(main())
