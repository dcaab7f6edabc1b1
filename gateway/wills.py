"""Wills: kept while their clients are connected, published when a connection ends without a DISCONNECT, maybe later (3.1.2.5).

A will may be as large as a packet and every connection may bring one, so all together have a limit: above it a CONNECT with a
will is refused, for its client would rely on what we cannot keep.

Invariant: what is counted is what connected clients have and what waits for its delay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .mqtt.packets import Will
from .mqtt.properties import Properties, Property, encode_block
from .session import Client, Session

if TYPE_CHECKING:
    from .connecting import Broker

WILL_BYTES = 600
"""What a will costs in memory besides its content, about."""
DECODED = 4
"""Times the bytes of its properties as they are sent."""


class Wills:
    """See the module; `bytes` are those of all wills."""

    def __init__(self, broker: Broker, limit: int) -> None:
        self.bytes = 0
        self._broker = broker
        self._limit = limit
        self._delayed: dict[Session, tuple[float, Will]] = {}
        """And when they are due."""

    def takes(self, will: Will, before: Session | None) -> bool:
        """Whether there is room for it, in the place of what the client's session has."""
        connected = before.client.will if before is not None and before.client is not None else None
        delayed = self._delayed[before][1] if before in self._delayed else None
        given_back = sum(_size(one) for one in (connected, delayed) if one is not None)
        return self.bytes + _size(will) - given_back <= self._limit

    def keep(self, client: Client, will: Will) -> None:
        """As long as the client is connected."""
        client.will = will
        self.bytes += _size(will)

    def ended(self, client: Client, session: Session, with_will: bool) -> None:
        """Its connection has, and its session has been told."""
        will, client.will = client.will, None
        if will is None:
            return
        delay = min(int(will.properties.get(Property.WILL_DELAY_INTERVAL, 0)), session.expiry)
        if with_will and delay:
            self._delayed[session] = self._broker.now + delay, will
            return
        self.bytes -= _size(will)
        if with_will:
            self._publish(session, will)

    def publish_due(self, at_stop: bool = False) -> None:
        """Those whose delay is over (3.1.3.2.2); a stop does not wait for any."""
        for session in [session for session, (due, _) in self._delayed.items() if at_stop or due <= self._broker.now]:
            self._publish(session, self._take(session))

    def settle(self, session: Session | None, publish: bool) -> None:
        """The client is back in time: its delayed will is not sent [MQTT-3.1.3-9], unless the session ends now (3.1.3.2.2)."""
        if session is not None and session in self._delayed:
            will = self._take(session)
            if publish:
                self._publish(session, will)

    def _take(self, session: Session) -> Will:
        _, will = self._delayed.pop(session)
        self.bytes -= _size(will)
        return will

    def _publish(self, session: Session, will: Will) -> None:
        kept: Properties = {key: value for key, value in will.properties.items() if key != Property.WILL_DELAY_INTERVAL}
        topic = self._broker.router.topics[will.topic.encode()]
        if topic.reserved:
            return
        self._broker.publishing.publish(session.name, topic, will.qos, will.retain, will.payload, encode_block(kept))


def _size(will: Will) -> int:
    return WILL_BYTES + 2 * len(will.topic) + len(will.payload) + DECODED * len(encode_block(will.properties))
