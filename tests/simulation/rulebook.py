"""Rule files of the simulation: written by chance, some of them with a mistake, and what each one asks for.

What a file asks for is written down here a second time, from what was meant and not from what the gateway reads, so the two
can be compared. A rule's operation is easy to compare: the start of the uplink that made it, rule, kind, client, topic and
payload.

Invariant: a file with a mistake means what it would mean without it, once that is mended.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tidegate.store.entry import KIND_NAMES, PUBLISH, QOS_MASK, RETAIN, Entry
from tidegate.store.log import Row
from tidegate.store.topic import matches
from tidegate.uplink.backend import Action, Packed
from tidegate.uplink.pools import Pool
from tidegate.uplink.rule import Rule

from tests.uplink.far_end import FarLink

FILE = "emqx_backend_redis.conf"
PUBLISH_EVENT, CONNECTED_EVENT, DISCONNECTED_EVENT = "message.publish", "client.connected", "client.disconnected"
STORE, RETAINED, CLEARED, COMMAND = "on_message_publish", "on_message_retain", "on_retain_delete", ""
POOLS = ("pool1", "pool2", "pool3")
MISTAKES = ("", "", "", "", "function", "event", "server", "bytes")
"""What is wrong with a file: mostly nothing."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One rule, as it is meant."""

    event: str
    number: int
    topic: str
    function: str
    pool: str

    def asks_for(self, kind: int, topic: str, qos: int, retain: bool, payload: bytes) -> bool:
        if KIND_NAMES[kind] != self.event or (kind == PUBLISH and not matches(self.topic, topic)):
            return False
        if self.function == STORE:
            return qos > 0 and not (retain and not payload)
        if self.function in (RETAINED, CLEARED):
            return retain and bool(payload) == (self.function == RETAINED)
        return True

    def line(self, event: str = "", function: str = "") -> str:
        name = function or self.function
        action = {"function": name} if name else {"commands": ["A ${payload}"]}
        body = json.dumps({"topic": self.topic, "action": action, "pool": self.pool})
        return f"backend.redis.hook.{event or self.event}.{self.number} = {body}"


@dataclass(frozen=True, slots=True)
class RuleBook:
    """A file: its pools and rules, and which mistake it is written with."""

    pools: tuple[str, ...]
    hooks: tuple[Hook, ...]
    mistake: str = ""

    def text(self) -> bytes:
        if self.mistake == "bytes":
            return b"\xff\xfe"
        lines = [f"backend.redis.{pool}.server = 127.0.0.1:1" for pool in self.pools]
        rules = [hook.line() for hook in self.hooks]
        last = self.hooks[-1]
        if self.mistake == "function":
            rules[-1] = last.line(function="on_mesage_publish")
        elif self.mistake == "event":
            wrong = "mesage.publish" if last.event == PUBLISH_EVENT else "client.disconected"
            rules = [hook.line(event=wrong if hook.event == last.event else "") for hook in self.hooks]
        elif self.mistake == "server":
            lines[0] = lines[0].replace("server", "sever")
        return "\n".join([*lines, *rules, ""]).encode()

    def wants(self, kind: int, topic: str = "", qos: int = 0, retain: bool = False, payload: bytes = b"x") -> bool:
        """Whether it means that such an event is kept for one of its pools."""
        return any(hook.asks_for(kind, topic, qos, retain, payload) for hook in self.hooks)

    def due(self, pool: str, row: Row) -> list[bytes]:
        """The operations that a row means for a pool, without the uplink's start."""
        kind, topic, payload, flags = row[4], row[6].text if row[6] else "", row[8] or b"", row[7] or 0
        found: list[bytes] = []
        for hook in self.hooks:
            if hook.pool == pool and hook.asks_for(kind, topic, flags & QOS_MASK, bool(flags & RETAIN), payload):
                found.append(operation(hook.number, kind, row[5].text, topic, payload))
        return found


class TaggedBackend:
    """The simulation's backend: operations that say which start of the uplink made them."""

    def __init__(self, start: int) -> None:
        self._start = start

    def actions(self, rule: Rule, node: str) -> Action:
        def act(entry: Entry) -> Sequence[Packed]:
            if rule.function == STORE and (not entry.qos or (entry.retain and not entry.payload)):
                return ()
            if rule.function in (RETAINED, CLEARED) and (
                not entry.retain or bool(entry.payload) != (rule.function == RETAINED)
            ):
                return ()
            data = operation(rule.number, entry.kind, entry.clientid, entry.topic, entry.payload)
            return (Packed(b"%d|%b" % (self._start, data), 1),)

        return act

    def gap_action(self) -> Action:
        return lambda entry: ()

    def connect(self, pool: Pool) -> FarLink:
        raise AssertionError("the simulation connects by itself")


def operation(rule: int, kind: int, clientid: str, topic: str, payload: bytes) -> bytes:
    return b"%d %d %b %b %b" % (rule, kind, clientid.encode(), topic.encode(), payload)


def untagged(data: bytes) -> tuple[int, bytes]:
    """(start of the uplink, operation)."""
    start, _, rest = data.partition(b"|")
    return int(start), rest


def whole() -> RuleBook:
    """The file that the simulation begins and ends with: everything for everyone."""
    return RuleBook(POOLS, tuple(hook for pool in POOLS for hook in _hooks(pool, ("#", "b/#"))))


def another(chance: random.Random, before: RuleBook) -> RuleBook:
    """The next file: the last one mended, or some pools with some of the rules, maybe with a mistake."""
    if before.mistake and chance.random() < 0.6:
        return replace(before, mistake="")
    mistake = chance.choice(MISTAKES)
    if chance.random() < 0.3:
        return replace(before, mistake=mistake)
    pools = tuple(pool for pool in POOLS if chance.random() < 0.7) or POOLS[:1]
    hooks = [hook for pool in pools for hook in _some(chance, pool)]
    return RuleBook(pools, tuple(hooks), mistake)


def _some(chance: random.Random, pool: str) -> list[Hook]:
    topics = (chance.choice(("#", "#", "a/+", "b/#")), chance.choice(("b/#", "+/x", "c")))
    every = list(_hooks(pool, topics))
    return [hook for hook in every if chance.random() < 0.8] or every[:1]


def _hooks(pool: str, topics: tuple[str, str]) -> Iterator[Hook]:
    """One of each kind; numbers tell the pools apart, because a number is used once per event."""
    first = 10 * int(pool[-1])
    yield Hook(CONNECTED_EVENT, first, "#", "on_client_connected", pool)
    yield Hook(DISCONNECTED_EVENT, first, "#", "on_client_disconnected", pool)
    yield Hook(PUBLISH_EVENT, first + 1, topics[1], COMMAND, pool)
    yield Hook(PUBLISH_EVENT, first + 2, topics[0], STORE, pool)
    yield Hook(PUBLISH_EVENT, first + 3, topics[0], RETAINED, pool)
    yield Hook(PUBLISH_EVENT, first + 4, topics[0], CLEARED, pool)
