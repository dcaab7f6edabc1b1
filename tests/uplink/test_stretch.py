"""What is made ready while the far end works is used where it fits, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tidegate.store.entry import Entry
from tidegate.store.reader import READ_BYTES, LogReader
from tidegate.uplink.backend import Action, Mark, Packed
from tidegate.uplink.plan import Plan
from tidegate.uplink.pools import Pool
from tidegate.uplink.rule import Rule, load
from tidegate.uplink.stretch import Stretch, Stretches

from .far_end import FarLink
from .logfile import GATEWAY, LogFile
from .rig import LIST

SERVER = "backend.redis.pool1.server = 127.0.0.1:1\n"
STORE = 'backend.redis.hook.message.publish.1 = {"action": {"function": "on_message_publish"}, "pool": "pool1"}\n'
QUEUE = 'backend.redis.hook.message.acked.1 = {"action": {"function": "on_message_acked_for_queue"}, "pool": "pool1"}\n'
NOW, NEXT = (GATEWAY, 1), (GATEWAY, 2)


class Backend:
    """Each entry is one operation: its payload."""

    def actions(self, rule: Rule, node: str) -> Action:
        def act(entry: Entry) -> Sequence[Packed]:
            return (Packed(entry.payload, 1),)

        return act

    def gap_action(self) -> Action:
        return lambda entry: ()

    def connect(self, pool: Pool) -> FarLink:
        raise AssertionError("nobody connects here")


class Log(LogReader):
    """Writes down from where it was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[int] = []

    def read(self, after: int, limit: int, kinds: object = None) -> tuple[list[Entry], int]:
        self.reads.append(after)
        return super().read(after, limit)


class Bench:
    """A log of ten messages, and what makes batches of it, five at a time."""

    limit = 5

    def __init__(self, directory: Path, rules: str = LIST) -> None:
        conf = directory / "emqx_backend_redis.conf"
        conf.write_text(SERVER + rules)
        self.file = LogFile(directory)
        self.publish(10)
        self.log = Log(self.file.path)
        self.marks: dict[tuple[str, int], Mark] = {}
        self.plan = Plan(load(conf, "redis").rules, Backend(), "barn")
        self.stretches = Stretches(self.plan, self.log)

    def publish(self, count: int) -> None:
        for _ in range(count):
            self.file.publish("t", b"%d" % (self.file.seq + 1))

    def next(self, after: int) -> Stretch | None:
        return self.stretches.next(after, self.limit, self.marks, 0, True)

    def send(self, after: int) -> Stretch:
        """The next batch is on its way to the far end, which takes its time."""
        stretch = self.next(after)
        assert stretch is not None
        self.stretches.look_ahead(stretch, self.limit, self.marks, 0, True)
        return stretch

    def sent(self, after: int) -> Stretch:
        """The same, and the far end says yes."""
        stretch = self.send(after)
        self.marks[stretch.key] = Mark(stretch.through)
        return stretch


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.log.close()
    bench.file.close()


def texts(stretch: Stretch | None) -> list[bytes]:
    assert stretch is not None
    return [operation.packed.data for operation in stretch.operations]


def numbers(first: int, last: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, last + 1)]


def test_the_next_batch_is_read_while_the_far_end_works_and_not_again(bench: Bench) -> None:
    assert texts(bench.sent(0)) == numbers(1, 5)
    assert bench.log.reads == [0, 5]
    stretch = bench.next(5)
    assert texts(stretch) == numbers(6, 10)
    assert stretch is not None
    assert (stretch.key, stretch.mark, stretch.through, stretch.wanted) == (NOW, Mark(5), 10, 5)
    assert bench.log.reads == [0, 5]


def test_a_batch_that_is_not_sent_after_all_is_read_again(bench: Bench) -> None:
    bench.send(0)
    assert texts(bench.next(0)) == numbers(1, 5)
    assert bench.log.reads == [0, 5, 0]


def test_nothing_is_kept_for_later_when_the_link_is_lost(bench: Bench) -> None:
    bench.sent(0)
    bench.stretches.forget()
    assert texts(bench.next(5)) == numbers(6, 10)
    assert bench.log.reads == [0, 5, 5]


@pytest.mark.parametrize(
    ("there", "left"), [(Mark(7), numbers(8, 10)), (Mark(5, 1), numbers(7, 10)), (Mark(3), numbers(6, 10))]
)
def test_a_mark_that_stands_elsewhere_than_thought_counts(bench: Bench, there: Mark, left: list[bytes]) -> None:
    bench.send(0)
    bench.marks[NOW] = there
    assert texts(bench.next(5)) == left
    assert bench.log.reads == [0, 5, 5]


def test_a_batch_that_has_become_too_large_is_read_again(bench: Bench) -> None:
    bench.sent(0)
    bench.limit = 2
    assert texts(bench.next(5)) == numbers(6, 7)


def test_after_a_small_batch_nothing_is_read_ahead_so_what_comes_meanwhile_goes_together(bench: Bench) -> None:
    bench.limit = 20
    bench.sent(0)
    assert bench.log.reads == [0]
    bench.publish(3)
    assert texts(bench.next(10)) == numbers(11, 13)


def test_a_batch_with_as_many_bytes_as_it_may_have_is_not_small(bench: Bench) -> None:
    bench.limit = 20
    bench.file.publish("t", bytes(READ_BYTES + 1))
    bench.sent(0)
    assert bench.log.reads == [0, 11]


def test_after_the_last_batch_nothing_is_made_ready_and_what_comes_is_found(bench: Bench) -> None:
    bench.sent(5)
    assert bench.next(10) is None
    bench.publish(1)
    assert texts(bench.next(10)) == numbers(11, 11)


def test_the_next_life_of_the_gateway_is_a_batch_of_its_own_under_its_own_mark(bench: Bench) -> None:
    bench.file.new_run(2)
    bench.publish(4)
    bench.limit = 20
    bench.marks[NEXT] = Mark(12)
    assert texts(bench.sent(0)) == numbers(1, 10)
    stretch = bench.next(10)
    assert texts(stretch) == numbers(13, 14)
    assert stretch is not None
    assert (stretch.key, stretch.mark) == (NEXT, Mark(12))
    assert bench.log.reads == [0, 10]


def test_an_acknowledgement_that_comes_while_the_far_end_works_still_cancels_its_message(tmp_path: Path) -> None:
    bench = Bench(tmp_path, STORE + QUEUE)
    bench.sent(0)
    bench.file.acked("c1", "t", 7)
    stretch = bench.next(5)
    assert stretch is not None
    assert stretch.left_out == 1
    assert b"7" not in texts(stretch)
    bench.log.close()
    bench.file.close()
