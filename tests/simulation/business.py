"""The far end of `asking` and the business system behind it: subscriptions, stored messages, retained values, a channel.

Rows come and go by chance; questions are lost before or after they were answered; what the channel says while nobody listens is
lost. Ids of one topic rise, as the specification wants them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence

from tidegate.store.entry import ACKED, POSITION, UNSUBSCRIBED, Entry, forgotten
from tidegate.uplink.asking import Fetch, Fetched, Found
from tidegate.uplink.errors import NotConnected

FAR, OTHER, QUEUE = "far/a", "far/b", "queue/q"
MADE = (OTHER, "here/#")
"""What the business system subscribes clients to; they never do so themselves."""
KEPT = ("kept/w", "kept/x", "kept/y", "kept/z")
PAGE = 3


class Business:
    """`wall` is the gateway's time in ms, which the business system does not quite share."""

    def __init__(self, chance: random.Random, wall: Callable[[], int]) -> None:
        self.subscriptions: dict[str, dict[str, int]] = {}
        self.stored: dict[str, dict[str, Found]] = {FAR: {}, OTHER: {}, QUEUE: {}}
        self.read: dict[tuple[str, str], str] = {}
        """(client, topic) -> the last message that it has read."""
        self.retained: dict[str, Found] = {}
        self.withdrawn: set[str] = set()
        """Messages that the business system took away again."""
        self.moments: dict[bytes, int] = {}
        """Payload of a retained value -> its time."""
        self.calm = False
        self._chance = chance
        self._wall = wall
        self._number = 0
        self._at = 0
        self._link = 0
        self._said: list[bytes] | None = None

    # -- the business system ---------------------------------------------------------------------------------------

    def store(self) -> None:
        topic = self._chance.choice(tuple(self.stored))
        name = self._name("m")
        self.stored[topic][name] = Found(name, topic, "office", self._chance.choice((1, 2)), self._wall(), name.encode())

    def withdraw(self) -> None:
        there = self.stored[self._chance.choice(tuple(self.stored))]
        if there:
            gone = self._chance.choice(tuple(there))
            del there[gone]
            self.withdrawn.add(gone)

    def retain(self) -> None:
        topic, name = self._chance.choice(KEPT), self._name("r")
        self._at = max(self._at + 1, self._wall() + self._chance.choice((-3000, 0, 2000)))
        self.retained[topic] = Found(name, topic, "office", 1, self._at, name.encode())
        self.moments[name.encode()] = self._at

    def subscribe(self, client: str) -> None:
        """A row is made, changed or taken away; mostly the channel is told too, at times it alone."""
        text = self._chance.choice(MADE)
        # With QoS 0 nothing is promised, not even of what was found when the row said more.
        qos = self._chance.randrange(1 if text == OTHER else 0, 3)
        mine = self.subscriptions.setdefault(client, {})
        kind = "unsubscribe" if text in mine and self._chance.random() < 0.6 else "subscribe"
        if self._chance.random() < 0.6 and self._said is not None:
            self._said.append(json.dumps({"type": kind, "topic": text, "clientid": client, "qos": qos}).encode())
        if self._chance.random() < 0.1:
            return
        if kind == "subscribe":
            mine[text] = qos
        else:
            mine.pop(text, None)

    def _name(self, letter: str) -> str:
        self._number += 1
        return f"{letter}{self._number:06}"

    # -- what the side that writes brings --------------------------------------------------------------------------

    def carry(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            key = entry.clientid, entry.topic
            if entry.kind == POSITION:
                self.read[key] = max(self.read.get(key, ""), entry.payload.decode())
            elif entry.kind == ACKED and entry.topic == QUEUE:
                self.stored[QUEUE].pop(entry.payload.decode(), None)
            elif entry.kind == UNSUBSCRIBED:
                for topic in forgotten(entry):
                    self.read.pop((entry.clientid, topic), None)

    # -- the far end -----------------------------------------------------------------------------------------------

    def connect(self) -> Asker:
        self.trouble(0.2)
        self._link += 1
        self._said = []
        return Asker(self, self._link)

    def cut(self) -> None:
        self._link += 1
        self._said = None

    def trouble(self, chance: float = 0.05) -> None:
        if not self.calm and self._chance.random() < chance:
            self.cut()
            raise NotConnected("chance")

    def check_link(self, link: int) -> None:
        if link != self._link:
            raise NotConnected("cut")

    def heard(self) -> list[bytes]:
        said, self._said = self._said or [], []
        return said


class Asker:
    """See `asking.Asker`: a question may be lost, or its answer."""

    def __init__(self, far: Business, link: int) -> None:
        self._far = far
        self._link = link

    def subscriptions(self, clients: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
        self._far.check_link(self._link)
        self._far.trouble()
        found = {client: list(self._far.subscriptions.get(client, {}).items()) for client in clients}
        self._far.trouble()
        return found

    def fetch(self, question: Fetch) -> Fetched:
        self._far.check_link(self._link)
        self._far.trouble()
        there = self._far.stored[question.topic]
        low = "" if question.queue else self._far.read.get((question.client, question.topic), "")
        due = [one for name, one in there.items() if name > low]
        page = due[question.after : question.after + PAGE]
        further = question.after + PAGE if len(due) > question.after + PAGE else 0
        self._far.trouble()
        return Fetched(page, 0, {}, further)

    def retained(self, topic_filter: str) -> list[Found]:
        self._far.check_link(self._link)
        self._far.trouble()
        found = [one for topic, one in self._far.retained.items() if topic == topic_filter]
        self._far.trouble()
        return found

    def fileno(self) -> int:
        return -1

    def heard(self) -> list[bytes]:
        self._far.check_link(self._link)
        return self._far.heard()

    def check(self) -> None:
        """What is wrong is found by the next question."""

    def close(self) -> None:
        self._far.cut()
