"""Handing messages to clients: pushed from memory while a session keeps up, read from the log when it does not.

A committed batch is walked once; each message goes to its route's targets. A session whose window or socket is full falls
behind and remembers the seq; when room comes back it reads on, from the tail of recent batches in memory or from disk,
until it has caught up with the tail and is live again. `retaining` sends retained messages, `outlet` makes the packets and
writes them.

Invariant: a session's QoS 1 messages leave in order of seq, its QoS 2 messages too (after the commit of their packet ids, so a
later QoS 1 message may overtake them, 4.6), and what it has not got is at or above `next_seq`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tidegate.store.catchup import ROWS, Fetched
from tidegate.store.entry import ADDRESSED, FOREIGN, PUBLISH, QOS_MASK, RETAIN
from tidegate.store.few import NO_DICT, NO_LIST
from tidegate.store.foreign import name_of
from tidegate.store.log import Batch, Log, Row
from tidegate.store.piece import MESSAGE, Piece, Stored

from .held import Retained
from .outlet import PACKET_ID, PUBREL, TURN_BYTES
from .progress import Progress
from .queued import Queued
from .retaining import Retaining
from .routing import Router, Target, Topic
from .session import RELEASED, SENT, Client, Session
from .tail import Tail
from .walk import ReadLog, Walk, wanted

DUP = 8
RESEND_AT_ONCE = 500
Feed = Callable[[Session, Progress, Client], bool]


class Delivery(Retaining):
    """See the module. `live` is the last seq handed to live sessions, `durable` the last one committed."""

    def __init__(
        self,
        log: Log,
        router: Router,
        kept: Retained,
        read: ReadLog,
        max_queued_bytes: int,
        queued: Queued,
        message_id: Any,
    ) -> None:
        super().__init__(log, router, kept, read, max_queued_bytes, queued, message_id)
        self.live = self.durable = log.next_seq - 1
        self.feed: Feed = lambda session, progress, client: False
        """What a session fetches is handed out by `offline`."""
        self.session_of: Callable[[str], Session | None] = lambda clientid: None
        self._walk, self._tail = Walk(read, self), Tail()
        self._sated: list[Session] = []

    def flush(self) -> None:
        """End of a turn: one write per client; whoever had its share of the turn and still takes more goes on."""
        while self.dirty:
            super().flush()
            sated, self._sated = self._sated, []
            for session in sated:
                self.pump(session)

    # -- pushing ---------------------------------------------------------------------------------------------------

    def push_committed(self, batch: Batch) -> None:
        """Give a durable batch to everyone connected, and remember it for those who are a little behind."""
        router = self._router
        generation = router.generation
        only_messages = True
        for row in batch.rows:
            if row[4] != PUBLISH or not row[7] & QOS_MASK:
                only_messages = False
                if row[4] == ADDRESSED:
                    self._push_addressed(row)
                continue
            topic = row[6]
            if topic.generation != generation:
                router.route(topic, PUBLISH)
            if topic.targets:
                self.fan_out(topic, row[0], row[7], row[8], row[9] or b"", row[5], row[1], row[2], row[3])
        if batch.rows:
            self.live = batch.first_seq + len(batch.rows) - 1
            self._tail.add(batch, only_messages)

    def shrink_tail(self) -> None:
        """Called each second: give the tail's memory back when nobody has published for a while."""
        self._walk.tidy()
        self._tail.tick()

    def forget_tail(self) -> None:
        """What was published is read from the log from now on."""
        self._tail.forget()

    def give_up(self, gone: set[int], sessions: Iterable[Session]) -> Callable[[], None]:
        """The log lets these go: what holds them in memory lets them go too. To be called when that is durable."""
        self._tail.give_up(max(gone))
        return self._walk.give_up(gone, sessions)

    def fan_out(
        self, topic: Topic, seq: int, flags: int, payload: bytes, properties: bytes, sender: Any, at: int, mono: int, run: int
    ) -> None:
        """Push one message to its route. `seq` 0: it has no place in the log (QoS 0, or nobody stores it)."""
        packets: dict[int, tuple[bytes, bytes]] = {}
        message_qos = flags & QOS_MASK
        expiring = b"\x02" in properties
        too_late = expiring and self._expired(properties, at, mono, run)  # the commit took long
        for target in topic.targets:
            if seq and seq <= target.since:
                before = self._router.match(target.session, topic, seq)
                if before is None:
                    continue
                target = before
            session, granted, _, no_local, retain_as_published, identifiers = target
            client = session.client
            if client is None:
                continue
            if no_local and _is(session, sender):
                if (own := self._router.own(session, topic, seq)) is None:
                    continue
                _, granted, _, _, retain_as_published, identifiers = own
            qos = granted if granted < message_qos else message_qos
            if qos and seq:
                if session.behind:
                    continue
                if (
                    client.blocked
                    or client.out_size > TURN_BYTES
                    or (len(session.inflight) + len(session.releasing) >= session.window)
                ):
                    session.behind = True
                    session.next_seq = seq
                    self._sated.append(session)
                    continue
            elif qos:
                qos = 0
            if too_late:
                self.dropped["expired"] += 1
                continue
            v5 = client.version == 5
            key = qos << 2 | (32 if retain_as_published and flags & RETAIN else 0) | v5
            if identifiers or expiring:
                parts = self._variant(topic, key, payload, self._properties(properties, identifiers, at, mono, run))
            else:
                found = packets.get(key)
                parts = found or packets.setdefault(key, self._variant(topic, key, payload, properties))
            if client.maximum_packet_size and self._too_large(client, *parts):
                continue
            self._send_stored(session, client, seq, qos, parts)
            if topic.watched:
                self._note(session, topic, seq, qos, at, run)

    def _push_addressed(self, row: Row) -> None:
        """Give a message to the one session that it is for, if that keeps up."""
        seq, at, mono, run, _, name, topic, flags, payload, properties = row
        session = self.session_of(name.text)
        client = session.client if session is not None else None
        if session is None or client is None or session.behind:
            return
        if client.blocked or client.out_size > TURN_BYTES or session.room() <= 0:
            session.behind = True
            session.next_seq = seq
            self._sated.append(session)
            return
        self._send_late(session, client, (seq, topic.raw, flags, payload, properties, name, at, mono, run))

    # -- reading on ------------------------------------------------------------------------------------------------

    def resume(self, session: Session) -> None:
        """A session is connected again: first again what was in flight, then what it missed."""
        client = session.client
        if client is None:
            return
        again: list[tuple[int, int, int]] = [(seq, pid, 1) for pid, seq in session.inflight.items()]
        for packet_id, (seq, state) in session.releasing.items():
            if state == RELEASED:
                self.send(client, (PUBREL | packet_id).to_bytes(4, "big"))
            else:
                again.append((seq, packet_id, 2))
        session.behind = True
        session.resend = sorted(again) or NO_LIST
        self.pump(session)

    def _resend_on(self, session: Session, client: Client) -> None:
        """Ask for the next of what is to be sent again, within the client's receive maximum [MQTT-3.3.4-9]."""
        outstanding = len(session.inflight) + len(session.releasing) - len(session.resend)
        count = min(client.window - outstanding, RESEND_AT_ONCE)
        if count <= 0:
            return
        seqs = [seq for seq, _, _ in session.resend[:count]]
        session.reading = client
        self._read(lambda reader: reader.fetch(seqs), lambda got: self._resent(session, client, seqs[-1], got))

    def _resent(self, session: Session, client: Client, asked: int, got: Fetched | Exception) -> None:
        if session.reading is client:
            session.reading = None
        if session.client is not client:
            return
        if isinstance(got, Exception):
            self.read_failed(session, got)
            return
        stored = {message[0]: message for message in got.messages}
        through = min(asked, got.through)
        while session.resend and session.resend[0][0] <= through:
            seq, packet_id, qos = session.resend.pop(0)
            self._send_again(session, client, packet_id, qos, stored.get(seq))
        self.pump(session)

    def _send_again(self, session: Session, client: Client, packet_id: int, qos: int, message: Stored | None) -> None:
        if (packet_id not in session.inflight) if qos == 1 else session.releasing.get(packet_id, (0, 0))[1] != SENT:
            return
        if message is None:
            self.forget(session, client, packet_id, qos)
            self.dropped["no_longer_stored"] += 1
            return
        topic = self._router.topics[message[1]]
        target = self._router.match(session, topic)
        target = self._unless_own(session, topic, message, target)
        key = qos << 2 | (client.version == 5) | (32 if session.retaining.get(packet_id) == message[0] else 0)
        forwarded = b"" if message[2] & FOREIGN else message[4]
        properties = self._properties(forwarded, target.identifiers if target else b"", *message[6:])
        head, tail = self._variant(topic, key, message[3], properties)
        if self._too_large(client, head, tail):
            self.forget(session, client, packet_id, qos)
            return
        self.send(client, _dup(head, DUP) + PACKET_ID[packet_id] + tail)

    def pump(self, session: Session, its_turn: bool = False) -> None:
        """Send retained messages that wait, then to a session that is behind, as much as window and socket take.

        Where many are behind each waits for its turn, however much it has at hand.
        """
        if session.client is None or session.client.held is not None:  # the CONNACK leaves first, then `resume`
            return
        if session.retained or session.retained_due:
            self._send_waiting_retained(session, session.client)
            self._fetch_retained(session, session.client)
        while client := session.client:
            if client.out_size > TURN_BYTES:
                self._sated.append(session)
                return
            if client.blocked or not session.behind:
                return
            if session.resend:
                if session.reading is not client:
                    self._resend_on(session, client)
                return
            if session.room() <= 0:
                return
            progress = session.progress
            if progress is not None and progress.pending:
                if not self.feed(session, progress, client):
                    return
            elif session.backlog and (its_turn or not self._walk.crowded):
                self._send_backlog(session, client)
            elif session.reading is client:
                return
            elif session.backlog:
                self._walk.ask(session, client)
            elif session.next_seq > self.live:
                self._walk.leave(session)
                session.behind = False
                session.dirty = True
            elif session.next_seq >= self._tail.first:
                self._walk.leave(session)
                self._keep(session, self._tail.piece(session.next_seq), self._walk.limit)
            else:
                self._read_on(session, client)

    def _send_backlog(self, session: Session, client: Client) -> None:
        """Alike messages (QoS 1, no properties, one size) many at once, plain ones in one loop, all others one by one."""
        if session.plain >= 0 and self._send_alike(session, client):
            self._prefetch(session, client)
            return
        backlog, v5 = session.backlog, client.version == 5
        if session.inflight is NO_DICT:
            session.inflight = {}
        inflight = session.inflight
        room, size, sent, packet_id = session.room(), client.out_size, 0, session.next_id
        plans: dict[tuple[bytes, int, int], bytes | None] = {}
        if client.out is NO_LIST:
            self.dirty.append(client)
            client.out = []
        out = client.out
        taken = 0
        while taken < len(backlog) and room > 0 and size <= TURN_BYTES:
            message = backlog[taken]
            taken += 1
            seq, raw, flags, payload, properties, _, _, _, _ = message
            kind = (raw, flags | (DUP if seq < session.suspect else 0), len(payload))
            head = plans[kind] if kind in plans else plans.setdefault(kind, self._plain_head(session, client, seq, *kind))
            if head is None or properties or session.handled:
                session.next_id, client.out_size = packet_id, size
                self._send_late(session, client, message)
                room, size, packet_id = session.room(), client.out_size, session.next_id
                continue
            while packet_id in inflight or packet_id in session.releasing:
                packet_id = packet_id % 65_535 + 1
            inflight[packet_id] = seq
            packet = head + PACKET_ID[packet_id] + (b"\0" + payload if v5 else payload)
            packet_id = packet_id % 65_535 + 1
            out.append(packet)
            size += len(packet)
            room -= 1
            sent += 1
        del backlog[:taken]
        session.backlog = backlog or NO_LIST
        session.next_id, client.out_size = packet_id, size
        session.dirty = True
        session.taken += sent
        self.sent += sent
        self._prefetch(session, client)

    def _send_alike(self, session: Session, client: Client) -> bool:
        """As many of the backlog's alike messages as there is room for; False if one of them is not plain after all."""
        backlog, inflight, first = session.backlog, session.inflight, session.next_id
        count = min(session.room(), len(backlog), (TURN_BYTES - client.out_size) // (session.plain + 64) + 1, 65_536 - first)
        last = backlog[count - 1][0]
        packet_ids = range(first, first + count)
        suspicious = backlog[0][0] < session.suspect
        if (suspicious and last >= session.suspect) or session.handled or session.releasing:
            return False
        if not inflight.keys().isdisjoint(packet_ids):
            return False
        messages = backlog[:count]
        heads: dict[bytes, bytes] = {}
        for raw in {message[1] for message in messages}:
            head = self._plain_head(session, client, backlog[0][0], raw, 1 | (DUP if suspicious else 0), session.plain)
            if head is None:
                return False
            heads[raw] = head
        if client.version == 5:
            packets = [heads[m[1]] + PACKET_ID[n] + b"\0" + m[3] for m, n in zip(messages, packet_ids, strict=True)]
        else:
            packets = [heads[m[1]] + PACKET_ID[n] + m[3] for m, n in zip(messages, packet_ids, strict=True)]
        seqs = [message[0] for message in messages]
        if inflight is NO_DICT:
            session.inflight = dict(zip(packet_ids, seqs, strict=True))
        else:
            inflight.update(zip(packet_ids, seqs, strict=True))
        del backlog[:count]
        session.backlog = backlog or NO_LIST
        session.next_id = (first + count - 1) % 65_535 + 1
        session.dirty = True
        session.taken += count
        self.sent += count
        self.send(client, b"".join(packets))
        return True

    def _plain_head(self, session: Session, client: Client, seq: int, raw: bytes, flags: int, length: int) -> bytes | None:
        """What stands before the packet id in every plain QoS 1 message of this topic and size; None if it is not plain."""
        topic = self._router.topics[raw]
        target = self._router.match(session, topic)
        if target is None or min(target.qos, flags & QOS_MASK) != 1 or target.no_local or target.identifiers:
            return None
        if target.since >= seq or client.maximum_packet_size or self._router.watches(topic):
            return None
        key = 4 | (32 if target.retain_as_published and flags & RETAIN else 0) | (client.version == 5)
        return _dup(self._variant(topic, key, bytes(length), b"")[0], flags)

    def _read_on(self, session: Session, client: Client) -> None:
        if wanted(session):
            self._walk.ask(session, client)
        else:
            session.next_seq = self.live + 1

    def _prefetch(self, session: Session, client: Client) -> None:
        """Ask for the next piece while this one is being sent: disk and wire work side by side."""
        if len(session.backlog) >= ROWS or session.reading is client or session.next_seq > self.live or self._walk.crowded:
            return
        if session.next_seq < self._tail.first:
            self._read_on(session, client)

    def hand_over(self, session: Session, client: Client, piece: Piece | None, limit: int) -> int:
        """Its turn, with what it is to have of the log if it needs more; how many messages left."""
        before = self.sent
        if piece is not None:
            self._keep(session, piece, limit)
            self._prefetch(session, client)
        self.pump(session, its_turn=True)
        return self.sent - before

    def _keep(self, session: Session, piece: Piece, limit: int) -> None:
        leaves_now = min(TURN_BYTES, session.room() * (max(0, piece.plain) + MESSAGE))
        messages, through = piece.take(session.next_seq, wanted(session), max(limit, leaves_now))
        messages = self._walk.left(messages)
        if messages:
            session.plain = piece.plain if not session.backlog or session.plain == piece.plain else -1
            if session.backlog is NO_LIST:
                session.backlog = []
            session.backlog.extend(messages)
        session.next_seq = through + 1

    def _send_late(self, session: Session, client: Client, message: Stored) -> None:
        """Send one message of the log to a session that was behind, if it is still for it."""
        seq = message[0]
        if message[2] & FOREIGN and not _is(session, message[5]):
            return
        topic = self._router.topics[message[1]]
        target = self._router.match(session, topic)
        if target is not None and seq <= target.since:
            target = self._router.match(session, topic, seq)
        target = self._unless_own(session, topic, message, target)
        if target is None or not (min(target.qos, message[2] & QOS_MASK) or self._router.owes(session, topic, seq)):
            return
        if session.handled and session.handled.pop(seq, 0) is None:
            return
        self.send_old(session, client, message, target)

    def _unless_own(self, session: Session, topic: Topic, message: Stored, target: Target | None) -> Target | None:
        """The target, or if this is the session's own message what it gets of those."""
        if target is None or not target.no_local or message[2] & FOREIGN or not _is(session, message[5]):
            return target
        return self._router.own(session, topic, message[0])

    def send_old(self, session: Session, client: Client, message: Stored, target: Target) -> int:
        """Send a message of the log, if it is still worth it; its QoS, 0 if it need not be acknowledged."""
        seq, raw, flags, payload, properties, sender, at, mono, run = message
        name = name_of(flags, properties)
        if flags & FOREIGN:
            properties, sender = b"", 0
        topic = self._router.topics[raw]
        _, granted, _, no_local, retain_as_published, identifiers = target
        qos = min(granted, flags & QOS_MASK)
        if no_local and _is(session, sender):
            return 0
        if b"\x02" in properties and self._expired(properties, at, mono, run):
            self.dropped["expired"] += 1
            session.taken += 1
            session.expired += 1
            return 0
        v5 = client.version == 5
        key = qos << 2 | (32 if retain_as_published and flags & RETAIN else 0) | v5
        if v5 and (identifiers or properties):
            properties = self._properties(properties, identifiers, at, mono, run)
        head, tail = self._variant(topic, key, payload, properties)
        if self._too_large(client, head, tail):
            return 0
        if qos == 1 and seq < session.suspect:
            head = _dup(head, DUP)
        self._send_stored(session, client, seq, qos, (head, tail))
        if self._router.watches(topic):
            self._note(session, topic, seq, qos, at, run, name)
        return qos

    def in_memory(self, seq: int) -> Row | None:
        """The row of an entry that the tail still holds."""
        return self._tail.row(seq)


def _is(session: Session, sender: Any) -> bool:
    return sender is session.name or (sender == session.name.id and sender != 0)


def _dup(head: bytes, flags: int) -> bytes:
    """The head with the DUP bit, if `flags` has it (3.3.1.1)."""
    return bytes((head[0] | DUP,)) + head[1:] if flags & DUP else head
