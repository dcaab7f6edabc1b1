"""What a far end is asked for devices, and when: lookups, rounds, outages, sessions that are gone, on a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tidegate.store.schema import StoreError
from tidegate.uplink import asking_lane
from tidegate.uplink.lane_book import LaneBook, read_lanes
from tidegate.uplink.progress import Progress, held

from tests.support.redis_server import RedisServer

from .lane_rig import LOOKUP, RETAINED, LaneRig, subscriptions


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def rig(tmp_path: Path, server: RedisServer) -> Iterator[LaneRig]:
    with LaneRig(tmp_path, server.port, LOOKUP) as rig:
        yield rig


def test_a_new_session_s_subscriptions_are_looked_up(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        far.hset("mqtt:sub:c1", mapping={"a/b": 1, "x/#": 2, "odd": "seven"})
    rig.log.arrive("c1")
    rig.ask()
    assert [subscriptions(answer) for answer in rig.answers()] == [("c1", {"a/b": 1, "x/#": 2, "odd": -1})]
    assert (rig.told, rig.waiting()) == (2, 0)


def test_answers_are_not_repeated_and_changes_are_found_by_the_next_round(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        far.hset("mqtt:sub:c1", "a", 1)
        rig.log.arrive("c1")
        rig.ask()
        assert len(rig.take()) == 1
        rig.next_round()
        assert rig.answers() == []
        far.hset("mqtt:sub:c1", "b", 0)
        rig.next_round()
        assert [subscriptions(answer) for answer in rig.take()] == [("c1", {"a": 1, "b": 0})]
        far.delete("mqtt:sub:c1")
        rig.next_round()
        assert [subscriptions(answer) for answer in rig.answers()] == [("c1", {})]


def test_questions_wait_for_the_far_end_once_each_and_hold_no_log_back(rig: LaneRig, server: RedisServer) -> None:
    with server.client() as far:
        far.hset("mqtt:sub:c1", "a", 1)
        far.hset("mqtt:sub:gone", "a", 1)
        far.save()
    rig.ask()
    server.kill()
    for _ in range(3):
        rig.log.arrive("c1")
        rig.log.arrive("gone", persistent=False)
        rig.log.leave("c1")
        rig.log.leave("gone")
    rig.step_until(lambda _: rig.waiting() == 1)
    rig.step_until(lambda _: read_lanes(rig.data)[rig.pool_name].state == "unreachable")
    assert held(rig.data, []) == [rig.log.seq]
    lane = read_lanes(rig.data)[rig.pool_name]
    assert (lane.questions, lane.inbox, bool(lane.error)) == (1, 0, True)
    rig.start()
    server.start()
    rig.ask()
    assert [subscriptions(answer) for answer in rig.answers()] == [("c1", {"a": 1})]
    assert (rig.waiting(), read_lanes(rig.data)[rig.pool_name].state) == (0, "connected")


def test_a_new_lane_asks_for_those_who_were_there_before_it(tmp_path: Path, server: RedisServer) -> None:
    """The child needs a second to start, and its file may be lost."""
    with server.client() as far:
        for name in ("old", "young", "passing", "gone"):
            far.hset(f"mqtt:retain:{name}", mapping={"id": name, "payload": name, "ts": 1_700_000_000})
    with LaneRig(tmp_path, server.port, RETAINED) as rig:
        rig.log.arrive("c1")
        rig.log.subscribe("c1", "old")
        rig.log.leave("c1")
        rig.log.new_run(2)
        rig.log.arrive("c2")
        rig.log.subscribe("c2", "young")
        rig.log.arrive("c3", persistent=False)
        for name in ("passing", "gone"):
            rig.log.subscribe("c3", name)
        rig.log.unsubscribe("c3", "gone")
        rig.book.keep_lanes([])
        rig.start()
        rig.ask()
        found = {(answer.client, answer.msgid) for answer in rig.answers()}
        assert found == {("c1", "old"), ("c2", "young"), ("c3", "passing")}
        assert not any(question.due for question in rig.book.questions(rig.pool_name))


def test_a_session_that_expires_while_its_question_waits_is_not_asked_for(rig: LaneRig, server: RedisServer) -> None:
    rig.ask()
    server.kill()
    rig.log.arrive("c1")
    rig.log.leave("c1")
    rig.step_until(lambda _: rig.waiting() == 1)
    rig.log.end("c1")
    server.start()
    rig.ask()
    assert (rig.answers(), rig.waiting()) == ([], 0)


def test_killed_before_the_answer_is_kept_asks_again_killed_after_does_not(
    rig: LaneRig, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.ask()
    with server.client() as far:
        far.hset("mqtt:sub:c1", "a", 1)
    rig.log.arrive("c1")

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rig.progress, "checkpoint", kill)
        with pytest.raises(Killed):
            rig.step_until(lambda _: False)
    rig.start()
    rig.ask()
    assert len(rig.take()) == 1
    rig.start()
    rig.ask()
    # Told once more after the restart, because a connected client is asked for again: the same, which changes nothing.
    assert [subscriptions(answer) for answer in rig.answers()] == [("c1", {"a": 1})]


def test_what_the_broker_does_not_take_stops_the_questions(
    rig: LaneRig, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking_lane, "INBOX_ANSWERS", 2)
    for number in range(2):
        rig.log.arrive(f"c{number}")
    rig.ask()
    rig.log.arrive("c2")
    rig.ask()
    assert (len(rig.answers()), rig.waiting()) == (2, 1)
    rig.take()
    assert ([subscriptions(answer)[0] for answer in rig.answers()], rig.waiting()) == (["c2"], 0)


def test_a_full_disk_loses_no_question(rig: LaneRig, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.ask()
    rig.log.arrive("c1")
    save = rig.book.save

    def refuse(*arguments: Any) -> None:
        if len(arguments) > 3 and arguments[3]:
            raise StoreError("uplink.db: database or disk is full")
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rig.book, "save", refuse)
        rig.step_until(lambda _: read_lanes(rig.data)[rig.pool_name].state == "unreachable")
        assert (rig.answers(), rig.waiting()) == ([], 1)
    rig.ask()
    assert [subscriptions(answer)[0] for answer in rig.answers()] == ["c1"]
    assert rig.waiting() == 0


def test_ids_of_the_inbox_rise_although_the_file_was_set_back(rig: LaneRig, server: RedisServer) -> None:
    rig.log.take_answers(rig.book.identity(), 41)
    rig.start()
    rig.log.arrive("c1")
    rig.ask()
    assert [answer.id for answer in rig.answers()] == [42]


def test_a_file_of_an_earlier_version_is_moved_forward(tmp_path: Path) -> None:
    (tmp_path / "uplink.db").write_bytes((Path(__file__).parent / "uplink-v1.db").read_bytes())
    assert (read_lanes(tmp_path), held(tmp_path, [])) == ({}, [7])
    progress = Progress(tmp_path)
    book = LaneBook(progress)
    assert len(book.identity()) == 16
    assert (book.inbox(), book.standing("redis.pool1"), held(tmp_path, [])) == ((0, 0, 0), None, [7])
    progress.close()
