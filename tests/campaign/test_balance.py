"""The campaign sees what is wrong: each kind of damage to a far end, or to a log, comes up under its own name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tidegate.store.entry import CONNECTED, PUBLISH, Entry

from . import far_end
from .balance import balance, expected
from .far_end import Contents, Fault, Presence
from .people import Keeper, Publisher
from .redis_far_end import SingleRedis
from .trial import Plan, Trial


def entry(seq: int, kind: int, client: str, topic: str = "", payload: bytes = b"", qos: int = 0, retain: bool = False) -> Entry:
    return Entry(seq, 0, 1000 * seq, kind, client, topic, qos, retain, payload, b"", "gateway", 1, f"id{seq:03}")


def published(person: Publisher, count: int) -> list[Entry]:
    """What the log holds when all of it was acknowledged at once."""
    person.sent = count
    person.acknowledged = set(range(count))
    first = 10 * person.qos
    message = [(person.topic_of(number), person.payload(number)) for number in range(count)]
    return [entry(first + n, PUBLISH, person.name, *message[n], person.qos, person.retain) for n in range(count)]


def world() -> tuple[list[Publisher], list[Entry]]:
    people = [Publisher("one", "data/1", 1), Keeper("two", "kept", 2)]
    came = [entry(number, CONNECTED, person.name) for number, person in enumerate(people, 1)]
    for person in people:
        person.client = object()  # type: ignore[assignment] # somebody who is there
    return people, [*came, *published(people[0], 6), *published(people[1], 6)]


Damage = Callable[[Contents], Contents]
DAMAGES: dict[str, tuple[Damage, dict[str, int]]] = {
    "none": (lambda far: far, {}),
    "a row is missing": (lambda far: far._replace(messages=far.messages[1:]), {"missing_at_the_far_end": 1}),
    "a statement is missing": (lambda far: far._replace(listed=far.listed[:-1]), {"missing_at_the_far_end": 1}),
    "a row is there twice": (lambda far: far._replace(messages=[*far.messages, far.messages[-1]]), {"extra_at_the_far_end": 1}),
    "a statement ran twice": (lambda far: far._replace(listed=[*far.listed, far.listed[-1]]), {"extra_at_the_far_end": 1}),
    "a row that nobody sent": (
        lambda far: far._replace(messages=[*far.messages, far.messages[0]._replace(msgid="x")]),
        {"extra_at_the_far_end": 1},
    ),
    "two rows changed places": (
        lambda far: far._replace(messages=[far.messages[1], far.messages[0], *far.messages[2:]]),
        {"out_of_order": 1},
    ),
    "a field differs": (
        lambda far: far._replace(messages=[far.messages[0]._replace(payload=b"?"), *far.messages[1:]]),
        {"rows_that_differ": 1},
    ),
    "the counter is one behind": (lambda far: far._replace(counted=far.counted - 1), {"counter_wrong_by": 1}),
    "a retained message is gone": (
        lambda far: far._replace(retained={topic: row for topic, row in far.retained.items() if topic != "kept/1"}),
        {"retained_wrong": 2},
    ),
    "somebody is offline": (
        lambda far: far._replace(presence=far.presence | {"one": Presence(False, 1, 2)}),
        {"presence_wrong": 2},
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_at_the_far_end(damage: str) -> None:
    people, entries = world()
    change, wanted = DAMAGES[damage]
    assert balance(entries, change(expected(entries)), people, []).mistakes() == wanted


def test_what_was_acknowledged_and_is_not_in_the_log() -> None:
    people, entries = world()
    lost = entries[:4] + entries[5:]
    assert balance(lost, expected(lost), people, []).mistakes() == {"missing_in_the_log": 1}


@pytest.mark.parametrize(("place", "resent", "mistakes"), [(2, 1, {}), (2, 0, {"stored_again_unexplained": 1}),
                                                         (8, 1, {"stored_again_unexplained": 1})])  # fmt: skip
def test_a_second_copy_in_the_log_needs_a_resend_of_qos_1(place: int, resent: int, mistakes: dict[str, int]) -> None:
    people, entries = world()
    people[entries[place].qos - 1].resent[0] = resent
    entries.insert(place + 1, entries[place]._replace(seq=90, msgid="id090"))
    assert balance(entries, expected(entries), people, []).mistakes() == mistakes


class Forgetful(SingleRedis):
    """Loses its mark and nothing else."""

    def faults(self) -> Sequence[Fault]:
        return [Fault("mark lost", self._forget, far_end.CONNECTED)]

    @contextmanager
    def _forget(self) -> Iterator[None]:
        with self._server.client() as client:
            client.delete(*client.keys("tidegate:ledger:*"))
        self.drop()
        yield


def test_a_far_end_that_gets_everything_twice_is_found_out(tmp_path: Path) -> None:
    with Forgetful(tmp_path) as far:
        sheet = Trial(far, tmp_path / "gateway", random.Random(1)).run(Plan(cuts=1, kills=0, rounds=1)).sheet
    assert sheet.extra_at_the_far_end > 0
    assert sheet.counter_wrong_by > 0
    log, there = ((tmp_path / "gateway" / name).read_text() for name in ("log.txt", "far_end.txt"))
    assert len(there.splitlines()) == len(log.splitlines()) + sheet.extra_at_the_far_end
