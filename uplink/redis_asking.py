"""Redis as a far end that is asked: subscriptions made for clients, stored and retained messages, the channel.

Layout of the specification: `mqtt:sub:{clientid}`, `mqtt:msg:{topic}` with `mqtt:msg:{msgid}`, `mqtt:acked:{clientid}:{topic}`,
`mqtt:retain:{topic}`; ours: `tidegate:position:{clientid}:{topic}`. An index entry whose message has expired is removed, when
it was found without one twice: who adds a message from elsewhere may write the index first.

Invariant: outside of `answers` no error of the driver is seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError
from tidegate.store.topic import is_wild, matches

from .asking import Fetch, Fetched, Found
from .pools import Pool
from .redis_answers import answers
from .redis_channel import Channel
from .redis_slots import Slots, command
from .redis_stored import MOST, Standing, choose, message, standing_of, subscriptions
from .redis_wire import Wire
from .redis_wire import connect as connect_wire

PAGE = 500
"""Messages of one answer."""
GONE_FOR = 10.0
"""Seconds between two looks that find an index entry without its message."""
MOST_GONE = 10_000
SCANS, SCAN_KEYS = 100, 1_000
"""Looking for retained messages by wildcard: so many steps at most on each server, of about so many keys."""
_GLOB = str.maketrans({character: f"\\{character}" for character in "*?[]\\^"})


def connect_asker(pool: Pool) -> RedisAsker:
    """Open a connection for questions, and one for the channel. Raises NotConnected or Misconfigured."""
    server: Wire | Slots = Slots(pool) if pool.settings["type"] == "cluster" else connect_wire(pool)
    try:
        channel = _listen(pool, server) if pool.settings["channel"] else None
    except BaseException:
        server.close()
        raise
    return RedisAsker(server, pool, channel)


def _listen(pool: Pool, server: Wire | Slots) -> Channel:
    return Channel(pool, server.listener() if isinstance(server, Slots) else connect_wire(pool))


class RedisAsker:
    """See `asking.Asker`."""

    def __init__(self, server: Wire | Slots, pool: Pool, channel: Channel | None = None) -> None:
        self._server = server
        self._pool = pool
        self._channel = channel
        self._gone: dict[tuple[bytes, bytes], float] = {}
        """(index, id) of entries without a message -> when that was seen first."""

    def subscriptions(self, clients: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
        found = self._ask([(b"HGETALL", b"mqtt:sub:" + client.encode()) for client in clients])
        return {client: subscriptions(answer) for client, answer in zip(clients, found, strict=True)}

    def fetch(self, question: Fetch) -> Fetched:
        index = b"mqtt:msg:" + question.topic.encode()
        if question.queue:
            (ids,) = self._ask([(b"ZRANGE", index, b"%d" % question.after, b"%d" % (question.after + PAGE - 1))])
            further = question.after + PAGE if len(ids or ()) == PAGE else 0
            return Fetched(self._messages(index, question.topic, ids or ()), 0, {}, further)
        standing = self._standing(question, index)
        if not standing.known and not question.window_first:
            return Fetched((), 0, {})
        since = int(time.time() * 1000) - question.span if question.span else 0
        ids, skipped = choose(self._newest(index, standing.low), standing, question.limit, since)
        page = ids[question.after : question.after + PAGE]
        further = question.after + PAGE if len(ids) > question.after + PAGE else 0
        found = self._messages(index, question.topic, page)
        young = [one for one in found if not one.at or one.at >= since]
        if standing.known:
            skipped += len(found) - len(young)
        return Fetched(young, 0 if question.after else skipped, standing.read, further)

    def retained(self, topic_filter: str) -> list[Found]:
        if not is_wild(topic_filter):
            return self._retained([topic_filter])
        wires = self._server.masters() if isinstance(self._server, Slots) else [self._server]
        return self._retained(list(dict.fromkeys(topic for wire in wires for topic in self._scan(wire, topic_filter))))

    def fileno(self) -> int:
        return self._channel.fileno() if self._channel is not None else -1

    def heard(self) -> list[bytes]:
        return self._channel.heard() if self._channel is not None else []

    def check(self) -> None:
        if self._channel is not None:
            self._channel.check()

    def close(self) -> None:
        self._server.close()
        if self._channel is not None:
            self._channel.close()

    # -- messages --------------------------------------------------------------------------------------------------

    def _standing(self, question: Fetch, index: bytes) -> Standing:
        name = f"{question.client}:{question.topic}".encode()
        vector, acked = self._ask([(b"HGETALL", b"tidegate:position:" + name), (b"GET", b"mqtt:acked:" + name)])
        standing = standing_of(vector or (), acked or b"")
        if standing.low and not standing.ours:
            # What others wrote is ordered only among its like: a position that is not there any more says nothing.
            (there,) = self._ask([(b"ZSCORE", index, standing.low)])
            if there is None:
                return standing_of((), b"")
        return standing

    def _newest(self, index: bytes, low: bytes) -> list[bytes]:
        """Ids above `low`, the newest first, as many as one looks through."""
        bound = b"(" + low if low else b"-"
        (ids,) = self._ask([(b"ZREVRANGEBYLEX", index, b"+", bound, b"LIMIT", b"0", b"%d" % MOST)])
        return list(ids or ())

    def _messages(self, index: bytes, topic: str, ids: Sequence[bytes]) -> list[Found]:
        found: list[Found] = []
        gone: list[bytes] = []
        for number in range(0, len(ids), 50):
            part = ids[number : number + 50]
            for one, answer in zip(part, self._ask([(b"HGETALL", b"mqtt:msg:" + one) for one in part]), strict=True):
                if answer:
                    found.append(message(answer, one, topic))
                elif answer is not None:
                    gone.append(one)
        self._sweep(index, gone)
        return found

    def _sweep(self, index: bytes, gone: list[bytes]) -> None:
        now = time.monotonic()
        old = [one for one in gone if now - self._gone.setdefault((index, one), now) >= GONE_FOR]
        if old:
            self._exchange([(b"ZREM", index, *old)])  # without the right to write it stays, and does no harm
            for one in old:
                del self._gone[index, one]
        if len(self._gone) > MOST_GONE:
            self._gone.clear()

    # -- retained messages -----------------------------------------------------------------------------------------

    def _retained(self, topics: Sequence[str]) -> list[Found]:
        found: list[Found] = []
        for topic in topics:
            (answer,) = self._ask([(b"HGETALL", b"mqtt:retain:" + topic.encode())])
            if answer is None:  # a pointer, as EMQX 4 writes it
                (msgid,) = self._ask([(b"GET", b"mqtt:retain:" + topic.encode())])
                (answer,) = self._ask([(b"HGETALL", b"mqtt:msg:" + msgid)]) if msgid else ((),)
            if answer and (one := message(answer, b"", topic)).payload and one.msgid:
                found.append(one)
        return found

    def _scan(self, wire: Wire, topic_filter: str) -> list[str]:
        """Topics whose retained message matches; bounded, so of very many keys not all are looked at."""
        pattern = "/".join("*" if part in ("+", "#") else part.translate(_GLOB) for part in topic_filter.split("/"))
        pattern = pattern.removesuffix("/*") + "*" if topic_filter.endswith("/#") else pattern
        place, topics = b"0", dict[str, None]()
        for _ in range(SCANS):
            with answers(self._pool, wire.address):
                place, keys = wire.ask(
                    *(b"SCAN", place, b"MATCH", b"mqtt:retain:" + pattern.encode(), b"COUNT", b"%d" % SCAN_KEYS)
                )
            names = [key[len(b"mqtt:retain:") :].decode(errors="replace") for key in keys]
            topics |= dict.fromkeys(name for name in names if matches(topic_filter, name))
            if place == b"0":
                break
        return list(topics)

    # -- the wire --------------------------------------------------------------------------------------------------

    def _ask(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        """The answers; None for a key of another type. What says something of the server or our rights is raised."""
        found = self._exchange(commands)
        for number, answer in enumerate(found):
            if isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
                found[number] = None
            elif isinstance(answer, Exception):
                with answers(self._pool, self._address):
                    raise answer
        return found

    def _exchange(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        if isinstance(self._server, Slots):
            return self._server.exchange([command(*one) for one in commands])
        with answers(self._pool, self._address):
            return self._server.exchange(commands)

    @property
    def _address(self) -> str:
        return "the cluster" if isinstance(self._server, Slots) else self._server.address
