"""A pool's rules as a plan: entry in, operations out.

Which rules concern a topic is computed once per (kind, topic) and remembered, because an outage's backlog repeats a few
topics a million times. Rules of one event run in the order of their numbers, as they stand in the file.

Invariant: the same entry and rules give the same operations in the same order, today and after a restart.
"""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.store.entry import GAP, Entry

from .backend import Action, Backend, Operation
from .rule import Rule
from .vocabulary import READING

TAKES = "on_message_acked_for_queue"
CANCELLING = (TAKES, "on_message_publish", "on_message_store")
"""Of a message and its acknowledgement, both not sent yet, neither need be."""

MAX_REMEMBERED = 20_000


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

    def operations(self, entry: Entry, cancelled: bool = False) -> list[Operation]:
        """Everything the entry asks for, in order; often one, or none. `cancelled`: but to store or take out its message."""
        found = self._known.get((entry.kind, entry.topic))
        if found is None:
            found = self._look_up(entry.kind, entry.topic)
        operations: list[Operation] = []
        seq, new, number = entry.seq, tuple.__new__, 0
        for target, action, cancels in found:
            for packed in action(entry):
                if not (cancels and cancelled):
                    # As Operation(...), in a third of the time.
                    operations.append(new(Operation, (seq, number, target, packed)))
                number += 1
        return operations

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
