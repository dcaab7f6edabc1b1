"""What the broker was told already, so that a question that is asked again and again fills no inbox with the same answers.

Kept in memory alone: after a restart everything is told once more, and the broker knows it.

Invariant: per question no more is remembered than its last answer held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tidegate.store.inbox import MESSAGE, POSITION, RETAINED, SUBSCRIBE, SUBSCRIPTIONS, UNSUBSCRIBE, Answer

from .asking import Fetch, Fetched, Found
from .lane_book import lookup_answer

Rows = Sequence[tuple[str, int]]
News = tuple[list[Answer], Callable[[], None]]
"""Answers for the inbox, and what makes them remembered, to be called when they are in it."""


class Told:
    """Of one pool; `code` is that of this gateway in message ids."""

    def __init__(self, pool: str, code: str) -> None:
        self._pool = pool
        self._code = code
        self._rows: dict[str, dict[str, int]] = {}
        """What the last lookup of a client found."""
        self._heard: dict[str, dict[str, int]] = {}
        """The same with what a channel said since."""
        self._messages: dict[tuple[str, str], frozenset[str]] = {}
        self._positions: dict[tuple[str, str], tuple[int, int]] = {}

    def forget(self, key: tuple[str, str]) -> None:
        """A question that begins anew, or is no more; without a filter all of the client's subscriptions."""
        client, text = key
        if text:
            self._messages.pop(key, None)
            self._positions.pop(key, None)
        else:
            self._rows.pop(client, None)
            self._heard.pop(client, None)

    def interrupted(self) -> None:
        """A channel may have said what nobody heard: what stands at the far end is compared with all that was told."""
        self._rows |= self._heard
        self._heard.clear()

    def lookup(self, client: str, rows: Rows) -> News:
        """What stands at the far end for the client."""
        found = dict(rows)

        def remember() -> None:
            self._rows[client] = found
            self._heard.pop(client, None)

        known = self._rows.get(client)
        if known == found:
            return [], lambda: None
        return [lookup_answer(self._pool, client, list(found.items()), SUBSCRIPTIONS)], remember

    def heard(self, kind: int, client: str, topic_filter: str, qos: int) -> News:
        """What a channel said."""

        def remember() -> None:
            before = self._heard.get(client, self._rows.get(client))
            if before is None:
                return  # what else stands there was not told yet: the next lookup tells all
            known = self._heard[client] = dict(before)
            known.pop(topic_filter, None)
            if kind == SUBSCRIBE:
                known[topic_filter] = qos

        assert kind in (SUBSCRIBE, UNSUBSCRIBE)
        return [lookup_answer(self._pool, client, [(topic_filter, qos)], kind)], remember

    def fetched(self, ask: Fetch, found: Fetched) -> News:
        """Stored messages, and how far the client has read ours."""
        client, topic, queue = ask[:3]
        key = client, topic
        before = self._messages.get(key, frozenset())
        answers = [self._message(MESSAGE, client, topic, one, queue) for one in found.messages if one.msgid not in before]
        position = found.positions.get(self._code)
        if position is not None and position != self._positions.get(key):
            epoch, seq = position
            answers.insert(0, Answer(0, self._pool, POSITION, client, topic, topic, epoch=epoch, seq=seq))

        def remember() -> None:
            ids = frozenset(one.msgid for one in found.messages)
            self._messages[key] = self._messages.get(key, frozenset()) | ids if ask.after else ids
            if position is not None:
                self._positions[key] = position

        return answers, remember

    def retained(self, client: str, topic_filter: str, found: Iterable[Found]) -> list[Answer]:
        """Retained messages; a subscription asks once, so nothing is remembered."""
        return [self._message(RETAINED, client, topic_filter, one, queue=False) for one in found]

    def _message(self, kind: int, client: str, topic_filter: str, found: Found, queue: bool) -> Answer:
        return Answer(
            *(0, self._pool, kind, client, topic_filter, found.topic),
            msgid=found.msgid, sender=found.sender, qos=found.qos, at=found.at, payload=found.payload, queue=queue,
        )  # fmt: skip
