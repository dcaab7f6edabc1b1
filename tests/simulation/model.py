"""What must be true of the simulated gateway, written down without looking at how it works.

It sees what devices saw and what each commit held, and says at once when something cannot be, and at the end what is missing.
For each persistent session wanted = delivered + expired + too large + given up with the session, message by message.

Invariant: it knows nothing of the broker but rows that became durable, packets that arrived, and what the rule file means.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate.store.entry import CONNECTED, DISCONNECTED, PUBLISH, QOS_MASK, RETAIN
from tidegate.store.log import Row
from tidegate.store.topic import matches

QOS_OF = {"#": 2, "a/+": 1, "+/x": 2, "b/#": 0, "c": 1, "a/x": 0}
LARGE = 400
"""A payload of this size is too large for a device that has a limit, and small ones never are."""
Wants = Callable[..., bool]
"""`wants(kind, topic, qos, retain, payload)`: whether the rules in force mean that such an event is kept."""


@dataclass
class Reader:
    """What one persistent device has subscribed to and got."""

    since: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Filter -> (next seq, moment) when its SUBACK arrived."""
    fresh: Counter[tuple[bytes, int]] = field(default_factory=Counter)
    """(payload, QoS) -> copies without DUP and retain flag; one subscription more may make a copy's QoS another."""
    seen: set[bytes] = field(default_factory=set)
    complete: set[bytes] = field(default_factory=set)
    """Payloads got with QoS 2."""
    last: Counter[int] = field(default_factory=Counter)
    """QoS -> seq of the last fresh copy; the standard promises order within a QoS (4.6)."""


@dataclass(slots=True)
class Message:
    """What was published under one payload."""

    topic: str
    qos: int
    retain: bool
    moment: int
    rules: int
    """How many times the rules had changed when it was sent first."""
    expiry: int | None = None
    """Seconds."""
    copies: int = 0
    """How often it was sent."""


class Model:
    """See the module. Payloads are unique; that of a QoS names it ("d1-17-q2")."""

    times_change = False
    """Whether power cuts of unknown length make a message younger than it was taken for."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.seqs: dict[bytes, list[int]] = defaultdict(list)
        self.age: Callable[[int, int, int], int] = lambda at, mono, run: 0
        """Of a row's (at, mono, run) the ms that have passed, as the gateway itself knows it."""
        self._expiring: list[Row] = []
        self._oldest: dict[int, int] = {}
        """Seq of what expires -> the greatest age (ms) at which it was ever known to be. A power cut of unknown length makes it
        younger again, and by then it may have been dropped with good reason."""
        self.reasons: Counter[int] = Counter()
        self.excused: Counter[str] = Counter()
        """Why a message that a session wanted never arrived."""
        self._messages: dict[bytes, Message] = {}
        self._acknowledged: set[bytes] = set()
        self._readers: dict[str, Reader] = defaultdict(Reader)
        self._sessions: set[str] = set()
        self._lasting: set[str] = set()
        """Those of them that no time ends."""
        self._online: dict[str, bool] = {}
        self._presence_from: int | None = None
        """Since this seq every connection and every end of one is in the log."""
        self._cleared: dict[str, int] = {}
        self._moment = 0
        self._rules: list[Wants] = []

    def rules(self, wants: Wants, next_seq: int) -> None:
        """The gateway goes by these rules from `next_seq` on. Who is online is known as long as they want to know it."""
        self._rules.append(wants)
        if not (wants(CONNECTED) and wants(DISCONNECTED)):
            self._online.clear()
            self._presence_from = None
        elif self._presence_from is None:
            self._presence_from = next_seq

    def wants(self, kind: int, topic: str, qos: int, retain: bool, payload: bytes) -> bool:
        """Whether the rules in force mean that such an event is kept."""
        return self._rules[-1](kind, topic, qos, retain, payload)

    # -- what became durable ---------------------------------------------------------------------------------------

    def durable(self, rows: list[Row]) -> None:
        for row in rows:
            assert not self.rows or row[0] > self.rows[-1][0], f"seq {row[0]} after {self.rows[-1][0]}"
            assert not self.rows or row[1] >= self.rows[-1][1], f"time went back at seq {row[0]}"
            self.rows.append(row)
            if row[4] == PUBLISH and row[8]:
                self._stored(row)
            elif row[4] in (CONNECTED, DISCONNECTED) and self._presence_from is not None and row[0] >= self._presence_from:
                self._presence(row[5].text, row[4] == CONNECTED, row[0])

    def _stored(self, row: Row) -> None:
        payload, sent = row[8], self._messages.get(row[8])
        assert sent is not None, f"{payload!r} is in the log and was never sent"
        if row[9]:
            self._expiring.append(row)
        assert (row[6].text, row[7] & QOS_MASK) == (sent.topic, sent.qos), f"{payload!r} was stored as {row[6].text} {row[7]}"
        copies = self.seqs[payload]
        copies.append(row[0])
        assert len(copies) <= (1 if sent.qos == 2 else sent.copies or 1), (
            f"{payload!r} is in the log {len(copies)} times and was sent {sent.copies} times"
        )

    def _presence(self, name: str, online: bool, seq: int) -> None:
        assert self._online.get(name) is not online or online, f"{name} went offline twice at seq {seq}"
        self._online[name] = online

    def cleared(self, topic: str) -> None:
        """The retained message of the topic went, with what is durable so far; a row says so only if a rule wants it."""
        self._cleared[topic] = len(self.rows)

    def note_ages(self) -> None:
        """Before the gateway's clock goes on or changes."""
        for row in self._expiring:
            self._oldest[row[0]] = max(self._oldest.get(row[0], 0), self.age(row[1], row[2], row[3]))

    # -- what devices saw ------------------------------------------------------------------------------------------

    def sent(self, payload: bytes, topic: str, qos: int, retain: bool = False, expiry: int | None = None) -> None:
        self._moment += 1
        message = self._messages.setdefault(
            payload, Message(topic, qos, retain, self._moment, max(0, len(self._rules) - 1), expiry)
        )
        message.copies += 1

    def acknowledged(self, payload: bytes) -> None:
        self._acknowledged.add(payload)
        if payload:
            assert self.seqs[payload] or not self.must_be_stored(payload), f"{payload!r} was acknowledged before it was durable"

    def must_be_stored(self, payload: bytes) -> bool:
        """Whether some consumer has wanted it ever since it was sent."""
        message = self._messages[payload]
        if all(wants(PUBLISH, message.topic, message.qos, message.retain, payload) for wants in self._rules[message.rules :]):
            return True
        return any(
            moment < message.moment and QOS_OF[text] and matches(text, message.topic)
            for name in self._lasting
            for text, (_, moment) in self._readers[name].since.items()
        )

    def connected(self, name: str, persistent: bool, present: bool, may_have_expired: bool, expires: bool) -> None:
        assert present or name not in self._sessions or may_have_expired, f"{name}: its session is lost"
        assert persistent or not present, f"{name}: began anew and found a session"
        if not present:
            self.forget(name)
        if persistent:
            self._sessions.add(name)
        if persistent and not expires:
            self._lasting.add(name)

    def told(self, name: str, reason: int) -> None:
        self.reasons[reason] += 1

    def subscribed(self, name: str, text: str, next_seq: int) -> None:
        self._moment += 1
        self._readers[name].since.setdefault(text, (next_seq, self._moment))

    def unsubscribed(self, name: str, text: str) -> None:
        self._readers[name].since.pop(text, None)

    def forget(self, name: str) -> None:
        """Its session has ended."""
        self._readers.pop(name, None)
        self._sessions.discard(name)

    def repeated(self, name: str, payload: bytes, dup: bool) -> None:
        assert dup, f"{name}: {payload!r} sent again without DUP"

    def received(self, name: str, topic: str, payload: bytes, qos: int, dup: bool, retained: bool, left: int | None) -> None:
        if not payload:
            return
        sent = self._messages[payload]
        assert topic == sent.topic, f"{name} got {payload!r} under {topic}"
        self._check_expiry(name, payload, sent.expiry, left, dup)
        if qos:
            assert payload in self.seqs, f"{name} saw {payload!r}, which is not durable"
            assert sent.qos >= qos, f"{name} got {payload!r} with QoS {qos}"
        reader = self._readers[name]
        if retained:
            return
        reader.seen.add(payload)
        if not qos:
            return
        assert payload not in reader.complete, f"{name} got {payload!r} again after QoS 2"
        if qos == 2:
            reader.complete.add(payload)
        if dup:
            return
        reader.fresh[payload, qos] += 1
        copies = self.seqs[payload]
        assert reader.fresh[payload, qos] <= len(copies), f"{name} got {payload!r} again without DUP"
        later = [seq for seq in copies if seq > reader.last[qos]]
        if not later and sent.expiry is not None and self.times_change:
            return  # it had expired when its turn came, and by what is known of the time now it has not
        assert later, f"{name} got {payload!r} (seq {copies}) after seq {reader.last[qos]}"
        reader.last[qos] = later[0]

    def _check_expiry(self, name: str, payload: bytes, expiry: int | None, left: int | None, dup: bool) -> None:
        if left is not None:
            assert expiry is not None and left <= expiry, f"{name}: {payload!r} expires in {left} s, was sent with {expiry}"
            assert left or dup, f"{name} got {payload!r} when it had expired"

    # -- the end ---------------------------------------------------------------------------------------------------

    def check(self, limited: dict[str, bool], online: set[str]) -> None:
        """Everything has come to rest: nothing may be missing. `limited`: persistent devices, and whether they take no large
        packets."""
        self.note_ages()
        for payload in self._acknowledged:
            assert not payload or self.seqs[payload] or not self.must_be_stored(payload), f"{payload!r} is not in the log"
        for name, is_limited in limited.items():
            self._check_reader(name, self._readers[name], is_limited)
        found = {name for name, is_online in self._online.items() if is_online}
        known = set(self._online)
        assert found == online & known, f"online are {sorted(found)}, should be {sorted(online & known)}"

    def _check_reader(self, name: str, reader: Reader, limited: bool) -> None:
        """Wanted = delivered + expired + too large."""
        for row in self.rows:
            if row[4] != PUBLISH or not row[8] or not row[7] & QOS_MASK:
                continue
            due = [text for text, (since, _) in reader.since.items() if row[0] >= since and matches(text, row[6].text)]
            if not any(QOS_OF[text] for text in due):
                continue
            if limited and len(row[8]) >= LARGE:
                assert row[8] not in reader.seen, f"{name} got {len(row[8])} bytes, more than it takes"
                self.excused["too large"] += 1
            elif row[8] not in reader.seen:
                expiry = self._messages[row[8]].expiry
                assert expiry is not None and self._oldest[row[0]] >= expiry * 1000, (
                    f"{name} never got {row[8]!r} (seq {row[0]}), due for {due}"
                )
                self.excused["expired"] += 1

    def retained(self) -> dict[str, bytes]:
        """Topic -> its retained message."""
        found: dict[str, bytes] = {}
        for number, row in enumerate(self.rows):
            if row[4] == PUBLISH and row[7] & RETAIN:
                found[row[6].text] = row[8] if number >= self._cleared.get(row[6].text, 0) else b""
        return {topic: payload for topic, payload in found.items() if payload}
