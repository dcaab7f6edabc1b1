"""Positions and fetches under any order of events: a client that comes, goes, unsubscribes, and a gateway that is killed.

At the end it subscribes to everything, and must have had every acknowledged message, with QoS 2 once; its balance adds up all
along. Commits and reads happen at once, or (`lazy`) when they like. A seed reproduces its story.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from tidegate.gateway.accounts import mismatch
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import PubAck, PubRec, Unsubscribe
from tidegate.store.entry import PUBLISH, Want
from tidegate.store.local import PUBSUB, QUEUE, FetchRule, Keep, LocalRules

from tests.broker.receiver import Receiver
from tests.broker.world import Device, World

FILTERS = ("pubsub/a", "pubsub/b", "pubsub/+")
RULES = LocalRules(
    fetches=(FetchRule("pubsub/#", False, 0, 0, True),), acks=(("pubsub/#", PUBSUB),), keeps=(Keep("#", 10**12),)
)


class Story:
    """One gateway, its publishers, one receiver."""

    def __init__(self, path: Path, seed: int, qos: int, lazy: bool) -> None:
        self.random = Random(f"{seed} {qos} {lazy}")
        self._path = path
        self._qos = qos
        self._lazy = lazy
        self._limits = Limits(max_inflight=self.random.choice((1, 2, 5, 100)))
        self._sent: list[tuple[Device, int, str]] = []
        self.tried = 0
        self.acknowledged: set[str] = set()
        self._open()
        self.receiver = Receiver(self.world.device("s", clean=False))

    def _open(self) -> None:
        self.world = World(self._path, self._limits)
        self.world.auto = not self._lazy
        self.world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)], RULES)

    def act(self) -> str:
        acts = (self.publish, self.step, self.step, self.subscribe, self.unsubscribe, self.wait, self.cut, self.restart)
        act = self.random.choice(acts)
        act()
        for _ in range(self.random.randint(0, 6)):
            if self.world.commits and self.random.random() < 0.6:
                self.world.commit()
            elif self.world.reads:
                self.world.read()
        session = self.world.broker.sessions.get("s")
        assert session is None or mismatch(session) == 0
        return act.__name__

    def publish(self) -> None:
        publisher = self.world.device(f"p{self.tried}")
        for packet_id in range(1, self.random.randint(2, 5)):
            payload = str(self.tried)
            self.tried += 1
            publisher.publish(f"pubsub/{self.random.choice('ab')}", payload.encode(), self._qos, packet_id=packet_id)
            self._sent.append((publisher, packet_id, payload))

    def _note_acknowledged(self) -> None:
        for device, packet_id, payload in self._sent:
            if any(isinstance(e, PubAck | PubRec) and e.packet_id == packet_id for e in device.got):
                self.acknowledged.add(payload)
        self._sent = []

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
        self.world.broker.lost(self.receiver.device.client)  # answers that wait for a commit go nowhere
        self.world.broker.turn_over()
        if self.random.random() < 0.5:
            self.publish()
        self.receiver.device = self.world.device("s", clean=False)

    def restart(self) -> None:
        if self.random.random() < 0.3:
            self.world.stop()
        else:
            self.world.kill()
        self._note_acknowledged()
        self._open()
        if self.random.random() < 0.3:
            self.publish()
        self.receiver.device = self.world.device("s", clean=False)

    def finish(self) -> None:
        self.world.auto = True
        self.world.settle()
        for text in FILTERS:
            self.receiver.device.subscribe(text, self._qos)
        while self.receiver.step():
            pass
        self._note_acknowledged()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("seed", range(25))
def test_every_message_arrives_and_with_qos_2_once(tmp_path: Path, seed: int, qos: int, lazy: bool) -> None:
    story = Story(tmp_path / "log.db", seed, qos, lazy)
    told = [story.act() for _ in range(40)]
    story.finish()
    arrived = Counter(story.receiver.arrived)
    assert not story.acknowledged - set(arrived), told
    assert lazy or len(story.acknowledged) == story.tried
    if qos == 2:
        assert max(arrived.values(), default=1) == 1, (told, arrived)


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("seed", range(15))
def test_every_message_of_a_queue_is_taken_once_and_then_gone(tmp_path: Path, seed: int, qos: int) -> None:
    random = Random(f"queue {seed} {qos}")
    rules = LocalRules(
        fetches=(FetchRule("queue/#", True, 0, 0, True),), acks=(("queue/#", QUEUE),), keeps=(Keep("#", 10**12),)
    )

    def begin() -> World:
        world = World(tmp_path / "log.db", Limits(max_inflight=random.choice((1, 3, 100))))
        world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)], rules)
        return world

    def connect(number: int) -> Receiver:
        device = world.device(f"s{number}", clean=bool(number))
        device.subscribe(random.choice(("queue/a", "queue/#")), qos)
        return Receiver(device)

    world = begin()
    receivers = [connect(number) for number in range(3)]
    published = 0
    arrived: set[str] = set()
    for _ in range(40):
        number = random.randrange(3)
        match random.choice(("publish", "publish", "step", "step", "step", "cut", "kill")):
            case "publish":
                for _ in range(random.randint(1, 4)):
                    world.device(f"p{published}").publish("queue/a", str(published).encode(), qos)
                    published += 1
            case "step":
                receivers[number].step()
            case "cut":
                arrived.update(receivers[number].arrived)
                receivers[number].device.cut()
                receivers[number] = connect(number)
            case "kill":
                arrived.update(*(receiver.arrived for receiver in receivers))
                world.kill()
                world = begin()
                receivers = [connect(number) for number in range(3)]
    last = connect(3)
    while last.step():
        pass
    assert arrived.union(last.arrived, *(receiver.arrived for receiver in receivers)) == {str(n) for n in range(published)}
    left = connect(4)
    while left.step():
        pass
    assert left.arrived == []
