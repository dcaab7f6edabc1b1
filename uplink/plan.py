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

MAX_REMEMBERED = 20_000


class Plan:
    """`kinds` are the entries it can use; `operations(entry)` is what they become."""

    def __init__(self, rules: Iterable[Rule], backend: Backend, node: str) -> None:
        self._actions = [(rule, backend.actions(rule, node)) for rule in rules if rule.function not in READING]
        self._gap: tuple[tuple[str, Action], ...] = (("gap", backend.gap_action()),)
        self._known: dict[tuple[int, str], tuple[tuple[str, Action], ...]] = {}
        self.kinds = frozenset(rule.reads for rule, _ in self._actions) | {GAP}

    def operations(self, entry: Entry) -> list[Operation]:
        """Everything the entry asks for, in order; often one, or none."""
        found = self._known.get((entry.kind, entry.topic))
        if found is None:
            found = self._look_up(entry.kind, entry.topic)
        operations: list[Operation] = []
        seq, new = entry.seq, tuple.__new__
        for target, action in found:
            for packed in action(entry):
                # As Operation(...), in a third of the time.
                operations.append(new(Operation, (seq, len(operations), target, packed)))
        return operations

    def _look_up(self, kind: int, topic: str) -> tuple[tuple[str, Action], ...]:
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        found = self._gap
        if kind != GAP:
            rules = [(rule, action) for rule, action in self._actions if rule.reads == kind and rule.concerns(topic)]
            stored = any(rule.function == "on_message_store" for rule, _ in rules)
            found = tuple(
                # What both would store is stored once.
                (rule.target, action) for rule, action in rules if not (stored and rule.function == "on_message_publish")
            )  # fmt: skip
        self._known[kind, topic] = found
        return found
