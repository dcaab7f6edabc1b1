"""A pool's rules as a plan: entry in, operations out.

Which rules concern a topic is computed once per (kind, topic) and remembered, because an outage's backlog repeats a few
topics a million times. Rules of one event run in the order of their numbers, as they stand in the file.

Invariant: the same entry and rules give the same operations in the same order, today and after a restart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from tidegate.store.entry import GAP, Entry

from .backend import Action, Backend, Operation
from .rule import Rule
from .vocabulary import READING

TAKES = "on_message_acked_for_queue"
CANCELLING = (TAKES, "on_message_publish", "on_message_store")
"""Of a message and its acknowledgement, both not sent yet, neither need be."""

MAX_REMEMBERED = 20_000


class Asked(NamedTuple):
    """What entries ask for, how many of them ask for anything, and how many no longer do because they were cancelled."""

    operations: list[Operation]
    wanted: int
    left_out: int


class Plan:
    """`kinds` are the entries it can use; `operations(entry)` is what they become."""

    def __init__(self, rules: Iterable[Rule], backend: Backend, node: str) -> None:
        self._actions = [(rule, backend.actions(rule, node)) for rule in rules if rule.function not in READING]
        self._gap: tuple[tuple[str, Action, bool], ...] = (("gap", backend.gap_action(), False),)
        self._queues = [rule for rule, _ in self._actions if rule.function == TAKES]
        self._known: dict[tuple[int, str], tuple[tuple[str, Action, bool], ...]] = {}
        self.kinds = frozenset(rule.reads for rule, _ in self._actions) | {GAP}

    @property
    def has_queues(self) -> bool:
        """Whether acknowledgements may take messages out."""
        return bool(self._queues)

    def is_queue(self, topic: str) -> bool:
        return any(rule.concerns(topic) for rule in self._queues)

    def operations(self, entry: Entry) -> list[Operation]:
        """Everything the entry asks for, in order; often one, or none."""
        return self.ask((entry,)).operations

    def ask(self, entries: Iterable[Entry], after: int = 0, cancelled: Collection[int] = ()) -> Asked:
        """The same of all these beyond `after`; of those `cancelled` all but to store or take out their message."""
        operations: list[Operation] = []
        wanted = left_out = 0
        kinds, known, new = self.kinds, self._known, tuple.__new__
        # An outage's backlog comes through here by the million.
        for entry in entries:
            seq, kind, topic = entry.seq, entry.kind, entry.topic
            if kind not in kinds or seq <= after:
                continue
            found = known.get((kind, topic))
            if found is None:
                found = self._look_up(kind, topic)
            number, before = 0, len(operations)
            for target, action, cancels in found:
                for packed in action(entry):
                    if not (cancels and seq in cancelled):
                        # As Operation(...), in a third of the time.
                        operations.append(new(Operation, (seq, number, target, packed)))
                    number += 1
            if len(operations) > before:
                wanted += 1
            elif number:
                left_out += 1
        return Asked(operations, wanted, left_out)

    def _look_up(self, kind: int, topic: str) -> tuple[tuple[str, Action, bool], ...]:
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        found = self._gap
        if kind != GAP:
            rules = [(rule, action) for rule, action in self._actions if rule.reads == kind and rule.concerns(topic)]
            stored = any(rule.function == "on_message_store" for rule, _ in rules)
            found = tuple(
                # What both would store is stored once.
                (rule.target, action, rule.function in CANCELLING)
                for rule, action in rules
                if not (stored and rule.function == "on_message_publish")
            )
        self._known[kind, topic] = found
        return found
