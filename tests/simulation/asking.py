"""What comes down: the broker's core, its inbox and the lane that asks, with a business system at a far end, by one seed.

As in `simulation`: bytes, commits and reads happen one by one, clocks step, disks are full, either process is killed at any
moment: the child before or after its answers are kept, the broker before or after the commit that takes them. A power cut sets
`uplink.db` back to what was synced last. Devices are close by: what they send arrives.

In the end every message that stands at the far end has reached those who subscribe to its topic, what was acknowledged with
QoS 2 never came again, subscriptions are what the far end said last, and the newest value is the retained one.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from tidegate.gateway.inbox import Inbox
from tidegate.gateway.trimming import Reach, Trimming, reach
from tidegate.store.clock import believe
from tidegate.store.entry import PUBLISH, RETAIN
from tidegate.store.inbox import Answer
from tidegate.store.reader import LogReader
from tidegate.store.schema import StoreError
from tidegate.store.trim import Trim
from tidegate.uplink.asking_lane import AskingLane, Lane
from tidegate.uplink.crowd import Question
from tidegate.uplink.lane_book import LaneBook, LaneStanding
from tidegate.uplink.lane_log import LaneLog
from tidegate.uplink.local import local_rules
from tidegate.uplink.progress import Progress, held
from tidegate.uplink.reading import reading
from tidegate.uplink.rule import load_all, wants

from tests.broker.world import NOW, World
from tests.support.said import Said

from .asking_device import Subscriber
from .business import FAR, KEPT, MADE, OTHER, QUEUE, Business

POOL = "redis.pool1"
AGE = 60_000
"""ms for which the log is kept."""
ALL = '"offline_opts": {"max_returned_count": 0, "time_range": "0s"}, '
RULES = (
    "backend.redis.pool1.server = 127.0.0.1:1\n"
    + "".join(
        f'backend.redis.hook.{hook} = {{"topic": "{topic}", "action": {{"function": "{function}"}}, {more}"pool": "pool1"}}\n'
        for hook, topic, function, more in (
            ("message.publish.1", "#", "on_message_publish", ""),
            ("message.publish.2", "#", "on_message_retain", ""),
            ("message.publish.3", "#", "on_retain_delete", ""),
            ("session.subscribed.1", "far/#", "on_message_fetch", ALL),
            ("session.subscribed.2", "queue/#", "on_message_fetch_for_queue", ""),
            ("session.subscribed.3", "kept/#", "on_retain_lookup", ""),
            ("message.acked.1", "far/#", "on_message_acked", ""),
            ("message.acked.2", "queue/#", "on_message_acked_for_queue", ""),
            ("session.unsubscribed.1", "#", "on_acked_delete", ""),
        )
    )
    + 'backend.redis.hook.client.connected.1 = {"action": {"function": "on_subscribe_lookup"}, "pool": "pool1"}\n'
)


class Killed(Exception):
    """The child is gone."""


class Book(LaneBook):
    """Fails at times, or is the last thing that the child did. `synced` is the file as a power cut leaves it."""

    def __init__(self, progress: Progress, path: Path, fails: Callable[[], str]) -> None:
        super().__init__(progress)
        self._path = path
        self._fails = fails
        self.synced = b""

    def save(
        self,
        pool: str,
        standing: LaneStanding,
        questions: Iterable[tuple[tuple[str, str], Question | None]],
        answers: Sequence[Answer] = (),
    ) -> None:
        fault = self._fails()
        if fault == "full":
            raise StoreError("uplink.db: database or disk is full")
        if fault == "before":
            raise Killed
        super().save(pool, standing, questions, answers)
        if answers:
            with closing(sqlite3.connect(self._path)) as db:
                self.synced = db.serialize()
        if fault == "after":
            raise Killed


class Time:
    """The lane's clock."""

    def __init__(self, mono: Callable[[], int], wall: Callable[[], int]) -> None:
        self._mono = mono
        self.wall = wall

    def monotonic(self) -> float:
        return self._mono() / 1000


class Asking:
    """`run` some steps, then `finish`; see `simulation.Simulation`."""

    inbox_type: type[Inbox] = Inbox
    lane_type: type[AskingLane] = AskingLane

    def __init__(self, directory: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.said = Said()
        self._directory = directory
        self._wall, self._mono = NOW, 1000
        self._offsets = [NOW - 1000]
        """Every one that the gateway's clock ever had."""
        self._calm = False
        self._carried = 0
        self._numbers = 0
        self._fault: Exception | None = None
        self._interval = self.chance.choice((0.0, 2.0))
        self.far = Business(self.chance, lambda: self._wall)
        self.devices = [
            Subscriber(name, qos, lasting, self.chance, self.far)
            for name, qos, lasting in (("one", 1, True), ("two", 2, True), ("passing", 2, False))
        ]
        (directory / "emqx_backend_redis.conf").write_text(RULES)
        self._files = load_all(directory, ["redis"])
        assert not any(file.mistakes for file in self._files)
        self._start_box()
        self._start_child()
        weights: dict[Callable[[], None], int] = {
            self._device_acts: 90,
            self._device_listens: 300,
            self._commit: 250,
            self._read: 200,
            self._timer: 30,
            self._child_steps: 200,
            self._carry: 40,
            self.far.store: 40,
            self.far.withdraw: 8,
            self.far.retain: 25,
            self._make: 25,
            self._set_here: 3,
            self.far.cut: 5,
            self._time_passes: 30,
            self._clock_steps: 1,
            self._disk_fills: 1,
            self._disk_is_mended: 40,
            self._trim: 5,
            self._crash: 3,
            self._crash_after_commit: 10,
            self._kill_child: 4,
            self._power_cut: 2,
            self._take_stock: 1,
        }
        self._steps, self._weights = list(weights), list(weights.values())

    def close(self) -> None:
        self._kill_child()
        self._kill_box()

    def run(self, steps: int) -> None:
        for step in self.chance.choices(self._steps, self._weights, k=steps):
            self.counts[step.__name__] += 1
            step()

    def story(self) -> str:
        arrived = sum(len(device.arrived) for device in self.devices)
        return f"{self.counts.total()} steps, {len(self.far.moments)} values, {arrived} arrivals, {self.chance.random():.12f}"

    # -- processes -------------------------------------------------------------------------------------------------

    def _start_box(self) -> None:
        self.box = World(self._directory / "log.db", None, "full", self._wall, self._mono)
        self.box.auto = False
        self.box.fault = self._fault
        local = local_rules(self._files)
        assert local is not None
        self.box.broker.router.set_wants(wants(self._files, {}), local)
        self.inbox = self.inbox_type(self.box.broker, self._directory / "uplink.db")
        self._log = LogReader(self._directory / "log.db")
        self._trimming = Trimming(
            Trim(1 << 30, AGE),
            self.box.store.connection,
            lambda job, done: done(job()),
            self.box.broker,
            self._reach,
            self.said,
        )
        self.inbox.look()

    def _kill_box(self) -> None:
        self.box.kill()
        self._log.close()

    def _reach(self) -> Reach:
        return reach(self.box.broker, [*held(self._directory, []), self._carried])

    def _start_child(self) -> None:
        path = self._directory / "uplink.db"
        self._progress = Progress(self._directory)
        self._book = Book(self._progress, path, self._trouble)
        self._reader = LaneLog(self._directory / "log.db")
        found = reading(self._files[0].rules)
        assert found is not None
        lane = Lane(POOL, self._reader.run().code, found, self._interval)
        clock = Time(lambda: self._mono, lambda: self._wall)
        make = partial(self.lane_type, lane, self.far.connect, self._reader, self._book, clock, self.said, self.chance)
        self._lane: AskingLane | None = None
        try:
            self._lane = make(self.inbox_look)
        except (Killed, StoreError):
            self._end_child()

    def inbox_look(self) -> None:
        self.inbox.look()

    def _end_child(self) -> None:
        self._lane = None
        self.far.cut()
        self._progress.close()
        self._reader.close()

    def _trouble(self) -> str:
        if self._calm:
            return ""
        if self._fault is not None:
            return "full"
        draw = self.chance.random()
        return "before" if draw < 0.02 else "after" if draw < 0.04 else ""

    def _child_steps(self) -> None:
        if self._lane is None:
            self._start_child()
            return
        try:
            self._lane.step()
        except Killed:
            self._end_child()

    def _kill_child(self) -> None:
        if self._lane is not None:
            self._end_child()

    def _crash(self) -> None:
        """Both, because the child does not outlive the broker."""
        self._kill_child()
        self._kill_box()
        for device in self.devices:
            device.lose()
        self._mono += 100
        self._wall += 100
        self._start_box()

    def _crash_after_commit(self) -> None:
        if self.box.commits and self._fault is None:
            self.box.store.apply(self.box.commits.pop(0)[0])
        self._crash()

    def _power_cut(self) -> None:
        synced = self._book.synced
        self._kill_child()
        if synced:
            for ending in ("-wal", "-shm"):
                (self._directory / f"uplink.db{ending}").unlink(missing_ok=True)
            (self._directory / "uplink.db").write_bytes(synced)
        self._crash()

    # -- everything else that happens ------------------------------------------------------------------------------

    def _device_acts(self) -> None:
        self.chance.choice(self.devices).act(self.box)

    def _device_listens(self) -> None:
        self.chance.choice(self.devices).listen()

    def _make(self) -> None:
        self.far.subscribe(self.chance.choice(self.devices).name)

    def _set_here(self) -> None:
        """A device of this gateway sets or clears a retained value."""
        self._numbers += 1
        payload = b"" if self.chance.random() < 0.2 else b"here-%d" % self._numbers
        topic = self.chance.choice(KEPT)
        publisher = self.box.device("publisher")
        publisher.publish(topic, payload, 1, retain=True)
        publisher.disconnect()
        for device in self.devices:
            device.set_here(topic)

    def _commit(self) -> None:
        if self.box.commits:
            self.box.commit()

    def _read(self) -> None:
        if self.box.reads:
            self.box.read()

    def _timer(self) -> None:
        if self.box.timers:
            self.box.timers.pop(0)()

    def _carry(self) -> None:
        """The side that writes brings what is durable."""
        entries, self._carried = self._log.read(self._carried, 100)
        self.far.carry(entries)

    def _trim(self) -> None:
        self._trimming.start()

    def _disk_fills(self) -> None:
        self._fault = self.box.fault = sqlite3.OperationalError("database or disk is full")

    def _disk_is_mended(self) -> None:
        self._fault = self.box.fault = None

    def _time_passes(self, milliseconds: int = 0) -> None:
        milliseconds = milliseconds or self.chance.choice((1, 50, 1000, 2000, 5000))
        self._wall += milliseconds
        self._mono += milliseconds
        self.box.broker.now += milliseconds / 1000
        self._tell_time()
        self.box.broker.tick()
        self.inbox.tick()

    def _clock_steps(self) -> None:
        self._wall += self.chance.choice((-3_600_000, -5_000, 7_000, 3_600_000))
        self._offsets.append(self._wall - self._mono)
        self._tell_time()

    def _tell_time(self) -> None:
        log = self.box.broker.log
        log.tick(self._mono)
        log.step(*believe(log.clock, self._wall, self._mono))

    # -- what must be true -----------------------------------------------------------------------------------------

    def _take_stock(self) -> None:
        """No message is in the log twice for one client."""
        twice = (
            "SELECT client, msgid FROM addressed a WHERE acked OR EXISTS (SELECT 1 FROM entry e WHERE e.seq = a.seq)"
            " GROUP BY client, msgid HAVING count(*) > 1"
        )
        found = self.box.store.connection.execute(twice).fetchall()
        assert not found, f"applied twice: {found}"

    def finish(self) -> None:
        """Calm until nothing moves; everybody is there, and looks up everything once more."""
        self._calm = self.far.calm = True
        self._fault = self.box.fault = None
        self.devices[2].leave()
        self._rest()
        self.far.cut()
        self._rest()
        self._take_stock()
        lasting = [device for device in self.devices if device.lasting]
        for device in lasting:
            self._check_subscriptions(device)
            self._check_messages(device)
        self._check_queue(lasting)
        self._check_kept(lasting)

    def _rest(self) -> None:
        for _ in range(3):
            for _ in range(2_000):
                if not self._calm_step():
                    break
            else:
                raise AssertionError(f"does not come to rest: {self.said[-3:]}")
            self._time_passes(3_000)

    def _calm_step(self) -> bool:
        moved = False
        for device in self.devices:
            if device.lasting and (device.device is None or device.device.closed):
                device.connect(self.box)
                moved = True
            moved |= device.listen()
        waiting = (self.box.commits, self.box.reads, self.box.timers)
        for queue, act in zip(waiting, (self._commit, self._read, self._timer), strict=True):
            moved |= bool(queue)
            act()
        before = self._carried
        self._carry()
        if self._lane is None:
            self._start_child()
            return True
        wait = self._lane.step()
        return moved or self._carried != before or wait.seconds == 0 or not wait.for_news

    def _check_subscriptions(self, device: Subscriber) -> None:
        session = self.box.broker.sessions.get(device.name)
        assert session is not None, f"{device.name} has no session"
        found = {text: one.qos for text, one in session.subscriptions.items() if text in MADE}
        wanted = self.far.subscriptions.get(device.name, {})
        assert found == wanted, f"{device.name} is subscribed to {found}, the far end says {wanted}"

    def _check_messages(self, device: Subscriber) -> None:
        made = self.far.subscriptions.get(device.name, {}).get(OTHER, 0)
        topics = [topic for topic, is_due in ((FAR, FAR in device.subscribed), (OTHER, made > 0)) if is_due]
        for topic in topics:
            missing = [name for name in self.far.stored[topic] if name.encode() not in device.arrived]
            assert not missing, f"{device.name} never got {missing} of {topic}"

    def _check_queue(self, lasting: list[Subscriber]) -> None:
        if any(QUEUE in device.subscribed for device in lasting):
            assert not self.far.stored[QUEUE], f"nobody took {list(self.far.stored[QUEUE])}"

    def _check_kept(self, lasting: list[Subscriber]) -> None:
        """What was asked for when a device subscribed is here; and after another look the newest of all is."""
        for device in lasting:
            for topic, at in device.asked.items():
                found = self._kept_here(topic)
                assert max(self.far.moments.get(found, 0), self._set_here_between(topic)[1]) >= at, (
                    f"{device.name} asked for {topic}, there is {found!r}"
                )
        checker = self.box.device("checker", clean=False)
        for topic in KEPT:
            checker.subscribe(topic)
        self._rest()
        for topic in KEPT:
            self._check_newest(topic)

    def _check_newest(self, topic: str) -> None:
        there, (earliest, latest) = self.far.retained.get(topic), self._set_here_between(topic)
        found = self._kept_here(topic)
        if there is not None and there.at > latest:
            assert found == there.payload, f"{topic} is {found!r}, the far end has a newer one: {there}"
        elif earliest and (there is None or there.at <= earliest):
            assert found not in self.far.moments, f"{topic} is {found!r}, which is older than what was set here"

    def _kept_here(self, topic: str) -> bytes:
        sql = "SELECT e.payload FROM retained r JOIN topic t ON t.id = r.topic JOIN entry e ON e.seq = r.seq WHERE t.name = ?"
        row = self.box.store.connection.execute(sql, (topic,)).fetchone()
        return bytes(row[0]) if row else b""

    def _set_here_between(self, topic: str) -> tuple[int, int]:
        """When a device of this gateway set or cleared it last, whatever its clock showed then; 0: never. The entry of a clear
        may be trimmed by now, its time stays."""
        sql = (
            "SELECT max(e.mono), (SELECT at FROM cleared WHERE topic = ?1) FROM entry e JOIN topic t ON t.id = e.topic"
            f" WHERE t.name = ?1 AND e.kind = {PUBLISH} AND e.flags & {RETAIN}"
        )
        mono, cleared = self.box.store.connection.execute(sql, (topic,)).fetchone()
        slow, fast = min(self._offsets), max(self._offsets)
        entry = (mono + slow, mono + fast) if mono else (0, 0)
        clear = (cleared + slow - fast, cleared + fast - slow) if cleared else (0, 0)
        return max(entry[0], clear[0]), max(entry[1], clear[1])
