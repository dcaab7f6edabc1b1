"""The disk budget in the broker: gap records are gathered, written down in time and kept over a restart."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.gaps import MAX_OPEN
from tidegate.gateway.mqtt.packets import PubAck, PubRec
from tidegate.gateway.mqtt.reasons import ReasonCode
from tidegate.gateway.trimming import Reach, Trimming
from tidegate.store.entry import GAP, PUBLISH, Want
from tidegate.store.policy import Policies, Policy
from tidegate.store.reader import LogReader
from tidegate.store.trim import Lost, Trim

from .world import NOW, World

POLICIES = Policies((Policy("high/#", 2), Policy("keep/#", 1, "reject_new")))
FOREVER = 10**12


class Box(World):
    """A small budget, and a far end that reads as the test says."""

    def __init__(self, path: Path, budget: int = 450_000) -> None:
        super().__init__(path)
        self.broker.router.set_wants([Want(PUBLISH, "#", 0, False)])
        self.broker.router.policies = POLICIES
        self.floor = 0
        self.pools: tuple[int, ...] = (0,)
        self.trimming = Trimming(
            Trim(budget, FOREVER, POLICIES),
            self.store.connection,
            lambda job, done: done(job()),
            self.broker,
            lambda: Reach(self.floor, self.pools),
            self.said,
        )

    def tick(self, seconds: float = 10.0) -> None:
        self.wait(seconds)
        self.trimming.tick()
        self.settle()

    def publish(self, topic: str, count: int) -> None:
        device = self.device("p")
        for number in range(count):
            device.publish(topic, b"%d".ljust(200) % number, packet_id=number % 60_000 + 1)
        device.disconnect()

    def gaps(self) -> list[dict[str, Any]]:
        found = LogReader(self.store.path).read(0, 100_000)[0]
        return [json.loads(entry.payload) for entry in found if entry.kind == GAP]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def box(path: Path) -> Iterator[Box]:
    box = Box(path)
    yield box
    box.kill()


def messages(box: Box) -> list[tuple[int, str]]:
    return [(entry.seq, entry.topic) for entry in LogReader(box.store.path).read(0, 100_000)[0] if entry.kind == PUBLISH]


def test_many_steps_make_one_record_for_each_topic_when_far_ends_read_on(box: Box) -> None:
    for _ in range(5):
        box.publish("low/a", 1_000)
        box.publish("low/b", 100)
        box.tick()
    there = messages(box)
    assert box.gaps() == [], "the far end stands: they are gathered"
    box.pools = (1,)
    box.tick()
    gaps = {gap["topic"]: gap for gap in box.gaps()}
    assert set(gaps) == {"low/a", "low/b"}
    for topic, sent in (("low/a", 5_000), ("low/b", 500)):
        left = [seq for seq, name in there if name == topic]
        assert gaps[topic]["count"] == sent - len(left)
        assert gaps[topic]["last_seq"] < min(left)
        assert gaps[topic]["event"] == "message.publish" and gaps[topic]["reason"] == "disk_budget"
        assert NOW <= gaps[topic]["first_at"] <= gaps[topic]["last_at"]
    assert box.broker.delivery.dropped["disk_budget"] == sum(gap["count"] for gap in gaps.values())
    box.tick()
    assert len(box.gaps()) == 2, "and not again"


def test_a_far_end_that_reads_on_beyond_what_is_lost_makes_no_records(box: Box) -> None:
    """Else one that works would fill the budget with records for one that is away for weeks."""
    box.pools = (0, 0)
    for number in range(1, 6):
        box.publish("low/a", 1_000)
        box.pools = (0, box.broker.delivery.live)
        box.tick()
        assert box.broker.gaps.open > 0 and box.gaps() == [], number
    box.pools = (1, box.broker.delivery.live)
    box.tick()
    assert box.broker.gaps.open == 0 and [gap["topic"] for gap in box.gaps()] == ["low/a"]
    box.pools = (1, box.broker.delivery.live)
    box.tick()
    assert box.broker.gaps.ahead(1).total() > 0, "one has read the record, the other knows of it still"


def test_after_a_restart_they_wait_as_long_as_every_far_end_is_before_them(path: Path) -> None:
    box = Box(path)
    box.publish("high/a", 5)
    box.publish("low/a", 3_000)
    box.tick()
    box.kill()
    again = Box(path)
    again.pools = (2,)
    again.tick()
    assert again.broker.gaps.open > 0 and again.gaps() == []
    again.pools = (3,)
    again.tick()
    assert again.broker.gaps.open == 0 and [gap["topic"] for gap in again.gaps()] == ["low/a"]
    again.kill()


def test_without_anybody_who_reads_they_are_written_after_a_day(box: Box) -> None:
    box.publish("low/a", 3_000)
    box.tick()
    box.tick(80_000)
    assert box.gaps() == []
    box.tick(7_000)
    assert len(box.gaps()) == 1


def test_open_records_and_totals_survive_a_crash(path: Path) -> None:
    box = Box(path)
    box.publish("low/a", 3_000)
    box.tick()
    dropped = box.broker.gaps.open
    box.kill()
    again = Box(path)
    assert again.broker.gaps.open == dropped > 0
    assert again.broker.gaps.totals == {("disk_budget", "#"): dropped}
    again.pools = (1,)
    again.tick()
    assert [gap["count"] for gap in again.gaps()] == [dropped]
    again.kill()


def test_the_highest_priority_stays(box: Box) -> None:
    box.publish("high/a", 50)
    box.publish("low/a", 3_000)
    box.tick()
    assert sum(topic == "high/a" for _, topic in messages(box)) == 50
    assert {policy for _, policy in box.broker.gaps.totals} == {"#"}


def test_topics_without_end_do_not_make_records_without_end(box: Box) -> None:
    for step in range(20):
        box.broker.gaps.add(
            Lost("message.publish", f"t/{step}/{number}", "#", "disk_budget", number, number, NOW, NOW, 1)
            for number in range(50)
        )
    box.settle()
    assert box.broker.gaps.open == 1_000
    box.broker.gaps.close()
    box.broker.turn_over()
    box.settle()
    assert len(box.gaps()) <= MAX_OPEN + 51
    assert sum(gap["count"] for gap in box.gaps()) == 1_000


def test_a_removal_and_its_record_are_one_transaction(box: Box, path: Path) -> None:
    box.publish("low/a", 3_000)
    box.auto = False
    box.trimming.start()
    batch, _ = box.commits.pop()
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT count(*) FROM meta WHERE key = 'gaps'").fetchone() == (0,)
        before = other.execute("SELECT count(*) FROM entry").fetchone()[0]
    box.store.apply(batch)
    with sqlite3.connect(path) as other:
        (text,) = other.execute("SELECT value FROM meta WHERE key = 'gaps'").fetchone()
        after = other.execute("SELECT count(*) FROM entry").fetchone()[0]
    assert before - after == sum(fields[-1] for fields in json.loads(text)) > 0


def test_time_does_not_go_back_when_the_last_entry_is_gone(path: Path) -> None:
    box = Box(path, 20_000)
    box.wait(3600)
    box.publish("low/a", 10)
    box.tick()
    assert messages(box) == []
    at = box.broker.log.at
    box.kill()
    again = Box(path)  # by a clock that shows less
    assert again.broker.log.at >= at
    again.kill()


def test_near_the_budget_publishers_are_read_no_faster_than_room_is_made(path: Path) -> None:
    box = Box(path)
    box.auto = False
    device = box.device("p")
    box.settle()
    box.trimming.trim.tight = True
    box.trimming._under_way = True
    box.trimming.committed(0)
    device.publish("low/a", b"x")
    assert device.paused
    box.settle()
    assert device.paused, "its message is durable, and it waits all the same"
    box.trimming.trim.tight = False
    box.trimming.committed(0)
    assert not device.paused
    box.kill()


def test_who_publishes_to_new_long_topics_waits_for_the_disk_too(path: Path) -> None:
    """Nothing acknowledges QoS 0: only what is counted of a batch bounds what comes while the disk is slow."""
    box = Box(path)
    box.auto = False
    device = box.device("p")
    box.settle()
    for number in range(1_000):
        device.publish(f"{number}/".ljust(60_000, "x"), b"1", 0, retain=True)
        if device.paused:
            break
    assert 50 < number < 200
    box.settle()
    assert not device.paused
    box.kill()


# -- reject_new ------------------------------------------------------------------------------------------------------


def fill_up(box: Box) -> None:
    """With what must not be dropped, until nothing else is left."""
    box.publish("keep/a", 3_000)
    box.tick()
    assert box.broker.router.level == 2, "above the priority of what is refused"
    assert "are refused" in box.said[-1]


@pytest.mark.parametrize("qos", [1, 2])
def test_mqtt_5_is_told_that_the_quota_is_exceeded(box: Box, qos: int) -> None:
    fill_up(box)
    before = messages(box)
    device = box.device("v5", 5)
    device.publish("keep/a", b"refused", qos)
    device.publish("other", b"taken", qos, packet_id=2)
    answer: type = PubAck if qos == 1 else PubRec
    assert (first := device.take(answer)).reason == ReasonCode.QUOTA_EXCEEDED and first.packet_id == 1
    assert device.take(answer).packet_id == 2
    assert len(messages(box)) == len(before) + 1
    assert box.broker.pressure.refused == 1


def test_a_topic_that_was_published_to_before_stays_refused_whoever_subscribes_to_another(box: Box) -> None:
    device = box.device("v5", 5)
    device.publish("keep/a", b"before", packet_id=1)
    fill_up(box)
    before = messages(box)
    other = box.device("other")
    for number in range(2, 12):
        device.publish("keep/a", b"refused", packet_id=number)
        other.subscribe(f"elsewhere/{number}", 0)
    assert messages(box) == before
    assert box.broker.pressure.refused == 10


def test_before_5_the_acknowledgement_is_withheld_until_there_is_room_and_then_the_client_sends_again(box: Box) -> None:
    fill_up(box)
    device = box.device("v4")
    device.publish("keep/a", b"withheld", packet_id=7)
    device.publish("high/a", b"taken", packet_id=8)
    assert [packet.packet_id for packet in device.got if isinstance(packet, PubAck)] == [8]
    assert not device.closed
    box.floor = box.broker.delivery.live
    box.tick()
    assert device.closed and box.broker.router.level is None
    again = box.device("v4")
    again.publish("keep/a", b"withheld", packet_id=7)
    assert again.take(PubAck).packet_id == 7
    assert messages(box)[-1][1] == "keep/a"


def test_refusals_that_come_and_go_while_a_far_end_drains_are_told_once(box: Box) -> None:
    fill_up(box)
    for level in (None, 1, 2, None, 3, 2):
        box.wait(10)
        box.broker.pressure.set_level(level)
    assert sum("are refused" in line for line in box.said) == 1
    box.broker.pressure.set_level(None)
    box.wait(61)
    box.broker.pressure.set_level(3)
    assert sum("are refused" in line for line in box.said) == 2


def test_qos_0_still_flows_and_is_not_stored(box: Box) -> None:
    fill_up(box)
    before = messages(box)
    subscriber = box.device("s")
    subscriber.subscribe("keep/#", 0)
    box.device("p").publish("keep/a", b"live", 0, retain=True)
    assert [message[3] for message in subscriber.messages()] == [b"live"]
    assert messages(box) == before


def test_nothing_is_refused_while_something_of_the_same_priority_is_left_to_drop(box: Box) -> None:
    box.publish("keep/a", 300)
    box.publish("low/a", 3_000)
    box.tick()
    assert box.broker.gaps.open > 0 and box.broker.router.level is None
    assert not any("are refused" in line for line in box.said)
    device = box.device("v5", 5)
    device.publish("keep/a", b"taken")
    assert device.take(PubAck).reason != ReasonCode.QUOTA_EXCEEDED


def test_a_qos_2_message_that_was_taken_is_not_refused_when_it_is_sent_again(box: Box) -> None:
    device = box.device("q", clean=False)
    device.publish("keep/a", b"first", 2, packet_id=5)
    assert device.take(PubRec).packet_id == 5
    device.cut()
    fill_up(box)
    again = box.device("q", clean=False)
    again.publish("keep/a", b"first", 2, packet_id=5)
    assert again.take(PubRec).packet_id == 5
