"""Clients under faults: senders and receivers that behave as the standard asks when their broker dies.

Rules: a sender keeps what is unanswered and sends it again, with DUP, on the next connection (4.4); a
receiver keeps the packet ids of its open QoS 2 exchanges. Both note everything that happened; what a test
may demand is in `check`.

Invariant: `Sender.acknowledged` holds exactly the messages for which a PUBACK or PUBREC was read.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tests.support.client import Closed, Kind, MqttClient, Packet

FOR_EVER = {17: 0xFFFFFFFF}
"""Session expiry interval of MQTT 5.0."""
PACKET_ID_NOT_FOUND = 0x92


class Peer:
    """One client with a persistent session; `client` is its connection, None while it has none."""

    def __init__(self, name: str, version: int) -> None:
        self.name = name
        self.client: MqttClient | None = None
        self._version = version

    def connect(self, port: int) -> None:
        """Connect and take the session up again."""
        properties = FOR_EVER if self._version == 5 else None
        self.client = MqttClient(port, self.name, version=self._version, clean=False, properties=properties)
        self.resume(self.client)

    def resume(self, client: MqttClient) -> None:
        """What the standard asks for on a new connection."""
        raise NotImplementedError

    def handle(self, client: MqttClient, packet: Packet) -> None:
        """Note a packet and answer it."""
        raise NotImplementedError

    def turn(self) -> None:
        """Do what there is to do."""
        self.listen()

    def listen(self) -> None:
        """Handle what has arrived, and start nothing new."""
        assert self.client is not None
        for packet in self.client.available():
            self.handle(self.client, packet)

    def lose(self) -> None:
        """The broker is dead: take in what it still said, and let go of the connection."""
        client, self.client = self.client, None
        if client is None:
            return
        try:
            while True:
                select.select([client.sock], (), (), 5)
                for packet in client.available():
                    if packet.kind is not Kind.DISCONNECT:  # a stop says good-bye
                        self.note(packet)
        except (Closed, ConnectionError):
            client.sock.close()

    def note(self, packet: Packet) -> None:
        """Note a packet that can no longer be answered."""


class Sender(Peer):
    """Publishes "name:number" for ever, at most `window` unanswered."""

    retain = False

    def __init__(self, name: str, topic: str, qos: int, version: int = 4, window: int = 50) -> None:
        super().__init__(name, version)
        self.topic = topic
        self.qos = qos
        self.sent = 0
        self.acknowledged: set[int] = set()
        self.resent: Counter[int] = Counter()
        self.sending = True
        self._window = window
        self._unanswered: dict[int, int] = {}
        """Packet id → number, in order of sending."""
        self._released: list[int] = []
        """Packet ids whose PUBREL is unanswered (QoS 2)."""

    def resume(self, client: MqttClient) -> None:
        for packet_id in self._released:
            client.answer(Kind.PUBREL, packet_id)
        for packet_id, number in self._unanswered.items():
            self.resent[number] += 1
            self._publish(client, number, packet_id, dup=True)

    def turn(self) -> None:
        self.listen()
        assert self.client is not None
        while self.sending and self.may_start():
            packet_id = self.sent % 65535 + 1
            self._unanswered[packet_id] = self.sent
            self.sent += 1
            self._publish(self.client, self.sent - 1, packet_id)

    def may_start(self) -> bool:
        """Whether the next message goes out now."""
        return len(self._unanswered) + len(self._released) < self._window

    def handle(self, client: MqttClient, packet: Packet) -> None:
        self.note(packet)
        if packet.kind is Kind.PUBREC:
            client.answer(Kind.PUBREL, packet.packet_id)

    def note(self, packet: Packet) -> None:
        gone = packet.kind is Kind.PUBCOMP and packet.reason == PACKET_ID_NOT_FOUND  # a PUBREL sent again (4.3.3)
        assert packet.reason < 0x80 or gone, f"{self.name}: {packet}"
        if packet.kind is Kind.PUBCOMP:
            self._released.remove(packet.packet_id)
            return
        assert packet.kind is (Kind.PUBACK if self.qos == 1 else Kind.PUBREC), f"{self.name}: {packet}"
        number = self._unanswered.pop(packet.packet_id, None)
        if number is None:
            # the answer to a PUBLISH and to its resend may both arrive
            assert packet.packet_id in self._released, f"{self.name}: nothing to acknowledge: {packet}"
            return
        self.acknowledged.add(number)
        if self.qos == 2:
            self._released.append(packet.packet_id)

    def settled(self) -> bool:
        """Nothing is unanswered."""
        return not self._unanswered and not self._released

    def payload(self, number: int) -> bytes:
        """The payload of this message."""
        return b"%s:%d" % (self.name.encode(), number)

    def topic_of(self, number: int) -> str:
        """The topic of this message."""
        return self.topic

    def _publish(self, client: MqttClient, number: int, packet_id: int, dup: bool = False) -> None:
        topic, payload = self.topic_of(number), self.payload(number)
        client.publish(topic, payload, self.qos, retain=self.retain, dup=dup, packet_id=packet_id)


class SteadySender(Sender):
    """A sender that keeps to a rate (messages a second) instead of filling its window."""

    rate = 5.0
    _due = 0.0

    def hurry(self, seconds: float) -> None:
        """The next turn sends what so many seconds were for."""
        self._due -= seconds

    def may_start(self) -> bool:
        now = time.monotonic()
        if now < self._due or not super().may_start():
            return False
        self._due = max(self._due, now - 2.0) + 1 / self.rate
        return True


class Receiver(Peer):
    """Subscribes once and notes every message. `twice` are deliveries marked DUP by the broker."""

    def __init__(self, name: str, topic_filter: str, qos: int, version: int = 4) -> None:
        super().__init__(name, version)
        self.qos = qos
        self.messages: list[bytes] = []
        self.marked: Counter[bytes] = Counter()
        self._filter = topic_filter
        self._subscribed = False
        self._open: set[int] = set()

    def resume(self, client: MqttClient) -> None:
        if self._subscribed:
            assert client.connack.session_present, f"{self.name}: the session is gone"
            return
        assert client.subscribe((self._filter, self.qos)) == (self.qos,)
        self._subscribed = True

    def handle(self, client: MqttClient, packet: Packet) -> None:
        self.note(packet)
        if packet.kind is Kind.PUBREL:
            client.answer(Kind.PUBCOMP, packet.packet_id)
        else:
            client.answer(Kind.PUBACK if packet.qos == 1 else Kind.PUBREC, packet.packet_id)

    def note(self, packet: Packet) -> None:
        if packet.kind is Kind.PUBREL:
            self._open.discard(packet.packet_id)
            return
        assert packet.kind is Kind.PUBLISH and packet.qos > 0, f"{self.name}: {packet}"
        if packet.qos == 2:
            if packet.packet_id in self._open:
                return
            self._open.add(packet.packet_id)
        self.messages.append(packet.payload)
        self.marked[packet.payload] += packet.dup

    def has_all(self, senders: Iterable[Sender]) -> bool:
        """Everything that was acknowledged to these senders has arrived."""
        seen = set(self.messages)
        return all(sender.payload(number) in seen for sender in senders for number in sender.acknowledged)


def run(peers: Sequence[Peer], until: Callable[[], bool], deadline: float = 30.0) -> None:
    """Let everyone do their work until `until()`; AssertionError after `deadline` seconds."""
    clients = {peer.client.sock: peer for peer in peers if peer.client is not None}
    for peer in clients.values():
        peer.turn()
    end = time.monotonic() + deadline
    while not until():
        assert time.monotonic() < end, f"not done after {deadline} s: {describe(peers)}"
        for sock in select.select(clients, (), (), 0.01)[0]:
            clients[sock].turn()


def run_for(peers: Sequence[Peer], seconds: float) -> None:
    """Let everyone do their work for so long."""
    end = time.monotonic() + seconds
    run(peers, lambda: time.monotonic() >= end)


def settle(senders: Sequence[Sender], receivers: Sequence[Receiver]) -> None:
    """Send nothing new, and wait until all is acknowledged and received."""
    for sender in senders:
        sender.sending = False
    run([*senders, *receivers], lambda: all(sender.settled() for sender in senders))
    run([*senders, *receivers], lambda: all(receiver.has_all(senders) for receiver in receivers))


def check(senders: Sequence[Sender], receivers: Sequence[Receiver]) -> None:
    """Nothing missing, QoS 2 once, first copies in order, extra copies only of resends."""
    for receiver in receivers:
        copies = Counter(receiver.messages)
        for sender in senders:
            numbers = [number for number in range(sender.sent) if sender.payload(number) in copies]
            missing = sender.acknowledged.difference(numbers)
            assert not missing, f"{receiver.name}: acknowledged and missing: {sorted(missing)[:10]}"
            _check_copies(sender, receiver, copies)
            _check_order(sender, receiver)


def _check_copies(sender: Sender, receiver: Receiver, copies: Counter[bytes]) -> None:
    for number in range(sender.sent):
        payload = sender.payload(number)
        allowed = 1
        if sender.qos == 1:
            allowed += sender.resent[number]
        if min(sender.qos, receiver.qos) == 1:
            allowed += receiver.marked[payload]
        assert copies[payload] <= allowed, f"{receiver.name}: {copies[payload]} copies of {payload!r}"


def _check_order(sender: Sender, receiver: Receiver) -> None:
    prefix = sender.name.encode() + b":"
    first = dict.fromkeys(payload for payload in receiver.messages if payload.startswith(prefix))
    numbers = [int(payload.rpartition(b":")[2]) for payload in first]
    assert numbers == sorted(numbers), f"{receiver.name}: messages of {sender.name} out of order"


def describe(peers: Iterable[Peer]) -> str:
    """Where everyone is, for a failure."""
    texts = []
    for peer in peers:
        if isinstance(peer, Sender):
            texts.append(f"{peer.name}: sent {peer.sent}, acknowledged {len(peer.acknowledged)}")
        elif isinstance(peer, Receiver):
            texts.append(f"{peer.name}: {len(peer.messages)} messages")
    return "; ".join(texts)
