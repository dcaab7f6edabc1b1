"""What online traffic feels while many sessions that slept are served from the log at once.

    .venv/bin/python bench/crowd.py [--sessions N] [--messages N]        half a minute

The real gateway, started anew, so that nothing is in its memory. A process of its own sends a QoS 0 message to itself every few
ms: while nothing else happens, and while all sleepers are back. Each of them takes all that was published while it slept, up to
1,000 unacknowledged, and acknowledges it; every message is checked.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import brokers
import wire
from load import Load, Subscriber
from scenarios import PUBLISHERS, store_for

PAUSE = 0.004
QUIET = 3.0
TOPIC = b"probe"
MESSAGE = wire.publish_head(TOPIC, 0) + wire.NAME.pack(0, 0) + wire.FILLER


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--messages", type=int, default=10_000)
    options = parser.parse_args()
    brokers.allow_many_sockets()
    with brokers.Broker(brokers.Tidegate(True)) as broker:
        names = [b"sleeper-%d" % number for number in range(options.sessions)]
        store_for(broker, options.messages, names)
        broker.stop(signal.SIGTERM)
        broker.start()
        quiet, _ = while_probed(broker.port, lambda: time.sleep(QUIET))
        busy, took = while_probed(broker.port, lambda: serve(broker, options.messages, names))
    count = options.sessions * options.messages
    print(f"{count:,} messages for {options.sessions} sessions in {took:.1f} s, {count / took:,.0f}/s\n")
    print("| a QoS 0 message to oneself | p50, ms | p99, ms | longest, ms |\n|---|---:|---:|---:|")
    for name, times in (("while nothing else happens", quiet), ("while all of them are served", busy)):
        shown = (times[len(times) // 2], times[len(times) * 99 // 100], times[-1])
        print(f"| {name} | " + " | ".join(f"{value * 1000:,.2f}" for value in shown) + " |")
    return 0


def while_probed(port: int, act: Callable[[], None]) -> tuple[list[float], float]:
    """How long probes took meanwhile, sorted, and how long it took; seconds."""
    over = multiprocessing.Event()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_probe, args=(port, over, theirs), daemon=True)
    process.start()
    ours.recv()
    began = time.perf_counter()
    act()
    took = time.perf_counter() - began
    over.set()
    times: list[float] = ours.recv()
    process.join()
    return sorted(times), took


def _probe(port: int, over: Event, answer: Connection) -> None:
    sock = wire.connect(port, b"probe")
    wire.subscribe(sock, TOPIC, 0)
    answer.send(None)
    times = []
    while not over.wait(PAUSE):
        began = time.perf_counter()
        sock.sendall(MESSAGE)
        assert wire.receive(sock, len(MESSAGE)) == MESSAGE
        times.append(time.perf_counter() - began)
    answer.send(times)


def serve(broker: brokers.Broker, messages: int, names: list[bytes]) -> None:
    """All come back and take what they missed."""
    load = Load()
    for name in names:
        Subscriber(load, wire.connect(broker.port, name, clean=False), 1, [messages // PUBLISHERS] * PUBLISHERS)
    load.run(broker.cpu_seconds)
    load.close()


if __name__ == "__main__":
    sys.exit(main())
