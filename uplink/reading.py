"""What the rules of a pool read at its far end: lookups, stored messages and retained messages, for new subscriptions.

A rule's filter is matched against a subscription's filter taken as if it were a topic, as on the box itself (`store.local`).

Invariant: pure; a pool without such rules has no `Reading`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from tidegate.store.entry import CONNECTED, DISCONNECTED, SESSION_CREATED, SUBSCRIBED, UNSUBSCRIBED, Want
from tidegate.store.local import LocalRules
from tidegate.store.topic import is_wild, matches, without_share

from .local import fetch_rule, filter_of
from .vocabulary import READING

if TYPE_CHECKING:
    from .pools import Pool
    from .rule import Rule

FETCH, RETAINED, LOOKUP = 1, 2, 4
"""What is asked; of one subscription the first two, of a client the third."""
KINDS = frozenset((CONNECTED, DISCONNECTED, SESSION_CREATED, SUBSCRIBED, UNSUBSCRIBED))
"""Entries that tell who is there and what they subscribe to."""


class Reading(NamedTuple):
    """`retained`: filters of `on_retain_lookup`."""

    rules: LocalRules
    retained: tuple[str, ...]

    def asked_for(self, topic_filter: str, qos: int) -> int:
        """What a subscription asks: stored messages of a literal topic when it has a QoS, retained ones of any filter."""
        name = without_share(topic_filter)
        literal = not is_wild(topic_filter) and name == topic_filter
        fetch = FETCH if qos and literal and self.rules.fetch_for(topic_filter) is not None else 0
        return fetch | (RETAINED if any(not one or matches(one, name) for one in self.retained) else 0)


def reading(rules: Iterable[Rule]) -> Reading | None:
    """What these rules of one pool read, None if nothing."""
    mine = [rule for rule in rules if rule.function in READING]
    if not mine:
        return None
    lookups = {rule.kind for rule in mine if rule.function == "on_subscribe_lookup"}
    local = LocalRules(
        lookup_new=SESSION_CREATED in lookups,
        lookup_always=CONNECTED in lookups,
        fetches=tuple(fetch_rule(rule) for rule in mine if rule.function.startswith("on_message_fetch")),
    )
    return Reading(local, tuple(filter_of(rule) for rule in mine if rule.function == "on_retain_lookup"))


def too_few_connections(pool: Pool, rules: Iterable[Rule]) -> str:
    """What is wrong with `pool_size` for these rules of the pool; empty if nothing. What writes in order is never shared: a
    question that takes long would hold it up."""
    uses = ["one writes"]
    if reading(rules) is not None:
        uses.append("one looks things up")
        if pool.backend == "redis" and pool.settings["channel"]:
            uses.append("one listens to the channel")
    size = pool.settings["pool_size"]
    if size >= len(uses):
        return ""
    less = "; or take out the rules that read back" if len(uses) > 1 else ""
    return f"{size} is too small for these rules: {', '.join(uses)}: set {len(uses)} or more{less}"


def wants_of(rule: Rule) -> list[Want]:
    """What must be logged so that a reading rule can follow who is there."""
    found = [Want(kind, "", 0, False) for kind in (CONNECTED, DISCONNECTED, SESSION_CREATED)]
    if rule.kind == SUBSCRIBED:
        found += [Want(kind, filter_of(rule), 0, False) for kind in (SUBSCRIBED, UNSUBSCRIBED)]
    return found
