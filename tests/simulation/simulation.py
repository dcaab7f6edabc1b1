"""One seeded simulation of broker core, log and uplink worker: devices, disk, link, clock and crashes are chance.

Every step takes one of the things that could happen next: bytes move, a commit succeeds, fails or is cut off before or after
it became durable, a read of the log is answered, time passes or jumps, the gateway is killed or stopped, the far end loses an
answer or its memory. `finish` lets everything come to rest, and the model says what must be true then. All chance comes from
one generator, so a seed repeats a failure exactly.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tidegate.gateway.accounts import mismatch
from tidegate.store.entry import PUBLISH, Entry
from tidegate.store.log import Batch, Name, Row
from tidegate.store.reader import LogReader
from tidegate.uplink.backend import Action, Packed
from tidegate.uplink.plan import Plan
from tidegate.uplink.pools import Pool
from tidegate.uplink.progress import Progress, read_pools
from tidegate.uplink.rule import Rule, load, wants
from tidegate.uplink.worker import Worker

from tests.broker.world import NOW, World
from tests.uplink.far_end import FarEnd, FarLink
from tests.uplink.rig import TestClock

from .device import Device, Wire
from .model import Model

RULES = """
backend.redis.pool1.server = 127.0.0.1:1
backend.redis.hook.client.connected.1 = {"action": {"function": "on_client_connected"}, "pool": "pool1"}
backend.redis.hook.client.disconnected.1 = {"action": {"function": "on_client_disconnected"}, "pool": "pool1"}
backend.redis.hook.message.publish.1 = {"topic": "b/#", "action": {"commands": ["A ${payload}"]}, "pool": "pool1"}
backend.redis.hook.message.publish.2 = {"topic": "#", "action": {"function": "on_message_publish"}, "pool": "pool1"}
backend.redis.hook.message.publish.3 = {"topic": "#", "action": {"function": "on_message_retain"}, "pool": "pool1"}
backend.redis.hook.message.publish.4 = {"topic": "#", "action": {"function": "on_retain_delete"}, "pool": "pool1"}
"""
SLEEPY, ALERT = 1, 40
"""Weights of an outage of the disk beginning and ending."""


class Backend:
    """Operations that are easy to compare: rule, kind, client, topic, payload."""

    def actions(self, rule: Rule, node: str) -> Action:
        def act(entry: Entry) -> Sequence[Packed]:
            if rule.number > 2 or (entry.kind == PUBLISH and not entry.qos and rule.number == 2):
                return ()
            return (Packed(operation(rule.number, entry.kind, entry.clientid, entry.topic, entry.payload), 1),)

        return act

    def gap_action(self) -> Action:
        return lambda entry: ()

    def connect(self, pool: Pool) -> FarLink:
        raise AssertionError("the simulation connects by itself")


def operation(rule: int, kind: int, clientid: str, topic: str, payload: bytes) -> bytes:
    return b"%d %d %b %b %b" % (rule, kind, clientid.encode(), topic.encode(), payload)


class Box(World):
    """One life of the gateway; what it makes durable is told to the model."""

    def __init__(self, path: Path, model: Model, wall: int, mono: int, durability: str = "full") -> None:
        super().__init__(path, None, durability, wall, mono)
        self.auto = False
        self._model = model
        model.durable(self._written_by_the_start())

    def _written_by_the_start(self) -> list[Row]:
        """A start after a crash writes down who was connected then."""
        last = self._model.rows[-1][0] if self._model.rows else 0
        return [
            (*row[:5], row[5] and Name(row[5]), row[6] and Name(row[6]), *row[7:])
            for row in self.store.connection.execute(
                "SELECT e.seq, e.at, e.mono, e.run, e.kind, c.clientid, t.name, e.flags, e.payload, e.properties FROM entry e"
                " LEFT JOIN client c ON c.id = e.client LEFT JOIN topic t ON t.id = e.topic WHERE e.seq > ? ORDER BY e.seq",
                (last,),
            )
        ]

    def commit(self) -> None:
        if self.fault is None:
            batch, done = self.commits.pop(0)
            self.apply(batch)
            done(None)
        else:
            super().commit()

    def apply(self, batch: Batch) -> None:
        """Make a batch durable without saying so: the answer may be lost."""
        self.store.apply(batch)
        self._model.durable(batch.rows)


class Simulation:
    """`run` some steps, then `finish`."""

    box_type: type[Box] = Box
    worker_type: type[Worker] = Worker
    model_type: type[Model] = Model

    def __init__(self, directory: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.model = self.model_type()
        self.counts: Counter[str] = Counter()
        self.path = directory / "log.db"
        self._wall = NOW
        self._mono = 1000
        conf = directory / "emqx_backend_redis.conf"
        conf.write_text(RULES)
        file = load(conf, "redis")
        self._rules = file.rules
        self._wants = wants([file], {})
        self.far = FarEnd(self.chance)
        self.clock = TestClock()
        self.devices = [Device(f"d{number}", number % 3 != 2, 4 + number % 2, self.chance, self.model) for number in range(6)]
        self._wires: list[Wire] = []
        self.box = self._start_box()
        self._progress = Progress(directory)
        self._open_reader()
        self.worker = self._start_worker()
        self._steps = self.weights()

    def close(self) -> None:
        self.box.kill()
        self._progress.close()
        self._reader.close()

    def _open_reader(self) -> None:
        self._reader = LogReader(self.path)

    def _start_box(self) -> Box:
        box = self.box_type(self.path, self.model, self._wall, self._mono)
        box.broker.router.set_wants(self._wants)
        return box

    def _start_worker(self) -> Worker:
        return self.worker_type(
            "redis.pool1",
            Plan(self._rules, Backend(), "node"),
            self.far.connect,
            self._reader,
            self._progress,
            self.clock,
            lambda text: None,
            self.chance,
        )

    def weights(self) -> tuple[list[Callable[[], None]], list[int]]:
        steps: dict[Callable[[], None], int] = {
            self._device_acts: 300,
            self._bytes_up: 300,
            self._bytes_down: 300,
            self._answer: 250,
            self._commit: 250,
            self._read: 150,
            self._timer: 60,
            self._time_passes: 20,
            self._worker_steps: 60,
            self._network_breaks: 12,
            self._broker_hears_of_ends: 60,
            self._clock_steps: 2,
            self._disk_fills: SLEEPY,
            self._disk_is_mended: ALERT,
            self._crash: 2,
            self._crash_after_commit: 2,
            self._stop: 1,
            self._restart_worker: 2,
        }
        return list(steps), list(steps.values())

    def run(self, steps: int) -> None:
        for step in self.chance.choices(*self._steps, k=steps):
            self.counts[step.__name__] += 1
            step()

    # -- devices and network ---------------------------------------------------------------------------------------

    def _device_acts(self) -> None:
        device = self.chance.choice(self.devices)
        if device.wire is None:
            device.connect(self.box)
            assert device.wire is not None
            self._wires.append(device.wire)
            return
        acts = (device.publish, device.subscribe, device.unsubscribe, device.ping, device.disconnect)
        self.chance.choices(acts, (300, 20, 3, 5, 3))[0]()

    def _bytes_up(self) -> None:
        """A turn of the gateway: some sockets are read."""
        for wire in self.chance.sample(self._wires, min(len(self._wires), self.chance.randrange(1, 4))):
            self._read_socket(wire)
        self.box.broker.turn_over()

    def _read_socket(self, wire: Wire) -> bool:
        if not wire.up or wire.paused or wire.broker_is_done or wire.client is None:
            return False
        data = wire.up.popleft()
        if self.chance.random() < 0.3:
            data += b"".join(wire.up)
            wire.up.clear()
        elif self.chance.random() < 0.1:
            cut = self.chance.randrange(len(data))
            wire.up.appendleft(data[cut:])
            data = data[:cut]
        if data:
            self.box.broker.receive(wire.client, data)
        return True

    def _bytes_down(self) -> None:
        device = self.chance.choice(self.devices)
        if not device.listen() and device.wire is not None and device.wire.broker_is_done:
            device.drop()

    def _answer(self) -> None:
        self.chance.choice(self.devices).answer()

    def _network_breaks(self) -> None:
        self.chance.choice(self.devices).drop()

    def _broker_hears_of_ends(self) -> None:
        mine = {device.wire for device in self.devices}
        for wire in self._wires:
            if (wire not in mine and not wire.up) or wire.broker_is_done:
                self._hang_up(wire)
                return

    def _hang_up(self, wire: Wire) -> None:
        self._wires.remove(wire)
        wire.broker_is_done = True
        if wire.client is not None:
            wire.client.closing = True
            self.box.broker.lost(wire.client)
            self.box.broker.turn_over()

    # -- disk and time ---------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        if self.box.commits:
            self.box.commit()

    def _read(self) -> None:
        if self.box.reads:
            self.box.read()

    def _timer(self) -> None:
        if self.box.timers:
            self.box.timers.pop(0)()

    def _disk_fills(self) -> None:
        self.box.fault = sqlite3.OperationalError("database or disk is full")

    def _disk_is_mended(self) -> None:
        self.box.fault = None

    def _time_passes(self) -> None:
        milliseconds = self.chance.choice((1, 50, 1000, 5000))
        self._wall += milliseconds
        self._mono += milliseconds
        self.box.broker.now += milliseconds / 1000
        self._tell_time()
        self.box.broker.tick()

    def _clock_steps(self) -> None:
        self._wall += self.chance.choice((-3_600_000, -5_000, 7_000, 3_600_000, 86_400_000))
        self._tell_time()

    def _tell_time(self) -> None:
        self.box.broker.log.tick(self._wall, self._mono)

    # -- ends and beginnings ---------------------------------------------------------------------------------------

    def _crash(self) -> None:
        self.box.kill()
        self.begin_again()

    def _crash_after_commit(self) -> None:
        """What was being committed is durable, and nobody ever hears so."""
        if self.box.commits and self.box.fault is None:
            self.box.apply(self.box.commits.pop(0)[0])
        self._crash()

    def _stop(self) -> None:
        if self.box.fault is None:
            self.box.stop()
            self.begin_again()

    def begin_again(self) -> None:
        for device in self.devices:
            device.drop()
        self._wires.clear()
        self._wall += 100
        self._mono += 100
        self.box = self._start_box()
        self._tell_time()
        self.worker = self._start_worker()

    def _worker_steps(self) -> None:
        self.clock.now += self.worker.step().seconds or 0.01

    def _restart_worker(self) -> None:
        self.worker = self._start_worker()

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Calm weather until nothing moves, then what must be true is checked."""
        self.far.calm = True
        self.box.fault = None
        lasting = [device for device in self.devices if device.persistent]
        for device in self.devices:
            if not device.persistent:
                device.drop()
        for _ in range(5_000):
            if not self._calm_step(lasting):
                break
        else:
            raise AssertionError(f"does not come to rest: {self.box.said[-3:]}")
        self.model.check({device.name for device in lasting}, {device.name for device in lasting})
        self._check_far_end()
        self._check_balance()
        self._check_retained()

    def _calm_step(self, lasting: list[Device]) -> bool:
        """Everything that can move moves once; whether anything did."""
        moved = False
        mine = {device.wire for device in self.devices}
        for wire in list(self._wires):
            moved |= self._read_socket(wire)
            if wire not in mine or wire.broker_is_done:
                self._hang_up(wire)
                moved = True
        self.box.broker.turn_over()
        for device in lasting:
            if device.wire is None:
                device.connect(self.box)
                assert device.wire is not None
                self._wires.append(device.wire)
            moved |= device.listen() | device.answer() | (not device.connected)
            if device.wire.broker_is_done and not device.wire.down:
                device.drop()
        waiting = (self.box.commits, self.box.reads, self.box.timers)
        for queue, act in zip(waiting, (self._commit, self._read, self._timer), strict=True):
            moved |= bool(queue)
            act()
        if not moved:
            self._time_passes()
            moved = self.box.broker.busy or not self.are_quiet(lasting)
        wait = self.worker.step()
        self.clock.now += wait.seconds or 0.0
        return moved or wait.seconds is not None

    def are_quiet(self, devices: list[Device]) -> bool:
        """Whether these have nothing left that is unfinished."""
        return all(device.is_quiet for device in devices)

    def _check_far_end(self) -> None:
        wanted = self.wanted()
        assert self.far.state.applied == wanted, first_difference(self.far.state.applied, wanted)

    def _check_balance(self) -> None:
        """Of what the pool was to carry, every entry is explained, and of what sessions were to get, every message."""
        for session in self.box.broker.sessions:
            assert not mismatch(session), f"{session.name.text}: {mismatch(session)} of its messages are nowhere"
        (pool,) = read_pools(self.path.parent, self.box.broker.gaps.ahead)
        assert not pool.balance["mismatch"] and not pool.balance["waiting"], str(pool.balance)

    def wanted(self) -> list[tuple[int, int, bytes]]:
        """What the far end must have been told: (seq, number of the operation, operation)."""
        wanted: list[tuple[int, int, bytes]] = []
        for row in self.model.rows:
            topic, payload = row[6].text if row[6] else "", row[8] or b""
            numbers = [2] if row[4] == PUBLISH and row[7] & 3 else [] if row[4] == PUBLISH else [1]
            if topic.startswith("b/"):
                numbers.insert(0, 1)
            made = [operation(number, row[4], row[5].text, topic, payload) for number in numbers]
            wanted += [(row[0], number, data) for number, data in enumerate(made)]
        return wanted

    def _check_retained(self) -> None:
        checker = self.box.device("checker")
        self.box.settle()
        checker.subscribe("#", 0)
        self.box.settle()
        got = {topic: payload for topic, flags, _, payload in checker.messages() if flags & 1}
        assert got == self.model.retained(), f"retained are {got}, should be {self.model.retained()}"


def first_difference(found: list[tuple[int, int, bytes]], wanted: list[tuple[int, int, bytes]]) -> str:
    for number, (one, other) in enumerate(zip(found, wanted, strict=False)):
        if one != other:
            return f"at {number}: {one} instead of {other}"
    return f"{len(found)} operations instead of {len(wanted)}"
