"""The broker's core without sockets, threads or clocks: every step is taken by the test.

Commits and reads wait in queues until the test lets them happen, so any order of events can be played. The database is
real. `Device` is a client in memory: what it sends and gets are packets of the codec.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidegate.gateway.broker import Broker
from tidegate.gateway.connecting import Limits
from tidegate.gateway.mqtt.connection import Acks, Connection, Side, Terms, TopicNames
from tidegate.gateway.mqtt.packets import (
    Connect,
    Disconnect,
    PubAck,
    Publish,
    Subscribe,
    Subscription,
    Will,
    encode,
)
from tidegate.gateway.session import Client
from tidegate.store.catchup import CatchUp
from tidegate.store.clock import Judge, believe
from tidegate.store.log import Batch, Log
from tidegate.store.msgid import message_id
from tidegate.store.schema import StoreError
from tidegate.store.store import Store
from tidegate.store.unstorable import Unstorable

from tests.support.said import Said

NOW = 1_764_000_000_000


class Everyone:
    """Access that refuses only the user `mallory`."""

    def authenticate(self, username: str | None, password: bytes | None, listener: Any) -> bool:
        return username != "mallory"

    def why_not(self, username: str | None) -> str:
        return "mallory"


class World:
    """One gateway life on `path`; a second World on the same path is the restart."""

    def __init__(
        self,
        path: Path,
        limits: Limits | None = None,
        durability: str = "full",
        wall: int = NOW,
        mono: int = 1000,
        judge: Judge = believe,
        boot: str = "",
    ) -> None:
        self.mono = mono
        self.store = Store.open(path, "barn", "normal", wall, mono, judge, boot)
        identity = self.store.identity
        log = Log(identity.next_seq, identity.last_at, identity.run, identity.clock)
        log.tick(mono)
        self.commits: list[tuple[Batch, Callable[[Any], None]]] = []
        self.reads: list[tuple[Callable[[Any], Any], Callable[[Any], None]]] = []
        self.timers: list[Callable[[], None]] = []
        self.said = Said()
        self.fault: Exception | None = None
        self.auto = True
        self._catch_up = CatchUp(path)
        runs = self.store.connection.execute("SELECT id, code, epoch FROM run").fetchall()
        self._runs = {run: (code, epoch) for run, code, epoch in runs}
        self.broker = Broker(
            log,
            self._commit,
            lambda job, done: self.reads.append((job, done)),
            lambda delay, call: self.timers.append(call),
            Everyone(),
            limits or Limits(),
            durability,
            0.0,
            lambda seq, at, run: message_id(at, *self._runs[run], seq).encode(),
            lambda: "assigned-1",
            self.said,
        )
        self.broker.load(self.store.connection, identity.clean)

    @property
    def pieces_read(self) -> int:
        """How often the log was read on from."""
        return self._catch_up.pieces_read

    def _commit(self, batch: Batch, done: Callable[[Any], None]) -> None:
        self.commits.append((batch, done))

    def settle(self) -> None:
        """Let everything that is due happen: commits and reads, until nothing is left."""
        while self.commits or self.reads:
            while self.commits:
                self.commit()
            while self.reads:
                self.read()

    def read(self) -> None:
        """Let one read of the log be answered."""
        job, done = self.reads.pop(0)
        done(self._answer(job))

    def read_all(self) -> list[Any]:
        """Let the reader come through all that it was asked before the event loop handles anything; what it has found."""
        asked, self.reads = self.reads, []
        found = [self._answer(job) for job, _ in asked]
        for (_, done), got in zip(asked, found, strict=True):
            done(got)
        return found

    def _answer(self, job: Callable[[Any], Any]) -> Any:
        try:
            return job(self._catch_up)
        except (sqlite3.Error, StoreError) as error:
            return error

    def commit(self) -> None:
        """Let one commit happen, or fail: with `fault`, or because it can never succeed."""
        batch, done = self.commits.pop(0)
        if self.fault is not None:
            done(self.fault)
            return
        try:
            self.store.apply(batch)
        except Unstorable as error:
            done(error)
        else:
            done(None)

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.broker.now += seconds
        self.elapse(int(seconds * 1000))
        self.broker.tick()
        self._settle_if_auto()

    def elapse(self, milliseconds: int) -> None:
        """What is written now is written later."""
        self.mono += milliseconds
        self.broker.log.tick(self.mono)

    def _settle_if_auto(self) -> None:
        if self.auto:
            self.settle()

    def stop(self) -> None:
        self.broker.stop()
        self.settle()
        while self.broker.busy:
            self.timers.pop(0)()
            self.settle()
        self._catch_up.close()
        self.store.close(self.broker.log.now)

    def kill(self) -> None:
        """Like kill -9: nothing is said or written any more."""
        self._catch_up.close()
        self.store.abandon()

    def device(self, client_id: str, version: int = 4, **options: Any) -> Device:
        return Device(self, client_id, version, **options)


class Device:
    """A client in memory. `got` are packets received and not taken yet."""

    def __init__(
        self,
        world: World,
        client_id: str,
        version: int = 4,
        clean: bool = True,
        will: Will | None = None,
        username: str | None = None,
        keep_alive: int = 0,
        properties: dict[Any, Any] | None = None,
        auto_ack: bool = True,
    ) -> None:
        self.world = world
        self.version = version
        self.auto_ack = auto_ack
        self.got: list[Any] = []
        self.properties: list[bytes] = []
        """Those of every message that came."""
        self.closed = False
        self.paused = False
        self.full = 0
        self._wire: Connection[str] = Connection(Terms(TopicNames(), 1 << 28, 0, Side.CLIENT), version)
        self.client: Client = world.broker.opened(self, client_id, None)
        self.send(Connect(version, client_id, clean, keep_alive, username, None, will, properties or {}))

    # -- session.Link ----------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        assert not self.closed
        for event in self._wire.receive(data):
            if isinstance(event, tuple):
                topic, flags, packet_id, payload, properties = event
                self.got.append((topic, flags, packet_id, payload))
                self.properties.append(properties)
            elif isinstance(event, Acks):
                self.got += [PubAck(packet_id) for packet_id in event.packet_ids]
            else:
                self.got.append(event)

    def close(self) -> None:
        self.closed = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def buffered(self) -> int:
        return self.full

    # -- what a test does ------------------------------------------------------------------------------------------

    def send(self, packet: Any) -> None:
        self.send_bytes(encode(packet, self.version))

    def send_bytes(self, data: bytes) -> None:
        self.world.broker.receive(self.client, data)
        self.world.broker.turn_over()
        self.world._settle_if_auto()

    def subscribe(self, text: str, qos: int = 1, **options: Any) -> None:
        wanted = Subscription(text, qos, options.get("no_local", False), options.get("rap", False), options.get("rh", 0))
        self.send(Subscribe(77, (wanted,), options.get("properties", {})))

    def publish(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False, packet_id: int = 1) -> None:
        self.send(Publish(topic, payload, qos, retain, False, packet_id if qos else 0, {}))

    def ack_all(self) -> list[Any]:
        """Take what came and acknowledge QoS 1; the messages."""
        messages = self.messages()
        for _, flags, packet_id, _ in messages:
            if flags >> 1 & 3 == 1:
                self.send(PubAck(packet_id))
        return messages

    def messages(self) -> list[Any]:
        """Take the PUBLISH packets that came: (topic, flags, packet id, payload)."""
        found = [event for event in self.got if isinstance(event, tuple)]
        self.got = [event for event in self.got if not isinstance(event, tuple)]
        return found

    def take(self, kind: type) -> Any:
        """Take the first packet of this type that came."""
        for event in self.got:
            if isinstance(event, kind):
                self.got.remove(event)
                return event
        raise AssertionError(f"no {kind.__name__} in {self.got}")

    def disconnect(self) -> None:
        self.send(Disconnect())
        self.world.broker.lost(self.client)
        self.world.broker.turn_over()

    def cut(self) -> None:
        """The network is gone without a word."""
        self.closed = True
        self.world.broker.lost(self.client)
        self.world.broker.turn_over()
        self.world._settle_if_auto()
