"""A business system that writes into the far end, and the device that is to get it, under faults.

The office writes stored messages of one to many and of a queue, and retained values, as the specification lays them out in
Redis. The device takes the messages with QoS 2 and subscribes to each retained value once. `broken` says what a disk that was
copied at some moment fails to hold, by what the device had seen and the far end had been told until then.

Invariant: every payload is the message's id, so each is known wherever it turns up.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import redis
from tidegate.store.entry import SUBSCRIBED
from tidegate.store.inbox import RETAINED, cursor_name

from tests.support.client import Kind, MqttClient, Packet

from .traffic import Receiver

TOML = '[uplink]\nbackends = ["sqlite", "redis"]\n'
ORDERS, QUEUE, KEPT = "far/orders", "far/queue", "far/kept/"
RULES = """\
backend.redis.pool1.server = 127.0.0.1:{port}
backend.redis.pool1.lookup_interval = 50ms
""" + "".join(
    f'backend.redis.hook.{hook} = {{{{"topic": "{topic}", "action": {{{{"function": "{function}"}}}}, "pool": "pool1"}}}}\n'
    for hook, topic, function in (
        ("session.subscribed.1", ORDERS, "on_message_fetch_for_pubsub"),
        ("session.subscribed.2", QUEUE, "on_message_fetch_for_queue"),
        ("session.subscribed.3", KEPT + "#", "on_retain_lookup"),
        ("message.acked.1", ORDERS, "on_message_acked_for_pubsub"),
        ("message.acked.2", QUEUE, "on_message_acked_for_queue"),
    )
)


class Office:
    """Writes into Redis; `written` is everything by topic."""

    def __init__(self, port: int) -> None:
        self.far: redis.Redis = redis.Redis(port=port, decode_responses=True)
        self.written: dict[str, list[str]] = {ORDERS: [], QUEUE: []}
        self.kept = 0

    def write(self, count: int) -> None:
        """So many more of each."""
        pipeline = self.far.pipeline()
        for _ in range(count):
            self.kept += 1
            pipeline.hset(f"mqtt:retain:{KEPT}{self.kept}", mapping=_message(f"kept-{self.kept}", f"{KEPT}{self.kept}"))
            for topic, written in self.written.items():
                msgid = f"{topic.rpartition('/')[2]}-{len(written):06}"
                written.append(msgid)
                pipeline.hset(f"mqtt:msg:{msgid}", mapping=_message(msgid, topic))
                pipeline.zadd(f"mqtt:msg:{topic}", {msgid: 1})
        pipeline.execute()

    def told(self, device: str) -> set[str]:
        """The messages of which the far end was told that the device has them."""
        position = self.far.get(f"mqtt:acked:{device}:{ORDERS}") or ""
        waiting = self.far.zrange(f"mqtt:msg:{QUEUE}", 0, -1)
        read = {msgid for msgid in self.written[ORDERS] if msgid <= str(position)}
        return read | (set(self.written[QUEUE]) - set(waiting))


def _message(msgid: str, topic: str) -> dict[Any, Any]:
    return {"id": msgid, "from": "office", "qos": 2, "topic": topic, "payload": msgid, "ts": int(time.time())}


class Device(Receiver):
    """`released`: the messages whose exchange the broker has said to be over; `kept`: how many values it has asked for."""

    def __init__(self, name: str, office: Office) -> None:
        super().__init__(name, ORDERS, 2)
        self.released: set[bytes] = set()
        self.kept = 0
        self._office = office
        self._under: dict[int, bytes] = {}

    def resume(self, client: MqttClient) -> None:
        if not self._subscribed:
            assert client.subscribe((QUEUE, 2)) == (2,)
        super().resume(client)

    def ask(self) -> None:
        """Subscribe to what the office has set since the last time, a few at once."""
        assert self.client is not None
        wanted = range(self.kept + 1, min(self._office.kept, self.kept + 20) + 1)
        if wanted:
            assert set(self.client.subscribe(*((f"{KEPT}{number}", 1) for number in wanted))) == {1}
            self.kept = wanted[-1]

    def note(self, packet: Packet) -> None:
        super().note(packet)
        if packet.kind is Kind.PUBLISH and packet.qos == 2:
            self._under[packet.packet_id] = packet.payload
        elif packet.kind is Kind.PUBREL and packet.packet_id in self._under:
            self.released.add(self._under.pop(packet.packet_id))

    def missing(self) -> set[bytes]:
        """The messages that have not come yet, of all that the office wrote."""
        return {msgid.encode() for written in self._office.written.values() for msgid in written} - set(self.messages)


def broken(data: Path, device: Device, told: set[str]) -> list[str]:
    """What this disk fails to hold. `told`: see `Office.told`."""
    if not _has(data / "log.db", "addressed"):
        return ["the log is empty"]
    with closing(sqlite3.connect(data / "log.db")) as log:
        found = list(_messages(log, device, told))
        # A child that finds nothing of its own asks everything.
        if _has(data / "uplink.db", "lane"):
            with closing(sqlite3.connect(data / "uplink.db")) as uplink:
                found += _kept(log, uplink, device)
    return found


def _has(path: Path, table: str) -> bool:
    """Whether the file is there with this table; what is there must be sound."""
    if not path.exists():
        return False
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return bool(db.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (table,)).fetchone())


def _messages(log: sqlite3.Connection, device: Device, told: set[str]) -> Iterator[str]:
    """What the device saw is durable, what it was told to be over is over, and each came into the log once."""
    rows = log.execute(
        "SELECT a.msgid, max(a.acked), count(*) FROM addressed a JOIN client c ON c.id = a.client WHERE c.clientid = ?"
        " GROUP BY a.msgid",
        (device.name,),
    ).fetchall()
    there = {msgid.encode(): (acked, count) for msgid, acked, count in rows}
    for payload in device.messages:
        if not payload.startswith(b"kept") and payload not in there:
            yield f"{payload!r} was handed over and is not in the log"
    for payload in {*device.released, *(msgid.encode() for msgid in told)}:
        if not there.get(payload, (0, 0))[0]:
            yield f"{payload!r} is done with, and the log does not know it"
    yield from (f"{payload!r} is in the log {count} times" for payload, (_, count) in there.items() if count > 1)


def _kept(log: sqlite3.Connection, uplink: sqlite3.Connection, device: Device) -> Iterator[str]:
    """Every retained value that the device asked for is here, on its way, or still to be asked for."""
    here = {topic for (topic,) in log.execute("SELECT t.name FROM retained r JOIN topic t ON t.id = r.topic")}
    ((identity,),) = uplink.execute("SELECT value FROM meta WHERE key = 'identity'")
    found = log.execute("SELECT seq FROM cursor WHERE name = ?", (cursor_name(identity),)).fetchone()
    inbox = "SELECT topic FROM inbox WHERE kind = ? AND id > ?"
    here |= {topic for (topic,) in uplink.execute(inbox, (RETAINED, found[0] if found else 0))}
    here |= {topic for (topic,) in uplink.execute("SELECT filter FROM question WHERE due")}
    if not (lanes := uplink.execute("SELECT cursor FROM lane").fetchall()):
        return
    ((read,),) = lanes
    later = "SELECT t.name FROM entry e JOIN topic t ON t.id = e.topic WHERE e.kind = ? AND e.seq > ?"
    here |= {topic for (topic,) in log.execute(later, (SUBSCRIBED, read))}
    for number in range(1, device.kept + 1):
        if f"{KEPT}{number}" not in here:
            yield f"{KEPT}{number} was asked for, and nobody knows"
