"""The trees of filters and topics against plain matching, and what deep topics of strangers cost in them."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from tidegate.store.topic import FilterTree, TopicTree, matches

LEVELS = ("a", "b", "", "ab", "$x")
SEEDS = range(12)
DEEP = 200
MANY = 500


def levels(chance: random.Random, choices: tuple[str, ...]) -> str:
    return "/".join(chance.choice(choices) for _ in range(chance.randrange(1, 7)))


def a_topic(chance: random.Random) -> str:
    return levels(chance, LEVELS)


def a_filter(chance: random.Random) -> str:
    text = levels(chance, (*LEVELS, "+", "+"))
    return chance.choice((text, text, text + "/#", "#"))


@pytest.mark.parametrize("seed", SEEDS)
def test_filters_come_and_go_and_are_found_as_they_match(seed: int) -> None:
    chance = random.Random(seed)
    tree: FilterTree[int, int] = FilterTree()
    there: dict[tuple[str, int], int] = {}
    for number in range(400):
        text, key = a_filter(chance), chance.randrange(3)
        if chance.random() < 0.6:
            tree.put(text, key, number)
            there[text, key] = number
        else:
            text, key = chance.choice([*there, (text, key)])
            assert tree.remove(text, key) == (there.pop((text, key), None) is not None)
        topic = a_topic(chance)
        found = sorted((key, value) for (text, key), value in there.items() if matches(text, topic))
        assert sorted(tree.find(topic)) == found, topic
        assert len(tree) == len(there)
    assert all([tree.remove(text, key) for text, key in there])
    assert len(tree) == 0 and not any(list(tree.find(a_topic(chance))) for _ in range(50))


@pytest.mark.parametrize("seed", SEEDS)
def test_topics_come_and_go_and_are_found_as_they_are_matched(seed: int) -> None:
    chance = random.Random(seed)
    tree: TopicTree[int] = TopicTree()
    there: dict[str, int] = {}
    for number in range(400):
        topic = a_topic(chance)
        if chance.random() < 0.6:
            tree.put(topic, number)
            there[topic] = number
        else:
            topic = chance.choice([*there, topic])
            assert tree.remove(topic) == (there.pop(topic, None) is not None)
        wanted = a_filter(chance)
        assert sorted(tree.find(wanted)) == sorted(value for topic, value in there.items() if matches(wanted, topic)), wanted
        assert len(tree) == len(there)
    assert all([tree.remove(topic) for topic in there])
    assert len(tree) == 0 and list(tree.find("#")) == list(tree.find("$x/#")) == []


def test_deep_topics_cost_about_their_bytes() -> None:
    topics = ["/".join(f"{number}.{level}" for level in range(DEEP)) for number in range(MANY)]
    tree: TopicTree[int] = TopicTree()
    tracemalloc.start()
    for topic in topics:
        tree.put(topic, 1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < sum(len(topic) + 600 for topic in topics)


def test_deep_filters_that_match_one_topic_cost_about_their_bytes() -> None:
    """And as few steps: each node of the tree that a topic's ways lead through is looked at."""
    filters = [
        "/".join("+" if level < 10 and number >> level & 1 else "a" for level in range(DEEP)) for number in range(1, MANY)
    ]
    tree: FilterTree[int, int] = FilterTree()
    tracemalloc.start()
    for text in filters:
        tree.put(text, 1, 1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < sum(len(text) + 800 for text in filters)
    assert len(list(tree.find("/".join(["a"] * DEEP)))) == len(filters)
