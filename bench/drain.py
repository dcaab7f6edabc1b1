"""How fast a backlog drains into Redis, against a raw redis-py pipeline that writes the same keys.

Rules: the backlog is stored by the real gateway while nothing listens on Redis' port; then a redis-server
starts there, and the time runs from the first message seen in it to the last. The peer is one redis-py
pipeline without transactions, a thousand messages a round trip, into a fresh redis-server: HSET, ZADD and
EXPIRE, and nothing that makes a repetition harmless.

Invariant: every message is in Redis, under its topic, with its payload, before a rate is reported.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import cast

import wire
from brokers import Broker, redis
from load import WrongAnswer
from redis import Redis

BATCH = 1000
DEADLINE = 120.0
POLL = 0.005
EXPIRE = 7200


def drain_rate(broker: Broker, publishers: int, messages: int, port: int) -> float:
    """Messages/s from the gateway's log into the redis-server that starts on `port` now."""
    each = messages // publishers
    with redis(port), closing(Redis(port=port)) as far:
        deadline = time.perf_counter() + DEADLINE
        first = began = 0.0
        while (arrived := _arrived(far, publishers)) < messages:
            now = time.perf_counter()
            if now > deadline:
                raise WrongAnswer(f"{arrived} of {messages} messages in Redis after {DEADLINE:.0f} s:\n{broker.log()}")
            if not arrived:
                time.sleep(POLL)
            elif not began:
                first, began = arrived, now
            else:
                time.sleep(POLL)
        seconds = time.perf_counter() - began
        _check(far, publishers, each)
    return (messages - first) / seconds


def raw_rate(publishers: int, messages: int) -> float:
    """Messages/s of the raw pipeline."""
    with redis() as port, closing(Redis(port=port)) as far:
        began = time.perf_counter()
        for start in range(0, messages, BATCH):
            pipeline = far.pipeline(transaction=False)
            for number in range(start, min(start + BATCH, messages)):
                _write(pipeline, number % publishers, number)
            pipeline.execute()
        return messages / (time.perf_counter() - began)


def _write(pipeline: Redis, publisher: int, number: int) -> None:
    topic, msgid = wire.topic_of(publisher).decode(), f"{number:020}"
    message: dict[str | bytes, str | bytes | int] = {
        "id": msgid,
        "from": f"publisher-{publisher}",
        "qos": 1,
        "topic": topic,
        "retain": "false",
        "payload": wire.NAME.pack(publisher, number) + wire.FILLER,
        "ts": 1_700_000_000,
    }
    pipeline.hset(f"mqtt:msg:{msgid}", mapping=message)  # type: ignore[arg-type]
    pipeline.expire(f"mqtt:msg:{msgid}", EXPIRE)
    pipeline.zadd(f"mqtt:msg:{topic}", {msgid: 1})


def _arrived(far: Redis, publishers: int) -> int:
    pipeline = far.pipeline(transaction=False)
    for publisher in range(publishers):
        pipeline.zcard(b"mqtt:msg:" + wire.topic_of(publisher))
    return sum(pipeline.execute())


def _check(far: Redis, publishers: int, each: int) -> None:
    """Each topic's ids, in their order, lead to the messages of its publisher in theirs."""
    for publisher in range(publishers):
        pipeline = far.pipeline(transaction=False)
        ids = cast(list[bytes], far.zrange(b"mqtt:msg:" + wire.topic_of(publisher), 0, -1))
        for msgid in ids:
            pipeline.hget(b"mqtt:msg:" + msgid, "payload")
        expected = [wire.NAME.pack(publisher, index) + wire.FILLER for index in range(each)]
        if pipeline.execute() != expected:
            raise WrongAnswer(f"Redis does not hold the messages of publisher {publisher} as they were published")
