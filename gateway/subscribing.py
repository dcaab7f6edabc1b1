"""SUBSCRIBE and UNSUBSCRIBE (3.8, 3.10), and the retained messages that a new subscription brings.

Invariant: a SUBACK or UNSUBACK of a session that survives leaves after the commit that holds its subscriptions, and retained
messages after the SUBACK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidegate.store.entry import SUBSCRIBED, UNSUBSCRIBED
from tidegate.store.log import Name
from tidegate.store.topic import matches

from .mqtt.packets import SubAck, Subscribe, UnsubAck, Unsubscribe, encode
from .mqtt.packets import Subscription as Requested
from .mqtt.properties import Property
from .mqtt.reasons import ReasonCode
from .routing import Topic, target_of
from .session import Client, Session, Subscription

if TYPE_CHECKING:
    from .broker import Broker


class Subscribing:
    """Handlers of SUBSCRIBE and UNSUBSCRIBE."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def on_subscribe(self, client: Client, session: Session, packet: Subscribe) -> None:
        identifiers = packet.properties.get(Property.SUBSCRIPTION_IDENTIFIER) or [0]
        reasons: list[ReasonCode] = []
        retained: list[tuple[Requested, Subscription]] = []
        for wanted in packet.subscriptions:
            reason, subscription, new = self._subscribe(client, session, wanted, identifiers[0])
            reasons.append(reason)
            if subscription is not None and (wanted.retain_handling == 0 or (wanted.retain_handling == 1 and new)):
                retained.append((wanted, subscription))
        answer = encode(SubAck(packet.packet_id, tuple(reasons), {}), client.version)
        through = self._broker.log.next_seq - 1
        if session.persistent:
            self._broker.when_durable(self._confirm, client, session, answer, retained, through)
            return
        self._broker.delivery.send(client, answer)
        if self._broker.busy:  # a retained message may be on its way to the disk
            self._broker.when_durable(self._send_all_retained, client, session, retained, through)
        else:
            self._send_all_retained(client, session, retained, through)

    def _subscribe(
        self, client: Client, session: Session, wanted: Requested, identifier: int
    ) -> tuple[ReasonCode, Subscription | None, bool]:
        if wanted.filter.startswith("$share/"):
            return ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED, None, False
        since = self._broker.log.next_seq - 1
        subscription = Subscription(wanted.qos, wanted.no_local, wanted.retain_as_published, identifier, since)
        new = self._broker.sessions.subscribe(session, wanted.filter, subscription)
        if self._broker.router.wanted(SUBSCRIBED, wanted.filter):
            self._broker.log.append(SUBSCRIBED, session.name, _filter_topic(wanted.filter), wanted.qos)
        return ReasonCode(wanted.qos), subscription, new

    def _confirm(
        self, client: Client, session: Session, answer: bytes, retained: list[tuple[Requested, Subscription]], through: int
    ) -> None:
        if session.client is client:
            self._broker.delivery.send(client, answer)
            self._send_all_retained(client, session, retained, through)

    def _send_all_retained(
        self, client: Client, session: Session, retained: list[tuple[Requested, Subscription]], through: int
    ) -> None:
        if session.client is client:
            for wanted, subscription in retained:
                self._send_retained(client, session, wanted.filter, subscription, through)

    def _send_retained(self, client: Client, session: Session, text: str, subscription: Subscription, through: int) -> None:
        target = target_of(session, subscription)
        if text.startswith("$SYS"):
            for name, payload in self._broker.sys_values.items():
                if matches(text, name):
                    self._broker.delivery.send_value(client, self._broker.router.topics[name.encode()], payload)
        # What was published after the SUBSCRIBE went out as a message already.
        seqs = [seq for seq in self._broker.retained.find(text) if seq <= through]
        if seqs:
            self._broker.delivery.queue_retained(client, text, target, seqs)

    def on_unsubscribe(self, client: Client, session: Session, packet: Unsubscribe) -> None:
        reasons = []
        for text in packet.filters:
            gone = self._broker.sessions.unsubscribe(session, text)
            reasons.append(ReasonCode.SUCCESS if gone else ReasonCode.NO_SUBSCRIPTION_EXISTED)
            if gone and self._broker.router.wanted(UNSUBSCRIBED, text):
                self._broker.log.append(UNSUBSCRIBED, session.name, _filter_topic(text))
        answer = encode(UnsubAck(packet.packet_id, tuple(reasons), {}), client.version)
        if session.persistent:
            self._broker.when_durable(self._confirm, client, session, answer, [], 0)
        else:
            self._broker.delivery.send(client, answer)


def _filter_topic(text: str) -> Name:
    """A topic filter as an interned name, so that rules see it as a topic."""
    return Topic(text.encode(), text)
