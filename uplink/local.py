"""The rules of `emqx_backend_sqlite.conf` as the broker carries them out: functions that answer from the box's own log.

They need no pool and no worker: the log is at hand. Storing functions are what the log does anyway; they say for how long a
message counts as stored.

Invariant: a file with a mistake gives None, and whoever asked keeps the rules that were in force.
"""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.store.entry import CONNECTED, SESSION_CREATED
from tidegate.store.local import PUBSUB, QUEUE, FetchRule, Keep, LocalRules

from .rule import Rule, RuleFile
from .vocabulary import EXPIRED_TIME

_ACKS = {"on_message_acked": PUBSUB, "on_message_acked_for_pubsub": PUBSUB, "on_message_acked_for_queue": QUEUE}
_STORES = ("on_message_publish", "on_message_store")


def local_rules(files: Iterable[RuleFile]) -> LocalRules | None:
    """What the file of sqlite asks of the broker; None if it has mistakes."""
    mine = [file for file in files if file.backend == "sqlite"]
    if any(file.mistakes for file in mine):
        return None
    rules = [rule for file in mine for rule in file.rules]
    lookups = {rule.kind for rule in rules if rule.function == "on_subscribe_lookup"}
    return LocalRules(
        lookup_new=SESSION_CREATED in lookups,
        lookup_always=CONNECTED in lookups,
        fetches=tuple(_fetch(rule) for rule in rules if rule.function.startswith("on_message_fetch")),
        acks=tuple((rule.topic_filter, _ACKS[rule.function]) for rule in rules if rule.function in _ACKS),
        forgets=tuple(rule.topic_filter for rule in rules if rule.function == "on_acked_delete"),
        keeps=tuple(
            Keep(rule.topic_filter, 1000 * (rule.expired_time or EXPIRED_TIME["sqlite"]))
            for rule in rules
            if rule.function in _STORES
        ),
    )


def _fetch(rule: Rule) -> FetchRule:
    queue = rule.function == "on_message_fetch_for_queue"
    return FetchRule(rule.topic_filter, queue, rule.max_returned_count, 1000 * rule.time_range, rule.first_fetch == "window")
