"""`[[store.policy]]`: the shipped example loads, and every mistake has its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tidegate.gateway.config import load
from tidegate.store.policy import Policies, Policy

from .test_config import SHIPPED, mistakes, written


def test_the_shipped_example_loads_and_shows_the_keys(tmp_path: Path) -> None:
    text = SHIPPED.read_text().replace("#   ", "")
    config = load(written(tmp_path, text), None, (), {})
    assert config.policies.of("alarm/fire") == Policy("alarm/#", 2, "drop_oldest")
    assert config.policies.of("else") == Policy("#", 1, "drop_oldest")


def test_the_first_policy_that_matches_holds() -> None:
    policies = Policies((Policy("a/+", 5), Policy("a/#", 0, "reject_new")))
    assert [policies.of(topic).priority for topic in ("a/b", "a/b/c", "a", "b", "$SYS/a")] == [5, 0, 0, 1, 1]
    assert policies.classes == [(0, True), (1, False), (5, False)]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("[[store.policy]]\n", 1, "needs topic"),
        ("[[store.policy]]\ntopic = 'a/#/b'\n", 2, "a topic filter such as"),
        ("[[store.policy]]\ntopic = '$share/g/a'\n", 2, "not $share"),
        ("[[store.policy]]\ntopic = 7\n", 2, "a text in quotes"),
        ("[[store.policy]]\ntopic = 'a'\n[[store.policy]]\ntopic = 'b'\npriority = 101\n", 5, "a whole number from 0 to 100"),
        ("[[store.policy]]\ntopic = 'a'\nwhen_full = 'reject'\n", 3, "drop_oldest | reject_new (nearest: reject_new)"),
        ("[[store.policy]]\ntopic = 'a'\nprioritty = 2\n", 3, "unknown key 'prioritty' in [[store.policy]]: did you mean"),
        ("[[store.policy]]\ntopic = 'a'\n[[store.policy]]\ntopic = 'a'\n", 4, "again: the first one holds"),
        ("[store]\npolicy = 'alarm'\n", 2, "[[store.policy]], with two brackets"),
        ("[store.policy]\ntopic = 'a'\n", 1, "[[store.policy]], with two brackets"),
    ],
)
def test_a_mistake_in_a_policy_has_its_line(tmp_path: Path, text: str, place: int, words: str) -> None:
    (found,) = mistakes(tmp_path, text)
    assert found.startswith(f"gateway.toml:{place}: ")
    assert words in found
