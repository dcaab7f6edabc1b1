"""Routes are kept as long as nothing concerns them, and are never out of date."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate.gateway.mqtt.packets import Subscribe, Subscription
from tidegate.gateway.mqtt.properties import Property
from tidegate.gateway.routing import MAX_CHANGES, MAX_TOPIC_BYTES, Topic
from tidegate.store.entry import PUBLISH
from tidegate.store.topic import FilterTree, matches

from .world import Device, World

TOPICS = ("a", "b", "a/a", "a/b", "b/a", "a/a/b", "a/b/a", "$a/b", "b/b/b")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "log.db")
    yield world
    world.kill()


def random_filter(chance: random.Random) -> str:
    levels = chance.choices(("a", "b", "+"), k=chance.randrange(1, 4))
    return "/".join([*levels, "#"] if chance.random() < 0.3 else levels)


def targets(world: World, topic: Topic) -> set[tuple[str, int]]:
    world.broker.router.route(topic, PUBLISH)
    return {(target.session.name.text, target.qos) for target in topic.targets}


@pytest.mark.parametrize("seed", range(4))
def test_a_route_is_true_after_any_changes(world: World, seed: int) -> None:
    chance = random.Random(seed)
    topics = {text: world.broker.router.topics[text.encode()] for text in TOPICS}
    devices = [world.device(f"d{number}", clean=False) for number in range(5)]
    for _ in range(400):
        place = chance.randrange(len(devices))
        device = devices[place]
        if device.closed:
            devices[place] = world.device(f"d{place}", clean=False)
        elif chance.random() < 0.3:
            device.cut()
        elif chance.random() < 0.6:
            device.subscribe(random_filter(chance), chance.randrange(3))
        else:
            session = device.client.session
            assert session is not None
            for text in chance.sample(sorted(session.subscriptions), min(1, len(session.subscriptions))):
                world.broker.sessions.unsubscribe(session, text)
        for text in chance.sample(TOPICS, chance.randrange(3)):
            assert targets(world, topics[text]) == targets(world, Topic(text.encode(), text)), text


def test_a_route_with_many_receivers_is_not_made_again_for_what_does_not_concern_it(world: World) -> None:
    for number in range(MAX_CHANGES):
        Device(world, f"d{number}").subscribe("hot/+", 0)
    topic = world.broker.router.topics[b"hot/1"]
    world.broker.router.route(topic, PUBLISH)
    before = topic.targets
    other = Device(world, "other")
    for number in range(MAX_CHANGES):
        other.subscribe(f"cold/{number}/#", 0)
    world.broker.router.route(topic, PUBLISH)
    assert topic.targets is before
    other.subscribe("hot/#", 0)
    assert ("other", 0) in targets(world, topic)


def test_a_tree_finds_what_one_key_has_as_it_finds_all() -> None:
    chance = random.Random(0)
    tree: FilterTree[int, str] = FilterTree()
    filters = {(random_filter(chance), chance.randrange(4)) for _ in range(60)}
    for text, key in filters:
        tree.put(text, key, text)
    for topic in TOPICS:
        for key in range(4):
            wanted = sorted(text for text, owner in filters if owner == key and matches(text, topic))
            assert sorted(tree.of(key, topic)) == wanted
            assert sorted(text for owner, text in tree.find(topic) if owner == key) == wanted


def test_what_a_session_gets_of_a_long_topic_is_not_remembered_for_each(world: World) -> None:
    device = Device(world, "d")
    device.subscribe("#", 1)
    session = world.broker.sessions.get("d")
    assert session is not None
    for text in (b"short", b"x" * 60_000):
        target = world.broker.router.match(session, world.broker.router.topics[text])
        assert target is not None and target.qos == 1
    assert list(session.matched) == [b"short"]


def test_the_routes_that_are_remembered_take_bounded_memory(world: World) -> None:
    """They are as long as there are receivers: fifty of every topic would be hundreds of megabytes."""
    for number in range(50):
        Device(world, f"d{number}").subscribe("#", 0)
    topics = world.broker.router.topics
    for number in range(8_000):
        topic = topics[b"t/%d" % number]
        world.broker.router.route(topic, PUBLISH)
        assert len(topic.targets) == 50
    held = sum(sys.getsizeof(topic.targets) + sum(map(sys.getsizeof, topic.targets)) for topic in topics.values())
    assert held < MAX_TOPIC_BYTES and len(topics) < 8_000


def test_identifiers_of_many_subscriptions_are_made_once(world: World) -> None:
    device = Device(world, "d", 5)
    texts = ["/".join("+" if number >> level & 1 else "a" for level in range(8)) for number in range(256)]
    for number, text in enumerate(texts):
        device.send(Subscribe(1, (Subscription(text, 1),), {Property.SUBSCRIPTION_IDENTIFIER: [number + 1]}))
    topic = world.broker.router.topics[b"a/a/a/a/a/a/a/a"]
    world.broker.router.route(topic, PUBLISH)
    (target,) = topic.targets
    assert len(target.identifiers) == 127 * 2 + 129 * 3 and target.qos == 1
    session = world.broker.sessions.get("d")
    assert session is not None and world.broker.router.match(session, topic) == target
    assert not session.matched, "so much is not remembered for each session and topic"
