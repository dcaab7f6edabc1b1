"""The beginning and the end of a connection: CONNECT, takeover, session, will, keep-alive, DISCONNECT.

Presence is logged here, so its order in the log is the order of the facts: a takeover logs the old connection's end before the
new one's beginning, and a late end can never mark the new one offline.

Invariant: a client whose `session` is set is the one that the session's `client` names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tidegate.store.entry import CONNECTED, DISCONNECTED, SESSION_CREATED
from tidegate.store.log import Log, Name
from tidegate.store.report import WARNING, Say

from .delivery import Delivery
from .made import MadeSubscriptions
from .mqtt.packets import ConnAck, Connect, Disconnect, encode
from .mqtt.properties import Property
from .mqtt.reasons import ReasonCode
from .pressure import Pressure
from .publishing import Publishing
from .refusals import Refusals
from .routing import Router
from .rows import Rows
from .session import NEVER, Client, Session
from .sessions import Sessions
from .subscribing import Subscribing
from .wills import Wills


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds per client; sizes in bytes, times in seconds."""

    max_packet_size: int = 1 << 20
    max_inflight: int = 1000
    max_queued_bytes: int = 1 << 20
    max_queued_together: int = 64 << 20
    max_unfinished_together: int = 64 << 20
    max_wills_together: int = 16 << 20
    max_connections: int = 10_000
    max_connections_per_address: int = 0
    max_keep_alive: int = 65_535
    session_expiry: int = NEVER
    max_waiting_messages: int = 0
    max_waiting_bytes: int = 0
    max_waiting_age: int = NEVER
    """Of what waits for a session that is away; 0 and NEVER: no limit but the disk budget."""
    max_subscriptions: int = 1 << 62
    max_subscriptions_together: int = 64 << 20
    max_retained_bytes: int = 1 << 62
    max_session_bytes: int = 1 << 62
    max_exchange_bytes: int = 1 << 62
    """Of all together, on disk (`held`)."""
    connect_timeout: float = 10.0


class Stranger(NamedTuple):
    """A connection before its CONNECT: where it came in, and when that must have come."""

    listener: Any
    deadline: float


class Access(Protocol):
    """Who may connect; the only one that may refuse (`gateway.access`)."""

    def authenticate(self, username: str | None, password: bytes | None, listener: Any) -> bool: ...
    def why_not(self, username: str | None) -> str: ...


class Broker(Protocol):
    """What is needed of the broker here."""

    log: Log
    router: Router
    delivery: Delivery
    sessions: Sessions
    made: MadeSubscriptions
    subscribing: Subscribing
    clients: dict[Client, None]
    strangers: dict[Client, Stranger]
    addresses: Counter[str]
    counters: Counter[str]
    pressure: Pressure
    publishing: Publishing
    rows: Rows
    now: float

    def handle(self, client: Client, events: list[Any]) -> None: ...

    def read_again(self, client: Client) -> None: ...

    def when_durable(self, function: Callable[..., None], *arguments: Any) -> None: ...

    report: Say


TOPIC_ALIASES = 10
"""Topic aliases a v5 client may set on its connection (3.2.2.3.8); mosquitto's default."""


class Connecting:
    """See the module. `refused` counts CONNECTs by reason; `refusals` keeps the last ones."""

    def __init__(
        self, broker: Broker, access: Access, limits: Limits, durability: str, new_client_id: Callable[[], str]
    ) -> None:
        self.refused: dict[str, int] = {}
        self.refusals = Refusals()
        self._broker = broker
        self._access = access
        self._limits = limits
        self._durability = durability
        self._new_client_id = new_client_id
        self.wills = Wills(broker, limits.max_wills_together)

    # -- in --------------------------------------------------------------------------------------------------------

    def on_connect(self, client: Client, packet: Connect) -> None:
        client.version = 5 if packet.version == 5 else 4
        refusal = self._refusal(packet, self._broker.strangers.pop(client).listener)
        if refusal is not None:
            self._refuse(client, packet, refusal)
            return
        assigned = "" if packet.client_id else self._new_client_id()
        clientid = packet.client_id or assigned
        broker = self._broker
        expiry = self._expiry(packet)
        before = broker.sessions.get(clientid)
        if before is not None and before.client is not None:
            self.drop(before.client, ReasonCode.SESSION_TAKEN_OVER)
            before = broker.sessions.get(clientid)
        self.wills.settle(before, publish=packet.clean_start)
        durable = False
        if before is not None and packet.clean_start:
            durable = before.persistent
            broker.sessions.drop(before)
            before = None
        if before is None:
            name = Name(clientid)
            session = broker.sessions.create(name, expiry)
            durable |= session.persistent
        else:
            session = before
            broker.sessions.wake(session, expiry)
            # What the connection before began, the session itself too, is resumed at once: it must be durable by then.
            durable = session.persistent
        self._attach(client, session, packet)
        self._log_connected(session, new=before is None)
        made = broker.made.look_up(session, new=before is None)
        present = before is not None and packet.version > 3  # a reserved byte in 3.1
        answer = self._connack(client, packet, present, assigned, expiry)
        if client.maximum_packet_size and len(answer) > client.maximum_packet_size:  # [MQTT-3.1.2-24]
            self._close(client)
            return
        if durable:
            client.held = []
            broker.when_durable(self._connected, client, session, answer)
        else:
            self._connected(client, session, answer)
        broker.subscribing.bring(session, made)

    def _refusal(self, packet: Connect, listener: Any) -> ReasonCode | None:
        if not packet.client_id and (packet.version == 3 or (packet.version == 4 and not packet.clean_start)):
            return ReasonCode.CLIENT_IDENTIFIER_NOT_VALID
        longest = self._limits.max_keep_alive
        if packet.version < 5 and longest < 65_535 and not 0 < packet.keep_alive <= longest:
            return ReasonCode.CLIENT_IDENTIFIER_NOT_VALID  # it cannot be told to ping more often; the code is mosquitto's
        if Property.AUTHENTICATION_METHOD in packet.properties:
            return ReasonCode.BAD_AUTHENTICATION_METHOD
        if len(self._broker.clients) > self._limits.max_connections:
            return ReasonCode.SERVER_BUSY
        if not self._access.authenticate(packet.username, packet.password, listener):
            return ReasonCode.NOT_AUTHORIZED
        if not self._broker.sessions.takes(packet.client_id, persistent=self._expiry(packet) > 0):
            text = "max_session_bytes is used up: a new session is refused; let sessions end with session_expiry, or raise it"
            self._broker.report("sessions_full", text, WARNING)
            return ReasonCode.QUOTA_EXCEEDED
        if packet.will is not None and not self.wills.takes(packet.will, self._broker.sessions.get(packet.client_id)):
            text = "max_wills_together is used up: a CONNECT with a will is refused; let wills be smaller, or raise it"
            self._broker.report("wills_full", text, WARNING, client=packet.client_id, size=len(packet.will.payload))
            return ReasonCode.QUOTA_EXCEEDED
        return None

    def _refuse(self, client: Client, packet: Connect, reason: ReasonCode) -> None:
        name = reason.name.lower()
        self.refused[name] = self.refused.get(name, 0) + 1
        why = f"{name}: {self._access.why_not(packet.username)}" if reason == ReasonCode.NOT_AUTHORIZED else name
        self.refusals.note(self._broker.log.now, client.peer, packet.client_id, packet.username, why)
        self._broker.delivery.send(client, encode(ConnAck(False, reason, {}), client.version))
        self._close(client)

    def turn_away(self, client: Client, address: str) -> None:
        """A connection too many of one address."""
        name = "connections_of_one_address"
        self.refused[name] = self.refused.get(name, 0) + 1
        self.refusals.note(self._broker.log.now, client.peer, "", None, name)
        text = "an address has max_connections_per_address already: its new connections are closed"
        self._broker.report("address_full", text, WARNING, f"address {address}", address=address)
        client.closing = True
        client.link.close()

    def note_fault(self, client: Client, error: object) -> None:
        """What the client sent was no MQTT: it is disconnected for it."""
        client_id = client.session.name.text if client.session is not None else ""
        self.refusals.note(self._broker.log.now, client.peer, client_id, client.username, f"protocol error: {error}")

    def note_unstorable(self, client: Client, why: str) -> None:
        """What the client sent can never be stored: it is disconnected for it."""
        client_id = client.session.name.text if client.session is not None else ""
        self.refusals.note(self._broker.log.at, client.peer, client_id, client.username, f"cannot be stored: {why}")

    def drop_unfinished(self, connection: object) -> None:
        """It has held an incomplete packet for the longest time, and too much of them is there."""
        broker = self._broker
        client = next(client for client in broker.clients if client.connection is connection)
        broker.counters["unfinished_dropped"] += 1
        name = client.session.name.text if client.session is not None else ""
        text = "max_unfinished_together is used up: a client that does not send the rest of its packet is disconnected"
        self.refusals.note(broker.log.now, client.peer, name, client.username, "a packet that it did not finish")
        broker.report("unfinished_dropped", text, WARNING, peer=client.peer, client=name)
        self.drop(client, ReasonCode.QUOTA_EXCEEDED)

    def _expiry(self, packet: Connect) -> int:
        """Session expiry in seconds: v5 as asked (3.1.2.11.2), 3.1.1 none or for ever; within our own bound."""
        if packet.version == 5:
            asked = int(packet.properties.get(Property.SESSION_EXPIRY_INTERVAL, 0))
        else:
            asked = 0 if packet.clean_start else NEVER
        return min(asked, self._limits.session_expiry)

    def _attach(self, client: Client, session: Session, packet: Connect) -> None:
        client.session, session.client = session, client
        client.username = packet.username
        client.keep_alive = min(packet.keep_alive or self._limits.max_keep_alive, self._limits.max_keep_alive)
        if not packet.keep_alive and self._limits.max_keep_alive == 65_535:
            client.keep_alive = 0
        if packet.will is not None:
            self.wills.keep(client, packet.will)
        receive_maximum = int(packet.properties.get(Property.RECEIVE_MAXIMUM, 65_535))
        client.window = min(receive_maximum, self._limits.max_inflight)
        self._broker.rows.settle(session)
        client.maximum_packet_size = int(packet.properties.get(Property.MAXIMUM_PACKET_SIZE, 0))
        if session.subscriptions:
            self._broker.router.presence_changed(session)

    def _connack(self, client: Client, packet: Connect, present: bool, assigned: str, expiry: int) -> bytes:
        properties: dict[Property, Any] = {}
        if client.version == 5:
            properties[Property.RECEIVE_MAXIMUM] = min(self._limits.max_inflight, 65_535)
            properties[Property.MAXIMUM_PACKET_SIZE] = self._limits.max_packet_size
            properties[Property.TOPIC_ALIAS_MAXIMUM] = TOPIC_ALIASES
            properties[Property.SHARED_SUBSCRIPTION_AVAILABLE] = 0
            if assigned:
                properties[Property.ASSIGNED_CLIENT_IDENTIFIER] = assigned
            if expiry != int(packet.properties.get(Property.SESSION_EXPIRY_INTERVAL, 0)):
                properties[Property.SESSION_EXPIRY_INTERVAL] = expiry
            if client.keep_alive != packet.keep_alive:
                properties[Property.SERVER_KEEP_ALIVE] = client.keep_alive
            properties[Property.USER_PROPERTY] = [("tidegate-durability", self._durability)]
        answer = encode(ConnAck(present, ReasonCode.SUCCESS, properties), client.version)
        if client.maximum_packet_size and len(answer) > client.maximum_packet_size:
            properties.pop(Property.USER_PROPERTY)  # [MQTT-3.2.2-20]
            answer = encode(ConnAck(present, ReasonCode.SUCCESS, properties), client.version)
        return answer

    def _log_connected(self, session: Session, new: bool) -> None:
        broker, name = self._broker, session.name
        if broker.router.wanted(CONNECTED):
            broker.log.append(CONNECTED, name)
            broker.log.change(
                "UPDATE client SET state = 1, online_at = ?, offline_at = NULL, created = ifnull(created, ?) WHERE id = ?",
                broker.log.now,
                broker.log.now,
                name,
            )
        if new and broker.router.wanted(SESSION_CREATED):
            broker.log.append(SESSION_CREATED, name)

    def _connected(self, client: Client, session: Session, answer: bytes) -> None:
        if session.client is not client:
            return
        broker = self._broker
        held, client.held = client.held, None
        broker.delivery.send_first(client, answer)
        if session.behind or session.inflight or session.releasing:
            broker.delivery.resume(session)
        else:
            broker.delivery.pump(session)
        if held is not None:
            topics = broker.router.topics
            broker.handle(client, [(topics[e[0].raw], *e[1:]) if type(e) is tuple else e for e in held])
            broker.read_again(client)

    # -- out -------------------------------------------------------------------------------------------------------

    def drop(self, client: Client, reason: ReasonCode | None) -> None:
        """We end the connection: a v5 client is told why (3.14)."""
        if client.closing:
            return
        if reason is not None and client.session is not None and client.version == 5:
            self._broker.delivery.send(client, encode(Disconnect(reason, {}), 5))
        self.detach(client, with_will=True)
        self._close(client)

    def on_disconnect(self, client: Client, session: Session, packet: Disconnect) -> None:
        expiry = packet.properties.get(Property.SESSION_EXPIRY_INTERVAL)
        if expiry is not None:
            if expiry and not session.expiry:
                self.drop(client, ReasonCode.PROTOCOL_ERROR)
                return
            session.expiry = min(int(expiry), self._limits.session_expiry)
            if session.persistent and session.expiry:
                self._broker.sessions.set_expiry(session, session.expiry)
        self.detach(client, with_will=packet.reason != ReasonCode.SUCCESS)  # [MQTT-3.1.2-10]
        self._close(client)

    def detach(self, client: Client, with_will: bool) -> None:
        """The connection is over for the broker; its session sleeps or ends."""
        broker = self._broker
        client.connection.end()
        broker.strangers.pop(client, None)
        if client in broker.clients:
            del broker.clients[client]
            address = client.peer.rpartition(":")[0]
            broker.addresses[address] -= 1
            if not broker.addresses[address]:
                del broker.addresses[address]
        broker.pressure.forget(client)
        session, client.session = client.session, None
        if session is None:
            return
        if broker.router.wanted(DISCONNECTED):
            broker.log.append(DISCONNECTED, session.name)
            broker.log.change("UPDATE client SET state = 0, offline_at = ? WHERE id = ?", broker.log.now, session.name)
        if session.expiry:
            broker.sessions.sleep(session, broker.delivery.live, broker.now)
        else:
            if not session.persistent:
                broker.rows.passing -= len(session.received)
            broker.sessions.drop(session)
        self.wills.ended(client, session, with_will)

    def _close(self, client: Client) -> None:
        """Send what is there, then close the socket."""
        self.detach(client, with_will=False)
        self._broker.delivery.flush_one(client)
        client.closing = True
        client.link.close()
