"""Bounds of one session that stays away: what waits for it above them is given up, the oldest first.

What waits in the log is counted by the reader's thread, a stretch of the log at a time, each stretch once; so a session costs
nothing while it is connected, and what was published since the last look while it is away. First goes what was sent and never
acknowledged, it is the oldest. Giving up moves the session's cursor, so that it holds nothing in the log any more.

Invariant: one question is under way at a time, and its answer counts only for a session that is where it was asked about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidegate.store.catchup import Counted
from tidegate.store.report import WARNING

from .session import NEVER, RELEASED, SENT, Session
from .sessions import forget_kept

if TYPE_CHECKING:
    from .broker import Broker
    from .connecting import Limits

AT_ONCE = 100
"""Questions in one second."""
ALL = 1 << 62


class Waiting:
    """What waits in the log for a session, as far as it was counted: through seq `through`."""

    __slots__ = ("bytes", "messages", "through")

    def __init__(self, through: int) -> None:
        self.through = through
        self.messages = 0
        self.bytes = 0


class Absence:
    """`tick` each second."""

    def __init__(self, broker: Broker, limits: Limits) -> None:
        self._broker = broker
        self._messages = limits.max_waiting_messages or ALL
        self._bytes = limits.max_waiting_bytes or ALL
        self._age = limits.max_waiting_age
        self._counts = bool(limits.max_waiting_messages or limits.max_waiting_bytes)
        self._asked = False
        self._left = 0
        self._old = 0
        """Everything through this seq is too old."""
        self._due: list[Session] = []

    def tick(self) -> None:
        """Look at the sessions that are away."""
        self._left = AT_ONCE
        if self._asked or not (self._counts or self._age != NEVER):
            return
        self._asked = True
        if self._age == NEVER:
            self._go_on()
        else:
            clock, born_before = self._broker.log.clock, self._broker.log.mono - self._age * 1000
            self._broker.read(
                lambda reader: reader.last_before(lambda *born: clock.born(*born) < born_before), self._have_cutoff
            )

    def _have_cutoff(self, old: Any) -> None:
        self._old = old if isinstance(old, int) else self._old
        self._go_on()

    def _go_on(self) -> None:
        """Ask the next question, if there is one."""
        while self._left:
            if not self._due:
                self._due = [session for session in self._broker.sessions if session.client is None]
                self._left = min(self._left, len(self._due))
            if not self._due:
                break
            if self._look(self._due.pop()):
                self._left -= 1
                return
            self._left -= 1
        self._asked = False
        self._broker.turn_over()

    def _look(self, session: Session) -> bool:
        """Whether there was something to ask about this session."""
        if session.client is not None or not session.persistent:
            return False
        live, first = self._broker.delivery.live, session.next_seq
        filters = [text for text, subscription in session.subscriptions.items() if subscription.qos]
        old = min(self._old, live)
        if first <= old or self._oldest_sent(session) <= old:
            self._ask(session, first, old, filters, (ALL, ALL), "max_waiting_age")
            return True
        if not self._counts:
            return False
        waiting: Waiting = session.waiting or Waiting(first - 1)
        session.waiting = waiting
        sent = len(_sent(session))
        more, larger = waiting.messages + sent - self._messages, waiting.bytes - self._bytes
        if more > 0 or larger > 0:
            reason = "max_waiting_messages" if more > 0 else "max_waiting_bytes"
            self._ask(session, first, waiting.through, filters, (max(0, more - sent), max(0, larger)), reason, more)
            return True
        through = waiting.through
        if through < live and filters:
            self._broker.read(
                lambda reader: reader.count(waiting.through + 1, live, filters, client=session.name.id),
                lambda got: self._counted(session, waiting, got),
            )
            return True
        return False

    def _oldest_sent(self, session: Session) -> int:
        return min([seq for seq, _ in (*_sent(session), *_sent_qos2(session))], default=ALL)

    def _counted(self, session: Session, waiting: Waiting, got: Any) -> None:
        if isinstance(got, Counted) and session.waiting is waiting:
            waiting.through = got.through
            waiting.messages += got.messages
            waiting.bytes += got.bytes
            self._due.append(session)
        self._go_on()

    def _ask(
        self, session: Session, first: int, last: int, filters: list[str], excess: tuple[int, int], reason: str, sent: int = 0
    ) -> None:
        """Find out how far its cursor has to move, and what that gives up."""

        def answer(got: Any) -> None:
            if isinstance(got, Counted) and session.client is None and session.next_seq == first:
                self._give_up(session, got, reason, sent)
            self._go_on()

        if excess == (0, 0):
            answer(Counted(0, 0, 0))
        elif first > last:
            answer(Counted(0, 0, last))
        else:
            self._broker.read(lambda reader: reader.count(first, last, filters, *excess, session.name.id), answer)

    def _give_up(self, session: Session, got: Counted, reason: str, sent: int) -> None:
        """Everything through `got.through`, of what was sent at least the `sent` oldest."""
        oldest = sorted(_sent(session))
        given_up = [packet_id for number, (seq, packet_id) in enumerate(oldest) if seq <= got.through or number < sent]
        if got.through >= session.next_seq:
            session.next_seq = got.through + 1
            session.handled = {seq: None for seq in session.handled if seq > got.through}
            if session.waiting is not None:
                session.waiting.messages = max(0, session.waiting.messages - got.messages)
                session.waiting.bytes = max(0, session.waiting.bytes - got.bytes)
                session.waiting.through = max(session.waiting.through, got.through)
            given_up = [packet_id for _, packet_id in oldest]
        session.taken += got.messages
        count = got.messages + len(given_up)
        session.drop(reason, count)
        count += self._release(session, got.through)
        for packet_id in given_up:
            seq = session.inflight.pop(packet_id)
            if session.progress is not None:
                session.progress.give_up(seq, fetched=False)
        forget_kept(self._broker.log, session, given_up)
        self._broker.sessions.moved_asleep(session)
        if count:
            self._broker.delivery.dropped[reason] += count
            name, text = session.name.text, "a session that stays away has lost its oldest messages"
            self._broker.report("session_cut", text, WARNING, f"{reason} {name}", client=name, count=count, reason=reason)

    def _release(self, session: Session, through: int) -> int:
        """QoS 2: the client may have it, and holds its packet id until it is released (4.3.3)."""
        sent = [(seq, packet_id) for seq, packet_id in _sent_qos2(session) if seq <= through]
        for seq, packet_id in sent:
            session.releasing[packet_id] = (seq, RELEASED)
            if session.progress is not None:
                session.progress.give_up(seq, fetched=False)
            self._broker.sessions.set_delivery(session, seq, packet_id, RELEASED)
        return len(sent)


def _sent(session: Session) -> list[tuple[int, int]]:
    """(seq, packet id) of QoS 1 messages that it has not acknowledged. Not of what it fetches, which is old anyway."""
    fetched = session.progress.fetched if session.progress is not None else ()
    return [(seq, packet_id) for packet_id, seq in session.inflight.items() if seq not in fetched]


def _sent_qos2(session: Session) -> list[tuple[int, int]]:
    """The same of QoS 2."""
    fetched = session.progress.fetched if session.progress is not None else ()
    return [(seq, pid) for pid, (seq, state) in session.releasing.items() if state == SENT and seq not in fetched]
