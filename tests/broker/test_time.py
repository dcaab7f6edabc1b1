"""Time in the broker's core: whatever the clock shows, nothing grows old but by the time that truly passed."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.mqtt.packets import Publish
from tidegate.gateway.mqtt.properties import Property
from tidegate.store.clock import BELIEVED, CONFIRMED, Clock, Judge, this_boot
from tidegate.store.entry import CONNECTED, DISCONNECTED, KINDS, PUBLISH, Entry, Want
from tidegate.store.reader import LogReader
from tidegate.store.trim import Plan, Trim

from tests.broker.world import NOW, World

MONTH = 30 * 86_400_000
AGE = 7 * 86_400_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def keep(clock: Clock, wall: int, mono: int) -> tuple[int, int]:
    """Nothing is known but what the log knows."""
    return clock.offset, clock.level


def believed(clock: Clock, wall: int, mono: int) -> tuple[int, int]:
    return wall - mono, BELIEVED


def confirmed(clock: Clock, wall: int, mono: int) -> tuple[int, int]:
    return wall - mono, CONFIRMED


def boot(path: Path, name: str, judge: Judge = keep, wall: int = 0, mono: int = 20_000) -> World:
    """A start of the gateway in the boot `name` of the machine, where everything is wanted."""
    world = World(path, wall=wall, mono=mono, judge=judge, boot=name)
    world.broker.router.set_wants(iter([Want(kind, "#", 0, False) for kind in KINDS.values()]))
    return world


def restart(world: World, path: Path, name: str, judge: Judge = keep, wall: int = 0) -> World:
    """Stopped cleanly and started again in the same boot."""
    mono = world.mono
    world.stop()
    return boot(path, name, judge, wall, mono + 1_000)


def entries(path: Path, kind: int = PUBLISH) -> list[Entry]:
    with closing(LogReader(path)) as reader:
        return [entry for entry in reader.read(0, 10_000)[0] if entry.kind == kind]


def publish(world: World, payload: bytes, expiry: int | None = None, retain: bool = False) -> None:
    device = world.device("p", 5)
    properties: dict[Any, Any] = {} if expiry is None else {Property.MESSAGE_EXPIRY_INTERVAL: expiry}
    device.send(Publish("t", payload, 1, retain, False, 1, properties))
    device.disconnect()


def learn(world: World, wall: int, level: int = CONFIRMED) -> None:
    """The clock shows `wall` now, and is believed."""
    world.broker.log.step(wall - world.mono, level)
    world.broker.tick()
    world.settle()


def test_what_was_written_before_the_clock_was_known_has_its_true_time(path: Path) -> None:
    world = boot(path, "first", confirmed, NOW)
    publish(world, b"0")
    world.kill()
    world = boot(path, "second")
    publish(world, b"1")
    world.elapse(60_000)
    publish(world, b"2")
    world = restart(world, path, "second")
    publish(world, b"3")
    assert [e.when for e in entries(path)[1:]] == [NOW + 20_000, NOW + 80_000, NOW + 81_000], "an estimate meanwhile"
    learn(world, NOW + MONTH)
    publish(world, b"4")
    learn(world, NOW + MONTH - 600_000)
    world.elapse(1_000)
    publish(world, b"5")
    world = restart(world, path, "second", keep)
    publish(world, b"6")
    found = entries(path)
    assert [e.payload for e in found] == [b"%d" % number for number in range(7)]
    now = NOW + MONTH - 600_000
    assert [e.when - now for e in found[1:]] == [-61_000, -1_000, 0, 0, 1_000, 2_000]
    assert found[0].when == NOW
    assert [e.msgid for e in found] == sorted({e.msgid for e in found})


def test_whoever_was_online_when_the_power_failed_went_then(path: Path) -> None:
    world = boot(path, "first", confirmed, NOW)
    world.device("ghost")
    world.kill()
    world = boot(path, "second")
    learn(world, NOW + MONTH)
    (gone,) = entries(path, DISCONNECTED)
    assert gone.when == NOW + 1, "its id comes after all before"
    world.kill()


def test_whoever_was_online_when_the_gateway_died_went_then(path: Path) -> None:
    world = boot(path, "first", confirmed, NOW)
    world.device("other").disconnect()
    world.stop()
    world = boot(path, "second")
    world.device("ghost")
    mono = world.mono
    world.kill()
    world = boot(path, "second", mono=mono + 5_000)
    learn(world, NOW + MONTH)
    (came,) = [entry for entry in entries(path, CONNECTED) if entry.clientid == "ghost"]
    (gone,) = [entry for entry in entries(path, DISCONNECTED) if entry.clientid == "ghost"]
    assert came.when == gone.when == NOW + MONTH - 5_000
    world.kill()


def test_a_clock_that_ran_ahead_does_not_take_anybody_along(path: Path) -> None:
    world = boot(path, "first", confirmed, NOW + MONTH)
    publish(world, b"0")
    learn(world, NOW)
    world.device("ghost")
    mono = world.mono
    world.kill()
    world = boot(path, "first", mono=mono + 5_000)
    ghost = [entry for entry in entries(path) + entries(path, DISCONNECTED) if entry.clientid == "ghost"]
    assert [entry.when for entry in ghost] == [NOW]
    offline = "SELECT offline_at FROM client WHERE clientid = 'ghost'"
    assert world.store.connection.execute(offline).fetchone() == (NOW,)
    world.kill()


def test_the_views_tell_the_true_time(path: Path) -> None:
    boot(path, "first", confirmed, NOW).stop()
    world = boot(path, "second")
    world.device("s")
    publish(world, b"x", retain=True)
    learn(world, NOW + MONTH)
    db = world.store.connection
    assert db.execute("SELECT arrived FROM mqtt_msg UNION SELECT arrived FROM mqtt_retain").fetchall() == [
        ("2025-12-24 16:00:00",)
    ]
    assert db.execute("SELECT online_at, created FROM mqtt_client WHERE clientid = 's'").fetchall() == [
        ("2025-12-24 16:00:00", "2025-12-24 16:00:00")
    ]
    world.kill()


# -- what may grow old -----------------------------------------------------------------------------------------------


def test_a_message_expires_by_the_time_that_passed(path: Path) -> None:
    world = boot(path, "first")
    world.device("s", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 10**6}).subscribe("t", 1)
    world.device("s", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 10**6}).cut()
    publish(world, b"short", expiry=30)
    publish(world, b"long", expiry=90)
    world = restart(world, path, "first")
    learn(world, NOW)
    world.elapse(59_000)
    device = world.device("s", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 10**6})
    assert [message[3] for message in device.messages()] == [b"long"]
    assert world.broker.delivery.dropped["expired"] == 1


def test_a_retained_message_expires_by_the_time_that_passed(path: Path) -> None:
    world = boot(path, "first")
    publish(world, b"kept", expiry=90, retain=True)
    learn(world, NOW + MONTH)
    world.elapse(60_000)
    early, late = world.device("early", 5), world.device("late", 5)
    early.subscribe("t", 1)
    assert [message[3] for message in early.messages()] == [b"kept"]
    world.elapse(40_000)
    late.subscribe("t", 1)
    assert late.messages() == []


@pytest.mark.parametrize(
    ("before", "after", "gone"),
    [(confirmed, confirmed, True), (believed, confirmed, False), (confirmed, believed, False)],
    ids=["known before and after", "not known before", "not known after"],
)
def test_a_power_cut_makes_old_only_where_its_length_is_known(path: Path, before: Judge, after: Judge, gone: bool) -> None:
    world = boot(path, "first", before, NOW)
    world.device("s", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 3_600}).disconnect()
    world.device("t", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 10**6}).subscribe("t", 1)
    world.device("t", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 10**6}).cut()
    publish(world, b"x", expiry=3_600)
    world.kill()
    world = boot(path, "second", after, NOW + 7_200_000)
    world.broker.tick()
    assert (world.broker.sessions.get("s") is None) == gone
    device = world.device("t", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 10**6})
    assert (device.messages() == []) == gone


def test_a_session_lives_as_long_as_it_was_promised(path: Path) -> None:
    world = boot(path, "first")
    world.device("s", 5, clean=False, properties={Property.SESSION_EXPIRY_INTERVAL: 3_600}).disconnect()
    learn(world, NOW + MONTH)
    world = restart(world, path, "first", confirmed, NOW + MONTH + 600_000)
    for level, wall in ((BELIEVED, NOW), (CONFIRMED, NOW + 3 * MONTH), (CONFIRMED, NOW + 2 * MONTH)):
        learn(world, wall, level)
        publish(world, b"x")
    world = restart(world, path, "first")
    world.wait(3_590)
    assert world.broker.sessions.get("s") is not None
    world.wait(20)
    assert world.broker.sessions.get("s") is None


def trimmed(world: World) -> int:
    """Lets go of what is older than a week; the first seq that is left."""
    log, db = world.broker.log, world.store.connection
    trim = Trim(1 << 30, AGE)
    while (plan := trim.plan(db, log.clock.at(world.mono), log.next_seq)) is not None:
        if isinstance(plan, Plan):
            for sql, parameters in plan.changes:
                log.change(sql, *parameters)
            world.store.apply(log.take())
    return int(db.execute("SELECT min(seq) FROM entry").fetchone()[0])


def test_nothing_is_trimmed_by_a_wrong_clock(path: Path) -> None:
    world = boot(path, "first")
    publish(world, b"x")
    first = trimmed(world)
    for wall, level in ((NOW, BELIEVED), (NOW + 20 * MONTH, BELIEVED), (NOW + MONTH, CONFIRMED), (NOW + 9 * MONTH, CONFIRMED)):
        learn(world, wall, level)
        assert trimmed(world) == first
    world.elapse(AGE - 1)
    publish(world, b"y")
    assert trimmed(world) == first
    world.elapse(60_000)
    assert trimmed(world) > first, "a week has passed, whatever the clock says"
    world.kill()


@pytest.mark.parametrize(
    ("before", "after", "mono", "goes"),
    [
        (confirmed, confirmed, 20_000, True),
        (believed, confirmed, 20_000, False),
        (confirmed, believed, 20_000, False),
        (believed, believed, AGE + 1, True),
    ],
    ids=["known before and after", "not known before", "not known after", "up for longer than that"],
)
def test_a_trim_after_a_power_cut(path: Path, before: Judge, after: Judge, mono: int, goes: bool) -> None:
    world = boot(path, "first", before, NOW)
    publish(world, b"x")
    last = world.broker.log.next_seq - 1
    world.kill()
    world = boot(path, "second", after, NOW + MONTH, mono)
    publish(world, b"y")
    assert (trimmed(world) > last) == goes
    world.kill()


# -- the far end's view ----------------------------------------------------------------------------------------------


def test_a_far_end_gets_nothing_of_this_boot_before_its_time_is_known(path: Path) -> None:
    world = boot(path, "first", believed, NOW)
    publish(world, b"0")
    world.kill()
    world = boot(path, "second")
    publish(world, b"1")
    with closing(LogReader(path, waits=True)) as reader:
        found, through = reader.read(0, 100)
        assert [e.payload for e in found if e.kind == PUBLISH] == [b"0"]
        assert reader.read(through, 100) == ([], through)
        world.broker.log.step(world.broker.log.clock.offset, BELIEVED)
        world.broker.tick()
        world.settle()
        found, _ = reader.read(through, 100)
        assert [e.payload for e in found if e.kind == PUBLISH] == [b"1"]
    world.kill()
    world = boot(path, "third")
    with closing(LogReader(path, waits=True)) as reader:
        found, _ = reader.read(0, 100)
        assert [e.payload for e in found if e.kind == PUBLISH] == [b"0", b"1"]
    world.kill()


def test_of_a_boot_that_is_over_nothing_more_becomes_known(path: Path) -> None:
    world = boot(path, "first")
    publish(world, b"0")
    world.kill()
    world = boot(path, "second")
    publish(world, b"1")
    with closing(LogReader(path, waits=True)) as reader:
        assert [e.payload for e in reader.read(0, 100)[0] if e.kind == PUBLISH] == [b"0"]
    world.kill()


def test_a_snapshot_that_is_started_again_is_another_boot(path: Path) -> None:
    world = boot(path, "first", confirmed, NOW, mono=10**9)
    publish(world, b"0")
    world.stop()
    world = boot(path, "first", confirmed, NOW + MONTH, mono=5_000)
    publish(world, b"1")
    learn(world, NOW + MONTH + 600_000)
    assert [entry.when for entry in entries(path)] == [NOW, NOW + MONTH + 600_000]
    world = restart(world, path, "first")
    publish(world, b"2")
    assert [entry.when for entry in entries(path)] == [NOW, NOW + MONTH + 600_000, NOW + MONTH + 601_000]
    world.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="shifting a clock needs root")
def test_a_shifted_boot_clock_is_another_one() -> None:
    code = "from tidegate.store.clock import this_boot; print(this_boot())"
    shifted = subprocess.run(
        ["unshare", "--time", "--boottime", "1000", "--fork", sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shifted.stdout.strip() == f"{this_boot()} 1000.0"
