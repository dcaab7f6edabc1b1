"""What far ends know for devices takes effect here: the broker's side of the inbox (`store.inbox`).

The uplink tells that there are answers; they are read by the reader's thread, a piece at a time, and applied in the event loop
like anything else that happens: rows and changes in the log's batch, with the place in the inbox in the same commit. The next
piece is read when that is durable, so the reader sees all that was applied.

Invariant: an answer has its effect once, whatever is killed, and nothing here keeps a client waiting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tidegate.store.answers import Answers, next_answers
from tidegate.store.inbox import SUBSCRIBE, SUBSCRIPTIONS, UNSUBSCRIBE, Answer
from tidegate.store.report import WARNING

from .broker import Broker

KEEP = "INSERT OR REPLACE INTO cursor (name, seq) VALUES (?,?)"
FORGET_OTHERS = "DELETE FROM cursor WHERE name LIKE 'inbox:%' AND name <> ?"
"""There is one inbox at a time."""
RETRY = 5.0


class Inbox:
    """`look()` whenever there may be answers; `path` is the uplink's file."""

    def __init__(self, broker: Broker, path: Path) -> None:
        self._broker = broker
        self._path = path
        self._looking = self._again = False
        self._retry_at: float | None = None
        self._apply = {
            SUBSCRIPTIONS: self._compare,
            SUBSCRIBE: self._subscribe,
            UNSUBSCRIBE: self._unsubscribe,
        }

    def look(self) -> None:
        """There may be something new."""
        self._again = self._looking
        if not self._looking:
            self._looking = True
            self._broker.read(lambda reader: next_answers(self._path, reader.db), self._have)

    def tick(self) -> None:
        """Once a second: look again where it could not be read."""
        if self._retry_at is not None and self._broker.now >= self._retry_at:
            self.look()

    def _have(self, found: Answers | Exception | None) -> None:
        self._looking, self._retry_at = False, None
        if isinstance(found, Exception):
            self._retry_at = self._broker.now + RETRY
            text = "answers of far ends cannot be read; they are kept and read later"
            self._broker.report("inbox_unreadable", text, WARNING, reason=found)
        elif found is not None:
            self._take(found)
        elif self._again:
            self.look()

    def _take(self, found: Answers) -> None:
        """All of them in one commit, with the place behind them."""
        self._looking = True
        broker = self._broker
        for answer in found.answers:
            apply = self._apply.get(answer.kind)
            if apply is None:
                broker.counters["answers_unknown"] += 1
            else:
                apply(answer)
        broker.log.change(FORGET_OTHERS, found.cursor)
        broker.log.change(KEEP, found.cursor, found.answers[-1].id)
        broker.when_durable(self._taken)
        broker.turn_over()

    def _taken(self) -> None:
        self._looking = False
        self.look()

    # -- subscriptions ---------------------------------------------------------------------------------------------

    def _compare(self, answer: Answer) -> None:
        self._broker.made.compare(answer.pool, answer.client, dict(_filters(answer)))

    def _subscribe(self, answer: Answer) -> None:
        for topic_filter, qos in _filters(answer):
            self._broker.made.bring(answer.pool, answer.client, topic_filter, qos)

    def _unsubscribe(self, answer: Answer) -> None:
        for topic_filter, _ in _filters(answer):
            self._broker.made.take_away(answer.pool, answer.client, topic_filter)


def _filters(answer: Answer) -> list[tuple[str, int]]:
    found: list[Any] = json.loads(answer.filters)
    return [(str(topic_filter), int(qos)) for topic_filter, qos in found]
