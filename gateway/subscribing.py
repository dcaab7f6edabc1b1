"""SUBSCRIBE and UNSUBSCRIBE (3.8, 3.10), and what a new subscription brings: retained messages, and stored ones by the rules.

Invariant: a SUBACK or UNSUBACK of a session that survives leaves after the commit that holds its subscriptions, and messages
that a subscription brings after the SUBACK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tidegate.store.entry import SUBSCRIBED, UNSUBSCRIBED
from tidegate.store.log import Name
from tidegate.store.report import WARNING
from tidegate.store.topic import matches

from .mqtt.packets import SubAck, Subscribe, UnsubAck, Unsubscribe, encode
from .mqtt.packets import Subscription as Requested
from .mqtt.properties import Property
from .mqtt.reasons import ReasonCode
from .retaining import Due
from .routing import Topic, subscription_bytes, target_of
from .session import Client, Session, Subscription

if TYPE_CHECKING:
    from .broker import Broker


class Made(NamedTuple):
    """A subscription that was just made; `through`: the last seq given out then. What came later is a message, not history."""

    wanted: Requested
    subscription: Subscription
    new: bool
    through: int

    @property
    def brings_retained(self) -> bool:
        return self.wanted.retain_handling == 0 or (self.wanted.retain_handling == 1 and self.new)


class Subscribing:
    """Handlers of SUBSCRIBE and UNSUBSCRIBE."""

    def __init__(self, broker: Broker, max_subscriptions: int, max_together: int) -> None:
        self._broker = broker
        self._max_subscriptions = max_subscriptions
        self._max_together = max_together

    def on_subscribe(self, client: Client, session: Session, packet: Subscribe) -> None:
        identifiers = packet.properties.get(Property.SUBSCRIPTION_IDENTIFIER) or [0]
        reasons: list[ReasonCode] = []
        made: list[Made] = []
        for wanted in packet.subscriptions:
            done = self.subscribe(session, wanted, identifiers[0])
            if isinstance(done, Made):
                made.append(done)
            reasons.append(ReasonCode(wanted.qos) if isinstance(done, Made) else done)
        answer = encode(SubAck(packet.packet_id, tuple(reasons), {}), client.version)
        if session.persistent:
            self._broker.when_durable(self._broker.delivery.send_if_connected, session, client, answer)
        else:
            self._broker.delivery.send(client, answer)
        self.bring(session, made)

    def subscribe(self, session: Session, wanted: Requested, identifier: int = 0) -> Made | ReasonCode:
        """Make one subscription, or say why not."""
        broker = self._broker
        if wanted.filter.startswith("$share/"):
            return ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
        if wanted.filter not in session.subscriptions and (limit := self._full(session, wanted.filter)):
            broker.counters["refused_subscriptions"] += 1
            name, text = session.name.text, f"{limit} is used up: a subscription is refused"
            about = f"{limit} {name}" if limit == "max_subscriptions" else limit  # of all: ever new clients may run into it
            broker.report("subscription_refused", text, WARNING, about, client=name, filter=wanted.filter)
            return ReasonCode.QUOTA_EXCEEDED
        since = broker.log.next_seq - 1
        subscription = Subscription(wanted.qos, wanted.no_local, wanted.retain_as_published, identifier, since)
        if not wanted.qos and (before := session.subscriptions.get(wanted.filter)) is not None:
            subscription.owed = self._owed(session) if before.qos else before.owed  # [MQTT-3.8.4-4]
        new = broker.sessions.subscribe(session, wanted.filter, subscription)
        if wanted.qos == 2:
            broker.rows.settle(session)
        if new and wanted.qos:
            broker.offline.subscribed(session, wanted.filter, since)
        if broker.router.wanted(SUBSCRIBED, wanted.filter):
            broker.log.append(SUBSCRIBED, session.name, _filter_topic(wanted.filter), wanted.qos)
        return Made(wanted, subscription, new, since)

    def _owed(self, session: Session) -> int:
        """The last seq of which the session has still to get what it has subscribed to; 0 if it keeps up."""
        if session.client is None:
            return self._broker.log.next_seq - 1
        return self._broker.delivery.live if session.behind else 0

    def _full(self, session: Session, topic_filter: str) -> str:
        """The limit that another subscription would break."""
        if len(session.subscriptions) >= self._max_subscriptions:
            return "max_subscriptions"
        if self._broker.router.subscription_bytes + subscription_bytes(topic_filter) > self._max_together:
            return "max_subscriptions_together"
        return "" if self._broker.sessions.takes_filter(session, topic_filter) else "max_session_bytes"

    def bring(self, session: Session, made: list[Made]) -> None:
        """Send what the subscriptions bring, once it can be read: what was published before may be on its way to the disk."""
        client = session.client
        if client is None:
            return
        if session.persistent or self._broker.busy:
            self._broker.log.batch.size += sum([subscription_bytes(one.wanted.filter) for one in made])
            self._broker.when_durable(self._send_all, client, session, made)
        else:
            self._send_all(client, session, made)

    def _send_all(self, client: Client, session: Session, made: list[Made]) -> None:
        if session.client is client:
            for one in made:
                if one.brings_retained:
                    self._send_retained(client, session, one)
            self._broker.offline.begin(session)

    def _send_retained(self, client: Client, session: Session, made: Made) -> None:
        text = made.wanted.filter
        if text.startswith("$SYS"):
            for name, payload in self._broker.sys_values.items():
                if matches(text, name):
                    self._broker.delivery.send_value(client, self._broker.router.topics[name.encode()], payload)
        self._broker.delivery.queue_retained(client, text, Due(target_of(session, made.subscription), made.through))

    def on_unsubscribe(self, client: Client, session: Session, packet: Unsubscribe) -> None:
        reasons = []
        for text in packet.filters:
            gone = self.unsubscribe(session, text)
            reasons.append(ReasonCode.SUCCESS if gone else ReasonCode.NO_SUBSCRIPTION_EXISTED)
        answer = encode(UnsubAck(packet.packet_id, tuple(reasons), {}), client.version)
        if session.persistent:
            self._broker.when_durable(self._broker.delivery.send_if_connected, session, client, answer)
        else:
            self._broker.delivery.send(client, answer)

    def unsubscribe(self, session: Session, text: str) -> bool:
        """Take one subscription away; whether it was there."""
        broker = self._broker
        gone = broker.sessions.unsubscribe(session, text)
        if gone:
            broker.offline.unsubscribed(session, text)
            wanted = broker.router.wanted(UNSUBSCRIBED, text)
            seq = broker.log.append(UNSUBSCRIBED, session.name, _filter_topic(text)) if wanted else 0
            broker.offline.forget_positions(session, text, seq)
        return gone


def _filter_topic(text: str) -> Name:
    """A topic filter as an interned name, so that rules see it as a topic."""
    return Topic(text.encode(), text)
