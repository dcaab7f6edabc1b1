"""The worker in a seeded simulation: whatever happens on the way, the far end ends with everything once and in order."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.store.entry import Entry
from tidegate.store.reader import LogReader
from tidegate.store.schema import StoreError
from tidegate.uplink.backend import Action, Packed
from tidegate.uplink.plan import Plan
from tidegate.uplink.pools import Pool
from tidegate.uplink.progress import Progress, cursors, read_pools
from tidegate.uplink.rule import Rule, load
from tidegate.uplink.worker import MAX_BACK_OFF, Worker

from tests.support.said import Said

from .far_end import FarEnd, FarLink
from .logfile import LogFile
from .rig import TestClock

RULES = """
backend.redis.pool1.server = 127.0.0.1:1
backend.redis.hook.message.publish.1 = {"topic": "twice/#", "action": {"commands": ["A ${payload}"]}, "pool": "pool1"}
backend.redis.hook.message.publish.2 = {"topic": "#", "action": {"commands": ["B ${payload}"]}, "pool": "pool1"}
"""
SEEDS = 60


class Backend:
    """Operations that are easy to compare: the rule's number and the payload."""

    def actions(self, rule: Rule, node: str) -> Action:
        def act(entry: Entry) -> Sequence[Packed]:
            return () if entry.topic == "unwanted" else (Packed(b"%d %b" % (rule.number, entry.payload), 1),)

        return act

    def gap_action(self) -> Action:
        return lambda entry: ()

    def connect(self, pool: Pool) -> FarLink:
        raise AssertionError("the simulation connects by itself")


class FullDisk(Progress):
    """Refuses to write now and then, as a disk that others fill up."""

    def __init__(self, directory: Path, chance: random.Random, far: FarEnd) -> None:
        super().__init__(directory)
        self._chance = chance
        self._far = far

    @contextlib.contextmanager
    def transaction(self, synchronous: str = "NORMAL") -> Iterator[sqlite3.Connection]:
        if not self._far.calm and self._chance.random() < 0.1:
            raise StoreError("uplink.db: database or disk is full")
        with super().transaction(synchronous) as db:
            yield db


class Simulation:
    """A log, a far end and a worker that is restarted now and then."""

    def __init__(self, directory: Path, seed: int, refusing: str = "bad") -> None:
        self.chance = random.Random(seed)
        self.log = LogFile(directory)
        self.clock = TestClock()
        self.data = directory
        bad = {b"2 %d" % number for number in range(400) if self.chance.random() < 0.02}
        self.far = FarEnd(self.chance, **{refusing: bad})
        self.bad = bad
        conf = directory / "emqx_backend_redis.conf"
        conf.write_text(RULES)
        self._rules = load(conf, "redis").rules
        self._progress = FullDisk(directory, self.chance, self.far)
        self._reader = LogReader(self.log.path)
        self._numbers = iter(range(1_000_000))
        self.said = Said()
        self.start()

    def close(self) -> None:
        self._progress.close()
        self._reader.close()
        self.log.close()

    def start(self) -> None:
        """A new worker, as after kill -9: what was not saved is forgotten."""
        self.worker = Worker(
            "redis.pool1",
            Plan(self._rules, Backend(), "node"),
            self.far.connect,
            self._reader,
            self._progress,
            self.clock,
            self.said,
            self.chance,
        )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            dice = self.chance.random()
            if dice < 0.2:
                self._publish(self.chance.randrange(1, 40))
            elif dice < 0.22:
                self.start()
            elif dice < 0.23:
                self.log.new_run(self.log_epoch + 1)
            self.clock.now += self.worker.step().seconds or 0.01

    def finish(self, worker: Worker | None = None) -> None:
        """Calm weather until everything is through, by this worker or a new one."""
        self.far.calm = True
        if worker is None:
            self.start()
        for _ in range(2000):
            wait = self.worker.step()
            if wait.seconds is None:
                return
            self.clock.now += wait.seconds
        raise AssertionError("does not come to rest")

    @property
    def log_epoch(self) -> int:
        return self._reader.births()[-1][1]

    def wanted(self) -> list[tuple[int, int, bytes]]:
        found: list[tuple[int, int, bytes]] = []
        for entry in self.log.entries():
            rules = () if entry.topic == "unwanted" else (1, 2) if entry.topic == "twice/x" else (2,)
            operations = [b"%d %b" % (rule, entry.payload) for rule in rules]
            found += [(entry.seq, number, data) for number, data in enumerate(operations)]
        return found

    def quarantined(self) -> list[tuple[int, int, bytes]]:
        with closing(sqlite3.connect(self.data / "uplink.db")) as db:
            return db.execute("SELECT seq, number, original FROM quarantine ORDER BY seq, number").fetchall()

    def _publish(self, count: int) -> None:
        for _ in range(count):
            topic = self.chance.choice(["once", "twice/x", "unwanted"])
            self.log.publish(topic, b"%d" % next(self._numbers))


def assert_balance(simulation: Simulation, parked: int) -> None:
    """Everything that came to rest is explained; what a restored far end lost was sent again, and so counts again."""
    (pool,) = read_pools(simulation.data)
    sheet = pool.balance
    assert not sheet["mismatch"] and not sheet["waiting"] and not sheet["dropped"], str(sheet)
    assert sheet["parked"] == parked
    assert sheet["wanted"] == sheet["delivered"] + parked >= len({seq for seq, *_ in simulation.wanted()})


@pytest.mark.parametrize("seed", range(SEEDS))
def test_everything_once_and_in_order_whatever_happens(tmp_path: Path, seed: int) -> None:
    simulation = Simulation(tmp_path, seed)
    simulation.run(250)
    simulation.finish()
    refused = {operation for operation in simulation.wanted() if operation[2] in simulation.bad}
    assert simulation.far.state.applied == [operation for operation in simulation.wanted() if operation not in refused]
    assert set(simulation.quarantined()) == refused
    assert simulation.far.state.refused == {}
    assert_balance(simulation, len({seq for seq, *_ in refused}))
    simulation.close()


@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_what_the_far_end_names_goes_to_quarantine_and_the_rest_through_whatever_happens(tmp_path: Path, seed: int) -> None:
    simulation = Simulation(tmp_path, seed, "named")
    simulation.run(250)
    simulation.finish()
    refused = {operation for operation in simulation.wanted() if operation[2] in simulation.bad}
    assert simulation.far.state.applied == [operation for operation in simulation.wanted() if operation not in refused]
    assert set(simulation.quarantined()) == refused
    simulation.close()


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_refused_as_a_whole_is_halved_down_to_the_bad_entry(tmp_path: Path, seed: int) -> None:
    simulation = Simulation(tmp_path, seed, "poison")
    simulation.far.calm = True
    simulation.run(120)
    simulation.finish()
    poisoned = {seq for seq, _, data in simulation.wanted() if data in simulation.bad}
    assert poisoned
    assert [op for op in simulation.wanted() if op[0] not in poisoned] == simulation.far.state.applied
    assert {seq for seq, *_ in simulation.quarantined()} == poisoned
    assert_balance(simulation, len(poisoned))
    simulation.close()


def test_back_off_grows_to_a_bound_and_says_little(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 1)
    waits: list[float] = []
    simulation.far.connect = _unreachable  # type: ignore[method-assign]
    simulation.start()
    for _ in range(100):
        wait = simulation.worker.step()
        assert not wait.for_news, "a device's message is no reason to knock again"
        waits.append(wait.seconds or 0.0)
        simulation.clock.now += waits[-1]
    assert waits[0] <= 0.1
    assert MAX_BACK_OFF / 2 <= waits[-1] <= MAX_BACK_OFF
    assert len(simulation.said) <= sum(waits) / 30 + 1
    simulation.close()


def test_batches_double_while_the_far_end_is_quick_and_an_outage_before_does_not_make_them_small(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 1)
    simulation.far.calm = True
    ways = iter([_unreachable] * 100)
    connect = simulation.far.connect
    simulation.far.connect = lambda: next(ways, connect)()  # type: ignore[method-assign]
    simulation.start()
    for number in range(4000):
        simulation.log.publish("once", b"%d" % number)
    marks: list[int] = []
    for _ in range(110):
        simulation.clock.now += simulation.worker.step().seconds or 0.0
        marks += [mark.seq for mark in simulation.far.state.marks.values() if mark.seq not in marks]
    assert marks == [100, 200, 400, 800, 1600, 2600, 3600, 4000]
    simulation.close()


def test_a_link_that_flaps_says_little_and_tells_the_end_of_each_loss_it_told(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 1)
    simulation.far.calm = True
    began = simulation.clock.now
    for number in range(300):
        simulation.log.publish("once", b"%d" % (1000 + number))
        simulation.finish(simulation.worker)
        simulation.far.is_cut = True
        assert not simulation.worker.step().for_news
        simulation.far.is_cut = False
        simulation.clock.now += 1.0
    simulation.finish(simulation.worker)
    minutes = (simulation.clock.now - began) / 60
    assert simulation.said[::2] == [line for line in simulation.said if line.startswith("pool_unreachable: ")]
    assert simulation.said[1::2] == ["pool_connected: connected again"] * (len(simulation.said) // 2)
    assert 2 <= len(simulation.said) <= 4 * minutes + 4
    held = sum(int(line.rpartition("repeated=")[2]) for line in simulation.said if "repeated=" in line)
    assert 300 - 30 <= held + len(simulation.said) // 2 <= 300, "what was held back is not counted"
    simulation.close()


def test_every_outage_of_a_far_end_that_was_well_in_between_has_its_lines(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 1)
    simulation.far.calm = True
    simulation.finish(simulation.worker)
    connect = simulation.far.connect
    for _ in range(5):
        simulation.clock.now += 3.0
        simulation.far.is_cut, simulation.far.connect = True, _unreachable  # type: ignore[method-assign]
        for _ in range(4):
            simulation.clock.now += simulation.worker.step().seconds or 0.0
        simulation.far.is_cut, simulation.far.connect = False, connect  # type: ignore[method-assign]
        simulation.finish(simulation.worker)
    assert [line.partition(":")[0] for line in simulation.said] == ["pool_unreachable", "pool_connected"] * 5
    simulation.close()


def test_status_and_cursor_can_be_read_from_outside(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, 2)
    simulation.far.calm = True
    for number in range(500):
        simulation.log.publish("once", b"%d" % (1000 + number))
    simulation.worker.step()
    assert cursors(tmp_path) == {"redis.pool1": 0}
    (pool,) = read_pools(tmp_path)
    assert (pool.state, pool.waiting, pool.oldest_at) == ("starting", 500, simulation.log.entries()[0].at)
    simulation.finish()
    (pool,) = read_pools(tmp_path)
    assert (pool.name, pool.state, pool.waiting, pool.cursor, pool.delivered) == ("redis.pool1", "connected", 0, 500, 500)
    simulation.close()


@pytest.fixture
def calm(tmp_path: Path) -> Iterator[Simulation]:
    """A far end that takes a batch in half a second, and its worker, connected and with nothing to carry."""
    simulation = Simulation(tmp_path, 1)
    simulation.far.calm = True
    simulation.finish(simulation.worker)
    yield simulation
    simulation.close()


def shown(simulation: Simulation, later: float = 0.0) -> tuple[object, object, object]:
    (pool,) = read_pools(simulation.data)
    found = pool.as_dict(simulation.clock.wall() + int(later * 1000))
    return found["waiting"], found["rate"], found["drain"]


def take(simulation: Simulation, batches: int) -> None:
    for _ in range(batches):
        simulation.clock.now += 0.5
        simulation.worker.step()


def publish(simulation: Simulation, count: int) -> None:
    for number in range(count):
        simulation.log.publish("once", b"%d" % (1000 + number))


def test_the_time_to_drain_is_told_of_a_backlog_that_is_being_drained_and_not_when_nothing_was_confirmed_lately(
    calm: Simulation,
) -> None:
    calm.clock.now += 3600.0  # an idle hour says nothing of how fast it goes
    publish(calm, 12_000)
    take(calm, 10)
    waiting, rate, drain = shown(calm)
    assert isinstance(waiting, int) and 0 < waiting < 8_000
    assert (rate, drain) == (2000.0, waiting / 2000.0), "a thousand each half second, after smaller ones at first"
    assert shown(calm, later=4.0) == (waiting, rate, drain)
    assert shown(calm, later=6.0) == (waiting, 0.0, None), "the far end hangs"


def test_who_is_idle_but_for_a_message_now_and_then_has_no_time_to_drain(calm: Simulation) -> None:
    for _ in range(20):
        publish(calm, 1)
        take(calm, 2)
    publish(calm, 9)
    assert shown(calm) == (9, 0.0, None)


def test_a_connection_that_was_lost_takes_its_rate_along(calm: Simulation) -> None:
    publish(calm, 12_000)
    take(calm, 10)
    connect, calm.far.connect = calm.far.connect, _unreachable  # type: ignore[method-assign]
    calm.worker.stop()
    take(calm, 1)
    assert shown(calm)[1:] == (0.0, None)
    calm.far.connect = connect  # type: ignore[method-assign]
    take(calm, 2)
    assert shown(calm)[1:] == (0.0, None), "nothing was measured since"


def _unreachable() -> FarLink:
    from tidegate.uplink.errors import NotConnected

    raise NotConnected("nobody there")
