"""The broker's core: packets in, batches to the store, and what the store has made durable out to the clients.

One turn handles everything one socket had to say. Messages that must survive go into the log's batch; their
acknowledgements wait there. While one batch is being committed the next one fills; when the commit is done, first the next
is handed over, then its acknowledgements leave, then its messages are delivered: commit, acknowledge, deliver. No socket,
no thread and no clock is touched here: `server` and `app` bring links, a store to commit to and the time.

Invariant: no PUBACK, PUBREC, PUBCOMP or SUBACK that promises something durable leaves before the commit that holds it.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from typing import Any

from tidegate.store.catchup import RETAINED
from tidegate.store.entry import PUBLISH
from tidegate.store.log import ROW_BYTES, Ack, Batch, Log
from tidegate.store.names import KEEP_FIRST, Unused
from tidegate.store.report import ERROR, INFO, WARNING, Say
from tidegate.store.schema import disk_fault
from tidegate.store.trim import KEEP_AT, KEEP_SEQ, Plan
from tidegate.store.unstorable import Unstorable

from .accounts import charge
from .aside import put_aside
from .connecting import TOPIC_ALIASES, Access, Connecting, Limits, Stranger
from .delivery import Delivery
from .exchanges import Exchanges
from .gaps import Gaps
from .held import Retained
from .limits import Absence
from .made import MadeSubscriptions
from .mqtt.connection import Acks, Connection, Fault, Terms
from .mqtt.packets import (
    Auth,
    Disconnect,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    PubRec,
    PubRel,
    Subscribe,
    Unsubscribe,
    encode,
)
from .mqtt.reasons import ReasonCode
from .mqtt.unfinished import Unfinished
from .offline import Offline
from .pressure import Pressure
from .publishing import PUBACK, Publishing, no_subscribers
from .queued import Queued
from .routing import Router, Topic
from .rows import Rows
from .session import Client, Link, Session
from .sessions import Sessions
from .subscribing import Subscribing
from .walk import ReadLog

BATCH_LIMIT = 16 << 20
UNREAD_LIMIT = 2 << 20
"""Bytes of answers that a client may leave unread before it is read no further."""
FOLD_PAUSE = 0.1
FOLD_AT_ONCE = 20
"""Positions ride along with a commit that happens anyway, so many of them in so many seconds; `tick` writes the rest."""
NEVER_PLAIN = -2
"""No topic's `plain`."""
RETRY = 1.0
GIVE_UP_RETRIES = 20
"""Failed commits (one each RETRY seconds) after which clients that wait for the disk are disconnected."""


Commit = Callable[[Batch, Callable[[Any], None]], None]
"""`commit(batch, done)`: make it durable, then `done(None)`; `done(exception)` when nothing of it is there."""


class Broker:
    """See the module. `now` is monotonic seconds, set by whoever calls in."""

    def __init__(
        self,
        log: Log,
        commit: Commit,
        read: ReadLog,
        later: Callable[[float, Callable[[], None]], Any],
        access: Access,
        limits: Limits,
        durability: str,
        commit_delay: float,
        message_id: Callable[[int, int, int], bytes],
        new_client_id: Callable[[], str],
        report: Say,
    ) -> None:
        self.log = log
        self.router = Router()
        queued = Queued(limits.max_queued_together)
        self.retained = Retained(limits.max_retained_bytes)
        read_in_turn = self._read_in_turn
        self.delivery = Delivery(log, self.router, self.retained, read_in_turn, limits.max_queued_bytes, queued, message_id)
        self.delivery.report = report
        self.sessions = Sessions(log, self.router, limits.max_session_bytes)
        self.delivery.session_of = self.sessions.get
        self.gaps = Gaps(log, self.delivery.dropped)
        self.batch_limit = BATCH_LIMIT
        """Bytes that may wait for the disk; above it the clients that add to them are read no further."""
        self.clients: dict[Client, None] = {}
        """Connections, in the order in which they came: what happens to all of them happens in the same order in every run."""
        self.strangers: dict[Client, Stranger] = {}
        """Those of them that have not said who they are."""
        self.addresses: Counter[str] = Counter()
        """Connections of each address."""
        self.unfinished = Unfinished(max(limits.max_unfinished_together, limits.max_packet_size))
        self.sys_values: dict[str, bytes] = {}
        self.counters: Counter[str] = Counter()
        self.received = self.stored = 0
        self.store_fault = ""
        self.now = 0.0
        self._next_fold = 0.0
        self._commit = commit
        self.read = read
        self._later = later
        self._limits = limits
        self._terms: Terms[Topic] = Terms(self.router.topics, limits.max_packet_size, TOPIC_ALIASES, unfinished=self.unfinished)
        self._durable = durability != "memory"
        self._delay = commit_delay
        self.message_id = message_id
        self.report = report
        self._committing = self._delayed = False
        self._failures = 0
        self._paused: list[Client] = []
        self.connecting = Connecting(self, access, limits, durability, new_client_id)
        self.pressure = Pressure(self)
        self.rows = Rows(self, limits.max_exchange_bytes)
        self.delivery.added_delivery = self.rows.add_exchange
        self._absence = Absence(self, limits)
        self.publishing = Publishing(self, limits.max_inflight)
        self._publish = self.publishing.on_publish
        exchanges, subscribing = Exchanges(self), Subscribing(self, limits.max_subscriptions, limits.max_subscriptions_together)
        self.subscribing = subscribing
        self.made = MadeSubscriptions(self, subscribing)
        self.offline = Offline(self, self._read_in_turn)
        self._handlers: dict[type, Callable[[Client, Session, Any], None]] = {
            Acks: exchanges.on_acks,
            PubAck: exchanges.on_puback,
            PubRec: exchanges.on_pubrec,
            PubRel: exchanges.on_pubrel,
            PubComp: exchanges.on_pubcomp,
            Subscribe: subscribing.on_subscribe,
            Unsubscribe: subscribing.on_unsubscribe,
            PingReq: self._on_ping,
            Disconnect: self.connecting.on_disconnect,
            Auth: lambda client, *_: self.connecting.drop(client, ReasonCode.PROTOCOL_ERROR),
        }

    def load(self, db: sqlite3.Connection, clean: bool) -> None:
        """Read back what the store knows of sessions and retained messages; `clean`: the last run was stopped properly."""
        self.sessions.load(db, clean, self.now)
        self.made.load(db)
        self.offline.load(db)
        self.gaps.load(db)
        self.rows.load(db)
        for row in db.execute(RETAINED):
            self.retained.put(*row)

    # -- what the shell calls --------------------------------------------------------------------------------------

    def opened(self, link: Link, peer: str, listener: Any) -> Client:
        """A socket was accepted. Above the limit of its address it is closed at once, before it can say anything."""
        client = Client(link, Connection(self._terms), peer, self.now)
        address = peer.rpartition(":")[0]
        if self._limits.max_connections_per_address and self.addresses[address] >= self._limits.max_connections_per_address:
            self.connecting.turn_away(client, address)
            return client
        self.addresses[address] += 1
        self.clients[client] = None
        self.strangers[client] = Stranger(listener, self.now + self._limits.connect_timeout)
        return client

    def receive(self, client: Client, data: bytes) -> None:
        """Everything one read of this client's socket brought."""
        client.last_seen = self.now
        batch = self.log.batch
        size = batch.size
        self.handle(client, client.connection.receive(data))
        crowded = batch.size > self.batch_limit and batch.size > size
        if not (crowded or client.blocked or client.held is not None) or client.paused or client.closing:
            return
        if crowded:
            self._paused.append(client)
        elif client.held is None and client.link.buffered() <= min(UNREAD_LIMIT, self.delivery.queued.share):
            return
        client.paused = True
        client.link.pause()

    def turn_over(self) -> None:
        """All sockets that had something to say have said it: answer, and hand on to the disk what they brought."""
        while (connection := self.unfinished.worst()) is not None:
            self.connecting.drop_unfinished(connection)
        if self.delivery.dirty:
            self.delivery.flush()
        if not self._committing:
            self._begin_commit()

    def _read_in_turn(self, job: Callable[[Any], Any], done: Callable[[Any], None]) -> None:
        """Read the log; what comes of it leaves at once, and its packet ids go to the disk at once."""

        def have_read(got: Any) -> None:
            done(got)
            self.turn_over()

        self.read(job, have_read)

    def lost(self, client: Client) -> None:
        """The socket is gone."""
        self.connecting.detach(client, with_will=True)

    def writable(self, client: Client, yes: bool) -> None:
        """The socket's buffer went above its mark (no) or below it again (yes)."""
        client.blocked = not yes
        if yes and client.paused and client.held is None and client not in self._paused:
            self.read_again(client)
        if yes and client.session is not None:
            self.delivery.pump(client.session)

    def read_again(self, client: Client) -> None:
        """The reason not to read from this client is gone."""
        client.paused = False
        client.link.resume()

    def tick(self) -> None:
        """Once a second: keep-alive, expiry, delayed wills, positions."""
        now = self.now
        for client in [client for client, stranger in self.strangers.items() if now > stranger.deadline]:
            self.connecting.drop(client, None)
        for client in list(self.clients):
            if client.keep_alive and now - client.last_seen > client.keep_alive * 1.5 and not client.paused:
                self.connecting.drop(client, ReasonCode.KEEP_ALIVE_TIMEOUT)
        self.connecting.wills.publish_due()
        for session in self.sessions.expired(now):
            self.sessions.drop(session)
            self.counters["sessions_expired"] += 1
        self.sessions.fold(self.delivery.live)
        self._absence.tick()
        self.offline.tick()
        self.rows.tick()
        self.delivery.shrink_tail()
        self.delivery.flush()
        self._begin_commit()

    def stop(self) -> None:
        """A clean stop: say good-bye, write down where every session stands. What is left to commit stays in the log."""
        for client in list(self.clients):
            self.connecting.drop(client, ReasonCode.SERVER_SHUTTING_DOWN)
        self.connecting.wills.publish_due(at_stop=True)
        self.offline.fold()
        self.sessions.fold_for_stop(self.delivery.live, self.rows.room)
        self._begin_commit()

    def trim(self, plan: Plan) -> None:
        """Carry out a step of the trim; what was still wanted leaves a gap record in the same transaction."""
        self.log.change(KEEP_SEQ, self.log.next_seq - 1)
        self.log.change(KEEP_AT, self.log.at)
        batch = self.log.batch
        first = len(batch.changes)
        for sql, parameters in plan.changes:
            self.log.change(sql, *parameters)
        batch.together.append(range(first, len(batch.changes)))
        batch.size += plan.cost
        self.gaps.add(plan.lost)
        charged = charge(self.router, plan)
        for session in charged:
            self.sessions.store_account(session)
        if charged:
            gone = {seq for taken in plan.messages for seq in taken.seqs}
            self.when_durable(self.delivery.give_up(gone, charged))
        self._begin_commit()

    def collect(self, unused: Unused) -> None:
        """Let names go that nothing uses, at the end of the batch. From here on no batch gets their numbers from memory:
        topics are forgotten, and whoever has a session keeps its name."""
        for _, text in unused.topics:
            self.router.topics.forget(text)
        clients = tuple([name for name in unused.clients if self.sessions.get(name[1]) is None])
        self.log.batch.unused.append(Unused(unused.checked, unused.topics, clients))
        if unused.first is not None:
            self.log.change(KEEP_FIRST, unused.first)
        self._begin_commit()

    @property
    def busy(self) -> bool:
        return self._committing or bool(self.log.batch)

    def publish_sys(self, values: dict[str, bytes]) -> None:
        """Set and send `$SYS` values: QoS 0, retained in memory only."""
        for text, payload in values.items():
            if self.sys_values.get(text) == payload:
                continue
            self.sys_values[text] = payload
            topic = self.router.topics[text.encode()]
            self.router.route(topic, PUBLISH)
            self.delivery.fan_out(topic, 0, 0, payload, b"", None, 0, 0, 0)
        self.delivery.flush()

    # -- commits ---------------------------------------------------------------------------------------------------

    def _begin_commit(self) -> None:
        if self._committing or not self.log.batch:
            return
        if self._delay and not self._delayed:
            self._delayed = True
            self._committing = True
            self._later(self._delay, self._delay_over)
            return
        self._delayed, self._committing = False, True
        if self.now >= self._next_fold:
            self._next_fold = self.now + FOLD_PAUSE
            self.sessions.fold(self.delivery.live, FOLD_AT_ONCE)
            self.offline.fold(FOLD_AT_ONCE)
        self.offline.fold_urgent()
        self._hand_over(self.log.take())

    def _hand_over(self, batch: Batch, pause: float = 0.0) -> None:
        self.delivery.leaving = batch.acks
        if pause:
            self._later(pause, lambda: self._hand_over(batch))
        else:
            self._commit(batch, lambda result: self._committed(batch, result))

    def _delay_over(self) -> None:
        self._committing = False
        self._begin_commit()

    def _committed(self, batch: Batch, result: Any) -> None:
        if isinstance(result, Unstorable):
            self._hand_over(batch, 0.0 if put_aside(self, batch, result) else RETRY)
            return
        if isinstance(result, BaseException):
            self._commit_failed(batch, result)
            return
        if self.store_fault:
            self.report("store_works", "the store works again; withheld acknowledgements are sent now", INFO, "")
            self.store_fault = ""
            self._failures = 0
        self._committing, self.delivery.leaving = False, {}
        self._begin_commit()
        self.delivery.acknowledge(batch.acks)
        self.stored += len(batch.rows)
        if batch.rows:
            self.delivery.durable = batch.first_seq + len(batch.rows) - 1
        for function, *arguments in batch.after:
            function(*arguments)
        self.delivery.push_committed(batch)
        self.delivery.flush()
        self._read_on()
        self._begin_commit()

    def hold(self, batch_limit: int) -> None:
        """How many bytes may wait for the disk; 0: who adds to them is read no further until there is another limit."""
        self.batch_limit = batch_limit
        self._read_on()

    def _read_on(self) -> None:
        if self.batch_limit:
            paused, self._paused = self._paused, []
            for client in paused:
                self.read_again(client)

    def _commit_failed(self, batch: Batch, error: BaseException) -> None:
        """The disk refuses: acknowledgements are withheld, and the same batch is tried again each second."""
        if not self.store_fault:
            text = "the store refuses to write; acknowledgements of QoS 1 and 2 are withheld"
            self.report("store_refuses", text, ERROR, reason=disk_fault(error))
        self.store_fault = disk_fault(error)
        self._failures += 1
        if self._failures > GIVE_UP_RETRIES:
            for client in [c for c in (*batch.acks, *self._paused) if c in self.clients]:
                self.connecting.drop(client, ReasonCode.QUOTA_EXCEEDED)
            self.delivery.flush()
        self._hand_over(batch, RETRY)

    def acknowledge(self, client: Client, packet: Ack) -> None:
        """Acknowledge once what was appended in this turn is durable (or now, in durability `memory`)."""
        if not self._durable:
            self.delivery.acknowledge({client: [packet]})
        else:
            self.log.acknowledge(client, packet)

    def when_durable(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` after the commit that holds everything appended so far."""
        self.log.when_durable(function, *arguments)

    # -- packets ---------------------------------------------------------------------------------------------------

    def handle(self, client: Client, events: list[Any]) -> None:
        """Act on what the client's connection read, in order.

        Long on purpose: the usual message, QoS 1 to be stored and not retained, is taken here without another call; what
        `Publishing.on_publish` would do for it.
        """
        log = self.log
        generation = self.router.generation if self._durable else NEVER_PLAIN
        v5 = client.version == 5
        for event in events:
            session = client.session
            if client.held is not None:
                client.held.append(event)
            elif type(event) is tuple:
                if session is None:
                    return
                topic, flags, packet_id, payload, properties = event
                if flags & 7 == 2 and topic.plain == generation:
                    self.received += 1
                    batch = log.batch
                    seq = log.next_seq
                    log.next_seq = seq + 1
                    batch.rows.append(
                        (seq, log.at, log.mono, log.run, PUBLISH, session.name, topic, 1, payload, properties or None)
                    )
                    batch.size += ROW_BYTES + len(payload) + len(properties)
                    ack = PUBACK | packet_id if topic.subscribed or not v5 else no_subscribers(packet_id)
                    acks = batch.acks
                    if client in acks:
                        acks[client].append(ack)
                    else:
                        acks[client] = [ack]
                    continue
                self._publish(client, session, topic, flags, packet_id, payload, properties)
            elif client.closing:
                return
            elif isinstance(event, Fault):
                self.counters["protocol_errors"] += 1
                about = f"{client.peer.rpartition(':')[0]} {event.error.reason.name}"
                text = "what a client sent is no MQTT; it is disconnected"
                self.report("protocol_error", text, WARNING, about, peer=client.peer, reason=event.error)
                self.connecting.note_fault(client, event.error)
                self.delivery.send(client, client.connection.refusal(event.error))
                self.connecting.drop(client, None)
            elif session is None:
                self.connecting.on_connect(client, event)
            else:
                self._handlers[type(event)](client, session, event)
            generation = self.router.generation if self._durable else NEVER_PLAIN

    def _on_ping(self, client: Client, session: Session, _: PingReq) -> None:
        """Who has nothing else to say is idle."""
        session.rest()
        self.delivery.send(client, encode(PingResp(), client.version))
