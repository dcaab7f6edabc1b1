"""Sessions that sleep and return at once: what they cost while they sleep, and what each costs when it is back.

The broker's core with a real database and without sockets. A sleeper takes up to 1,000 unacknowledged messages and
acknowledges each; it looks at the size of what it gets, so that its own cost stays small: every packet has the same. Two
kinds: `together` all fell asleep at the same place with the filter `bench/#`; `apart` each fell asleep elsewhere in the first
half of a log ten times as long, and wants about one message in ten, with filters that overlap.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import Connect, Disconnect, Subscribe, Subscription, encode
from tidegate.gateway.session import Client
from tidegate.store.entry import PUBLISH, Want
from tidegate.store.topic import matches

from tests.broker.world import Device, World

EACH = 2_000
APART = 10 * EACH
TOPICS = [f"bench/{number // 10}/{number % 10}" for number in range(50)]
PAYLOAD = 64
PACKET = 2 + 2 + len(TOPICS[0]) + 2 + PAYLOAD
BATCH = 500


class Figures(NamedTuple):
    """See `growth.py`: µs to store a message, ms for a session to be served, µs for each of its messages."""

    stored: float
    back: float
    each: float
    reads: float


class Sleeper:
    """A link that counts what comes, and what it will acknowledge."""

    def __init__(self, world: World, number: int, filters: list[str]) -> None:
        self.filters = filters
        self.begins_at = 0
        self.got = self.last = 0
        self._world = world
        self.name = f"sleeper-{number}"
        self._acks: list[bytes] = []
        self._client: Client | None = None

    def connect(self) -> None:
        self._client = self._world.broker.opened(self, self.name, None)
        self._send(encode(Connect(4, self.name, False, 0, None, None, None, {}), 4))

    def subscribe(self) -> None:
        wanted = tuple(Subscription(text, 1, False, False, 0) for text in self.filters)
        self._send(encode(Subscribe(1, wanted, {}), 4))

    def sleep(self) -> None:
        assert self._client is not None
        self._send(encode(Disconnect(), 4))
        self._world.broker.lost(self._client)

    def acknowledge(self) -> bool:
        """Send the acknowledgements that are due; whether there were any."""
        acks, self._acks = self._acks, []
        if acks:
            self._send(b"".join(acks))
        return bool(acks)

    def _send(self, data: bytes) -> None:
        assert self._client is not None
        self._world.broker.receive(self._client, data)
        self._world.broker.turn_over()

    def write(self, data: bytes) -> None:
        if data[0] & 0xF0 != 0x30:
            while data and data[0] & 0xF0 != 0x30:
                data = data[2 + data[1] :]
            if not data:
                return
        count, rest = divmod(len(data), PACKET)
        assert not rest, "a packet of another size"
        first, last = (int(data[at : at + PAYLOAD]) for at in (PACKET - PAYLOAD, len(data) - PAYLOAD))
        assert self.last < first <= last - count + 1, "out of order"
        self.last = last
        self.got += count
        at = PACKET - PAYLOAD - 2
        self._acks += [b"\x40\x02" + data[n : n + 2] for n in range(at, len(data), PACKET)]

    def close(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def buffered(self) -> int:
        return 0


def returning(count: int, apart: bool) -> Figures:
    """So many sleepers."""
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name) / "log.db", Limits(max_connections=2 * count))
        world.auto = False
        world.broker.router.set_wants([Want(PUBLISH, "#", 1, False)])
        chance = random.Random(count)
        total = APART if apart else EACH
        sleepers = [Sleeper(world, number, _filters(chance, apart)) for number in range(count)]
        for sleeper in sleepers:
            sleeper.begins_at = chance.randrange(total // 2) if apart else 0
            sleeper.connect()
            sleeper.subscribe()
            world.settle()
            sleeper.sleep()
        before = world.broker.log.next_seq
        began = time.process_time()
        _publish(world, total)
        stored = (time.process_time() - began) / total
        assert world.broker.log.next_seq - before == total, "more than one row a message"
        for sleeper in sleepers:
            _move(world, sleeper, before + sleeper.begins_at)
        world.broker.delivery.forget_tail()  # an hour later
        began = time.process_time()
        for sleeper in sleepers:
            sleeper.connect()
        _serve(world, sleepers)
        took = time.process_time() - began
        for sleeper in sleepers:
            wanted = [any(matches(text, topic) for text in sleeper.filters) for topic in TOPICS]
            expected = sum(wanted[number % 50] for number in range(sleeper.begins_at, total))
            assert sleeper.got == expected, f"{sleeper.got} of {expected}"
        reads = world.pieces_read
        world.kill()
        return Figures(stored * 1e6, took / count * 1e3, took / sum(s.got for s in sleepers) * 1e6, reads)


def _filters(chance: random.Random, apart: bool) -> list[str]:
    if not apart:
        return ["bench/#"]
    group = chance.randrange(5)
    choices: list[list[str]] = [
        [f"bench/+/{chance.randrange(10)}"],
        [f"bench/{group}/{chance.randrange(5)}", f"bench/{group}/+/#", *chance.sample(TOPICS, 2)][::3],
        chance.sample(TOPICS, 5),
        [f"bench/+/{chance.randrange(10)}", chance.choice(TOPICS)],
    ]
    return list(dict.fromkeys(chance.choice(choices)))


def _publish(world: World, total: int) -> None:
    sender = Device(world, "sender")
    world.settle()
    for start in range(0, total, BATCH):
        for number in range(start, start + BATCH):
            sender.publish(TOPICS[number % 50], b"%064d" % (number + 1), packet_id=number % 60_000 + 1)
        world.settle()
        sender.got.clear()


def _move(world: World, sleeper: Sleeper, seq: int) -> None:
    """It fell asleep when this seq was next."""
    session = world.broker.sessions.get(sleeper.name)
    assert session is not None
    session.next_seq = seq


def _serve(world: World, sleepers: list[Sleeper]) -> None:
    """One thing after the other, as the loop would, until nothing is due any more."""
    busy = True
    while busy:
        busy = bool(world.commits or world.reads)
        if world.commits:
            world.commit()
        if world.reads:
            world.read()
        for sleeper in sleepers:
            busy |= sleeper.acknowledge()
