"""What the rules would do with an entry, and why others would not: the worker's own way, entry to rule to action, no link.

The plan that a pool's worker follows is made and asked; what it answers is shown. Nothing is decided a second time here: the
words for a rule that writes nothing are looked for only after its action has said so.

Invariant: nothing is sent, and no far end is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tidegate.store.entry import ACKED, POSITION, Entry, forgotten
from tidegate.store.topic import is_wild, without_share

from .backend import Backend, Shown
from .plan import Plan
from .pools import Pool
from .rule import Rule, RuleFile
from .vocabulary import BUILT, EVENTS, READING

SENDS, ASKS, KEPT, NOTHING = "sends", "asks the far end", "kept on this box", "writes nothing"
OTHER_EVENT, OTHER_TOPIC = "other event", "other topic"
IN_FORCE, MISCONFIGURED, NOT_BUILT = "in force", "misconfigured", "not built yet"
_VIEWS = {
    "on_client_connected": "mqtt_client",
    "on_client_disconnected": "mqtt_client",
    "on_message_publish": "mqtt_msg",
    "on_message_store": "mqtt_msg",
    "on_message_retain": "mqtt_retain",
    "on_retain_delete": "mqtt_retain",
}


_QUESTIONS = {
    "on_subscribe_lookup": "for the client's subscriptions",
    "on_message_fetch": "for messages after the client's position",
    "on_message_fetch_for_pubsub": "for messages after the client's position",
    "on_message_fetch_for_queue": "for all messages of the topic",
    "on_retain_lookup": "for retained messages",
}


class Verdict(NamedTuple):
    """What becomes of the entry by one rule: `result` in two words, `reason` in a sentence when nothing is sent."""

    rule: Rule
    backend: str
    result: str
    reason: str
    writes: Sequence[Shown] = ()

    @property
    def matches(self) -> bool:
        """Whether the entry is the rule's, whatever it does with it."""
        return self.result not in (OTHER_EVENT, OTHER_TOPIC)


def explain(file: RuleFile, entry: Entry, node: str, find: Callable[[str], Backend]) -> list[Verdict]:
    """A verdict for every rule of the file, in their order. `find` brings the module of a backend; ImportError: no driver."""
    written: dict[int, list[Shown]] = {}
    fault = trouble(file)
    if file.backend != "sqlite" and not fault:
        try:
            written = _written(file, entry, node, find(file.backend))
        except ImportError as error:
            fault = f"the driver of {file.backend} is not installed: {error}"
    return [_verdict(file.backend, rule, entry, fault, written.get(rule.line, [])) for rule in file.rules]


def trouble(file: RuleFile) -> str:
    """Why no rule of the file is in force, if none is."""
    if file.backend not in BUILT:
        return f"the backend {file.backend} comes with a later version"
    if not file.mistakes:
        return ""
    more = f" (and {len(file.mistakes) - 1} more)" if len(file.mistakes) > 1 else ""
    return f"its pool waits until the file is mended: {file.mistakes[0]}{more}"


def state(file: RuleFile) -> str:
    """Whether the rules of the file are in force."""
    if file.backend not in BUILT:
        return NOT_BUILT
    return MISCONFIGURED if file.mistakes else IN_FORCE


def _written(file: RuleFile, entry: Entry, node: str, backend: Backend) -> dict[int, list[Shown]]:
    """Line of a rule -> what its pool's worker would send because of it."""
    written: dict[int, list[Shown]] = {}
    for pool in file.pools:
        rules = [rule for rule in file.rules if rule.pool == pool.name]
        lines = {rule.target: rule.line for rule in rules}
        plan = Plan(rules, backend, node)
        operations = plan.operations(entry)
        if entry.kind == ACKED:
            # What moves a position is carried out when the broker has folded the acknowledgement into it.
            operations += plan.operations(entry._replace(kind=POSITION))
        for operation in operations:
            written.setdefault(lines[operation.target], []).extend(_show(backend, operation.packed, pool))
    return written


def _show(backend: Backend, packed: Any, pool: Pool) -> Sequence[Shown]:
    show = getattr(backend, "show", None)
    if show is None:
        # A backend that cannot say more shows what the quarantine would keep.
        return [Shown("", [packed.data])]
    shown: Sequence[Shown] = show(packed, pool)
    return shown


def _verdict(backend: str, rule: Rule, entry: Entry, fault: str, writes: Sequence[Shown]) -> Verdict:
    def no(result: str, reason: str) -> Verdict:
        return Verdict(rule, backend, result, reason)

    if EVENTS[rule.event] != entry.kind:
        return no(OTHER_EVENT, f"it is a rule of {rule.event}")
    if not rule.concerns(entry.topic):
        return no(OTHER_TOPIC, f"{rule.topic_filter} does not match {entry.topic}{_hint(rule, entry)}")
    if fault:
        return no(MISCONFIGURED if backend in BUILT else NOT_BUILT, fault)
    if rule.function in READING and backend != "sqlite":
        why = why_not_asked(rule.function, entry)
        return no(NOTHING, why) if why else no(ASKS, _QUESTIONS[rule.function])
    if writes:
        return Verdict(rule, backend, SENDS, "", writes)
    reason = why_nothing(rule.function, entry)
    if not reason and rule.function == "on_message_publish" and backend != "sqlite":
        reason = "on_message_store of another rule stores it already"
    if backend == "sqlite" and not reason:
        view = _VIEWS.get(rule.function)
        how = f"its log holds it, to be read in the view {view}" if view else "the broker does it with its own log"
        return no(KEPT, f"{how}; nothing is sent")
    return no(NOTHING, reason or f"{rule.action} writes nothing for it")


def why_nothing(function: str, entry: Entry) -> str:
    """Why this storing function passes the entry over; empty when it does not."""
    clears = entry.retain and not entry.payload
    if function == "on_message_publish" and not entry.qos:
        return "on_message_publish stores QoS 1 and 2, and this is QoS 0 (on_message_store stores every QoS)"
    if function in ("on_message_publish", "on_message_store") and clears:
        return f"a retained message without a payload deletes the one before; {function} does not store it"
    if function in ("on_message_retain", "on_retain_delete") and not entry.retain:
        return "it is not retained"
    if function == "on_message_retain" and clears:
        return "it has no payload: on_retain_delete deletes the retained message"
    if function == "on_retain_delete" and not clears:
        return "it has a payload: on_message_retain keeps it"
    if function == "on_acked_delete" and not forgotten(entry):
        return "with wildcards it drops the positions that the client then has in topics that match; which, is not known here"
    return ""


def why_not_asked(function: str, entry: Entry) -> str:
    """Why this reading function has nothing to ask because of a subscription; empty when it has."""
    if not function.startswith("on_message_fetch"):
        return ""
    if not entry.qos:
        return "a subscription with QoS 0 fetches nothing"
    if is_wild(entry.topic) or entry.topic.startswith("$share/"):
        return "only literal topics are fetched from a far end; a wildcard gets what the box itself has"
    return ""


def _hint(rule: Rule, entry: Entry) -> str:
    if without_share(entry.topic).startswith("$") and rule.topic_filter[0] in "#+":
        return ": # and + do not stand for topics that begin with $"
    return ""
