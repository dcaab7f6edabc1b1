"""The clients of a campaign: who publishes, who sets and clears retained messages, who comes and goes.

Each knows what it was acknowledged and how it left the world, so what it says can be held against the log and the far end.
"""

from __future__ import annotations

import random
import time
from collections import Counter

from tests.faults.traffic import Peer, SteadySender
from tests.support.client import MqttClient, Packet

SENDERS, KEEPERS, VISITORS = 6, 2, 4
Key = tuple[str, bytes]
"""Topic and payload: what a message is known by."""


class Publisher(SteadySender):
    """Publishes messages that all differ."""

    rate = 8.0

    def keys(self) -> tuple[Counter[Key], Counter[Key], Counter[Key]]:
        """How often each message was sent for the first time, sent again, and acknowledged."""
        key = [(self.topic_of(number), self.payload(number)) for number in range(self.sent)]
        sent = Counter(key)
        again = Counter({key[number]: 0 for number in self.resent})
        for number, count in self.resent.items():
            again[key[number]] += count
        return sent, again, Counter(key[number] for number in self.acknowledged)


class Keeper(Publisher):
    """Sets retained messages of a few topics, and clears each of them now and then."""

    rate = 4.0
    retain = True

    def topic_of(self, number: int) -> str:
        return f"{self.topic}/{number % 5}"

    def payload(self, number: int) -> bytes:
        return b"" if number % 4 == 3 else super().payload(number)

    def end_state(self) -> dict[str, bytes]:
        """Topic -> what is retained after everything was acknowledged."""
        last = {self.topic_of(number): self.payload(number) for number in range(self.sent)}
        return {topic: payload for topic, payload in last.items() if payload}


class Visitor(Peer):
    """Comes, stays for a moment, and goes: with a good-bye or without."""

    def __init__(self, name: str, chance: random.Random) -> None:
        super().__init__(name, 4)
        self.resting = False
        self._chance = chance
        self._change = 0.0

    def connect(self, port: int) -> None:
        now = time.monotonic()
        if self.resting or now < self._change:
            return
        self.client = MqttClient(port, self.name)
        self._change = now + self._chance.uniform(0.1, 2.0)

    def handle(self, client: MqttClient, packet: Packet) -> None:
        raise AssertionError(f"{self.name} subscribed to nothing: {packet}")

    def turn(self) -> None:
        self.listen()
        now = time.monotonic()
        if self.resting or now < self._change or self.client is None:
            return
        client, self.client = self.client, None
        self._change = now + self._chance.uniform(0.1, 2.0)
        if self._chance.random() < 0.5:
            client.disconnect()
        else:
            client.sock.close()


def people(chance: random.Random) -> tuple[list[Publisher], list[Visitor]]:
    """Everyone: QoS 1 and 2, MQTT 3.1.1 and 5.0."""
    publishers = [Publisher(f"s{n}", f"data/{n}", 1 + n % 2, 4 + n // 2 % 2) for n in range(SENDERS)]
    keepers = [Keeper(f"k{n}", f"kept/{n}", 1 + n % 2, 5 - n % 2) for n in range(KEEPERS)]
    return [*publishers, *keepers], [Visitor(f"v{n}", random.Random(chance.random())) for n in range(VISITORS)]
