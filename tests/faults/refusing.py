"""What must hold while a disk refuses, and after it works again.

Rules: acknowledgements of QoS 1 and 2 are withheld, QoS 0 and pings go on as ever, `status` and log say it in words, and
nothing that was acknowledged is missing, neither for the subscriber nor on the disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing

from tidegate.gateway.control import ask

from tests.support.client import MqttClient
from tests.support.gateway import Gateway

from .traffic import Receiver, Sender, check, run, settle

PROBES = 100
LOAD = 300
"""Messages acknowledged before the fault, and again after it."""
RECOVERY = 20.0
REFUSES = "store_refuses: the store refuses to write"
Fault = Callable[[Gateway], AbstractContextManager[None]]


class Load:
    """Two senders and a receiver of all they send, on a gateway whose disk will refuse."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.senders = [Sender("one", "t/one", 1), Sender("two", "t/two", 2, version=5)]
        self.receivers = [Receiver("all", "t/#", 2)]
        self.peers = [*self.receivers, *self.senders]
        self.connect()

    def connect(self) -> None:
        for peer in self.peers:
            peer.connect(self._gateway.port)

    def lose(self) -> None:
        for peer in self.peers:
            peer.lose()

    def go_on(self, deadline: float = 30.0) -> None:
        """Until LOAD messages more are acknowledged."""
        before = self.acknowledged()
        run(self.peers, lambda: self.acknowledged() > before + LOAD, deadline)

    def is_withheld(self, words: str) -> None:
        """The disk refuses now, and this is what it looks like."""
        run(self.peers, lambda: REFUSES in self._gateway.log() and words in state(self._gateway))
        with MqttClient(self._gateway.port, "fast") as fast:
            fast.subscribe(("fast", 0))
            _probe(fast)
            self._listen()
            withheld = self.acknowledged()
            _probe(fast)
            self._listen()
        assert self.acknowledged() == withheld, "acknowledged without a disk"

    def end(self) -> None:
        """All that was begun is finished, and everybody goes."""
        settle(self.senders, self.receivers)
        check(self.senders, self.receivers)
        assert state(self._gateway) == "ok"
        for peer in self.peers:
            if peer.client is not None:
                peer.client.sock.close()

    def is_stored(self) -> None:
        """Looked for in the file itself, after the end of the gateway."""
        for sender in self.senders:
            assert stored(self._gateway, sender.topic) >= len(sender.acknowledged)

    def acknowledged(self) -> int:
        return sum(len(sender.acknowledged) for sender in self.senders)

    def _listen(self) -> None:
        for sender in self.senders:
            sender.listen()


def survives(gateway: Gateway, fault: Fault, words: str) -> Load:
    """A fault that comes and goes under the running gateway, and then kill -9."""
    with gateway:
        load = Load(gateway)
        load.go_on()
        with fault(gateway):
            load.is_withheld(words)
        load.go_on(RECOVERY)
        load.end()
        assert "store_works: the store works again" in gateway.log()
        gateway.kill()
    load.is_stored()
    return load


def _probe(fast: MqttClient) -> None:
    """QoS 0 to oneself and a ping, time and again."""
    for number in range(PROBES):
        fast.publish("fast", b"%d" % number)
        assert [packet.payload for packet in fast.ping()] == [b"%d" % number]


def state(gateway: Gateway) -> str:
    return str(ask(gateway.data / "control.sock", {"command": "status"})["store"]["state"])


def stored(gateway: Gateway, topic: str) -> int:
    with closing(sqlite3.connect(gateway.data / "log.db")) as log:
        (count,) = log.execute("SELECT count(DISTINCT payload || id) FROM mqtt_msg WHERE topic = ?", (topic,)).fetchone()
    return int(count)
