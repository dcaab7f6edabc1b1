"""The rules of `emqx_backend_sqlite.conf` as the broker carries them out: functions that answer from the box's own log.

They need no pool and no worker: the log is at hand. Storing functions are what the log does anyway; they say for how long a
message counts as stored.

Invariant: a file with a mistake gives None, and whoever asked keeps the rules that were in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tidegate.store.entry import CONNECTED, SESSION_CREATED
from tidegate.store.local import PUBSUB, QUEUE, FetchRule, Keep, LocalRules
from tidegate.store.topic import filters_overlap

from .vocabulary import EXPIRED_TIME, POSITIONS

if TYPE_CHECKING:
    from .rule import Rule, RuleFile

_ACKS = {"on_message_acked": PUBSUB, "on_message_acked_for_pubsub": PUBSUB, "on_message_acked_for_queue": QUEUE}
_STORES = ("on_message_publish", "on_message_store")


def local_rules(files: Iterable[RuleFile]) -> LocalRules | None:
    """What the rules ask of the broker; None if the file of sqlite has mistakes.

    What a far end is asked for is answered from the box's own log first, so its reading rules hold here as well.
    """
    files = list(files)
    mine = [file for file in files if file.backend == "sqlite"]
    if any(file.mistakes for file in mine):
        return None
    own = [rule for file in mine for rule in file.rules]
    far = list(_far(files))
    rules = own + far
    lookups = {rule.kind for rule in own if rule.function == "on_subscribe_lookup"}
    return LocalRules(
        lookup_new=SESSION_CREATED in lookups,
        lookup_always=CONNECTED in lookups,
        pools_new=_looked_up(files, SESSION_CREATED),
        pools_always=_looked_up(files, CONNECTED),
        retained=tuple(filter_of(rule) for rule in far if rule.function == "on_retain_lookup"),
        fetches=tuple(fetch_rule(rule) for rule in rules if rule.function.startswith("on_message_fetch")),
        acks=tuple((filter_of(rule), _ACKS[rule.function]) for rule in rules if rule.function in _ACKS),
        forgets=tuple(filter_of(rule) for rule in rules if rule.function == "on_acked_delete"),
        keeps=tuple(
            Keep(filter_of(rule), 1000 * (rule.expired_time or EXPIRED_TIME["sqlite"]), rule.function == "on_message_store")
            for rule in own
            if rule.function in _STORES
        ),
    )


def _looked_up(files: Iterable[RuleFile], kind: int) -> frozenset[str]:
    """The pools whose far end is asked at this event what subscriptions it has for the client."""
    return frozenset(
        f"{file.backend}.{rule.pool}"
        for file in files
        for rule in _far([file])
        if rule.function == "on_subscribe_lookup" and rule.kind == kind
    )


def _far(files: Iterable[RuleFile]) -> Iterator[Rule]:
    """The rules about far ends."""
    return (rule for file in files if file.backend != "sqlite" for rule in file.rules)


def filter_of(rule: Rule) -> str:
    """Empty: every name."""
    return "" if rule.everywhere else rule.topic_filter


def fetch_rule(rule: Rule) -> FetchRule:
    """What a rule `on_message_fetch…` says."""
    queue = rule.function == "on_message_fetch_for_queue"
    return FetchRule(filter_of(rule), queue, rule.max_returned_count, 1000 * rule.time_range, rule.first_fetch == "window")


def doubts(rules: Iterable[Rule]) -> Iterator[tuple[int, str]]:
    """(line, text) of what is allowed and hardly meant."""
    all_rules = list(rules)

    def partner(rule: Rule, *functions: str) -> Rule | None:
        found = (other for other in all_rules if other.function in functions)
        return next((other for other in found if _meet(rule, other)), None)

    for rule in all_rules:
        if rule.function == "on_message_fetch_for_queue" and not partner(rule, "on_message_acked_for_queue"):
            yield rule.line, "no on_message_acked_for_queue for these topics: every new subscriber gets every message again"
        if rule.function in ("on_message_fetch", "on_message_fetch_for_pubsub") and not partner(rule, *sorted(POSITIONS)):
            yield rule.line, "no on_message_acked_for_pubsub for these topics: every new subscription gets the same again"
        if rule.function.startswith("on_message_fetch") and not partner(rule, *_STORES):
            yield rule.line, "no rule stores messages of these topics (on_message_publish), so there is nothing to fetch"


def _meet(one: Rule, other: Rule) -> bool:
    return one.everywhere or other.everywhere or filters_overlap(one.topic_filter, other.topic_filter)
