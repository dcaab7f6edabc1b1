"""What must be true of the simulated gateway, written down without looking at how it works.

It sees what devices saw and what each commit held, and says at once when something cannot be, and at the end what is missing.

Invariant: it knows nothing of the broker but rows that became durable and packets that arrived.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tidegate.store.entry import CONNECTED, DISCONNECTED, PUBLISH, QOS_MASK, RETAIN
from tidegate.store.log import Row
from tidegate.store.topic import matches

QOS_OF = {"#": 2, "a/+": 1, "+/x": 2, "b/#": 0, "c": 1, "a/x": 0}


@dataclass
class Reader:
    """What one persistent device has subscribed to and got."""

    since: dict[str, int] = field(default_factory=dict)
    """Filter -> next seq when its SUBACK arrived."""
    fresh: Counter[tuple[bytes, int]] = field(default_factory=Counter)
    """(payload, QoS) -> copies without DUP and retain flag; one subscription more may make a copy's QoS another."""
    seen: set[bytes] = field(default_factory=set)
    complete: set[bytes] = field(default_factory=set)
    """Payloads got with QoS 2."""
    last: Counter[int] = field(default_factory=Counter)
    """QoS -> seq of the last fresh copy; the standard promises order within a QoS (4.6)."""


class Model:
    """See the module. Payloads are unique; that of a QoS names it ("d1-17-q2")."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.seqs: dict[bytes, list[int]] = defaultdict(list)
        self._sent: Counter[bytes] = Counter()
        self._acknowledged: set[bytes] = set()
        self._readers: dict[str, Reader] = defaultdict(Reader)
        self._sessions: set[str] = set()
        self._online: dict[str, bool] = {}
        self.reasons: Counter[int] = Counter()

    # -- what became durable ---------------------------------------------------------------------------------------

    def durable(self, rows: list[Row]) -> None:
        for row in rows:
            assert not self.rows or row[0] > self.rows[-1][0], f"seq {row[0]} after {self.rows[-1][0]}"
            assert not self.rows or row[1] >= self.rows[-1][1], f"time went back at seq {row[0]}"
            self.rows.append(row)
            if row[4] == PUBLISH and row[8]:
                self.seqs[row[8]].append(row[0])
                assert len(self.seqs[row[8]]) <= (1 if row[8].endswith(b"-q2") else self._sent[row[8]] or 1), (
                    f"{row[8]!r} is in the log {len(self.seqs[row[8]])} times and was sent {self._sent[row[8]]} times"
                )
            elif row[4] in (CONNECTED, DISCONNECTED):
                self._presence(row[5].text, row[4] == CONNECTED, row[0])

    def _presence(self, name: str, online: bool, seq: int) -> None:
        assert self._online.get(name) is not online or online, f"{name} went offline twice at seq {seq}"
        self._online[name] = online

    # -- what devices saw ------------------------------------------------------------------------------------------

    def sent(self, payload: bytes, name: str) -> None:
        self._sent[payload] += 1

    def acknowledged(self, payload: bytes, qos: int) -> None:
        assert not payload or self.seqs[payload], f"{payload!r} was acknowledged before it was durable"
        self._acknowledged.add(payload)

    def connected(self, name: str, persistent: bool, present: bool) -> None:
        assert present or name not in self._sessions, f"{name}: its session is lost"
        assert persistent or not present, f"{name}: began anew and found a session"
        if persistent:
            self._sessions.add(name)

    def told(self, name: str, reason: int) -> None:
        self.reasons[reason] += 1

    def subscribed(self, name: str, text: str, next_seq: int) -> None:
        self._readers[name].since.setdefault(text, next_seq)

    def unsubscribed(self, name: str, text: str) -> None:
        self._readers[name].since.pop(text, None)

    def forget(self, name: str) -> None:
        """Its session has ended."""
        self._readers.pop(name, None)

    def repeated(self, name: str, payload: bytes, dup: bool) -> None:
        assert dup, f"{name}: {payload!r} sent again without DUP"

    def received(self, name: str, topic: str, payload: bytes, qos: int, dup: bool, retained: bool) -> None:
        if not payload:
            return
        if qos:
            assert payload in self.seqs, f"{name} saw {payload!r}, which is not durable"
            assert payload[-1] - 48 >= qos, f"{name} got {payload!r} with QoS {qos}"
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
        assert later, f"{name} got {payload!r} (seq {copies}) after seq {reader.last[qos]}"
        reader.last[qos] = later[0]

    # -- the end ---------------------------------------------------------------------------------------------------

    def check(self, persistent: set[str], online: set[str]) -> None:
        """Everything has come to rest: nothing may be missing."""
        for payload in self._acknowledged:
            assert not payload or self.seqs[payload], f"{payload!r} was acknowledged and is not in the log"
        for name in persistent:
            self._check_reader(name, self._readers[name])
        found = {name for name, is_online in self._online.items() if is_online}
        assert found == online, f"online are {sorted(found)}, should be {sorted(online)}"

    def _check_reader(self, name: str, reader: Reader) -> None:
        for row in self.rows:
            if row[4] != PUBLISH or not row[8] or not row[7] & QOS_MASK:
                continue
            due = [text for text, since in reader.since.items() if row[0] >= since and matches(text, row[6].text)]
            if any(QOS_OF[text] for text in due):
                assert row[8] in reader.seen, f"{name} never got {row[8]!r} (seq {row[0]}), due for {due}"

    def retained(self) -> dict[str, bytes]:
        """Topic -> its retained message."""
        found: dict[str, bytes] = {}
        for row in self.rows:
            if row[4] == PUBLISH and row[7] & RETAIN:
                found[row[6].text] = row[8]
        return {topic: payload for topic, payload in found.items() if payload}
