"""Who gets a message: the subscription tree, and for each topic its route, computed once until subscriptions change.

`Topics` maps the raw bytes of a topic name to one `Topic`, so a PUBLISH costs one look-up for validity, interned number and
route together. A route's targets are the sessions that are connected now; whether the message goes to disk is decided here
too: QoS >= 1 for a rule or for any subscription with QoS >= 1, connected or asleep.

Invariant: a topic whose `generation` is the router's has a route that is true now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tidegate.store.entry import DELIVERED, PUBLISH, STORED_QOS0, Want
from tidegate.store.local import NO_RULES, LocalRules
from tidegate.store.log import Name
from tidegate.store.topic import FilterTree

from .mqtt.decoding import topic_name
from .session import Session, Subscription

MAX_TOPICS = 50_000
MAX_TOPIC_BYTES = 32 << 20
TOPIC_BYTES = 300
"""What a cached topic costs besides three copies of its name, about."""
MAX_MATCHED = 1_000


class Target(NamedTuple):
    """One session in a route. Not all of its subscriptions were there at or below `since`: ask `match` with a seq."""

    session: Session
    qos: int
    since: int
    no_local: bool
    retain_as_published: bool
    identifiers: tuple[int, ...]


class Topic(Name):
    """A topic name with its route. `plain` is its `generation` when QoS 1 messages are stored, else -1."""

    __slots__ = (
        "acks",
        "generation",
        "kept_qos0",
        "plain",
        "prefix",
        "raw",
        "reserved",
        "stored",
        "stored_qos0",
        "stored_retained",
        "subscribed",
        "targets",
        "watched",
    )
    table = "topic"

    def __init__(self, raw: bytes, text: str) -> None:
        super().__init__(text)
        self.raw = raw
        self.prefix = len(raw).to_bytes(2, "big") + raw
        self.reserved = text.startswith(("$SYS/", "$share/"))
        """No client publishes here, and nothing of it is stored."""
        self.generation = -1
        self.plain = -1
        self.targets: list[Target] = []
        self.stored = False
        self.subscribed = False
        """Whether any session, connected or asleep, has a subscription for it."""
        self.stored_qos0 = False
        self.stored_retained = False
        self.kept_qos0 = 0
        """Flag of entries with QoS 0."""
        self.acks = 0
        """PUBSUB, QUEUE: what an acknowledgement does besides."""
        self.watched = False
        """Whether a delivery is to be logged or followed."""


class Topics(dict[bytes, Topic]):
    """Raw topic name -> Topic; raises MqttError for what is no topic name. Bounded: emptied when full."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0

    def __missing__(self, raw: bytes) -> Topic:
        text = topic_name(raw)
        self._bytes += TOPIC_BYTES + 3 * len(raw)
        if len(self) >= MAX_TOPICS or self._bytes > MAX_TOPIC_BYTES:
            self.clear()
            self._bytes = 0
        topic = self[bytes(raw)] = Topic(bytes(raw), text)
        return topic

    def forget(self, text: str) -> None:
        """The name's number ends: whoever needs the topic again gets a new one. Only `Topic`s from here go into the log."""
        self.pop(text.encode(), None)


class Router:
    """Subscriptions and rules in, routes out."""

    def __init__(self) -> None:
        self.generation = 0
        self.subscriptions = 0
        self.topics = Topics()
        self._tree: FilterTree[Session, Subscription] = FilterTree()
        self._wants: FilterTree[Want, None] = FilterTree()
        self._kinds: frozenset[int] = frozenset()
        self.local = NO_RULES
        self.watching = False

    def set_wants(self, wants: Iterable[Want], local: LocalRules = NO_RULES) -> None:
        """Take what the rules want logged, and what they ask of the broker itself; replaces those before."""
        self.local = local
        self._wants = FilterTree()
        kinds = set()
        for want in wants:
            self._wants.put(want.topic_filter, want, None)
            kinds.add(want.kind)
        self._kinds = frozenset(kinds)
        self.watching = bool(local.acks) or DELIVERED in kinds
        self.generation += 1

    def wanted(self, kind: int, topic: str | None = None) -> bool:
        """Whether a rule wants entries of this kind (for this topic or filter taken as a topic)."""
        if kind not in self._kinds:
            return False
        return topic is None or any(want.kind == kind for want, _ in self._wants.find(topic))

    def subscribe(self, topic_filter: str, session: Session, subscription: Subscription) -> None:
        self._tree.put(topic_filter, session, subscription)
        session.matched.clear()
        self._changed()

    def unsubscribe(self, topic_filter: str, session: Session) -> None:
        self._tree.remove(topic_filter, session)
        session.matched.clear()
        self._changed()

    def presence_changed(self) -> None:
        """A session with subscriptions came or went: routes name connected ones only."""
        self.generation += 1

    def _changed(self) -> None:
        self.generation += 1
        self.subscriptions = len(self._tree)

    def route(self, topic: Topic, publish: int) -> None:
        """Make the topic's route true now. `publish` is the kind of message entries."""
        topic.stored = topic.stored_qos0 = topic.stored_retained = topic.subscribed = False
        for want, _ in self._wants.find(topic.text):
            if want.kind == publish:
                topic.stored |= not want.retained_only
                topic.stored_qos0 |= not want.retained_only and want.min_qos == 0
                topic.stored_retained |= want.retained_only
        merged: dict[Session, Target] = {}
        for session, subscription in self._tree.find(topic.text):
            topic.subscribed = True
            topic.stored |= subscription.qos > 0
            if session.client is not None:
                target = target_of(session, subscription)
                before = merged.get(session)
                merged[session] = target if before is None else _merge(before, target)
        if topic.reserved:
            topic.stored = topic.stored_qos0 = topic.stored_retained = False
        topic.kept_qos0 = STORED_QOS0 if topic.stored_qos0 and self.local.keeps_qos0(topic.text) else 0
        topic.acks = self.local.ack_of(topic.text)
        topic.watched = bool(topic.acks) or self.wanted(DELIVERED, topic.text)
        topic.targets = list(merged.values())
        topic.generation = self.generation
        topic.plain = self.generation if topic.stored else -1

    def fresh(self, topic: Topic) -> Topic:
        """The topic with a route that is true now."""
        if topic.generation != self.generation:
            self.route(topic, PUBLISH)
        return topic

    def watches(self, topic: Topic) -> bool:
        """Whether a delivery of it is to be logged or followed."""
        return self.watching and self.fresh(topic).watched

    def match(self, session: Session, topic: Topic, seq: int | None = None) -> Target | None:
        """What this session gets of a topic, None if nothing: for reading on from the log.

        With a `seq`: of this entry, by the subscriptions that were there before it.
        """
        if seq is not None:
            return self._find(session, topic, seq)
        known: dict[bytes, Target | None] = session.matched
        if topic.raw in known:
            return known[topic.raw]
        if len(known) >= MAX_MATCHED:
            known.clear()
        found = known[topic.raw] = self._find(session, topic)
        return found

    def _find(self, session: Session, topic: Topic, seq: int | None = None) -> Target | None:
        found: Target | None = None
        for owner, subscription in self._tree.find(topic.text):
            if owner is session and (seq is None or subscription.since < seq):
                target = target_of(session, subscription)
                found = target if found is None else _merge(found, target)
        return found


def target_of(session: Session, subscription: Subscription) -> Target:
    """The target that one subscription makes of its session."""
    return Target(
        session,
        subscription.qos,
        subscription.since,
        subscription.no_local,
        subscription.retain_as_published,
        (subscription.identifier,) if subscription.identifier else (),
    )


def _merge(one: Target, other: Target) -> Target:
    """Overlapping subscriptions: one delivery with the greater QoS and all identifiers (3.3.4)."""
    return Target(
        one.session,
        max(one.qos, other.qos),
        max(one.since, other.since),
        one.no_local and other.no_local,
        one.retain_as_published or other.retain_as_published,
        one.identifiers + other.identifiers,
    )
