"""Handing messages to clients: pushed from memory while a session keeps up, read from the log when it does not.

A committed batch is walked once; each message goes to its route's targets. A session whose window or socket is full falls
behind and remembers the seq; when room comes back it reads on, from the tail of recent batches in memory or from disk,
until it has caught up with the tail and is live again. What a client gets in one turn is joined and written once.

Invariant: a session's QoS 1 and 2 messages leave in order of seq, and what it has not got is at or above `next_seq`.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from tidegate.store.catchup import ROWS, Fetched, Piece, Stored
from tidegate.store.entry import DELIVERED, PUBLISH, QOS_MASK, RETAIN
from tidegate.store.log import Batch, Log

from .mqtt.properties import Property, decode_block, encode_block
from .mqtt.wire import write_varint
from .routing import Router, Target, Topic
from .session import RELEASED, SENT, Client, Session

DUP = 8
TAIL_BYTES = 24 << 20
"""Memory for recent batches, from which sessions a little behind are served; given back when nothing more comes."""
RESEND_AT_ONCE = 500
TAIL_REST = 30
"""Ticks (seconds) without a new batch until then."""
TURN_BYTES = 256 << 10
"""What one client is given in one turn before its socket is asked whether it keeps up."""

_PACKET_ID = [number.to_bytes(2, "big") for number in range(65_536)]
ReadLog = Callable[[Callable[[Any], Any], Callable[[Any], None]], None]
"""`read(job, done)`: run `job(catch_up)` in the reader's thread, then `done(result or exception)` here."""


class Delivery:
    """See the module. `sent`, `dropped` count messages; `live` is the last seq handed to live sessions."""

    def __init__(self, log: Log, router: Router, read: ReadLog, max_queued_bytes: int, message_id: Any) -> None:
        self.sent = 0
        self.dropped: Counter[str] = Counter()
        self.live = log.next_seq - 1
        self.report: Callable[[str], None] = lambda text: None
        self._log = log
        self._router = router
        self._read = read
        self._max_queued = max_queued_bytes
        self._message_id = message_id
        self._tail: deque[Batch] = deque()
        self._tail_bytes = 0
        self._tail_rest = 0
        self.dirty: list[Client] = []
        self._sated: list[Session] = []

    # -- out to the wires ------------------------------------------------------------------------------------------

    def send(self, client: Client, data: bytes) -> None:
        """Add bytes to what the client gets at the end of this turn."""
        if not client.out:
            self.dirty.append(client)
        client.out.append(data)
        client.out_size += len(data)

    def flush(self) -> None:
        """End of a turn: one write per client; whoever had its share of the turn and still takes more goes on."""
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for client in dirty:
                self.flush_one(client)
            sated, self._sated = self._sated, []
            for session in sated:
                self.pump(session)

    def flush_one(self, client: Client) -> None:
        """Write what one client is still to get, because its connection ends now."""
        if client.out and not client.closing:
            client.link.write(b"".join(client.out))
        client.out.clear()
        client.out_size = 0

    def send_value(self, client: Client, topic: Topic, payload: bytes) -> None:
        """A `$SYS` value for a new subscription: QoS 0, retain flag set."""
        head, tail = self._variant(topic, 32 | (client.version == 5), payload, b"")
        self._send_qos0(client, head + tail)

    # -- pushing ---------------------------------------------------------------------------------------------------

    def push_committed(self, batch: Batch) -> None:
        """Give a durable batch to everyone connected, and remember it for those who are a little behind."""
        router = self._router
        generation = router.generation
        for row, topic in zip(batch.rows, batch.topics, strict=True):
            if topic is None or not row[7] & QOS_MASK:
                continue
            if topic.generation != generation:
                router.route(topic, PUBLISH)
            if topic.targets:
                self.fan_out(topic, row[0], row[7], row[8], row[9] or b"", row[5], row[1], row[3])
        if batch.rows:
            self.live = batch.rows[-1][0]
            self._tail.append(batch)
            self._tail_bytes += batch.size
            self._tail_rest = 0
            while self._tail_bytes > TAIL_BYTES and len(self._tail) > 1:
                self._tail_bytes -= self._tail.popleft().size

    def shrink_tail(self) -> None:
        """Called each second: give the tail's memory back when nobody has published for a while."""
        self._tail_rest += 1
        if self._tail_rest > TAIL_REST and self._tail:
            self._tail.clear()
            self._tail_bytes = 0

    def fan_out(
        self, topic: Topic, seq: int, flags: int, payload: bytes, properties: bytes, sender: Any, at: int, run: int
    ) -> None:
        """Push one message to its route. `seq` 0: it has no place in the log (QoS 0, or nobody stores it)."""
        packets: dict[int, tuple[bytes, bytes]] = {}
        message_qos = flags & QOS_MASK
        expiring = b"\x02" in properties
        for target in topic.targets:
            session, granted, since, no_local, retain_as_published, identifiers = target
            client = session.client
            if client is None or (seq and seq <= since) or (no_local and _is(session, sender)):
                continue
            qos = granted if granted < message_qos else message_qos
            if qos and seq:
                if session.behind:
                    continue
                if client.blocked or client.out_size > TURN_BYTES or session.room() <= 0:
                    session.behind = True
                    session.next_seq = seq
                    self._sated.append(session)
                    continue
            elif qos:
                qos = 0
            v5 = client.version == 5
            key = qos << 2 | (32 if retain_as_published and flags & RETAIN else 0) | v5
            if identifiers or expiring:
                parts = self._variant(topic, key, payload, self._properties(properties, identifiers, at))
            else:
                found = packets.get(key)
                parts = found or packets.setdefault(key, self._variant(topic, key, payload, properties))
            if client.maximum_packet_size and self._too_large(client, *parts):
                continue
            self._send_stored(session, client, seq, qos, parts)
            if self._router.wanted(DELIVERED):
                self._log_delivered(session, topic, seq, at, run)

    def _send_qos0(self, client: Client, packet: bytes) -> None:
        if (client.blocked or client.out_size > TURN_BYTES) and (
            client.out_size + client.link.buffered() + len(packet) > self._max_queued
        ):
            self.dropped["queue_full"] += 1
            return
        self.sent += 1
        self.send(client, packet)

    def _send_stored(self, session: Session, client: Client, seq: int, qos: int, parts: tuple[bytes, bytes]) -> None:
        if not qos:
            self._send_qos0(client, parts[0] + parts[1])
        elif qos == 1:
            packet_id = session.free_packet_id()
            session.inflight[packet_id] = seq
            session.dirty = True
            self.send(client, parts[0] + _PACKET_ID[packet_id] + parts[1])
            self.sent += 1
        else:
            self._send_qos2(session, client, seq, parts)

    def _send_qos2(self, session: Session, client: Client, seq: int, parts: tuple[bytes, bytes]) -> None:
        """QoS 2: the packet id of a session that survives must be on disk before the packet leaves [MQTT-4.4.0-1]."""
        packet_id = session.free_packet_id()
        session.releasing[packet_id] = (seq, SENT)
        session.dirty = True
        packet = parts[0] + _PACKET_ID[packet_id] + parts[1]
        self.sent += 1
        if not session.persistent:
            self.send(client, packet)
            return
        self._log.change(
            "INSERT OR REPLACE INTO inflight (client, seq, packet_id, state) VALUES (?,?,?,?)",
            session.name,
            seq,
            packet_id,
            SENT,
        )
        self._log.batch.after.append((self._send_if_connected, session, client, packet))

    def _send_if_connected(self, session: Session, client: Client, packet: bytes) -> None:
        if session.client is client:
            self.send(client, packet)

    @staticmethod
    def _variant(topic: Topic, key: int, payload: bytes, properties: bytes) -> tuple[bytes, bytes]:
        """What stands before and behind the packet id; `key` = v5 | qos << 2 | retain << 5."""
        qos = key >> 2 & 3
        tail = (write_varint(len(properties)) + properties if key & 1 else b"") + payload
        length = len(topic.prefix) + len(tail) + (2 if qos else 0)
        first = 0x30 | qos << 1 | (1 if key & 32 else 0)
        return bytes((first,)) + write_varint(length) + topic.prefix, tail

    def _properties(self, properties: bytes, identifiers: Iterable[int], at: int) -> bytes:
        """The forwarded properties with the expiry counted down (3.3.2.3.3) and this client's identifiers added."""
        if b"\x02" in properties:
            found = decode_block(properties, 0, len(properties), "PUBLISH")
            if (left := _left(found, self._log.at - at)) is not None:
                found[Property.MESSAGE_EXPIRY_INTERVAL] = left
            properties = encode_block(found)
        return properties + b"".join(b"\x0b" + write_varint(number) for number in identifiers)

    def _log_delivered(self, session: Session, topic: Topic, seq: int, at: int, run: int) -> None:
        if seq and self._router.wanted(DELIVERED, topic.text):
            self._log.append(DELIVERED, session.name, topic, 0, self._message_id(seq, at, run))

    # -- reading on ------------------------------------------------------------------------------------------------

    def resume(self, session: Session) -> None:
        """A session is connected again: first again what was in flight, then what it missed."""
        client = session.client
        if client is None:
            return
        again: list[tuple[int, int, int]] = [(seq, pid, 1) for pid, seq in session.inflight.items()]
        for packet_id, (seq, state) in session.releasing.items():
            if state == RELEASED:
                self.send(client, struct.pack(">I", 0x62020000 | packet_id))
            else:
                again.append((seq, packet_id, 2))
        session.behind = True
        session.resend = sorted(again)
        self.pump(session)

    def _resend_on(self, session: Session, client: Client) -> None:
        """Ask for the next of what is to be sent again, within the client's receive maximum [MQTT-3.3.4-9]."""
        outstanding = len(session.inflight) + len(session.releasing) - len(session.resend)
        count = min(session.window - outstanding, RESEND_AT_ONCE)
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
            self._read_failed(session, got)
            return
        stored = {message[0]: message for message in got.messages}
        through = min(asked, got.through)
        while session.resend and session.resend[0][0] <= through:
            seq, packet_id, qos = session.resend.pop(0)
            self._send_again(session, client, packet_id, qos, stored.get(seq))
        self.pump(session)
        self.flush()

    def _send_again(self, session: Session, client: Client, packet_id: int, qos: int, message: Stored | None) -> None:
        if packet_id not in (session.inflight if qos == 1 else session.releasing):
            return
        if message is None:
            self.forget(session, packet_id, qos)
            self.dropped["no_longer_stored"] += 1
            return
        topic = self._router.topics[message[1]]
        target = self._router.match(session, topic)
        key = qos << 2 | (client.version == 5)
        properties = self._properties(message[4], target.identifiers if target else (), message[6])
        head, tail = self._variant(topic, key, message[3], properties)
        if self._too_large(client, head, tail):
            self.forget(session, packet_id, qos)
            return
        self.send(client, _dup(head, DUP) + _PACKET_ID[packet_id] + tail)

    def _too_large(self, client: Client, head: bytes, tail: bytes) -> bool:
        """Whether the client does not take a packet of this size; counted (3.1.2.11.4)."""
        if client.maximum_packet_size and len(head) + len(tail) + 2 > client.maximum_packet_size:
            self.dropped["packet_too_large"] += 1
            return True
        return False

    def forget(self, session: Session, packet_id: int, qos: int) -> None:
        """Free a packet id whose message can never be completed."""
        (session.inflight if qos == 1 else session.releasing).pop(packet_id, None)
        session.dirty = True

    def pump(self, session: Session) -> None:
        """Send retained messages that wait, then to a session that is behind, as much as window and socket take."""
        if session.client is not None and (session.retained or session.retained_due):
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
            if session.backlog:
                self._send_backlog(session, client)
            elif session.reading is client:
                return
            elif session.next_seq > self.live:
                session.behind = False
                session.dirty = True
            elif self._tail and session.next_seq >= self._tail[0].first_seq:
                self._take_from_tail(session)
            else:
                self._read_on(session, client)

    def _send_backlog(self, session: Session, client: Client) -> None:
        """Alike messages (QoS 1, no properties, one size) many at once, plain ones in one loop, all others one by one."""
        if session.plain >= 0 and self._send_alike(session, client):
            self._prefetch(session, client)
            return
        backlog, inflight, out, v5 = session.backlog, session.inflight, client.out, client.version == 5
        room, size, sent, packet_id = session.room(), client.out_size, 0, session.next_id
        plans: dict[tuple[bytes, int, int], bytes | None] = {}
        if not out:
            self.dirty.append(client)
        while backlog and room > 0 and size <= TURN_BYTES:
            message = backlog.popleft()
            seq, raw, flags, payload, properties, _, _, _ = message
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
            packet = head + _PACKET_ID[packet_id] + (b"\0" + payload if v5 else payload)
            packet_id = packet_id % 65_535 + 1
            out.append(packet)
            size += len(packet)
            room -= 1
            sent += 1
        session.next_id, client.out_size = packet_id, size
        session.dirty = True
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
        messages = list(islice(backlog, count))
        heads: dict[bytes, bytes] = {}
        for raw in {message[1] for message in messages}:
            head = self._plain_head(session, client, backlog[0][0], raw, 1 | (DUP if suspicious else 0), session.plain)
            if head is None:
                return False
            heads[raw] = head
        if client.version == 5:
            packets = [heads[m[1]] + _PACKET_ID[n] + b"\0" + m[3] for m, n in zip(messages, packet_ids, strict=True)]
        else:
            packets = [heads[m[1]] + _PACKET_ID[n] + m[3] for m, n in zip(messages, packet_ids, strict=True)]
        inflight.update(zip(packet_ids, [message[0] for message in messages], strict=True))
        for _ in range(count):
            backlog.popleft()
        session.next_id = (first + count - 1) % 65_535 + 1
        session.dirty = True
        self.sent += count
        self.send(client, b"".join(packets))
        return True

    def _plain_head(self, session: Session, client: Client, seq: int, raw: bytes, flags: int, length: int) -> bytes | None:
        """What stands before the packet id in every plain QoS 1 message of this topic and size; None if it is not plain."""
        topic = self._router.topics[raw]
        target = self._router.match(session, topic)
        if target is None or min(target.qos, flags & QOS_MASK) != 1 or target.no_local or target.identifiers:
            return None
        if target.since >= seq or client.maximum_packet_size or self._router.wanted(DELIVERED):
            return None
        key = 4 | (32 if target.retain_as_published and flags & RETAIN else 0) | (client.version == 5)
        return _dup(self._variant(topic, key, bytes(length), b"")[0], flags)

    def _take_from_tail(self, session: Session) -> None:
        """Fill the backlog from the batches in memory."""
        matched: dict[Topic, bool] = {}
        messages: list[Stored] = []
        for batch in self._tail:
            start = max(0, session.next_seq - batch.first_seq)
            for row, topic in zip(batch.rows[start:], batch.topics[start:], strict=True):
                if topic is None or not row[7] & QOS_MASK:
                    continue
                if topic not in matched:
                    matched[topic] = self._router.match(session, topic) is not None
                if matched[topic]:
                    messages.append((row[0], topic.raw, row[7], row[8], row[9] or b"", row[5], row[1], row[3]))
            session.next_seq = max(session.next_seq, batch.first_seq + len(batch.rows))
            if len(messages) >= ROWS:
                break
        kinds = {(message[2], len(message[3]), message[4]) for message in messages}
        flags, size, properties = kinds.pop() if len(kinds) == 1 else (0, 0, b"")
        session.plain = size if flags == 1 and not properties else -1
        session.backlog.extend(messages)

    def _read_on(self, session: Session, client: Client) -> None:
        first = session.next_seq
        filters = [text for text, subscription in session.subscriptions.items() if subscription.qos]
        if not filters:
            session.next_seq = self.live + 1
            return
        session.reading = client
        live = self.live
        self._read(lambda reader: reader.read(first, live, filters), lambda got: self._have_read(session, client, got))

    def _prefetch(self, session: Session, client: Client) -> None:
        """Ask for the next piece while this one is being sent: disk and wire work side by side."""
        on_disk = not self._tail or session.next_seq < self._tail[0].first_seq
        if on_disk and session.reading is not client and len(session.backlog) < ROWS and session.next_seq <= self.live:
            self._read_on(session, client)

    def _have_read(self, session: Session, client: Client, got: Piece | Exception) -> None:
        if session.reading is client:
            session.reading = None
        if session.client is not client:
            return
        if isinstance(got, Exception):
            self._read_failed(session, got)
            return
        session.plain = got.plain if not session.backlog or session.plain == got.plain else -1
        session.backlog.extend(got.messages)
        session.next_seq = max(got.through + 1, session.next_seq)
        self._prefetch(session, client)
        self.pump(session)
        self.flush()

    def _read_failed(self, session: Session, error: Exception) -> None:
        """Without its log a session cannot be served; it asks again when it connects again."""
        self.report(f"cannot read the log for {session.name.text}: {error}")
        if session.client is not None:
            session.client.link.close()

    def _send_late(self, session: Session, client: Client, message: Stored) -> None:
        """Send one message of the log to a session that was behind, if it is still for it."""
        seq, raw, flags, payload, properties, sender, at, run = message
        topic = self._router.topics[raw]
        target = self._router.match(session, topic)
        if target is None:
            return
        _, granted, since, no_local, retain_as_published, identifiers = target
        qos = min(granted, flags & QOS_MASK)
        if not qos or seq <= since or (no_local and _is(session, sender)):
            return
        if session.handled and seq in session.handled:
            session.handled.discard(seq)
            return
        if b"\x02" in properties and self._expired(properties, at):
            self.dropped["expired"] += 1
            return
        v5 = client.version == 5
        key = qos << 2 | (32 if retain_as_published and flags & RETAIN else 0) | v5
        if v5 and (identifiers or properties):
            properties = self._properties(properties, identifiers, at)
        head, tail = self._variant(topic, key, payload, properties)
        if self._too_large(client, head, tail):
            return
        if qos == 1 and seq < session.suspect:
            head = _dup(head, DUP)
        self._send_stored(session, client, seq, qos, (head, tail))
        self._log_delivered(session, topic, seq, at, run)

    def _expired(self, properties: bytes, at: int) -> bool:
        found = decode_block(properties, 0, len(properties), "PUBLISH")
        return _left(found, self._log.at - at) == 0

    # -- retained --------------------------------------------------------------------------------------------------

    def queue_retained(self, client: Client, topic_filter: str, target: Target, seqs: list[int]) -> None:
        """Retained messages for a new subscription; only numbers wait, and an earlier queue of the filter is replaced."""
        target.session.retained_due.pop(topic_filter, None)
        target.session.retained_due[topic_filter] = (target, sorted(seqs))
        self._fetch_retained(target.session, client)

    def _fetch_retained(self, session: Session, client: Client) -> None:
        if session.retained or session.fetching is client or not session.retained_due:
            return
        topic_filter, (target, seqs) = next(iter(session.retained_due.items()))
        session.fetching = client
        self._read(
            lambda reader: reader.fetch(seqs),
            lambda got: self._have_retained(session, client, topic_filter, target, got),
        )

    def _have_retained(
        self, session: Session, client: Client, topic_filter: str, target: Target, got: Fetched | Exception
    ) -> None:
        if session.fetching is client:
            session.fetching = None
        if session.client is not client:
            return
        if isinstance(got, Exception):
            self._read_failed(session, got)
            return
        due = session.retained_due.get(topic_filter)
        if due is not None and due[0] is target:
            left = [seq for seq in due[1] if seq > got.through]
            session.retained_due[topic_filter] = (target, left)
            if not left:
                del session.retained_due[topic_filter]
            session.retained.extend((target, message) for message in got.messages)
        self.pump(session)
        self.flush()

    def _send_waiting_retained(self, session: Session, client: Client) -> None:
        while session.retained and client.out_size <= TURN_BYTES and not client.blocked:
            target, message = session.retained[0]
            qos = min(target.qos, message[2] & QOS_MASK)
            if qos and session.room() <= 0:
                return
            session.retained.popleft()
            if b"\x02" in message[4] and self._expired(message[4], message[6]):
                continue
            v5 = client.version == 5
            properties = self._properties(message[4], target.identifiers, message[6]) if v5 else b""
            topic = self._router.topics[message[1]]
            parts = self._variant(topic, qos << 2 | 32 | v5, message[3], properties)
            if not self._too_large(client, *parts):
                self._send_stored(session, client, message[0], qos, parts)

    def in_memory(self, seq: int) -> tuple[Any, Topic] | None:
        """(row, topic) of an entry that the tail still holds."""
        if not self._tail or seq < self._tail[0].first_seq:
            return None
        for batch in self._tail:
            if seq < batch.first_seq + len(batch.rows):
                return batch.rows[seq - batch.first_seq], batch.topics[seq - batch.first_seq]
        return None


def _is(session: Session, sender: Any) -> bool:
    return sender is session.name or (sender == session.name.id and sender != 0)


def _dup(head: bytes, flags: int) -> bytes:
    """The head with the DUP bit, if `flags` has it (3.3.1.1)."""
    return bytes((head[0] | DUP,)) + head[1:] if flags & DUP else head


def _left(properties: dict[Any, Any], waited: int) -> int | None:
    """Seconds of message expiry left after `waited` ms, None when the message does not expire."""
    interval = properties.get(Property.MESSAGE_EXPIRY_INTERVAL)
    return None if interval is None else max(0, int(interval) - waited // 1000)
