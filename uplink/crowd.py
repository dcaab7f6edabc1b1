"""Who is there, what they subscribed to, and what is to be asked for them: the entries of the log folded into questions.

A question is a client and one of its subscriptions, or no subscription: then it is about the client's own. However often its
cause happens it is one question. What is asked for a session that is gone is forgotten.

Invariant: `changed` names every question that differs from what was saved last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from tidegate.store.entry import CONNECTED, DISCONNECTED, SESSION_CREATED, SUBSCRIBED, Entry

from .reading import LOOKUP, Reading


class Question(NamedTuple):
    """Without `filter` it is about the client's subscriptions. `due`: what is to be asked, of FETCH, RETAINED, LOOKUP."""

    client: str
    filter: str
    qos: int
    due: int

    @property
    def key(self) -> tuple[str, str]:
        return self.client, self.filter


class Crowd:
    """`online`: who is connected; `kept`: questions as they were saved."""

    def __init__(self, reading: Reading, online: Iterable[str], kept: Iterable[Question]) -> None:
        self.online = set(online)
        self.changed: set[tuple[str, str]] = set()
        self.new: set[tuple[str, str]] = set()
        """Begun anew: what was answered before does not count."""
        self._reading = reading
        self._of: dict[str, dict[str, Question]] = {}
        self._due: dict[tuple[str, str], None] = {}
        self._left: set[str] = set()
        """Disconnected: their session may be over."""
        for question in kept:
            self._keep(question)
        self.changed.update(self._due)

    def add(self, question: Question) -> None:
        """What is known from elsewhere, unless it is known already."""
        if self.get(question.key) is None:
            self._keep(question)

    def take(self, entry: Entry) -> None:
        """The next entry of the log."""
        kind, client = entry.kind, entry.clientid
        if kind == CONNECTED:
            self.online.add(client)
            if self._reading.rules.lookup_always:
                self._put(Question(client, "", 0, LOOKUP))
        elif kind == SESSION_CREATED:
            self._begin(client)
        elif kind == DISCONNECTED:
            self.online.discard(client)
            self._left.add(client)
        elif kind == SUBSCRIBED:
            self._subscribed(Question(client, entry.topic, entry.qos, self._reading.asked_for(entry.topic, entry.qos)))
        else:
            self._drop((client, entry.topic))

    def settle(self, sessions: Callable[[Collection[str]], set[str]]) -> None:
        """Forget those who left and have no session; `sessions` tells which of them have one."""
        left = self._left - self.online
        self._left.clear()
        if left:
            self.forget(left - sessions(left))

    def forget(self, clients: Iterable[str]) -> None:
        """Their sessions are over."""
        for client in clients:
            self.new.add((client, ""))
            for text in list(self._of.get(client, ())):
                self._drop((client, text))

    def due(self, what: int, limit: int) -> list[Question]:
        """Of what is to be asked the oldest."""
        found: list[Question] = []
        for client, text in self._due:
            question = self._of[client][text]
            if question.due & what:
                found.append(question)
                if len(found) == limit:
                    break
        return found

    def answered(self, question: Question) -> None:
        """It is not due any more; only what may be asked again is kept."""
        before = self._of.get(question.client, {}).get(question.filter)
        if before is None or not before.due & question.due:
            return
        if question.filter:
            self._put(before._replace(due=before.due & ~question.due))
        else:
            self._drop(question.key)
            self.new.discard(question.key)  # what was answered is remembered

    def restore(self, question: Question) -> None:
        """Its answer could not be kept."""
        self._put(question)

    def get(self, key: tuple[str, str]) -> Question | None:
        """The question as it is now."""
        return self._of.get(key[0], {}).get(key[1])

    def __iter__(self) -> Iterator[Question]:
        for questions in self._of.values():
            yield from questions.values()

    def __len__(self) -> int:
        """Of what is due."""
        return len(self._due)

    def _begin(self, client: str) -> None:
        """A new session: what the one before had subscribed to is over."""
        waits = self.get((client, ""))
        self.forget([client])
        if waits is not None or self._reading.rules.lookup_new:
            self._put(Question(client, "", 0, LOOKUP))

    def _subscribed(self, question: Question) -> None:
        if not question.due:
            self._drop(question.key)
            return
        if self.get(question.key) is None:
            self.new.add(question.key)
        self._put(question)

    def _keep(self, question: Question) -> None:
        if question.due == LOOKUP or self._reading.asked_for(question.filter, question.qos):
            self._put(question)
        else:
            self.changed.add(question.key)

    def _put(self, question: Question) -> None:
        self._of.setdefault(question.client, {})[question.filter] = question
        self.changed.add(question.key)
        if question.due:
            self._due[question.key] = None
        else:
            self._due.pop(question.key, None)

    def _drop(self, key: tuple[str, str]) -> None:
        client, text = key
        mine = self._of.get(client, {})
        if mine.pop(text, None) is None:
            return
        if not mine:
            del self._of[client]
        self._due.pop(key, None)
        self.changed.add(key)
        self.new.add(key)
