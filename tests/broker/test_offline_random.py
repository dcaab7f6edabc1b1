"""Positions and fetches under any order of events: a client that comes, goes, unsubscribes, and a gateway that is killed.

At the end it subscribes to everything, and must have had every message, with QoS 2 once. A seed reproduces its story.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import Unsubscribe
from tidegate.store.entry import PUBLISH, Want
from tidegate.store.local import PUBSUB, FetchRule, Keep, LocalRules

from tests.broker.receiver import Receiver
from tests.broker.world import World

FILTERS = ("pubsub/a", "pubsub/b", "pubsub/+")
RULES = LocalRules(
    fetches=(FetchRule("pubsub/#", False, 0, 0, True),), acks=(("pubsub/#", PUBSUB),), keeps=(Keep("#", 10**12),)
)


class Story:
    """One gateway, one publisher, one receiver."""

    def __init__(self, path: Path, seed: int, qos: int) -> None:
        self.random = Random(f"{seed} {qos}")
        self._path = path
        self._qos = qos
        self._limits = Limits(max_inflight=self.random.choice((1, 2, 5, 100)))
        self.published: list[str] = []
        self._open()
        self.receiver = Receiver(self.world.device("s", clean=False))

    def _open(self) -> None:
        self.world = World(self._path, self._limits)
        self.world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)], RULES)

    def publish(self) -> None:
        publisher = self.world.device("publisher")
        for number in range(1, self.random.randint(2, 5)):
            payload = str(len(self.published))
            publisher.publish(f"pubsub/{self.random.choice('ab')}", payload.encode(), self._qos, packet_id=number)
            self.published.append(payload)
        publisher.disconnect()
        self.world.settle()

    def step(self) -> None:
        for _ in range(self.random.randint(1, 8)):
            self.receiver.step()

    def subscribe(self) -> None:
        self.receiver.device.subscribe(self.random.choice(FILTERS), self._qos)

    def unsubscribe(self) -> None:
        self.receiver.device.send(Unsubscribe(9, (self.random.choice(FILTERS),), {}))

    def wait(self) -> None:
        self.world.wait(self.random.choice((0.2, 1, 3)))

    def cut(self) -> None:
        self.receiver.device.cut()
        if self.random.random() < 0.5:
            self.publish()
        self.receiver.device = self.world.device("s", clean=False)

    def restart(self) -> None:
        if self.random.random() < 0.3:
            self.world.stop()
        else:
            self.world.kill()
        self._open()
        if self.random.random() < 0.3:
            self.publish()
        self.receiver.device = self.world.device("s", clean=False)

    def finish(self) -> None:
        for text in ("pubsub/a", "pubsub/b"):
            self.receiver.device.subscribe(text, self._qos)
        while self.receiver.step():
            pass


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("seed", range(25))
def test_every_message_arrives_and_with_qos_2_once(tmp_path: Path, seed: int, qos: int) -> None:
    story = Story(tmp_path / "log.db", seed, qos)
    acts = (story.publish, story.step, story.step, story.subscribe, story.unsubscribe, story.wait, story.cut, story.restart)
    told = []
    for act in story.random.choices(acts, k=40):
        told.append(act.__name__)
        act()
    story.finish()
    arrived = Counter(story.receiver.arrived)
    assert set(arrived) == set(story.published), told
    if qos == 2:
        assert max(arrived.values(), default=1) == 1, (told, arrived)
