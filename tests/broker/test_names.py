"""Names that nothing uses are collected, and a number never stands for another name, whatever happens in between.

The simulation plays commits, their answers and the steps of the trim in any order, over several lives of the gateway, and
compares what readers see (one of them keeps what it has cached) with what was published.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.packets import PubAck
from tidegate.gateway.trimming import Reach, Trimming
from tidegate.store.catchup import CatchUp
from tidegate.store.clock import Moment
from tidegate.store.entry import ACKED, CONNECTED, DELIVERED, DISCONNECTED, KINDS, PUBLISH, Entry, Want
from tidegate.store.names import Unused
from tidegate.store.reader import LogReader
from tidegate.store.trim import Plan, Trim

from .world import Device, World

AGE = 60_000
SEEDS = 40


class Found(Trim):
    """Remembers whether its last answer was names."""

    found = False

    def plan(self, db: sqlite3.Connection, now: Moment, floor: int) -> Plan | Unused | None:
        plan = super().plan(db, now, floor)
        self.found = isinstance(plan, Unused) and bool(plan.topics or plan.clients)
        return plan


class Committing(World):
    """A world whose committer works in its own time: jobs in order, answers when the loop comes to them."""

    def __init__(self, path: Path, kinds: Iterable[int] = KINDS.values()) -> None:
        super().__init__(path, Limits())
        self.auto = False
        self.jobs: list[Callable[[], None]] = []
        self.answers: list[Callable[[], None]] = []
        self.broker.router.set_wants(Want(kind, "#", 0, False) for kind in kinds)
        self.trim = Found(1 << 30, AGE)
        self.trimming = Trimming(
            self.trim, self.store.connection, self.submit, self.broker, lambda: Reach(1 << 60, ()), self.said
        )

    def submit(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        def work() -> None:
            result = job()
            self.answers.append(lambda: done(result))

        self.jobs.append(work)

    def _commit(self, batch: Any, done: Callable[[Any], None]) -> None:
        self.submit(lambda: self.store.apply(batch), done)

    def go_on(self, chance: random.Random) -> None:
        """One thing happens in the committer's thread, the reader's or the loop."""
        queues: list[list[Any]] = [queue for queue in (self.jobs, self.answers, self.reads) if queue]
        if queues:
            queue = chance.choice(queues)
            if queue is self.reads:
                job, done = queue.pop(0)
                done(job(self._catch_up))
            else:
                queue.pop(0)()

    def until_names_are_handed_out(self) -> None:
        """The committer has found unused names; the loop has not heard of it yet."""
        while not (self.trim.found and self.answers):
            assert self.jobs or self.answers, "nothing was found"
            (self.answers or self.jobs).pop(0)()

    def settle(self) -> None:
        while self.jobs or self.answers or self.reads:
            self.go_on(random.Random(0))

    def forget_all(self) -> None:
        """Everything in the log grows old and goes, and the names with it."""
        self.settle()
        self.elapse(2 * AGE)
        self.trimming.start()
        self.settle()


def read(world: World) -> list[Entry]:
    return LogReader(world.store.path).read(0, 1000)[0]


def names(world: World, table: str) -> set[str]:
    column = "name" if table == "topic" else "clientid"
    return {text for (text,) in world.store.connection.execute(f"SELECT {column} FROM {table}")}


def test_random_clients_and_topics_do_not_stay(tmp_path: Path) -> None:
    world = Committing(tmp_path / "log.db")
    for number in range(300):
        device = world.device(f"random-{number}")
        device.publish(f"random/{number}", b"x")
        world.settle()
        device.disconnect()
    world.forget_all()
    assert len(names(world, "topic")) == 1, "the highest number stays, so that it is not given out again"
    assert len(names(world, "client")) == 1
    assert world.store.connection.execute("SELECT count(*) FROM sqlite_temp_schema").fetchone() == (0,)
    world.stop()


def test_what_is_still_used_outside_the_log_stays(tmp_path: Path) -> None:
    world = Committing(tmp_path / "log.db")
    sleeper = world.device("sleeper", clean=False)
    world.settle()
    sleeper.subscribe("far/away", 2)
    online = world.device("online")
    online.publish("kept", b"value", retain=True)
    world.settle()
    sleeper.disconnect()
    for number in range(20):
        online.publish(f"t/{number}", b"x")
        world.settle()
    world.forget_all()
    assert names(world, "topic") == {"kept", "t/19"}
    assert names(world, "client") == {"sleeper", "online"}
    online.publish("t/0", b"again")
    world.settle()
    assert [(e.clientid, e.topic, e.payload) for e in read(world) if e.kind == PUBLISH] == [
        ("online", "kept", b"value"),
        ("online", "t/0", b"again"),
    ]
    world.stop()


def test_what_a_new_client_said_before_its_connack_has_its_topic(tmp_path: Path) -> None:
    world = Committing(tmp_path / "log.db")
    first = world.device("first")
    for text in ("unused", "highest"):
        first.publish(text, b"x")
        world.settle()
    world.elapse(2 * AGE)
    world.trimming.start()
    world.until_names_are_handed_out()
    first.publish("highest", b"y")
    world.device("second", clean=False).publish("unused", b"z")
    world.settle()
    assert [(e.topic, e.payload) for e in read(world) if e.kind == PUBLISH] == [("highest", b"y"), ("unused", b"z")]
    world.stop()


def test_who_is_connected_keeps_its_name_although_nothing_on_disk_uses_it(tmp_path: Path) -> None:
    world = Committing(tmp_path / "log.db", [PUBLISH])
    device, other = world.device("quiet"), world.device("other")
    device.publish("t", b"x")
    world.settle()
    other.publish("u", b"x")
    world.forget_all()
    device.publish("t", b"y")
    world.settle()
    assert [(e.clientid, e.payload) for e in read(world)] == [("quiet", b"y")]
    world.stop()


def test_a_late_record_of_an_acknowledgement_has_its_names(tmp_path: Path) -> None:
    world = Committing(tmp_path / "log.db", [PUBLISH, ACKED])
    reader, writer = world.device("reader", auto_ack=False), world.device("writer")
    reader.subscribe("t", 1)
    writer.publish("t", b"x")
    world.settle()
    ((_, _, packet_id, _),) = reader.messages()
    for _ in range(40):
        world.wait(1)
    reader.send(PubAck(packet_id))
    ((job, done),) = world.reads
    world.reads.clear()
    found = job(world._catch_up)
    reader.disconnect()
    writer.publish("u", b"x")
    world.forget_all()
    assert names(world, "client") == {"writer"}
    done(found)
    world.settle()
    assert [(e.kind, e.clientid, e.topic) for e in read(world)] == [(ACKED, "reader", "t")]
    world.stop()


@pytest.mark.parametrize("look", ["log", "retained"])
def test_a_reader_that_was_interrupted_between_entry_and_name_has_both(tmp_path: Path, look: str) -> None:
    world = Committing(tmp_path / "log.db")
    device = world.device("c")
    for text in ("t", "highest"):
        device.publish(text, b"x")
        world.settle()
    seq = next(entry.seq for entry in read(world) if entry.topic == "t")
    reader: Any = LogReader(world.store.path) if look == "log" else CatchUp(world.store.path)

    def interrupted(sql: str) -> None:
        if "FROM topic" in sql:
            reader._db.set_trace_callback(None)
            world.forget_all()

    reader._db.set_trace_callback(interrupted)
    found = [e.topic for e in reader.read(seq - 1, 1)[0]] if look == "log" else [m[1].decode() for m in reader.fetch([seq])[0]]
    assert found == ["t"]
    assert names(world, "topic") == {"highest"}
    world.stop()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_number_never_stands_for_another_name(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "log.db"
    published: dict[bytes, tuple[str, str]] = {}
    """Payload -> (client, topic)."""
    for _ in range(3):
        world = Committing(path)
        reader = LogReader(path)
        devices: list[Device] = []
        for _ in range(250):
            _something(world, devices, published, chance)
            if chance.random() < 0.2:
                _check(reader, published)
        if chance.random() < 0.5:
            world.kill()
        else:
            world.forget_all()
            _check(reader, published)
            world.stop()
        _check(LogReader(path), published)
        reader.close()


def _something(
    world: Committing, devices: list[Device], published: dict[bytes, tuple[str, str]], chance: random.Random
) -> None:
    what = chance.random()
    if what < 0.1 or not devices:
        clientid = f"c{chance.randrange(12)}"
        devices[:] = [device for device in devices if device.client.session is not None]
        devices.append(world.device(clientid, clean=chance.random() < 0.6, auto_ack=False))
    device = chance.choice(devices)
    if device.client.session is None or device.closed:
        pass
    elif what < 0.35:
        payload = b"%d" % len(published)
        topic = f"t/{chance.randrange(15)}"
        published[payload] = (device.client.session.name.text, topic)
        device.publish(topic, payload, 1, retain=chance.random() < 0.1, packet_id=len(published) % 60_000 + 1)
    elif what < 0.38:
        device.subscribe(f"t/{chance.randrange(15)}", 1)
    elif what < 0.42:
        device.disconnect()
    elif what < 0.45:
        device.publish(f"t/{chance.randrange(15)}", b"", 0, retain=True)
    elif what < 0.5:
        for _, flags, packet_id, _ in device.messages():
            if flags >> 1 & 3 == 1 and not device.closed and device.client.session is not None:
                device.send(PubAck(packet_id))
    if what > 0.97:
        world.broker.router.topics.clear()
    elif what > 0.9:
        world.elapse(AGE // 2)
    elif what > 0.8:
        world.trimming.start()
    for _ in range(chance.randrange(6)):
        world.go_on(chance)


def _check(reader: LogReader, published: dict[bytes, tuple[str, str]]) -> None:
    """Every entry has its names, and a message those it was published with."""
    after = 0
    by_msgid: dict[bytes, str] = {}
    while True:
        entries, through = reader.read(after, 500)
        if through == after:
            return
        after = through
        for entry in entries:
            if entry.kind == PUBLISH and entry.payload:
                assert (entry.clientid, entry.topic) == published[entry.payload]
                by_msgid[entry.msgid.encode()] = entry.topic
            elif entry.kind in (ACKED, DELIVERED):
                assert entry.topic == by_msgid.get(entry.payload, entry.topic)
            elif entry.kind in (CONNECTED, DISCONNECTED):
                assert entry.clientid.startswith("c")
