"""What goes first when the disk budget is used up: a policy for each topic filter.

The first policy of the file whose filter matches a topic holds for it; without one, and for entries that are no message of a
topic (a client that connected), the default: priority 1, the oldest is dropped. Policies that ask for the same are one class.

Invariant: every topic has exactly one policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .topic import matches

REJECT_NEW = "reject_new"
DROP_OLDEST = "drop_oldest"


class Policy(NamedTuple):
    """`priority`: the lowest goes first. `when_full`: whether its oldest is dropped or new ones are refused."""

    topic: str = "#"
    priority: int = 1
    when_full: str = DROP_OLDEST

    @property
    def rejects(self) -> bool:
        return self.when_full == REJECT_NEW


@dataclass(frozen=True)
class Policies:
    """All of them, in the order of the file."""

    given: tuple[Policy, ...] = ()

    @cached_property
    def classes(self) -> list[tuple[int, bool]]:
        """The distinct (priority, rejects), lowest priority first; a class is named by its place."""
        return sorted({(policy.priority, policy.rejects) for policy in (*self.given, Policy())})

    def of(self, topic: str) -> Policy:
        """The policy that holds for this topic."""
        for policy in self.given:
            if matches(policy.topic, topic):
                return policy
        return Policy()

    def class_of(self, policy: Policy) -> int:
        return self.classes.index((policy.priority, policy.rejects))
