"""Who gets a message: the subscription tree, and for each topic its route, computed once until its subscriptions change.

`Topics` maps the raw bytes of a topic name to one `Topic`, so a PUBLISH costs one look-up for validity, interned number and
route together. A route's targets are the sessions that are connected now; whether the message goes to disk is decided here
too: QoS >= 1 for a rule or for any subscription with QoS >= 1, connected or asleep.

Sessions come, go and subscribe all the time. The last changes are remembered: a topic that none of them concerns keeps its
route, so that a topic with many receivers is not routed anew for every stranger.

Invariant: a topic whose `generation` is the router's has a route that is true now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tidegate.store.entry import DELIVERED, POSITION, PUBLISH, STORED_QOS0, Want
from tidegate.store.few import NO_DICT
from tidegate.store.local import NO_RULES, TOLD, LocalRules
from tidegate.store.log import Name
from tidegate.store.policy import Policies
from tidegate.store.topic import FilterTree, matches, without_share

from .mqtt.decoding import topic_name
from .mqtt.wire import write_varint
from .session import Session, Subscription

ANY = -1
"""A `Topic.waiting`: it may be the last seq given out."""
MAX_TOPICS = 50_000
MAX_TOPIC_BYTES = 32 << 20
TARGET_BYTES = 150
"""What a session in a topic's route costs."""
TOPIC_BYTES = 300
"""What a cached topic costs besides three copies of its name, about."""
MAX_MATCHED = 1_000
MAX_MATCHED_BYTES = 256
"""What belongs to longer topic names, or has more identifiers, is not remembered for each session."""
MAX_CHANGES = 64
SUBSCRIPTION_BYTES = 400
"""What one costs in memory besides its filter, which stands in its session and in the tree, about."""
CHEAP = 4
"""Looking through so many changes, and one more for each of its subscriptions, costs less than a new route."""


class Target(NamedTuple):
    """One session in a route. Not all of its subscriptions were there at or below `since`: ask `match` with a seq.

    `no_local`: not all of them are for its own messages: ask `own`.
    """

    session: Session
    qos: int
    since: int
    no_local: bool
    retain_as_published: bool
    identifiers: bytes
    """Subscription identifiers as they stand in a packet."""


class Topic(Name):
    """A topic name with its route. `plain` is its `generation` when QoS 1 messages are stored, else -1."""

    __slots__ = (
        "acks",
        "generation",
        "kept_qos0",
        "plain",
        "prefix",
        "raw",
        "refused",
        "reserved",
        "size",
        "stored",
        "stored_qos0",
        "stored_retained",
        "subscribed",
        "targets",
        "waiting",
        "watched",
        "weight",
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
        self.size = 0
        """Bytes of its route, about."""
        self.weight = 0
        """Subscriptions that its route was made of: what making it again costs."""
        self.stored = False
        self.waiting = 0
        """What is not stored waits until this seq is durable (4.6): the last one of it, or ANY if that is to be found out."""
        self.subscribed = False
        """Whether any session, connected or asleep, has a subscription for it."""
        self.stored_qos0 = False
        self.stored_retained = False
        self.refused = False
        """Whether the disk budget lets nothing more of it be stored."""
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
        self._waiting = 0
        """Of a topic that is new here: ANY once others were let go, of which it may be one."""

    def __missing__(self, raw: bytes) -> Topic:
        text = topic_name(raw)
        self.take(TOPIC_BYTES + 3 * len(raw))
        topic = self[bytes(raw)] = Topic(bytes(raw), text)
        topic.waiting = self._waiting
        return topic

    def take(self, size: int) -> None:
        """So many bytes more are used by a topic, or fewer."""
        self._bytes += size
        if len(self) >= MAX_TOPICS or self._bytes > MAX_TOPIC_BYTES:
            self.clear()
            self._bytes, self._waiting = 0, ANY

    def forget(self, text: str) -> None:
        """The name's number ends: whoever needs the topic again gets a new one. Only `Topic`s from here go into the log."""
        self._waiting = ANY
        self.pop(text.encode(), None)


class Router:
    """Subscriptions and rules in, routes out."""

    def __init__(self) -> None:
        self.generation = 0
        self.subscriptions = 0
        self.subscription_bytes = 0
        """Of memory, about."""
        self.topics = Topics()
        self.policies = Policies()
        self.level: int | None = None
        """Below this priority, policies that say so refuse what would be stored; None: nothing is refused."""
        self._tree: FilterTree[Session, Subscription] = FilterTree()
        self._wants: FilterTree[Want, None] = FilterTree()
        self._wants_everywhere: list[Want] = []
        self._kinds: frozenset[int] = frozenset()
        self.local = NO_RULES
        self.watching = False
        self._changes: deque[tuple[str, str]] = deque(maxlen=MAX_CHANGES)
        """(what topics begin with, filter) of the last changes, one for each generation."""

    def set_wants(self, wants: Iterable[Want], local: LocalRules = NO_RULES) -> None:
        """Take what the rules want logged, and what they ask of the broker itself; replaces those before."""
        self.local = local
        self._wants = FilterTree()
        self._wants_everywhere = []
        kinds = set()
        for want in wants:
            if want.topic_filter:
                self._wants.put(want.topic_filter, want, None)
            else:
                self._wants_everywhere.append(want)
            kinds.add(want.kind)
        self._kinds = frozenset(kinds)
        self.watching = bool(local.acks) or not kinds.isdisjoint((DELIVERED, POSITION))
        self._all_changed()

    def set_level(self, level: int | None) -> bool:
        """Whether this changes what is refused. As low as it may be for that, and None where nothing is."""
        refused = [policy.priority for policy in self.policies.given if policy.rejects and policy.priority < (level or 0)]
        level = max(refused) + 1 if refused else None
        if level == self.level:
            return False
        self.level = level
        self._all_changed()
        return True

    def refuses(self, topic: Topic, qos: int, retain: bool) -> bool:
        """Whether such a message would be stored, and must not be now."""
        if self.level is None:
            return False
        if topic.generation != self.generation:
            self.route(topic, PUBLISH)
        return topic.refused and (retain or (topic.stored if qos else topic.stored_qos0))

    def wanted(self, kind: int, topic: str | None = None) -> bool:
        """Whether a rule wants entries of this kind (for this topic or filter taken as a topic)."""
        if kind not in self._kinds:
            return False
        return topic is None or any(want.kind == kind for want in self._wants_of(without_share(topic)))

    def _wants_of(self, topic: str) -> Iterator[Want]:
        yield from self._wants_everywhere
        for want, _ in self._wants.find(topic):
            yield want

    def subscribe(self, topic_filter: str, session: Session, subscription: Subscription) -> None:
        before = len(self._tree)
        self._tree.put(topic_filter, session, subscription)
        self.subscription_bytes += (len(self._tree) - before) * subscription_bytes(topic_filter)
        self._subscriptions_changed(topic_filter, session)

    def unsubscribe(self, topic_filter: str, session: Session) -> None:
        if self._tree.remove(topic_filter, session):
            self.subscription_bytes -= subscription_bytes(topic_filter)
        self._subscriptions_changed(topic_filter, session)

    def presence_changed(self, session: Session) -> None:
        """A session came or went: routes name connected ones only."""
        if len(session.subscriptions) > MAX_CHANGES:
            self._all_changed()
        else:
            for text in session.subscriptions:
                self._changed(text)

    def _subscriptions_changed(self, topic_filter: str, session: Session) -> None:
        session.matched = NO_DICT
        self.subscriptions = len(self._tree)
        self._changed(topic_filter)

    def _changed(self, topic_filter: str) -> None:
        self.generation += 1
        self._changes.append((topic_filter.partition("#")[0].partition("+")[0].rstrip("/"), topic_filter))

    def _all_changed(self) -> None:
        self.generation += 1
        self._changes.clear()

    def _unconcerned(self, topic: Topic) -> bool:
        """Whether nothing that changed since its route was made can have changed it."""
        changes, missed, text = self._changes, self.generation - topic.generation, topic.text
        return (
            topic.generation >= 0
            and missed <= min(len(changes), CHEAP + topic.weight)
            and not any(text.startswith(changes[-n][0]) and matches(changes[-n][1], text) for n in range(1, missed + 1))
        )

    def route(self, topic: Topic, publish: int) -> None:
        """Make the topic's route true now. `publish` is the kind of message entries."""
        if not self._unconcerned(topic):
            self._make_route(topic, publish)
        topic.generation = self.generation
        topic.plain = self.generation if topic.stored and not topic.refused else -1

    def _make_route(self, topic: Topic, publish: int) -> None:
        if topic.stored:
            topic.waiting = ANY
        topic.stored = topic.stored_qos0 = topic.stored_retained = topic.subscribed = False
        for want in self._wants_of(topic.text):
            if want.kind == publish:
                topic.stored |= not want.retained_only
                topic.stored_qos0 |= not want.retained_only and want.min_qos == 0
                topic.stored_retained |= want.retained_only
        found: dict[Session, list[Subscription]] = {}
        topic.weight = 0
        for session, subscription in self._tree.find(topic.text):
            topic.weight += 1
            topic.subscribed = True
            topic.stored |= subscription.qos > 0
            if session.client is not None:
                found.setdefault(session, []).append(subscription)
        if topic.reserved:
            topic.stored = topic.stored_qos0 = topic.stored_retained = False
        topic.kept_qos0 = STORED_QOS0 if topic.stored_qos0 and self.local.keeps_qos0(topic.text) else 0
        topic.acks = self.local.ack_of(topic.text) | (TOLD if self.wanted(POSITION, topic.text) else 0)
        topic.watched = bool(topic.acks) or self.wanted(DELIVERED, topic.text)
        topic.targets = [target_of(session, *subscriptions) for session, subscriptions in found.items()]
        size = sum([TARGET_BYTES + len(target.identifiers) for target in topic.targets])
        self.topics.take(size - topic.size)
        topic.size = size
        topic.refused = False
        if self.level is not None:
            policy = self.policies.of(topic.text)
            topic.refused = policy.rejects and policy.priority < self.level

    def waiting(self, topic: str) -> set[Session]:
        """Sessions that want this topic with QoS 1 or 2 and do not get it as it comes."""
        return {session for session, one in self._tree.find(topic) if one.qos and session.behind}

    def fresh(self, topic: Topic) -> Topic:
        """The topic with a route that is true now."""
        if topic.generation != self.generation:
            self.route(topic, PUBLISH)
        return topic

    def watches(self, topic: Topic) -> bool:
        """Whether a delivery of it is to be logged or followed."""
        return self.watching and self.fresh(topic).watched

    def owes(self, session: Session, topic: Topic, seq: int) -> bool:
        """Whether this entry was for a subscription of the session that has QoS 0 by now."""
        return any(subscription.owed >= seq for subscription in self._tree.of(session, topic.text))

    def match(self, session: Session, topic: Topic, seq: int | None = None) -> Target | None:
        """What this session gets of a topic, None if nothing: for reading on from the log.

        With a `seq`: of this entry, by the subscriptions that were there before it.
        """
        if seq is not None:
            return self._find(session, topic, seq)
        if len(topic.raw) > MAX_MATCHED_BYTES:
            return self._find(session, topic)
        known: dict[bytes, Target | None] = session.matched
        if topic.raw in known:
            return known[topic.raw]
        if known is NO_DICT or len(known) >= MAX_MATCHED:
            known = session.matched = {}
        found = self._find(session, topic)
        if found is None or len(found.identifiers) <= MAX_MATCHED_BYTES:
            known[topic.raw] = found
        return found

    def own(self, session: Session, topic: Topic, seq: int = 0) -> Target | None:
        """What this session gets of its own messages [MQTT-3.8.3-3]; with a `seq` as in `match`."""
        return self._find(session, topic, seq or None, own=True)

    def _find(self, session: Session, topic: Topic, seq: int | None = None, own: bool = False) -> Target | None:
        found = [
            one for one in self._tree.of(session, topic.text) if (seq is None or one.since < seq) and not (own and one.no_local)
        ]
        return target_of(session, *found) if found else None


def subscription_bytes(topic_filter: str) -> int:
    """Memory that a subscription takes, about."""
    return SUBSCRIPTION_BYTES + 2 * len(topic_filter.encode())


def target_of(session: Session, first: Subscription, *others: Subscription) -> Target:
    """What subscriptions make of their session: one delivery with the greatest QoS and all identifiers (3.3.4)."""
    if not others:
        identifiers = _identifier(first.identifier)
        return Target(session, first.qos, first.since, first.no_local, first.retain_as_published, identifiers)
    every = (first, *others)
    return Target(
        session,
        max([one.qos for one in every]),
        max([one.since for one in every]),
        any([one.no_local for one in every]),
        any([one.retain_as_published for one in every]),
        b"".join([_identifier(one.identifier) for one in every]),
    )


def _identifier(number: int) -> bytes:
    return b"\x0b" + write_varint(number) if number else b""
