"""One pool's lane that asks, driven step by step against a real far end, with a clock that only the test moves."""

from __future__ import annotations

import importlib
import json
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from tidegate.store.entry import CONNECTED, DISCONNECTED, SESSION_CREATED, SUBSCRIBED, UNSUBSCRIBED
from tidegate.store.inbox import SUBSCRIPTIONS, Answer, cursor_name, read
from tidegate.uplink.asking import AskingBackend
from tidegate.uplink.asking_lane import AskingLane, Lane
from tidegate.uplink.lane_book import LaneBook
from tidegate.uplink.lane_log import LaneLog
from tidegate.uplink.progress import Progress
from tidegate.uplink.reading import reading
from tidegate.uplink.rule import load
from tidegate.uplink.worker import Wait

from tests.support.said import Said

from .logfile import LogFile
from .rig import TestClock


def rule(event: str, number: int, function: str, topic: str = "", more: str = "") -> str:
    """A line of the rule file."""
    filtered = f'"topic": "{topic}", ' if topic else ""
    body = f'{{{filtered}"action": {{"function": "{function}"}}, {more}"pool": "pool1"}}'
    return f"backend.redis.hook.{event}.{number} = {body}\n"


LOOKUP = rule("session.created", 1, "on_subscribe_lookup")
QUEUE = rule("session.subscribed", 1, "on_message_fetch_for_queue", "queue/#")
PUBSUB = rule("session.subscribed", 2, "on_message_fetch_for_pubsub", "pubsub/#")
RETAINED = rule("session.subscribed", 3, "on_retain_lookup")
INTERVAL = 60.0


class Devices(LogFile):
    """A log that also keeps who is connected and which sessions outlive their connection, as the broker does."""

    def arrive(self, client: str, persistent: bool = True, new: bool = True) -> None:
        """A connect; the session is made by it if it is `new`."""
        self.append(CONNECTED, client, None, 0, None)
        self._db.execute("UPDATE client SET state = 1 WHERE clientid = ?", (client,))
        if new:
            self.end(client)
            self.append(SESSION_CREATED, client, None, 0, None)
        if new and persistent:
            self._db.execute("INSERT INTO session (client, created, expiry, cursor) VALUES (?, 0, 60, 0)", (self._id(client),))

    def leave(self, client: str) -> None:
        self.append(DISCONNECTED, client, None, 0, None)
        self._db.execute("UPDATE client SET state = 0 WHERE clientid = ?", (client,))

    def end(self, client: str) -> None:
        """The session is over, of which nothing is logged."""
        self._db.execute("DELETE FROM session WHERE client = ?", (self._id(client),))
        self._db.execute("DELETE FROM subscription WHERE client = ?", (self._id(client),))

    def subscribe(self, client: str, topic_filter: str, qos: int = 1) -> None:
        self.append(SUBSCRIBED, client, topic_filter, qos, None)
        self._db.execute(
            "INSERT OR REPLACE INTO subscription SELECT client, ?, ?, NULL, 0 FROM session WHERE client = ?",
            (topic_filter, qos, self._id(client)),
        )

    def unsubscribe(self, client: str, topic_filter: str) -> None:
        self.append(UNSUBSCRIBED, client, topic_filter, 0, None)

    def take_answers(self, identity: str, through: int) -> None:
        """The broker is done with answers."""
        self._db.execute("INSERT OR REPLACE INTO cursor VALUES (?, ?)", (cursor_name(identity), through))

    def _id(self, client: str) -> int | None:
        return self._name("client", "clientid", client)


class LaneRig:
    """`log` to append to, `lane` to step; `told` counts how often the broker was told. `before`: what the log holds already."""

    def __init__(
        self,
        directory: Path,
        port: int,
        rules: str,
        settings: str = "",
        backend: str = "redis",
        before: Callable[[Devices], None] = lambda _: None,
    ) -> None:
        self.data = directory / "data"
        self.data.mkdir(exist_ok=True)
        self.pool_name = f"{backend}.pool1"
        self.clock = TestClock()
        self.said = Said()
        self.told = 0
        self.log = Devices(self.data)
        before(self.log)
        self.progress = Progress(self.data)
        self.book = LaneBook(self.progress)
        self.reader = LaneLog(self.data / "log.db")
        conf = directory / f"emqx_backend_{backend}.conf"
        lines = [f"server = 127.0.0.1:{port}", "timeout = 300ms", *settings.splitlines()]
        conf.write_text("".join(f"backend.{self.pool_name}.{line}\n" for line in lines) + rules)
        rule_file = load(conf, backend)
        assert rule_file.mistakes == ()
        (self.pool,) = rule_file.pools
        self.rules = rule_file.rules
        self.start()

    def start(self) -> None:
        """A new lane on what is saved, as after a kill."""
        far_end = cast(AskingBackend, importlib.import_module(f"tidegate.uplink.to_{self.pool.backend}"))
        found = reading(self.rules)
        assert found is not None
        lane = Lane(self.pool_name, self.reader.run().code, found, self.pool.settings["lookup_interval"])
        connect = lambda: far_end.connect_asker(self.pool)  # noqa: E731
        self.lane = AskingLane(lane, connect, self.reader, self.book, self.clock, self.said, random.Random(1), self._tell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lane.stop()
        self.progress.close()
        self.reader.close()
        self.log.close()

    def _tell(self) -> None:
        self.told += 1

    def ask(self, steps: int = 1000) -> None:
        """Step until nothing is left to ask for now; waits for the far end pass at once."""
        for _ in range(steps):
            wait = self.lane.step()
            if wait.for_news and wait.seconds != 0:
                return
            self.clock.now += wait.seconds or 0.0
        raise AssertionError(f"not done in {steps} steps: {self.book.standing(self.pool_name)}")

    def step_until(self, done: Callable[[Wait], bool], steps: int = 1000) -> None:
        for _ in range(steps):
            wait = self.lane.step()
            if done(wait):
                return
            self.clock.now += wait.seconds or 0.0
        raise AssertionError(f"not in {steps} steps: {self.book.standing(self.pool_name)}")

    def next_round(self) -> None:
        """The time has come to ask for everybody again."""
        self.clock.now += INTERVAL
        self.ask()

    def answers(self, after: int = 0) -> list[Answer]:
        with closing(sqlite3.connect(self.data / "uplink.db")) as db:
            return read(db, after, 100_000)

    def take(self) -> list[Answer]:
        """The broker takes every answer; they are cleared away."""
        found = self.answers()
        if found:
            self.log.take_answers(self.book.identity(), found[-1].id)
            self.ask()
        return found

    def waiting(self) -> int:
        """Questions that are due, as they are saved."""
        return sum(1 for question in self.book.questions(self.pool_name) if question.due)


def subscriptions(answer: Answer) -> tuple[str, dict[str, int]]:
    assert answer.kind == SUBSCRIPTIONS
    rows: list[list[Any]] = json.loads(answer.filters)
    return answer.client, {str(topic_filter): int(qos) for topic_filter, qos in rows}
