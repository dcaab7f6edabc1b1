"""One seeded simulation of broker core, log and uplink workers: devices, disk, link, clock and crashes are chance.

Every step takes one of the things that could happen next: bytes move, a commit succeeds, fails or is cut off before or after
it became durable, a read of the log is answered, time passes or jumps, the gateway is killed or stopped, the rules change, a
far end loses an answer or its memory. `finish` lets everything come to rest, and the model says what must be true then. All
chance comes from one generator, so a seed repeats a failure exactly.
"""

from __future__ import annotations

import hashlib
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tidegate.gateway.accounts import mismatch
from tidegate.gateway.session import NEVER
from tidegate.store.clock import Clock, Judge, believe
from tidegate.store.entry import PUBLISH
from tidegate.store.log import Batch, Name, Row
from tidegate.uplink.progress import read_pools
from tidegate.uplink.worker import Worker

from tests.broker.world import NOW, World

from .device import KINDS, Device, Wire
from .model import Model
from .uplink import Uplink
from .wills import Wills

RETAINED = re.compile("(INSERT OR REPLACE INTO|DELETE FROM) retained ")
SLEEPY, ALERT = 1, 40
"""Weights of an outage of the disk beginning and ending."""
SLEEPS_ON = 0.7
"""How often a device whose session ends some time does not come back yet."""


class Box(World):
    """One life of the gateway; what it makes durable is told to the model."""

    def __init__(
        self,
        path: Path,
        model: Model,
        wall: int,
        mono: int,
        durability: str = "full",
        judge: Judge = believe,
        boot: str = "the only one",
    ) -> None:
        super().__init__(path, None, durability, wall, mono, judge, boot)
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
        self._note_retained(batch)

    def _note_retained(self, batch: Batch) -> None:
        """A topic that is cleared and set again in one batch has the last of it."""
        last = {parameters[0].text: sql for sql, parameters in batch.changes if RETAINED.match(sql)}
        for topic, sql in last.items():
            if sql.startswith("DELETE"):
                self._model.cleared(topic)


class Simulation:
    """`run` some steps, then `finish`."""

    box_type: type[Box] = Box
    worker_type: type[Worker] = Worker
    model_type: type[Model] = Model
    uplink_type: type[Uplink] = Uplink

    def __init__(self, directory: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.model = self.model_type()
        self.wills = Wills(self.model)
        self.counts: Counter[str] = Counter()
        self.path = directory / "log.db"
        self._wall = NOW
        self._mono = 1000
        self.devices = [
            Device(f"d{number}", kind, self.chance, self.model, self.wills, lambda: self._mono)
            for number, kind in enumerate(KINDS)
        ]
        self._wires: list[Wire] = []
        self.box = self._start_box()
        self.uplink = self.uplink_type(directory, self.chance, self.model, lambda: self.box.fault is not None)
        self.uplink.worker_type = self.worker_type
        self._begin()
        self._steps = self.weights()

    def close(self) -> None:
        self.box.kill()
        self.uplink.close()

    def _start_box(self) -> Box:
        return self.box_type(self.path, self.model, self._wall, self._mono)

    def _begin(self) -> None:
        """Broker and child have been started, and read the rules."""
        self.uplink.tell(self.box)
        self.uplink.start()

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
            self._restart_uplink: 2,
            self._edit_rules: 3,
            self._reload: 4,
            self._take_stock: 1,
        }
        return list(steps), list(steps.values())

    def run(self, steps: int) -> None:
        for step in self.chance.choices(*self._steps, k=steps):
            self.counts[step.__name__] += 1
            step()

    def story(self) -> str:
        """What happened, in a few characters: the same seed tells the same story on every machine. (Message ids are not in
        it: they hold the gateway's own id.)"""
        digest = hashlib.sha256()
        for row in self.model.rows:
            names = [name.text for name in row[5:7] if name is not None]
            digest.update(repr((row[0], row[1], row[4], names, row[7], row[8] if row[4] == PUBLISH else b"")).encode())
        digest.update(self.uplink.story().encode())
        return f"{self.counts.total()} steps, {len(self.model.rows)} rows, {digest.hexdigest()[:16]}"

    # -- devices and network ---------------------------------------------------------------------------------------

    def _device_acts(self) -> None:
        device = self.chance.choice(self.devices)
        if device.wire is None:
            if 0 < device.kind.expiry < NEVER and self.chance.random() < SLEEPS_ON:
                return
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
            wire.read(data)
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
        if not wire.broker_is_done:
            wire.close()
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
        milliseconds = self.chance.choice((1, 50, 1000, 2000, 5000))
        self._wall += milliseconds
        self._mono += milliseconds
        self.box.broker.now += milliseconds / 1000
        self._tell_time()
        self.box.broker.tick()

    def _clock_steps(self) -> None:
        self._wall += self.chance.choice((-3_600_000, -5_000, 7_000, 3_600_000, 86_400_000))
        for device in self.devices:
            device.in_doubt = True
        self._tell_time()

    def _tell_time(self) -> None:
        self.model.note_ages()
        log = self.box.broker.log
        log.tick(self._mono)
        log.step(*self.judge(log.clock, self._wall, self._mono))
        self.model.age = log.age

    def judge(self, clock: Clock, wall: int, mono: int) -> tuple[int, int]:
        """How far the clock is believed."""
        return believe(clock, wall, mono)

    # -- rules -----------------------------------------------------------------------------------------------------

    def _edit_rules(self) -> None:
        self.uplink.edit()

    def _reload(self) -> None:
        """SIGHUP."""
        self.uplink.tell(self.box)

    def _take_stock(self) -> None:
        self.uplink.take_stock()

    # -- ends and beginnings ---------------------------------------------------------------------------------------

    def _crash(self) -> None:
        self.box.kill()
        self.wills.crashed()
        self.begin_again()

    def _crash_after_commit(self) -> None:
        """What was being committed is durable, and nobody ever hears so."""
        if self.box.commits and self.box.fault is None:
            self.box.apply(self.box.commits.pop(0)[0])
        self._crash()

    def _stop(self) -> None:
        if self.box.fault is None:
            self.box.stop()
            self.wills.stopped()
            self.after_stop()
            self.begin_again()

    def after_stop(self) -> None: ...

    def begin_again(self) -> None:
        for device in self.devices:
            device.drop()
            device.ended = None
        self._wires.clear()
        self._wall += 100
        self._mono += 100
        self.box = self._start_box()
        self._tell_time()
        self._begin()

    def _worker_steps(self) -> None:
        self.uplink.step()

    def _restart_uplink(self) -> None:
        self.uplink.start()

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Calm weather until nothing moves, then what must be true is checked."""
        self.uplink.calm()
        self.box.fault = None
        self.uplink.mend(self.box)
        lasting = [device for device in self.devices if device.persistent]
        for device in self.devices:
            if not device.persistent:
                device.drop()
        for _ in range(5_000):
            if not self._calm_step(lasting):
                break
        else:
            raise AssertionError(f"does not come to rest: {self.box.said[-3:]}")
        self.model.check({device.name: device.kind.small_packets for device in lasting}, {device.name for device in lasting})
        self.check_wills()
        self.uplink.check(self.model.rows)
        self.check_retained()
        self.check_balance()

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
        return self.uplink.step() or moved

    def are_quiet(self, devices: list[Device]) -> bool:
        """Whether these have nothing left that is unfinished."""
        return all(device.is_quiet for device in devices)

    def check_wills(self) -> None:
        self.wills.check()

    def check_balance(self) -> None:
        """Of what pools were to carry every entry is explained, and of what sessions were to get every message."""
        for session in self.box.broker.sessions:
            assert not mismatch(session), f"{session.name.text}: {mismatch(session)} of its messages are nowhere"
        for pool in read_pools(self.path.parent, self.box.broker.gaps.ahead):
            assert not pool.balance["mismatch"], str(pool.balance)

    def check_retained(self) -> None:
        checker = self.box.device("checker")
        self.box.settle()
        checker.subscribe("#", 0)
        self.box.settle()
        got = {topic: payload for topic, flags, _, payload in checker.messages() if flags & 1}
        assert got == self.model.retained(), f"retained are {got}, should be {self.model.retained()}"
