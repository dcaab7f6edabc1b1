"""Publishes that are refused: to `$SYS`, to topics whose policy is `reject_new` while the disk budget is used up, with QoS 2
while there is no room for exchanges (`rows`).

An MQTT 5 client is told, by an acknowledgement that says "quota exceeded": it keeps or drops the message as it likes.
Before 5.0 there are no such words. The acknowledgement is withheld then, so that the client keeps the message, and the client
goes on with its other topics; when there is room again its connection is ended, upon which it connects and sends again what is
unacknowledged. QoS 0 promises nothing: such a message reaches who is connected and is not stored.

Invariant: a message of QoS 1 or 2 that was refused has no entry, and no acknowledgement says that it was taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tidegate.store.report import WARNING

from .mqtt.packets import PubAck, PubRec, encode
from .mqtt.reasons import ReasonCode
from .routing import Topic
from .session import Client

if TYPE_CHECKING:
    from .broker import Broker

QUIET = 60.0
"""Seconds without any refusal after which the next one is told."""


class Pressure:
    """See the module. `refused` counts publishes."""

    def __init__(self, broker: Broker) -> None:
        self.refused = 0
        self._broker = broker
        self._withheld: dict[Client, None] = {}
        self._told = 0
        """The level that was told last."""
        self._refusing_at = float("-inf")

    def set_level(self, level: int | None) -> None:
        """Refuse what has a lower priority than `level` and the policy `reject_new`; None: refuse nothing."""
        broker = self._broker
        before = broker.router.level
        changed = broker.router.set_level(level)
        level = broker.router.level
        if level is not None:
            # A far end that drains slowly makes a little room again and again: that is told once.
            if level > self._told or broker.now - self._refusing_at >= QUIET:
                text = "the disk budget is used up: publishes of a lower priority with when_full = reject_new are refused"
                broker.report("budget_refuses", text, WARNING, below=level)
                self._told = level
            self._refusing_at = broker.now
        if changed and before is not None and (level is None or level < before):
            self.let_send_again()

    def let_send_again(self, may: Callable[[Client], bool] = lambda client: True) -> None:
        """There is room for them: who was refused without a word connects and sends again."""
        for client in [client for client in self._withheld if may(client)]:
            del self._withheld[client]
            self._broker.connecting.drop(client, None)
        self._broker.delivery.flush()

    def refuse(self, client: Client, topic: Topic, flags: int, packet_id: int, payload: bytes, properties: bytes) -> None:
        """This publish does not go into the log."""
        broker = self._broker
        self.refused += 1
        qos = flags >> 1 & 3
        if not qos:
            sender = client.session.name if client.session is not None else None
            if topic.targets:
                broker.delivery.fan_out(
                    topic, 0, 0, payload, properties, sender, broker.log.at, broker.log.mono, broker.log.run
                )
        elif client.version == 5:
            answer = PubAck if qos == 1 else PubRec
            # Not before the acknowledgements of what came earlier [MQTT-4.6.0-2].
            broker.acknowledge(client, encode(answer(packet_id, ReasonCode.QUOTA_EXCEEDED), 5))
        else:
            self._withheld[client] = None

    def refuse_reserved(self, client: Client, qos: int, packet_id: int) -> None:
        """`$SYS` is ours alone (4.7.2); before 5.0 a client cannot be told and gets its acknowledgement [MQTT-3.3.5-2]."""
        broker = self._broker
        broker.counters["refused_publishes"] += 1
        reason = ReasonCode.NOT_AUTHORIZED if client.version == 5 else ReasonCode.SUCCESS
        if qos:
            answer = PubAck(packet_id, reason) if qos == 1 else PubRec(packet_id, reason)
            broker.delivery.acknowledge_in_turn(client, encode(answer, client.version))

    def forget(self, client: Client) -> None:
        """Its connection has ended."""
        self._withheld.pop(client, None)
